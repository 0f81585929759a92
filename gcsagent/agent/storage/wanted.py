"""What storage.mount was asked for, checked as far as that goes without looking at any device."""

from __future__ import annotations

import os

from gcsagent.agent.storage import paths
from protocol.dataclass import replace
from protocol.errors import Code, RpcError
from protocol.families.storage import Device, Format, FsType, MountKind, MountStorage
from protocol.limits import MAX_LAYERS

READ_ONLY_TYPES = (FsType.EROFS, FsType.SQUASHFS)

_FIELDS: dict[MountKind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    MountKind.BLOCK: (("device",), ("target", "fstype", "format", "verity", "options", "read_only")),
    MountKind.VIRTIOFS: (("tag",), ("target", "options", "read_only")),
    MountKind.TMPFS: ((), ("target", "size_bytes", "options", "read_only")),
    MountKind.BIND: (("path",), ("target", "read_only")),
    MountKind.OVERLAY: (("lower",), ("target", "upper", "work", "options", "read_only")),
    MountKind.SWAP: (("device",), ("format",)),
}
"""What each kind must have, and what it may have."""

_OWN_FIELDS = sorted({name for must, may in _FIELDS.values() for name in (*must, *may)})

_RESERVED = frozenset(
    {
        "ro",
        "rw",
        "bind",
        "rbind",
        "move",
        "remount",
        "loop",
        "size",
        "lowerdir",
        "upperdir",
        "workdir",
        "private",
        "rprivate",
        "shared",
        "rshared",
        "slave",
        "rslave",
        "unbindable",
        "runbindable",
        "user",
        "users",
        "noauto",
        "auto",
        "fail",
        "nofail",
        "_netdev",
    }
)
"""Options that fields of the request stand for, or that are for mount(8) and not for a file system."""


def settle(params: MountStorage, mounts: str, state: str) -> MountStorage:
    """The request with its target filled in. Raises INVALID_ARGUMENT.

    ``mounts`` is where mounts go that name no target, ``state`` the agent's state directory.
    """
    _check_fields(params)
    for option in params.options:
        if option.partition("=")[0] in _RESERVED:
            raise _wrong("options", f"{option!r} is no option of a file system; use the request's fields")
    for field, device in (
        ("device", params.device),
        ("verity.hash_device", params.verity.hash_device if params.verity else None),
    ):
        if device is not None:
            _check_device(device, field)
    _check_format(params)
    _check_layers(params)
    if params.kind is MountKind.SWAP:
        return params
    target = params.target or os.path.join(mounts, params.mount)
    paths.check_target(target, state, mounts)
    return replace(params, target=target)


def _check_fields(params: MountStorage) -> None:
    must, may = _FIELDS[params.kind]
    default = MountStorage(params.mount, params.kind)
    for name in _OWN_FIELDS:
        given = getattr(params, name) != getattr(default, name)
        if name in must and not given:
            raise _wrong(name, f"is missing: a mount of kind {params.kind.value} needs it")
        if given and name not in (*must, *may):
            raise _wrong(name, f"is not for a mount of kind {params.kind.value}")


def _check_device(device: Device, field: str) -> None:
    given = [name for name in ("serial", "pci", "virtio", "path") if getattr(device, name) is not None]
    if len(given) != 1:
        raise _wrong(field, f"give exactly one of serial, pci, virtio and path, not {len(given)}")
    if device.path is not None and not device.path.startswith("/dev/"):
        raise _wrong(field, f"{device.path} is not in /dev")


def _check_format(params: MountStorage) -> None:
    if params.format is Format.NEVER:
        return
    if params.fstype in READ_ONLY_TYPES:
        raise _wrong("format", f"{params.fstype} file systems are made on the host")
    if params.verity is not None:
        raise _wrong("format", "what dm-verity protects has been written already")
    if params.read_only:
        raise _wrong("format", "a device that is to be read only is not formatted")


def _check_layers(params: MountStorage) -> None:
    if len(params.lower) > MAX_LAYERS:
        raise _wrong("lower", f"has {len(params.lower)} layers; at most {MAX_LAYERS}")
    if len(set(params.lower)) < len(params.lower):
        raise _wrong("lower", "names a layer twice")
    if (params.upper is None) != (params.work is None):
        raise _wrong("work" if params.work is None else "upper", "is missing: upper and work go together")
    for path in (*params.lower, params.upper or "", params.work or ""):
        if any(character in path for character in ",:\\"):
            raise _wrong("lower", f"{path!r} has a comma, colon or backslash, which overlay cannot take")


def _wrong(field: str, problem: str) -> RpcError:
    return RpcError(Code.INVALID_ARGUMENT, f"{field}: {problem}", field=field)

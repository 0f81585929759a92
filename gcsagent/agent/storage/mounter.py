"""Makes one mount, and takes it back: each step can be repeated, and is found by looking at the kernel.

Undoing looks at what there is instead of remembering what was done. The same undoing therefore serves a
request that failed, one that was cancelled, and one whose agent was killed.
"""

from __future__ import annotations

import glob
import os

from gcsagent.agent import mountinfo
from gcsagent.agent.storage import paths, superblock, tags
from gcsagent.agent.storage.devices import arrived
from gcsagent.agent.storage.superblock import BadSuperblock, VeritySuperblock
from gcsagent.agent.storage.table import Entry, Table, device_number
from gcsagent.agent.storage.tools import Tools
from gcsagent.agent.storage.wanted import READ_ONLY_TYPES
from protocol.dataclass import dataclass
from protocol.errors import Code, RpcError
from protocol.families.storage import Format, FsType, MountKind, MountStatus

UNDO_SECONDS = 30.0

_MKFS = {FsType.EXT4: ["mkfs.ext4", "-q", "-F"], FsType.XFS: ["mkfs.xfs", "-q", "-f"]}
_OPTIONS_PAGE = 4000
"""Bytes of options the kernel takes in mount(2), less what is added to them."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What mount(8) is told."""

    fstype: str
    source: str
    options: tuple[str, ...] = ()
    fd: int = -1
    """The source as a descriptor, for a bind mount."""


class Mounter:
    def __init__(self, table: Table, tools: Tools) -> None:
        self._table, self._tools = table, tools

    # -- making ---------------------------------------------------------------------------------

    async def make(self, entry: Entry, seconds: float) -> None:
        """Raises RpcError, OSError; :meth:`undo` is the caller's to call then."""
        asked = entry.asked
        if asked.kind in (MountKind.BLOCK, MountKind.SWAP):
            await self._make_device(entry, seconds)
        if asked.kind is MountKind.VIRTIOFS:
            await tags.arrived(asked.tag or "", asked.wait_ms / 1000)
        if asked.kind is MountKind.SWAP:
            await self._swap_on(entry, seconds)
        elif asked.path is not None:
            with paths.opened(asked.path, "path") as fd:
                file = not os.path.isdir(f"/proc/self/fd/{fd}")
                plan = _Plan("none", asked.path, ("bind",), fd)
                await self._mount(entry, plan, seconds, file=file)
        else:
            await self._mount(entry, self._plan(entry), seconds)

    def _plan(self, entry: Entry) -> _Plan:
        asked = entry.asked
        read_only = asked.read_only or asked.verity is not None or entry.fstype in READ_ONLY_TYPES
        flags = (*asked.options, *(("ro",) if read_only else ()))
        if asked.kind is MountKind.BLOCK:
            return _Plan(entry.fstype, entry.device, flags)
        if asked.kind is MountKind.VIRTIOFS:
            return _Plan("virtiofs", asked.tag or "", flags)
        if asked.kind is MountKind.TMPFS:
            size = () if asked.size_bytes is None else (f"size={asked.size_bytes}",)
            mode = () if any(option.startswith("mode=") for option in flags) else ("mode=0755",)
            return _Plan("tmpfs", "tmpfs", (*size, *mode, *flags))
        return _Plan("overlay", "overlay", (*_layers(entry, self._table.empty_directory()), *flags))

    async def _mount(self, entry: Entry, plan: _Plan, seconds: float, *, file: bool = False) -> None:
        target = entry.target
        entry.source, entry.fstype = plan.source, plan.fstype
        entry.before = [mount.ident for mount in mountinfo.at(target, mountinfo.read())]
        places = (("upper", entry.asked.upper), ("work", entry.asked.work), ("target", target))
        missing = [made for field, place in places if place for made in paths.missing(place, field)]
        entry.made = list(dict.fromkeys(missing))
        self._table.save(entry)
        paths.make(entry.made, "target", file=file)
        source = plan.source if plan.fd < 0 else "/proc/self/fd/4"
        kind = [] if plan.fd >= 0 else ["-t", plan.fstype]
        options = ["-o", ",".join(plan.options)] if plan.options else []
        what = f"mount {plan.source} on {target}"
        with paths.opened(target, "target") as fd:
            fds = {3: fd} if plan.fd < 0 else {3: fd, 4: plan.fd}
            argv = ["mount", *kind, *options, source, "/proc/self/fd/3"]
            await self._tools.run(entry, argv, seconds, fds=fds, what=what)
        if plan.fd >= 0 and entry.asked.read_only:
            # Binding makes a copy of the mount, flags and all; they are changed by a second call only.
            with paths.opened(target, "target") as fd:
                argv = ["mount", "-o", "remount,bind,ro", "none", "/proc/self/fd/3"]
                await self._tools.run(entry, argv, seconds, fds={3: fd}, what=what)
        ours = self._ours(entry)
        if not ours:
            raise RpcError(Code.INTERNAL, f"cannot {what}: it is not there; was {target} moved meanwhile?")
        entry.mount_id, entry.what, entry.fstype = ours[-1].ident, ours[-1].what(), ours[-1].fstype
        entry.read_only = "ro" in ours[-1].options

    async def _swap_on(self, entry: Entry, seconds: float) -> None:
        device = entry.device
        if _swaps_to(device):
            entry.device = ""  # undoing this one must not end what is another's
            raise RpcError(
                Code.FAILED_PRECONDITION, f"device: the guest swaps to {device} already", field="device"
            )
        self._table.save(entry)
        await self._tools.run(entry, ["swapon", device], seconds, what=f"swap to {device}")

    async def _its_turn(self, entry: Entry, node: str) -> None:
        """Two that find one disk empty would format it, or wipe it, from under each other's file system."""
        disk = device_number(node)
        while (other := self._table.taker_of(disk, entry)) is not None:
            if other.status is MountStatus.FAILED:
                raise RpcError(
                    Code.FAILED_PRECONDITION,
                    f"device: mount {other.ident} has half formatted {node}, and could not be undone:"
                    f" {other.problem}; unmount it first",
                    field="device",
                    mount=other.ident,
                )
            async with other.changing:
                pass  # it is through: look again
        if entry.asked.format is not Format.NEVER or entry.asked.kind is MountKind.SWAP:
            entry.disk = disk

    async def _make_device(self, entry: Entry, seconds: float) -> None:
        asked = entry.asked
        assert asked.device is not None
        node = await arrived(asked.device, asked.wait_ms / 1000)
        if asked.verity is not None:
            node = await self._make_verity(entry, node, seconds)
        await self._its_turn(entry, node)
        try:
            head = await self._tools.read(entry, node, 0, superblock.HEAD, seconds)
        except RpcError as error:
            if asked.verity is None or error.code is not Code.INTERNAL:
                raise
            why = f"verity: what {node} holds does not fit the root hash ({error.message})"
            raise RpcError(Code.FAILED_PRECONDITION, why, field="verity.root_hash") from error
        found = superblock.held(head)
        entry.device = entry.source = node
        if found == superblock.EMPTY and asked.format is Format.ON_FIRST_USE:
            await self._format(entry, node, seconds)
            found = entry.fstype
        wanted = "swap" if asked.kind is MountKind.SWAP else asked.fstype.value if asked.fstype else found
        if found != wanted or (asked.kind is MountKind.BLOCK and found not in set(FsType)):
            holds = found or "nothing but zeros"
            raise RpcError(Code.FAILED_PRECONDITION, f"{node} holds {holds}{_advice(entry, found)}")
        entry.fstype = found

    async def _format(self, entry: Entry, node: str, seconds: float) -> None:
        if entry.asked.kind is MountKind.SWAP:
            argv, entry.fstype = ["mkswap", node], "swap"
        else:
            kind = entry.asked.fstype or FsType.EXT4
            argv, entry.fstype = [*_MKFS[kind], node], kind.value
        entry.formatting = node
        self._table.save(entry)
        await self._tools.run(entry, argv, seconds, what=f"format {node}")
        entry.formatting, entry.formatted = "", True
        self._table.save(entry)

    async def _make_verity(self, entry: Entry, data: str, seconds: float) -> str:
        verity = entry.asked.verity
        assert verity is not None
        hashes = data
        if verity.hash_device is not None:
            wait = entry.asked.wait_ms / 1000
            hashes = await arrived(verity.hash_device, wait, "verity.hash_device")
        head = await self._tools.read(entry, hashes, verity.hash_offset, 512, seconds)
        try:
            table = VeritySuperblock.parse(head).table(data, hashes, verity.hash_offset, verity.root_hash)
        except BadSuperblock as error:
            where = f"{hashes} at byte {verity.hash_offset}"
            raise RpcError(
                Code.FAILED_PRECONDITION, f"verity: {where}: {error}; format it with veritysetup"
            ) from error
        what = f"set dm-verity up on {data}"
        await self._tools.run(entry, ["modprobe", "-a", "dm-mod", "dm-verity"], seconds, what=what)
        argv = ["dmsetup", "create", entry.mapping, "--readonly", "--noudevsync", "--noudevrules"]
        await self._tools.run(entry, [*argv, "--table", table], seconds, what=what)
        node = _mapped(entry.mapping)
        if node is None:
            raise RpcError(Code.INTERNAL, f"cannot {what}: dmsetup has made no device of it")
        return node

    # -- taking back ----------------------------------------------------------------------------

    def place(self, entry: Entry) -> str:
        """Where it is mounted, which is not its target when that has been moved; "" when it is not."""
        ours = self._ours(entry)
        return ours[-1].point if ours else ""

    async def undo(self, entry: Entry, seconds: float = UNDO_SECONDS) -> None:
        """Leaves nothing of it but its file in the table. Raises RpcError when something resists."""
        if entry.asked.kind is MountKind.SWAP:
            if entry.device and _swaps_to(entry.device):
                argv = ["swapoff", entry.device]
                await self._tools.run(entry, argv, seconds, what=f"stop swapping to {entry.device}")
        else:
            for mount in reversed(self._ours(entry)):
                await self._tools.run(entry, ["umount", mount.point], seconds, what=f"unmount {mount.point}")
        if entry.asked.verity is not None and _mapped(entry.mapping) is not None:
            argv = ["dmsetup", "remove", "--noudevsync", "--noudevrules", entry.mapping]
            await self._tools.run(entry, argv, seconds, what=f"remove {entry.mapping}")
        if entry.formatting:
            # It was empty: half a file system would neither be used nor overwritten the next time.
            argv = [
                "dd",
                "if=/dev/zero",
                f"of={entry.formatting}",
                "bs=4096",
                f"count={superblock.HEAD // 4096}",
            ]
            await self._tools.run(entry, argv, seconds, what=f"wipe {entry.formatting}")
            entry.formatting = ""
        paths.remove(entry.made)

    def _ours(self, entry: Entry) -> list[mountinfo.Mounted]:
        """What of it is mounted now: what was not there before, or the very mount, wherever it is now."""
        everything = mountinfo.read()
        if entry.mount_id:
            return [
                mount
                for mount in everything
                if mount.ident == entry.mount_id
                and entry.what in ([], mount.what())
                and entry.leaves in ("", mount.point)
            ]
        if not entry.source:
            return []  # it had not come to mounting
        return [mount for mount in mountinfo.at(entry.target, everything) if mount.ident not in entry.before]


def _layers(entry: Entry, empty: str) -> tuple[str, ...]:
    """``empty`` is an empty directory: the kernel makes no overlay of a single read-only layer."""
    asked = entry.asked
    for path in asked.lower:
        with paths.opened(path, "lower"):
            pass
    alone = len(asked.lower) == 1 and asked.upper is None
    options = [f"lowerdir={':'.join((*asked.lower, *([empty] if alone else [])))}"]
    for name, directory in (("upper", asked.upper), ("work", asked.work)):
        if directory is not None:
            options.append(f"{name}dir={directory}")
    if sum(map(len, options)) > _OPTIONS_PAGE:
        raise RpcError(
            Code.INVALID_ARGUMENT,
            f"lower: the paths of the layers take more than {_OPTIONS_PAGE} bytes, which the kernel does not"
            " take; mount them under shorter names",
            field="lower",
        )
    return tuple(options)


def _advice(entry: Entry, found: str) -> str:
    wanted = entry.asked.fstype.value if entry.asked.fstype else ""
    if found == superblock.EMPTY:
        return "; have it formatted with format: on_first_use"
    if entry.asked.kind is MountKind.SWAP:
        return ", not swap space; what holds anything is not overwritten"
    if wanted:
        return f", not {wanted}; what holds anything is not overwritten"
    return f"; this mounts {', '.join(FsType)}"


def _swaps_to(device: str) -> bool:
    """Under whichever name."""
    number = device_number(device)
    with open("/proc/swaps", encoding="utf-8", errors="replace") as file:
        return number != 0 and any(device_number(line.split()[0]) == number for line in file)


def _mapped(name: str) -> str | None:
    """The node of a device-mapper device: devtmpfs makes it by its number, names are udev's business."""
    for path in glob.glob("/sys/block/dm-*/dm/name"):
        try:
            with open(path, encoding="utf-8") as file:
                if file.read().strip() == name:
                    return f"/dev/{path.split('/')[3]}"
        except FileNotFoundError:
            continue
    return None

"""What disks and shares of a VM have in common where they are written as one word."""

from __future__ import annotations

from pathlib import Path

from gcsagent.host.vm.errors import InvalidVmConfig


def path_name_mode(text: str, what: str, form: str) -> tuple[Path, str | None, bool]:
    """`PATH[:NAME][:ro]`, taken apart; `form` is how the error about `what` says it.

    Raises:
        InvalidVmConfig: no such form.
    """
    path, *more = text.split(":")
    read_only = bool(more) and more[-1] == "ro"
    name = more[: len(more) - read_only]
    if not path or len(name) > 1:
        raise InvalidVmConfig(f"{what} {text!r}: write {form}")
    return Path(path), name[0] if name else None, read_only

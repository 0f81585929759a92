"""Where gcsctl keeps things: by the XDG base directory specification, or where root's belong."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from gcsagent.host.vm.errors import VmError


def state_dir(env: Mapping[str, str] | None = None) -> Path:
    """State that no reboot of this host survives; see `named.VmStore`."""
    return _place(env, "XDG_STATE_HOME", "/run", ".local/state")


def data_dir(env: Mapping[str, str] | None = None) -> Path:
    """What outlives the machine's run; see `snapshotdir.SnapshotStore`."""
    return _place(env, "XDG_DATA_HOME", "/var/lib", ".local/share")


def _place(env: Mapping[str, str] | None, variable: str, of_root: str, at_home: str) -> Path:
    return (xdg(variable, env) or (Path(of_root) if os.geteuid() == 0 else home() / at_home)) / "gcsctl"


def xdg(variable: str, env: Mapping[str, str] | None = None) -> Path | None:
    """The directory that a variable of the specification names; one that is relative is to be ignored."""
    given = (os.environ if env is None else env).get(variable, "")
    return Path(given) if os.path.isabs(given) else None


def home() -> Path:
    """Raises VmError: nobody knows it, as of a user id without an entry in passwd(5)."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise VmError("no home directory: set HOME") from error

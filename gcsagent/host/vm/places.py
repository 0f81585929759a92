"""Where gcsctl keeps things: by the XDG base directory specification, or where root's belong."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def state_dir(env: Mapping[str, str] | None = None) -> Path:
    """State that no reboot of this host survives; see `named.VmStore`."""
    return _place(env, "XDG_STATE_HOME", "/run", ".local/state")


def data_dir(env: Mapping[str, str] | None = None) -> Path:
    """What outlives the machine's run; see `snapshotdir.SnapshotStore`."""
    return _place(env, "XDG_DATA_HOME", "/var/lib", ".local/share")


def _place(env: Mapping[str, str] | None, variable: str, of_root: str, at_home: str) -> Path:
    given = (os.environ if env is None else env).get(variable)
    if given:
        return Path(given) / "gcsctl"
    return (Path(of_root) if os.geteuid() == 0 else Path.home() / at_home) / "gcsctl"

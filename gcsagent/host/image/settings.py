"""What an image's config makes of a container, as docker has it; what the caller says goes first.

Pure functions. Ports are not published and health is not looked after here, so those parts have no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gcsagent.host.image.documents import Config
from protocol import checks


@dataclass(frozen=True, slots=True)
class Settings:
    """``volumes`` are where the image wants its data apart from its root."""

    args: tuple[str, ...]
    env: tuple[str, ...] = ()
    workdir: str = "/"
    user: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    volumes: tuple[str, ...] = ()


def of(config: Config, args: Sequence[str], entrypoint: str | None = None) -> Settings:
    """For a container that runs ``args``, if given; ``entrypoint`` replaces the image's, empty: by none."""
    return Settings(
        args=tuple(command(config, args, entrypoint)),
        env=tuple(entry for entry in config.env if entry.partition("=")[0] and "=" in entry),
        workdir="/" + config.workdir.lstrip("/"),
        user=config.user,
        # The contract bounds labels; an image with more of them is still worth running.
        labels={} if checks.labels(dict(config.labels)) else dict(config.labels),
        volumes=tuple(path for path in config.volumes if checks.absolute_path(path) is None),
    )


def command(config: Config, args: Sequence[str], entrypoint: str | None = None) -> list[str]:
    """Arguments take the place of Cmd, another entrypoint that of Entrypoint and Cmd."""
    if entrypoint is not None:
        return [*([entrypoint] if entrypoint else []), *args]
    return [*config.entrypoint, *(args or config.command)]


def volume_mounts(volumes: Sequence[str], taken: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """Writable places for a read-only root, with what the image has there, and gone with the container."""
    return tuple(
        {
            "destination": path,
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "nodev", "mode=755", "tmpcopyup"],
        }
        for path in volumes
        if path not in taken
    )

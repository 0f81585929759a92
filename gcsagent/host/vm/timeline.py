"""When a VM's start reached what, on one clock: the host's steps and the guest's own stages.

The guest tells the uptime at which it reached a stage; a line of its console comes a little later than that,
never earlier. So the smallest difference between both clocks is the best idea of when the guest's began.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FIRMWARE = "firmware"
"""Firmware and the kernel's decompressor are through: the guest's clock begins."""

MEANINGS = {
    "parts": "image, tools and disks found",
    "vsock": "vsock device there, its daemon started",
    "qemu": "QEMU started, its monitor answers",
    FIRMWARE: "firmware done, kernel decompressed: its clock begins",
    "kernel": "kernel up, initramfs unpacked, PID 1 begins",
    "init": "settings read",
    "mounts": "file systems and cgroups mounted",
    "modules": "kernel modules loaded",
    "disks": "disks mounted",
    "network": "loopback up, host name set",
    "supervisor": "PID 1 becomes the supervisor",
    "agent": "supervisor up, agent begins",
    "loaded": "agent's code loaded",
    "ready": "agent listens",
    "restored": "memory loaded, agent answers again",
    "hello": "agent has answered the first hello",
}


@dataclass(frozen=True, slots=True)
class Moment:
    """A stage, and the seconds from the launch to it."""

    stage: str
    seconds: float


class Timeline:
    """One launch. The host's steps are marked as they are reached, the guest's stages as they are told."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._host: list[Moment] = []
        self._guest: dict[str, float] = {}
        self._offset = float("inf")

    def mark(self, step: str) -> None:
        """The host has come so far. A step reached again, by a second attempt, counts the second time."""
        self._host = [moment for moment in self._host if moment.stage != step]
        self._host.append(Moment(step, self._now()))

    def guest(self, stages: Mapping[str, float]) -> None:
        """The guest's stages so far, the latest just told, with its uptime at each in seconds."""
        if len(stages) == len(self._guest):
            return
        self._guest = dict(stages)
        self._offset = min(self._offset, self._now() - max(stages.values()))

    def again(self) -> None:
        """What is told from now on is another guest's."""
        self._guest, self._offset = {}, float("inf")

    def moments(self) -> tuple[Moment, ...]:
        """Everything so far, in order."""
        guest = [Moment(stage, self._offset + uptime) for stage, uptime in self._guest.items()]
        begins = [Moment(FIRMWARE, self._offset)] if guest else []
        return tuple(sorted((*self._host, *begins, *guest), key=lambda moment: moment.seconds))

    def _now(self) -> float:
        return time.monotonic() - self._begun


def meaning(stage: str) -> str:
    """What has been reached, for people; empty for a stage that a later agent may have."""
    return MEANINGS.get(stage, "")


def table(moments: Sequence[Moment]) -> list[str]:
    """Lines for people: when, what that took, and what it is."""
    lines, before = [], 0.0
    for moment in moments:
        took = moment.seconds - before
        about = f"{moment.stage:<10}  {meaning(moment.stage)}"
        lines.append(f"{moment.seconds:7.3f} s {took:+7.3f}  {about}".rstrip())
        before = moment.seconds
    return lines

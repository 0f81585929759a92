"""How much an image may be, and the count of it while it is unpacked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from gcsagent.host.image.errors import ImageError, TooLarge

VARIABLE = "GCS_IMAGE_MAX_BYTES"

MAX_DOCUMENT = 4 << 20
"""Bytes of an index, manifest or config: what registries take (distribution-spec, Pushing Manifests)."""

FREE_OF_RATIO = 256 << 20
"""Bytes an image may always unpack to, however small it is: a file of zeros harms nobody yet."""


@dataclass(frozen=True, slots=True)
class Limits:
    """``ratio``: how many times its compressed size an image may unpack to. gzip reaches 1,032 on zeros."""

    max_bytes: int = 32 << 30
    ratio: int = 200
    max_entries: int = 2_000_000
    max_layers: int = 512

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Limits:
        """Who allows a size in GCS_IMAGE_MAX_BYTES means it: no ratio counts then. Raises ImageError."""
        text = (os.environ if env is None else env).get(VARIABLE, "")
        if not text:
            return cls()
        if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 60):
            raise ImageError(f"{VARIABLE}={text}: give a number of bytes")
        return cls(max_bytes=int(text), ratio=1 << 60)


@dataclass(slots=True)
class Meter:
    """What has been read of one image's layers, and what came of it.

    ``unpacked`` are the bytes of the plain archives, ``files`` those of the files in them, holes included,
    which become zeros in a disk image.
    """

    limits: Limits
    packed: int = 0
    unpacked: int = 0
    files: int = 0
    entries: int = 0

    def add(self, count: int) -> None:
        """Raises TooLarge."""
        self.unpacked += count
        self._check(self.unpacked)

    def add_file(self, size: int) -> None:
        """Raises TooLarge."""
        self.files += size
        self._check(self.files)

    def _check(self, size: int) -> None:
        if size > self.limits.max_bytes:
            raise TooLarge(
                f"the image unpacks to more than {self.limits.max_bytes} bytes;"
                f" set {VARIABLE} if that is meant to be"
            )
        if size > max(FREE_OF_RATIO, self.packed * self.limits.ratio):
            raise TooLarge(
                f"the image unpacks to more than {self.limits.ratio} times its size, as bombs do;"
                f" if it is meant to be, set {VARIABLE} to how many bytes it may have"
            )

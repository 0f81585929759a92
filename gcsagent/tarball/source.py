"""The bytes of an archive as they come, as the file tarfile wants to read: forwards only, and in bounds.

tarfile reads headers into memory whole, as long as they say they are, and takes a header it cannot make
sense of for the end of the archive. Both are prevented here.
"""

from __future__ import annotations

from collections.abc import Callable

from gcsagent.tarball.errors import ArchiveError, damaged
from protocol.errors import Code

BLOCK = 512
MAX_HEADER = 4 << 20
"""Bytes of headers that one member may have: a name, a list of holes, extended attributes."""

CHUNK = 1 << 18


class Source:
    """``more`` gives the next bytes, b"" at the end; it may raise what it likes."""

    def __init__(
        self,
        more: Callable[[], bytes],
        *,
        most: int | None = None,
        leap: Callable[[int], None] | None = None,
    ) -> None:
        """``most`` is how many bytes there may be at all; ``leap`` passes over so many that would come next.

        It may raise what it likes when there are fewer.
        """
        self._more, self._most, self._leap = more, most, leap
        self._rest = memoryview(b"")
        self._position = 0
        self._budget: int | None = None
        self._last = b""
        self.received = 0

    # -- for tarfile ------------------------------------------------------------------------------

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes, fewer only at the end. Raises ArchiveError."""
        if size < 0:
            raise damaged("a size in it is below zero")
        if self._budget is not None:
            self._budget -= size
            if self._budget < 0:
                raise damaged(f"a member's headers take more than {MAX_HEADER} bytes")
        pieces = []
        while size:
            piece = self.piece(size)
            if not piece:
                break
            pieces.append(piece)
            size -= len(piece)
        self._last = b"".join(pieces)
        return self._last

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        self.skip(position - self._position)

    # -- for us -----------------------------------------------------------------------------------

    def piece(self, size: int) -> memoryview:
        """At most ``size`` bytes of what has come; none at the end."""
        if not self._rest:
            data = self._more()
            self._rest = memoryview(data)
            self.received += len(data)
            if self._most is not None and self.received > self._most:
                raise ArchiveError(
                    Code.RESOURCE_EXHAUSTED,
                    f"the archive has more than {self._most} bytes; allow more",
                    field="max_bytes",
                )
        taken, self._rest = self._rest[:size], self._rest[size:]
        self._position += len(taken)
        return taken

    def exactly(self, size: int) -> memoryview:
        """Some of the next ``size`` bytes, of which there must be one. Raises ArchiveError."""
        data = self.piece(min(size, CHUNK))
        if not data:
            raise damaged("it is cut off")
        return data

    def skip(self, size: int) -> None:
        """Raises ArchiveError, also when that would be backwards."""
        if size < 0:
            raise damaged("a size in it is below zero")
        if self._leap is not None and size > len(self._rest):
            far = size - len(self._rest)
            self._leap(far)
            self._rest = memoryview(b"")
            self._position += size
            return
        while size:
            size -= len(self.exactly(size))

    def begin_headers(self) -> None:
        """From here on tarfile reads a member's headers."""
        self._budget = MAX_HEADER

    def end_headers(self) -> None:
        self._budget = None

    def at_end_marker(self) -> bool:
        """Whether what was read last was the block of zeros that ends an archive."""
        return len(self._last) == BLOCK and not any(self._last)

    def drain(self) -> None:
        """Takes what is left: the second block of zeros, and padding."""
        while self.piece(CHUNK):
            pass

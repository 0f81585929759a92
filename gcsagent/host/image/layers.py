"""A layer's bytes: read once, decompressed, and checked on both sides of that."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import select
import shutil
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from gcsagent.host.image.errors import CannotUnpack, Damaged
from gcsagent.host.image.images import Image, Layer
from gcsagent.host.image.limits import Meter
from gcsagent.host.image.stores import Blob
from gcsagent.tarball.source import BLOCK, CHUNK

ZSTD = "zstd"
_ZSTD_WINDOW = "--memory=128MB"
"""RFC 8878 asks decoders for 8 MB; zstd's own default for long distances is 128."""
_END_SECONDS = 10.0
_SILENT_SECONDS = 60.0
"""How long the tool may take over the next byte."""


class _Packed:
    """The layer as it is in the image: counted, and hashed."""

    def __init__(self, blob: Blob, layer: Layer, meter: Meter, tick: Callable[[int], None]) -> None:
        self._blob, self._layer, self._meter, self._tick = blob, layer, meter, tick
        self._hash = hashlib.new(layer.digest.partition(":")[0]) if layer.digest else None

    def read(self, size: int = CHUNK) -> bytes:
        data = self._blob.read(min(size, CHUNK) if size >= 0 else CHUNK)
        if self._hash is not None:
            self._hash.update(data)
        self._meter.packed += len(data)
        self._tick(len(data))
        return data

    def check(self) -> None:
        while self.read():
            pass
        if self._hash is not None and self._hash.hexdigest() != self._layer.digest.partition(":")[2]:
            raise Damaged(f"layer {self._layer.digest} of the image is not what its digest says")


class Unpacked:
    """The layer as the plain tar it is. ``read`` gives the next bytes, none at its end.

    Some tools (`umoci insert` 0.4.7) leave out the last padding and the zeros that end an archive, and others
    take that for granted. That nothing is missing the digests say: the zeros are made up here.
    """

    def __init__(self, packed: _Packed, read: Callable[[int], bytes], layer: Layer, meter: Meter) -> None:
        self._packed, self._read, self._layer, self._meter = packed, read, layer, meter
        self._hash = hashlib.new(layer.diff_id.partition(":")[0])
        self._size, self._ended = 0, False

    def read(self) -> bytes:
        """Raises ImageError."""
        if self._ended:
            return b""
        try:
            data = self._read(CHUNK)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise Damaged(f"{self._layer.name}: the compressed data is damaged: {error}") from error
        self._meter.add(len(data))
        self._hash.update(data)
        self._size += len(data)
        if not data:
            self._ended = True
            return bytes(-self._size % BLOCK + 2 * BLOCK)
        return data

    def check(self) -> None:
        """To be called at its end: that it was the layer the manifest and the config mean. Raises Damaged."""
        self._packed.check()
        if self._hash.hexdigest() != self._layer.diff_id.partition(":")[2]:
            raise Damaged(
                f"{self._layer.name}: the layer is not what the image's config says ({self._layer.diff_id})"
            )


@contextmanager
def unpacked(image: Image, layer: Layer, meter: Meter, tick: Callable[[int], None]) -> Iterator[Unpacked]:
    """``tick`` is told of bytes that have been read of the image, and may raise. Raises ImageError."""
    blob = image.store.open(layer.name)
    try:
        if blob.size != layer.size:
            raise Damaged(f"{layer.name} has {blob.size} bytes where the image announces {layer.size}")
        packed = _Packed(blob, layer, meter, tick)
        with _decompressed(packed, layer.compression) as read:
            yield Unpacked(packed, read, layer, meter)
    finally:
        blob.close()


@contextmanager
def _decompressed(packed: _Packed, compression: str) -> Iterator[Callable[[int], bytes]]:
    if compression == "gzip":
        with gzip.GzipFile(fileobj=packed, mode="rb") as file:  # type: ignore[call-overload]
            yield file.read
    elif compression == "zstd":
        with _zstd(packed) as read:
            yield read
    else:
        yield packed.read


@contextmanager
def _zstd(packed: _Packed) -> Iterator[Callable[[int], bytes]]:
    """Through the tool, which a thread feeds: Python has no zstd of its own before 3.14."""
    program = shutil.which(ZSTD)
    if program is None:
        raise CannotUnpack("the image's layers are packed with zstd, and there is no zstd here: install it")
    pipe = subprocess.PIPE
    argv = [program, "-dcq", _ZSTD_WINDOW]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        feeder = _Feeder(packed, process.stdin)
        feeder.start()
        output, errors = process.stdout, process.stderr
        ended = False

        def read(size: int) -> bytes:
            nonlocal ended
            if ended:
                return b""
            if not select.select([output], [], [], _SILENT_SECONDS)[0]:
                raise CannotUnpack(f"zstd has unpacked nothing for {_SILENT_SECONDS:g} s; try again")
            data: bytes = output.read(size)
            if not data:
                ended = True
                feeder.join()
                said = errors.read(4096).decode(errors="replace").strip()
                feeder.reraise()
                if process.wait(_END_SECONDS) != 0:
                    raise Damaged(
                        f"zstd cannot unpack a layer: {said.splitlines()[-1] if said else 'no reason'}"
                    )
            return data

        try:
            yield read
        finally:
            process.kill()
            feeder.join()


class _Feeder(threading.Thread):
    def __init__(self, packed: _Packed, sink: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._packed, self._sink = packed, sink
        self._problem: BaseException | None = None

    def run(self) -> None:
        try:
            while data := self._packed.read():
                rest = memoryview(data)
                while rest:
                    rest = rest[self._sink.write(rest) :]
        except BrokenPipeError:
            pass  # it has its own words for why it ended
        except BaseException as error:
            self._problem = error
        finally:
            with contextlib.suppress(OSError):
                self._sink.close()

    def reraise(self) -> None:
        if self._problem is not None:
            raise self._problem

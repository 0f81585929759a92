"""Opens an image: finds it in its file, and reads what it says of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gcsagent.host.image import documents, reference, stores
from gcsagent.host.image.documents import Config, Descriptor
from gcsagent.host.image.errors import Damaged, TooLarge, Unsupported
from gcsagent.host.image.limits import MAX_DOCUMENT, Limits
from gcsagent.host.image.stores import Blob, DirectoryStore, Store, TarStore

OCI, DOCKER = "oci", "docker-archive"
_LAYOUT, _INDEX, _SAVED = "oci-layout", "index.json", "manifest.json"
_MAX_NESTED = 4
_NAMED_BY_DIGEST = re.compile(r"(?:.*/)?([0-9a-f]{64})(?:\.json)?\Z")
_MAGICS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class Layer:
    """``digest`` is that of the file as it is, empty where nobody says; ``diff_id`` that of the plain tar."""

    name: str
    size: int
    digest: str
    diff_id: str
    compression: str


@dataclass(frozen=True, slots=True)
class Image:
    """``ident`` is the digest of its config, which fixes all of its contents: docker's image id."""

    ident: str
    names: tuple[str, ...]
    format: str
    config: Config
    raw_config: bytes
    layers: tuple[Layer, ...]
    manifest: str
    store: Store

    @property
    def size(self) -> int:
        return sum(layer.size for layer in self.layers)


@contextmanager
def opened(text: str, limits: Limits) -> Iterator[Image]:
    """The image that PATH[:TAG] means. Raises ImageError, OSError."""
    wanted = reference.parse(text)
    store = _store(wanted.path)
    try:
        image = _read(store, wanted)
        if len(image.layers) > limits.max_layers:
            raise TooLarge(f"the image has {len(image.layers)} layers; {limits.max_layers} are allowed")
        yield image
    finally:
        store.close()


def _store(path: Path) -> Store:
    if path.is_dir():
        return DirectoryStore(path)
    return TarStore(path)


def _read(store: Store, wanted: reference.Reference) -> Image:
    if store.has(_LAYOUT) and store.has(_INDEX):
        version = documents.parse(stores.document(store, _LAYOUT), _LAYOUT).get("imageLayoutVersion")
        if version != "1.0.0":
            raise Unsupported(
                f"{wanted.path} is an OCI layout of version {version!r:.50}; 1.0.0 is known here"
            )
        return _oci(store, wanted)
    if store.has(_SAVED):
        return _docker(store, wanted)
    raise Unsupported(
        f"{wanted.path} is no image: neither an OCI layout (no {_LAYOUT} and {_INDEX})"
        f" nor what `docker save` writes (no {_SAVED})"
    )


# -- OCI layouts ----------------------------------------------------------------------------------


def _oci(store: Store, wanted: reference.Reference) -> Image:
    entries = documents.index(stores.document(store, _INDEX))
    chosen = reference.choose([(each.names, each.digest) for each in entries], wanted.tag, str(wanted.path))
    found = _image_manifest(store, [entries[number] for number in chosen], str(wanted.path))
    manifest = documents.manifest(_blob(store, found, "manifest"))
    raw = _blob(store, manifest.config, "config")
    config = documents.config(raw)
    _check_count(config, len(manifest.layers))
    layers = tuple(
        Layer(_path(each), each.size, each.digest, diff_id, documents.compression(each))
        for each, diff_id in zip(manifest.layers, config.diff_ids, strict=True)
    )
    names = tuple(dict.fromkeys(name for number in chosen for name in entries[number].names))
    return Image(documents.digest_of(raw), names, OCI, config, raw, layers, found.digest, store)


def _image_manifest(store: Store, entries: list[Descriptor], where: str) -> Descriptor:
    """Down through indexes of several platforms to one image's manifest."""
    for _ in range(_MAX_NESTED):
        found = reference.of_platform(entries, where)
        if found.media_type in documents.MANIFESTS:
            return found
        if found.media_type not in documents.INDEXES:
            raise Unsupported(
                f"{where} refers to a {found.media_type or 'nameless'!r:.100}, which is no image"
            )
        entries = list(documents.index(_blob(store, found, "index")))
    raise Damaged(f"{where} has indexes of indexes, more than {_MAX_NESTED} deep")


def _path(of: Descriptor) -> str:
    return "blobs/" + of.digest.replace(":", "/")


def _blob(store: Store, of: Descriptor, what: str) -> bytes:
    if of.size > MAX_DOCUMENT:
        raise TooLarge(f"the image's {what} has {of.size} bytes; {MAX_DOCUMENT} are read at the most")
    data = stores.document(store, _path(of))
    if len(data) != of.size:
        raise Damaged(f"the image's {what} has {len(data)} bytes where {of.size} are announced")
    if documents.digest_of(data, of.digest) != of.digest:
        raise Damaged(f"the image's {what} is not what its digest {of.digest} says")
    return data


# -- docker save ----------------------------------------------------------------------------------


def _docker(store: Store, wanted: reference.Reference) -> Image:
    entries = _saved(stores.document(store, _SAVED))
    chosen = reference.choose([(names, config) for config, names, _ in entries], wanted.tag, str(wanted.path))
    file, names, files = entries[chosen[0]]
    raw = stores.document(store, file)
    ident = documents.digest_of(raw)
    named = _NAMED_BY_DIGEST.match(file)
    if named is not None and f"sha256:{named[1]}" != ident:
        raise Damaged(f"the image's config is not what its name {file} says")
    config = documents.config(raw)
    _check_count(config, len(files))
    layers = []
    for name, diff_id in zip(files, config.diff_ids, strict=True):
        blob = store.open(name)
        layers.append(Layer(name, blob.size, "", diff_id, _sniffed(blob)))
    return Image(ident, names, DOCKER, config, raw, tuple(layers), "", store)


def _saved(data: bytes) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Of each image in there: its config's file, its names, its layers' files."""
    try:
        return [
            (
                str(each["Config"]),
                tuple(map(str, each.get("RepoTags") or ())),
                tuple(map(str, each["Layers"] or ())),
            )
            for each in json.loads(data)
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"the image's {_SAVED} is not as `docker save` writes it") from error


def _sniffed(blob: Blob) -> str:
    """Whether it is compressed: some tools do that, and the format has no place to say so."""
    head = blob.read(4)
    blob.close()
    return next((name for magic, name in _MAGICS.items() if head.startswith(magic)), "")


def _check_count(config: Config, layers: int) -> None:
    if len(config.diff_ids) != layers:
        raise Damaged(f"the image has {layers} layers, and its config says {len(config.diff_ids)}")

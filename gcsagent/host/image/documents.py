"""Indexes, manifests and configs: from bytes nobody vouches for to what is used of them. Pure functions.

Field names and meaning: OCI Image Format Specification 1.1, image-index.md, manifest.md, config.md and
descriptor.md; docker's manifests differ in their media types only. All raise Damaged or Unsupported.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gcsagent.host.image.errors import Damaged, Unsupported

Json = dict[str, Any]

_DIGEST = re.compile(r"(sha256):([0-9a-f]{64})\Z|(sha512):([0-9a-f]{128})\Z")

INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
CONFIGS = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
_LAYER = re.compile(
    r"application/vnd\.(?:oci\.image\.layer(?:\.nondistributable)?\.v1\.tar(?:\+(?P<oci>gzip|zstd))?"
    r"|docker\.image\.rootfs\.(?:foreign\.)?diff\.tar(?:\.(?P<docker>gzip|zstd))?)\Z"
)

REF_NAMES = ("org.opencontainers.image.ref.name", "io.containerd.image.name")
"""Annotations that name an image: the specification's, and that of docker and containerd."""

OS, ARCHITECTURE = "linux", "amd64"
MAX_SIZE = 1 << 60


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What one document says of a blob. ``platform`` is OS/ARCHITECTURE[/VARIANT], empty where unsaid."""

    media_type: str
    digest: str
    size: int
    names: tuple[str, ...] = ()
    platform: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class Config:
    """What an image says of itself. ``diff_ids`` are the digests of its layers as plain tar."""

    architecture: str
    os: str
    diff_ids: tuple[str, ...]
    created: str = ""
    user: str = ""
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    workdir: str = ""
    stop_signal: str = ""
    volumes: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def platform(self) -> str:
        return f"{self.os}/{self.architecture}"


def digest_of(data: bytes, like: str = "sha256") -> str:
    """``like`` is an algorithm, or a digest that has one."""
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def check_digest(value: object, what: str) -> str:
    if not isinstance(value, str) or not _DIGEST.match(value):
        raise Damaged(f"the image's {what} has {value!r:.100} for a digest; sha256 and sha512 are known here")
    return value


def parse(data: bytes, what: str) -> Json:
    """A JSON object."""
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise Damaged(f"the image's {what} is no JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise Damaged(f"the image's {what} is no JSON object")
    return value


def descriptor(value: object, what: str) -> Descriptor:
    given = _object(value, what)
    size = given.get("size")
    if type(size) is not int or not 0 <= size < MAX_SIZE:
        raise Damaged(f"the image's {what} has {size!r:.100} for a size")
    annotations = _object(given.get("annotations"), f"{what}'s annotations")
    names = [annotations[key] for key in REF_NAMES if isinstance(annotations.get(key), str)]
    platform = _object(given.get("platform"), f"{what}'s platform")
    return Descriptor(
        _text(given, "mediaType", what),
        check_digest(given.get("digest"), what),
        size,
        tuple(dict.fromkeys(name for name in names if name)),
        "/".join(
            part for part in (_text(platform, key, what) for key in ("os", "architecture", "variant")) if part
        ),
    )


def index(data: bytes, what: str = "index") -> tuple[Descriptor, ...]:
    entries = parse(data, what).get("manifests") or []
    if not isinstance(entries, list):
        raise Damaged(f"the image's {what}: 'manifests' is no array")
    return tuple(descriptor(each, f"{what}.manifests[{number}]") for number, each in enumerate(entries))


def manifest(data: bytes) -> Manifest:
    given = parse(data, "manifest")
    if given.get("schemaVersion") != 2:
        raise Unsupported("the image's manifest is of an old schema; convert it with `skopeo copy`")
    layers = given.get("layers")
    if not isinstance(layers, list):
        raise Damaged("the image's manifest has no array of layers")
    config = descriptor(given.get("config"), "config")
    if config.media_type not in CONFIGS:
        raise Unsupported(f"no container image: its config is {config.media_type or 'of no type'!r:.100}")
    return Manifest(config, tuple(descriptor(each, f"layers[{n}]") for n, each in enumerate(layers)))


def compression(layer: Descriptor) -> str:
    """gzip, zstd, or empty for a plain tar."""
    match = _LAYER.match(layer.media_type)
    if match is None:
        raise Unsupported(
            f"a layer of the image is {layer.media_type or 'of no type'!r:.100};"
            " tar, tar+gzip and tar+zstd are known here"
        )
    return match["oci"] or match["docker"] or ""


def config(data: bytes) -> Config:
    given = parse(data, "config")
    process = _object(given.get("config"), "config.config")
    rootfs = _object(given.get("rootfs"), "config.rootfs")
    diff_ids = _texts(rootfs, "diff_ids", "config.rootfs")
    labels = _object(process.get("Labels"), "config.config.Labels")
    found = Config(
        architecture=_text(given, "architecture", "config"),
        os=_text(given, "os", "config"),
        diff_ids=tuple(check_digest(each, "config.rootfs") for each in diff_ids),
        created=_text(given, "created", "config"),
        user=_text(process, "User", "config.config"),
        env=_texts(process, "Env", "config.config"),
        entrypoint=_texts(process, "Entrypoint", "config.config"),
        command=_texts(process, "Cmd", "config.config"),
        workdir=_text(process, "WorkingDir", "config.config"),
        stop_signal=_text(process, "StopSignal", "config.config"),
        volumes=tuple(sorted(_object(process.get("Volumes"), "config.config.Volumes"))),
        labels={key: _text(labels, key, "config.config.Labels") for key in labels},
    )
    if (found.os, found.architecture) != (OS, ARCHITECTURE):
        raise Unsupported(
            f"the image is for {found.platform if found.os else 'an unknown platform'};"
            f" only {OS}/{ARCHITECTURE} runs here"
        )
    return found


def _object(value: object, what: str) -> Json:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Damaged(f"the image's {what} is no JSON object")
    return value


def _text(given: Json, key: str, what: str) -> str:
    value = given.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value:
        raise Damaged(f"the image's {what}: {key!r:.100} is no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Damaged(f"the image's {what}: {key!r:.100} is no valid text") from None
    return value


def _texts(given: Json, key: str, what: str) -> tuple[str, ...]:
    value = given.get(key)
    if isinstance(value, str):  # as old versions of docker wrote them
        value = [value]
    if value is None:
        return ()
    if not isinstance(value, list):
        raise Damaged(f"the image's {what}: {key!r} is no array")
    return tuple(_text({key: each}, key, what) for each in value)

"""Images written by hand, honest and not, for what no tool would make."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
PLAIN = "application/vnd.oci.image.layer.v1.tar"
ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"

Member = tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def member(name: str, kind: bytes = tarfile.REGTYPE, **more: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.mode = kind, 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in more.items():
        setattr(made, key, value)
    return made


def file(name: str, data: str = "data", **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, **more), data.encode()


def directory(name: str, **more: Any) -> tarfile.TarInfo:
    return member(name, tarfile.DIRTYPE, **more)


def symlink(name: str, target: str) -> tarfile.TarInfo:
    return member(name, tarfile.SYMTYPE, linkname=target)


def hard_link(name: str, target: str) -> tarfile.TarInfo:
    return member(name, tarfile.LNKTYPE, linkname=target)


def tar(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for each in members:
            if isinstance(each, tuple):
                each[0].size = len(each[1])
                archive.addfile(each[0], io.BytesIO(each[1]))
            else:
                archive.addfile(each)
    return buffer.getvalue()


@dataclass(slots=True)
class Layout:
    """An OCI layout in the making: what is asked for goes in as it is, right or wrong."""

    root: Path
    entries: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.root / "blobs" / "sha256").mkdir(parents=True)
        (self.root / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        self.write_index()

    def path(self, digest: str) -> Path:
        return self.root / "blobs" / "sha256" / digest.partition(":")[2]

    def blob(self, data: bytes, media_type: str) -> dict[str, Any]:
        digest = sha256(data)
        self.path(digest).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def document(self, value: object, media_type: str) -> dict[str, Any]:
        return self.blob(json.dumps(value).encode(), media_type)

    def image(
        self,
        *layers: bytes,
        tag: str = "",
        media_type: str = GZIP,
        packed: Sequence[bytes] = (),
        config: dict[str, Any] | None = None,
        config_blob: dict[str, Any] | None = None,
        enter: bool = True,
        **manifest: Any,
    ) -> dict[str, Any]:
        """Adds one and returns its manifest's descriptor.

        ``packed`` are the layers' blobs, and ``config_blob`` the descriptor of its config, if given.
        """
        blobs = packed or [gzip.compress(each, 1) if media_type == GZIP else each for each in layers]
        described = [self.blob(each, media_type) for each in blobs]
        told: dict[str, Any] = {"architecture": "amd64", "os": "linux"}
        told["rootfs"] = {"type": "layers", "diff_ids": [sha256(each) for each in layers]}
        told.update(config or {})
        made = {
            "schemaVersion": 2,
            "config": config_blob or self.document(told, CONFIG),
            "layers": described,
            **manifest,
        }
        entry = self.document(made, MANIFEST)
        if tag:
            entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
        if enter:
            self.enter(entry)
        return entry

    def enter(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        self.write_index()

    def write_index(self) -> None:
        (self.root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self.entries}))

    def as_tar(self, path: Path) -> Path:
        with tarfile.open(path, "w") as archive:
            archive.add(self.root, arcname=".")
        return path


def docker_archive(path: Path, *layers: bytes, tags: Sequence[str] = ("app:1",), **changes: Any) -> Path:
    """As ``docker save`` wrote them for years: a directory per layer, which the second time is a symlink."""
    config = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [sha256(each) for each in layers]},
        **changes.pop("config", {}),
    }
    raw = json.dumps(config).encode()
    name = changes.pop("name", f"{sha256(raw)[7:]}.json")
    members: list[Member] = [file(name, raw.decode())]
    names: dict[bytes, str] = {}
    listed = []
    for number, layer in enumerate(layers):
        listed.append(f"layer{number}/layer.tar")
        if layer in names:
            members.append(symlink(listed[-1], f"../{names[layer]}"))
        else:
            names[layer] = listed[-1]
            members.append((member(listed[-1]), layer))
    manifest = [{"Config": name, "RepoTags": list(tags), "Layers": changes.pop("layers", listed)}]
    members.append(file("manifest.json", json.dumps(manifest)))
    path.write_bytes(tar(*members))
    return path

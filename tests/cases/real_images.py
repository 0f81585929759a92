"""An image as people make them: by umoci, in layers with whiteouts, and Debian's redis-server in it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PORT = 7001
_LOADER = "/lib64/ld-linux-x86-64.so.2"
_SECONDS = 120.0


def tool(*argv: str | Path) -> None:
    """Its own words are the failure."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"


def redis_image(rootfs: str, work: Path) -> Path:
    """An OCI layout with the image ``app``: redis-server as the user ``redis``, from the demo's ``rootfs``.

    Its second layer takes away a file and a directory of the first and has others beside them; its third one
    hides all that was in /srv/cache.
    """
    layout = work / "layout"
    name = f"{layout}:app"
    tool("umoci", "init", "--layout", layout)
    tool("umoci", "new", "--image", name)
    with _layer(name, work) as root:
        for link, target in (("bin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")):
            (root / target).mkdir(parents=True)
            (root / link).symlink_to(target)
        _copy(rootfs, root, "sh", "cat", "ls", "id", "stat", "ln", "mkdir", "rm")
        _write(root, "etc/passwd", "root:x:0:0::/root:/bin/sh\n")
        _write(root, "etc/group", "root:x:0:\n")
        for path in ("opt/old/file", "etc/motd", "srv/cache/a", "srv/cache/b/c"):
            _write(root, path, "first\n")
    with _layer(name, work) as root:
        _copy(rootfs, root, "redis-server", "redis-cli")
        _write(root, "etc/passwd", "root:x:0:0::/root:/bin/sh\nredis:x:999:998::/var/lib/redis:/bin/sh\n")
        _write(root, "etc/group", "root:x:0:\nredis:x:998:\nlogs:x:997:redis\n")
        shutil.rmtree(root / "opt" / "old")
        _write(root, "opt/new", "second\n")
        (root / "etc" / "motd").unlink()
        os.chown(_directory(root / "var/lib/redis"), 999, 998)
    fresh = work / "cache"
    _write(fresh, "new", "third\n")
    tool("umoci", "insert", "--image", name, "--opaque", fresh, "/srv/cache")
    shutil.rmtree(fresh)
    config = ["--config.user", "redis", "--config.workingdir", "/var/lib/redis/data"]
    config += ["--config.env", "GREETING=hello", "--config.label", "made.by=umoci"]
    config += ["--config.volume", "/var/lib/redis", "--config.entrypoint", "redis-server"]
    for word in ("--port", str(PORT), "--save", "", "--appendonly", "no"):
        config += ["--config.cmd", word]
    tool("umoci", "config", "--image", name, *config)
    return layout


@contextmanager
def _layer(name: str, work: Path) -> Iterator[Path]:
    """What is changed in the root directory becomes a further layer."""
    bundle = work / "bundle"
    tool("umoci", "unpack", "--image", name, bundle)
    yield bundle / "rootfs"
    tool("umoci", "repack", "--image", name, bundle)
    shutil.rmtree(bundle)


def _copy(rootfs: str, root: Path, *programs: str) -> None:
    """With the shared libraries they need (ld.so(8), --list)."""
    for program in programs:
        found = f"/usr/bin/{program}"
        listed = subprocess.run(
            ["chroot", rootfs, _LOADER, "--list", found],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
        paths = [word for line in listed.splitlines() for word in line.split() if word.startswith("/")]
        for path in (found, *paths):
            # In here, /lib and the like lead to /usr.
            inside = path if path.startswith("/usr/") else f"/usr{path}"
            target = root / inside.lstrip("/")
            if not target.exists():
                _directory(target.parent)
                shutil.copy2(f"{rootfs}{inside}", target)


def _write(root: Path, path: str, text: str) -> None:
    _directory((root / path).parent)
    (root / path).write_text(text)


def _directory(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path

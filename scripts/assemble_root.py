#!/usr/bin/python3
"""Picks the image's files out of unpacked Debian packages.

    assemble_root.py UNPACKED OUT LISTS...

UNPACKED has the packages' files, OUT gets one folder per part (python, runc, busybox, libs, modules, ...),
each a piece of the same root. LISTS are folders with a files.list and a modules.list each; the first, the
image's own, has stdlib.exclude too, the others are what --with adds. Python files are left as source:
compile_tree.py turns them into byte-code with the guest's own interpreter.
"""

from __future__ import annotations

import fnmatch
import lzma
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

LIBS = Path("usr/lib/x86_64-linux-gnu")
LOADER = Path("usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")


def die(message: str) -> NoReturn:
    sys.exit(f"assemble_root.py: error: {message}")


def all_rows(lists: list[Path], name: str) -> Iterator[list[str]]:
    for folder in lists:
        yield from rows(folder / name, 3)


def rows(path: Path, fields: int) -> Iterator[list[str]]:
    """Lines of a list file, split into `fields` columns, the last one being the reason."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        row = line.split(None, fields - 1)
        if len(row) != fields:
            die(f"{path.name}:{number}: want {fields} columns, the last one a reason: {line!r}")
        yield row


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target, follow_symlinks=False)
    if not source.is_symlink():
        # No set-id bit and nothing writable: everything here runs as root anyway.
        target.chmod(0o755 if source.stat().st_mode & 0o111 else 0o644)


def copy_listed(lists: list[Path], unpacked: Path, out: Path) -> None:
    excluded = [row[0] for row in rows(lists[0] / "stdlib.exclude", 2)]
    unused = set(excluded)
    for part, name, _ in all_rows(lists, "files.list"):
        source = unpacked / name
        if source.is_symlink() or source.is_file():
            copy(source, out / part / name)
            continue
        if not source.is_dir():
            die(f"files.list: {name} is in none of the packages")
        for file in sorted(source.rglob("*")):
            if file.is_dir() and not file.is_symlink():
                continue
            relative = file.relative_to(source)
            pattern = matching(relative, excluded)
            if pattern:
                unused.discard(pattern)
            elif file.suffix != ".pyi" and file.name != "py.typed":
                copy(file, out / part / file.relative_to(unpacked))
    for pattern in sorted(unused):
        print(f"assemble_root.py: stdlib.exclude: nothing matches {pattern}", file=sys.stderr)


def matching(relative: Path, patterns: list[str]) -> str | None:
    """The first pattern that names this file or a folder it is in."""
    prefixes = [str(relative), *(str(parent) for parent in relative.parents)][:-1]
    for pattern in patterns:
        same_depth = (prefix for prefix in prefixes if prefix.count("/") == pattern.count("/"))
        if any(fnmatch.fnmatchcase(prefix, pattern) for prefix in same_depth):
            return pattern
    return None


def copy_libraries(unpacked: Path, out: Path) -> None:
    """The shared libraries that what was copied so far is linked with, as the guest's loader finds them."""
    loader = unpacked / LOADER
    for file in sorted(path for path in out.rglob("*") if path.is_file() and not path.is_symlink()):
        with file.open("rb") as stream:
            if stream.read(4) != b"\x7fELF":
                continue
        listed = subprocess.run(
            [loader, "--list", "--library-path", unpacked / LIBS, file],
            capture_output=True,
            text=True,
            check=False,
        )
        if "not found" in listed.stdout:
            die(f"{file.name} needs a library that no package brings:\n{listed.stdout}")
        for library in re.findall(rf"{re.escape(str(unpacked / LIBS))}/(\S+)", listed.stdout):
            # The name looked for, whether link or file: as one file under that name.
            target = out / "libs" / LIBS / library
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2((unpacked / LIBS / library).resolve(), target)
                target.chmod(0o755)
    copy((unpacked / LOADER).resolve(), out / "libs" / LOADER)
    for link in ("bin", "sbin", "lib", "lib64"):
        (out / "libs" / link).symlink_to(f"usr/{link}")
    (out / "libs/usr/lib64").mkdir()
    (out / "libs/usr/lib64/ld-linux-x86-64.so.2").symlink_to("../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")


def copy_modules(lists: list[Path], unpacked: Path, out: Path) -> None:
    (release,) = (unpacked / "usr/lib/modules").iterdir()
    subprocess.run(["depmod", "-b", unpacked / "usr", release.name], check=True)
    needs: dict[str, list[str]] = {}
    for line in (release / "modules.dep").read_text().splitlines():
        path, _, dependencies = line.partition(":")
        needs[path] = dependencies.split()
    builtin = {Path(line).stem for line in (release / "modules.builtin").read_text().split()}
    by_name = {Path(path).name.split(".")[0].replace("-", "_"): path for path in needs}
    target = out / "modules/usr/lib/modules" / release.name
    boot = []
    for name, when, _ in all_rows(lists, "modules.list"):
        if when not in ("boot", "device", "demand"):
            die(f"modules.list: {name}: when is boot, device or demand, not {when}")
        path = by_name.get(name.replace("-", "_"), "")
        if not path:
            hint = " (it is built in: remove the line)" if name in builtin else ""
            die(f"modules.list: kernel {release.name} has no module {name}{hint}")
        boot += [name] if when == "boot" else []
        for each in (path, *needs[path]):
            # Unpacked: busybox's modprobe doesn't read .xz, and the archive compresses better as a whole.
            module = target / each.removesuffix(".xz")
            module.parent.mkdir(parents=True, exist_ok=True)
            data = (release / each).read_bytes()
            module.write_bytes(lzma.decompress(data) if each.endswith(".xz") else data)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy2(release / name, target / name)
    subprocess.run(["depmod", "-b", out / "modules/usr", release.name], check=True)
    # busybox reads the text files only.
    for index in [
        *target.glob("*.bin"),
        *target.glob("modules.builtin*"),
        target / "modules.order",
        target / "modules.softdep",
        target / "modules.weakdep",
        target / "modules.devname",
    ]:
        index.unlink(missing_ok=True)
    (target / "boot").write_text("".join(f"{name}\n" for name in boot))
    (out / "kernel").write_text(f"{release.name}\n")


def main() -> None:
    unpacked, out, *lists = (Path(argument).resolve() for argument in sys.argv[1:])
    copy_listed(lists, unpacked, out)
    copy_libraries(unpacked, out)
    copy_modules(lists, unpacked, out)


if __name__ == "__main__":
    main()

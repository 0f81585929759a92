"""Looking programs up inside a root as the kernel would, never outside of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gcsagent.agent.inroot import find_program, resolve
from gcsagent.tarball.tree import MAX_LINKS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    for directory in ("usr/bin", "etc", "home/me"):
        (made / directory).mkdir(parents=True)
    for name, mode in {"usr/bin/sh": 0o755, "usr/bin/data": 0o644, "home/me/run": 0o700}.items():
        (made / name).touch(mode)
        (made / name).chmod(mode)
    (made / "bin").symlink_to("usr/bin")
    (made / "etc/alternative").symlink_to("/usr/bin/sh")
    (made / "usr/bin/editor").symlink_to("../../etc/alternative")
    (made / "escape").symlink_to("../../../../../../usr/bin/sh")
    (made / "self").symlink_to("self")
    (made / "one").symlink_to("/two")
    (made / "two").symlink_to("one/x")
    (made / "dangling").symlink_to("/nowhere")
    (tmp_path / "outside").touch(0o755)
    (made / "sneaky").symlink_to("../outside")
    return made


@pytest.mark.parametrize(
    "path, inside",
    [
        ("/usr/bin/sh", "usr/bin/sh"),
        ("/bin/sh", "usr/bin/sh"),
        ("/usr/bin/editor", "usr/bin/sh"),
        ("/escape", "usr/bin/sh"),
        ("/../../..", ""),
        ("/../../usr/./bin//sh", "usr/bin/sh"),
        ("/bin/../sh", None),  # bin is usr/bin, and its parent is usr
        ("/bin/../bin/sh", "usr/bin/sh"),
        ("/sneaky", None),
        ("/self", None),
        ("/one", None),
        ("/dangling", None),
        ("/missing/../usr/bin/sh", None),
        ("/usr/bin/sh/x", None),
        ("", ""),
    ],
)
def test_resolving_follows_links_inside_only(root: Path, path: str, inside: str | None) -> None:
    found = resolve(str(root), path)
    assert found == (None if inside is None else str(root / inside) + ("" if inside else "/")) or (
        inside == "" and found == str(root)
    )


def test_as_many_links_as_the_kernel_follows_and_no_more(root: Path) -> None:
    (root / "link0").symlink_to("/usr/bin/sh")
    for number in range(1, MAX_LINKS + 1):
        (root / f"link{number}").symlink_to(f"link{number - 1}")
    assert resolve(str(root), f"/link{MAX_LINKS - 1}") == str(root / "usr/bin/sh")
    assert resolve(str(root), f"/link{MAX_LINKS}") is None


@pytest.mark.parametrize(
    "program, path, cwd, verdict",
    [
        ("sh", "/bin", "/", ""),
        ("sh", "/nowhere:/bin", "/", ""),
        ("/bin/sh", "", "/", ""),
        ("editor", "/usr/bin", "/", ""),
        ("./run", "", "/home/me", ""),
        ("me/run", "", "/home", ""),
        ("run", "/bin:", "/home/me", ""),  # an empty entry is the working directory
        ("bash", "/bin:/usr/bin", "/", "not_found"),
        ("sh", "/etc", "/", "not_found"),
        ("./sh", "", "/etc", "not_found"),
        ("data", "/usr/bin", "/", "not_executable"),
        ("data", "/usr/bin:/nowhere", "/", "not_executable"),
        ("/etc", "", "/", "not_executable"),
        ("/self", "", "/", "not_found"),
        ("/sneaky", "", "/", "not_found"),
    ],
)
def test_a_program_is_looked_up_as_execvp_would(
    root: Path, program: str, path: str, cwd: str, verdict: str
) -> None:
    assert find_program(str(root), program, path, cwd) == verdict

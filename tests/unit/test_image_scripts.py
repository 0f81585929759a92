"""The image's scripts, as far as they can be tried without network and root."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from gcsagent.host.vm.console import STAGES

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = REPO / "scripts"
INIT = REPO / "initramfs/init"
COMMANDS = ("build-rootfs.sh", "fetch-tools.sh", "make-demo-rootfs.sh")


def bash(code: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` after lib.sh, with a cache folder of its own."""
    return subprocess.run(
        ["bash", "-c", f"set -Eeuo pipefail; . {SCRIPTS}/lib.sh; {code}"],
        env={**os.environ, "GCS_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def script(name: str, *arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPTS / name, *arguments],
        env={**os.environ, "GCS_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHECKS = [["bash", "-n", str(path)] for path in sorted(SCRIPTS.glob("*.sh"))]


@pytest.mark.parametrize("command", [*CHECKS, ["sh", "-n", str(INIT)]])
def test_shell_syntax(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_command_and_its_options(name: str, tmp_path: Path) -> None:
    done = script(name, "--help", cache=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {name} ")
    assert "--mirror URL" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_unknown_option_shows_the_usage_and_touches_nothing(name: str, tmp_path: Path) -> None:
    done = script(name, "--nonsense", cache=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: {name} ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_option_without_its_value_is_named(name: str, tmp_path: Path) -> None:
    done = script(name, "--mirror", cache=tmp_path)
    assert done.returncode != 0
    assert "--mirror needs a URL" in done.stderr


def test_failing_command_is_never_silent(tmp_path: Path) -> None:
    done = bash("false", tmp_path)
    assert done.returncode == 1
    assert "failed: false" in done.stderr


ONE_LINE = """\
# deb http://commented.example/debian bookworm main
deb-src http://source.example/debian bookworm main
deb [arch=amd64 signed-by=/x.gpg] http://one.example/debian bookworm main contrib
"""
DEB822 = """\
Types: deb deb-src
URIs: http://two.example/debian/
Suites: bookworm
 bookworm-updates
Components: main

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: bookworm

Types: deb-src
URIs: http://source.example/debian
Suites: bookworm

types: deb
uris: http://two.example/debian-security
suites: bookworm-security
"""


def apt_folder(tmp_path: Path, **files: str) -> str:
    etc = tmp_path / "etc"
    (etc / "sources.list.d").mkdir(parents=True)
    for name, text in files.items():
        path = etc / "sources.list" if name == "sources" else etc / "sources.list.d" / name.replace("_", ".")
        path.write_text(text)
    return str(etc)


def test_sources_are_read_in_both_formats(tmp_path: Path) -> None:
    etc = apt_folder(tmp_path, sources=ONE_LINE, debian_sources=DEB822)
    done = bash("host_sources", tmp_path, GCS_APT_ETC=etc)
    assert done.stdout.splitlines() == [
        "http://one.example/debian bookworm",
        "http://two.example/debian/ bookworm",
        "http://two.example/debian/ bookworm-updates",
        "http://two.example/debian-security bookworm-security",
    ]


def mirrors(tmp_path: Path, etc: str, **environment: str) -> list[str]:
    environment["GCS_APT_ETC"] = etc
    done = bash('find_mirrors; echo "$DEBIAN_MIRROR $DEBIAN_SECURITY"', tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_mirror_and_security_archive_of_the_host(tmp_path: Path) -> None:
    etc = apt_folder(tmp_path, debian_sources=DEB822)
    assert mirrors(tmp_path, etc) == ["http://two.example/debian", "http://two.example/debian-security"]


def test_mirror_by_hand_wins_and_security_stands_beside_it(tmp_path: Path) -> None:
    etc = apt_folder(tmp_path, debian_sources=DEB822)
    found = mirrors(tmp_path, etc, GCS_MIRROR="http://snap.example/archive/debian/20260101T000000Z/")
    assert found == [
        "http://snap.example/archive/debian/20260101T000000Z",
        "http://snap.example/archive/debian-security/20260101T000000Z",
    ]


def test_host_of_another_distribution_uses_mmdebstraps_mirror(tmp_path: Path) -> None:
    etc = apt_folder(tmp_path, sources="deb http://archive.example/ubuntu noble main universe\n")
    mirror, security = mirrors(tmp_path, etc)
    assert mirror.endswith("/debian")
    assert security == f"{mirror}-security"


# An archive of two packages. `update` fails when the file "unreachable" is there; every call is noted.
FAKE_APT_GET = r"""#!/bin/bash
echo "$*" >>"$FAKE/calls"
case "$*" in
    *update*) [ ! -e "$FAKE/unreachable" ] || { echo "E: no route"; exit 100; } ;;
    *--print-uris*)
        echo "'http://x.example/b_2%3a1-1_amd64.deb' b_2%3a1-1_amd64.deb 10 SHA256:bbbb"
        echo "'http://x.example/a_1_all.deb' a_1_all.deb 10 SHA256:aaaa" ;;
esac
"""
RESOLVE = 'find_mirrors; apt_private t trixie; apt_resolve "$APT_DIR/r" a b; cat "$APT_DIR/r"'


def resolve(tmp_path: Path, drop: str = "", refresh: str = "") -> subprocess.CompletedProcess[str]:
    (tmp_path / "bin").mkdir(exist_ok=True)
    fake = tmp_path / "bin/apt-get"
    fake.write_text(FAKE_APT_GET)
    fake.chmod(0o755)
    return bash(
        RESOLVE,
        tmp_path / "cache",
        FAKE=str(tmp_path),
        PATH=f"{tmp_path}/bin:{os.environ['PATH']}",
        GCS_MIRROR="http://x.example/debian",
        APT_DROP=drop,
        GCS_REFRESH=refresh,
    )


def updates(tmp_path: Path) -> int:
    return (tmp_path / "calls").read_text().count("update")


def fetched(tmp_path: Path, *hashes: str) -> None:
    for name in hashes:
        (tmp_path / "cache/debs").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"cache/debs/{name}.deb").touch()


def test_resolved_packages_are_sorted_with_hash_and_version(tmp_path: Path) -> None:
    done = resolve(tmp_path)
    assert done.stdout.splitlines()[1:] == ["aaaa a 1", "bbbb b 2:1-1"]


def test_dropped_packages_are_whole_names(tmp_path: Path) -> None:
    assert resolve(tmp_path, drop="a|bb").stdout.splitlines()[1:] == ["bbbb b 2:1-1"]


def test_second_resolution_asks_nobody_once_all_is_fetched(tmp_path: Path) -> None:
    resolve(tmp_path)
    fetched(tmp_path, "aaaa", "bbbb")
    resolve(tmp_path)
    assert updates(tmp_path) == 1
    resolve(tmp_path, refresh="1")
    assert updates(tmp_path) == 2


def test_answer_with_packages_yet_to_fetch_is_asked_again(tmp_path: Path) -> None:
    resolve(tmp_path)
    fetched(tmp_path, "aaaa")
    resolve(tmp_path)
    assert updates(tmp_path) == 2


def test_archive_out_of_reach_falls_back_to_the_old_answer_and_says_so(tmp_path: Path) -> None:
    first = resolve(tmp_path)
    (tmp_path / "unreachable").touch()
    second = resolve(tmp_path)
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert "cannot be reached: using what was resolved on" in second.stderr
    assert "no route" in second.stderr


def test_archive_out_of_reach_without_an_old_answer_fails(tmp_path: Path) -> None:
    (tmp_path / "unreachable").touch()
    done = resolve(tmp_path)
    assert done.returncode != 0
    assert done.stdout == ""
    assert not list((tmp_path / "cache").glob("apt/*/r*.new"))


def test_old_answer_to_another_question_is_not_used(tmp_path: Path) -> None:
    resolve(tmp_path)
    (tmp_path / "unreachable").touch()
    assert resolve(tmp_path, drop="a").returncode != 0


def test_damaged_package_is_removed_and_named(tmp_path: Path) -> None:
    fetched(tmp_path, "aaaa")
    (tmp_path / "list").write_text("# header\naaaa a 1\n")
    done = bash(f'apt_fetch "{tmp_path}/list" "{tmp_path}/out"', tmp_path / "cache")
    assert done.returncode == 1
    assert "cached package a 1 was damaged and is removed: run again" in done.stderr
    assert not (tmp_path / "cache/debs/aaaa.deb").exists()


def test_work_folder_goes_when_the_script_is_interrupted(tmp_path: Path) -> None:
    done = bash('make_work_dir; touch "$WORK/x"; kill -TERM $$', tmp_path)
    assert done.returncode == 130
    assert list((tmp_path / "tmp").iterdir()) == []


def test_old_results_are_forgotten_but_never_the_current_one(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "newer", "old", "older")):
        (tmp_path / "r" / name).mkdir(parents=True)
        os.utime(tmp_path / "r" / name, (1000 - age, 1000 - age))
    done = bash(f'point_current "{tmp_path}/r" older; forget_old "{tmp_path}/r" 2', tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"new", "newer", "older", "current"}


def test_lists_have_a_reason_on_every_line() -> None:
    assemble = load(SCRIPTS / "assemble_root.py")
    for name, fields in (("files.list", 3), ("modules.list", 3), ("stdlib.exclude", 2), ("packages.list", 2)):
        assert all(row[-1] for row in assemble.rows(REPO / "initramfs" / name, fields))
        for feature in (REPO / "initramfs/with").iterdir():
            assert name == "stdlib.exclude" or all(row[-1] for row in assemble.rows(feature / name, fields))


def test_unknown_feature_is_refused_naming_those_there_are(tmp_path: Path) -> None:
    done = script("build-rootfs.sh", "--with", "nonsense", cache=tmp_path)
    assert done.returncode == 1
    assert "error: --with nonsense: there is criu" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_list_line_without_a_reason_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l.list").write_text("# comment\n\nvirtio_blk boot\n")
    with pytest.raises(SystemExit, match=r"l\.list:3: want 3 columns"):
        list(load(SCRIPTS / "assemble_root.py").rows(tmp_path / "l.list", 3))


@pytest.mark.parametrize(
    "path, pattern",
    [
        ("test/support/x.py", "test"),
        ("lib-dynload/_test.so", "lib-dynload/_test*"),
        ("asyncio/test.py", None),
        ("urllib/parse.py", None),
        ("urllib/request.py", "urllib/request.py"),
    ],
)
def test_exclusion_matches_as_many_components_as_it_has(path: str, pattern: str | None) -> None:
    assemble = load(SCRIPTS / "assemble_root.py")
    assert assemble.matching(Path(path), ["test", "lib-dynload/_test*", "urllib/request.py"]) == pattern


def test_byte_code_replaces_source_and_shows_the_guests_path(tmp_path: Path) -> None:
    package = tmp_path / "usr/lib/p"
    package.mkdir(parents=True)
    (package / "m.py").write_text('"""doc"""\ndef f():\n    assert True\n')
    compile_tree = [sys.executable, str(SCRIPTS / "compile_tree.py"), "compile", str(tmp_path)]
    subprocess.run(compile_tree, check=True, timeout=30)
    first = (package / "m.pyc").read_bytes()
    assert [path.name for path in package.iterdir()] == ["m.pyc"]
    shown = subprocess.run(
        [sys.executable, "-c", "import m; print(m.f.__code__.co_filename, m.__doc__)"],
        cwd=package,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert shown.stdout == "/usr/lib/p/m.py doc\n"
    (package / "m.py").write_text('"""doc"""\ndef f():\n    assert True\n')
    os.utime(package / "m.py", (0, 0))
    subprocess.run(compile_tree, check=True, timeout=30)
    assert (package / "m.pyc").read_bytes() == first


def test_broken_source_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("def f(:\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "compile_tree.py"), "compile", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode != 0
    assert "SyntaxError" in done.stderr


def packed(folder: Path) -> bytes:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "pack_newc.py"), str(folder), "0"],
        capture_output=True,
        timeout=30,
        check=True,
    ).stdout


def small_root(top: Path, names: Sequence[str]) -> Path:
    for name in names:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(f"{name} is here")
    (top / "link").symlink_to("a/x")
    return top


def test_archive_depends_on_contents_alone(tmp_path: Path) -> None:
    one = small_root(tmp_path / "1", ["a/x", "a-b", "a/y", "z"])
    two = small_root(tmp_path / "2", ["z", "a/y", "a-b", "a/x"])
    os.utime(two / "z", (5, 5))
    assert packed(one) == packed(two)
    (two / "z").chmod(0o600)
    assert packed(one) != packed(two)


def test_archive_has_the_newc_layout(tmp_path: Path) -> None:
    archive = packed(small_root(tmp_path / "r", ["a/x"]))
    headers = re.findall(rb"070701([0-9A-F]{104})([^\0]+)\0", archive)
    modes = {name: int(fields[8:16], 16) for fields, name in headers}
    assert modes == {b"a": 0o40755, b"a/x": 0o100644, b"link": 0o120777, b"TRAILER!!!": 0}
    assert len(archive) % 4 == 0
    assert b"a/x is here" in archive


def test_named_pipe_in_the_root_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        packed(tmp_path)
    assert b"is neither file nor folder nor link" in caught.value.stderr


def test_init_reports_its_stages_in_order() -> None:
    text = INIT.read_text()
    before_the_agent = STAGES[: STAGES.index("agent")]
    assert tuple(re.findall(r"^ *reached (\w+)$", text, re.M)) == before_the_agent


def functions_of_init() -> str:
    """init up to the point where it starts to act."""
    return INIT.read_text().split("# pivot_root refuses")[0]


def run_init_functions(code: str, tmp_path: Path) -> str:
    """Console output of `code` run after init's functions, with the machine's end replaced by a word."""
    console = tmp_path / "console"
    functions = functions_of_init().replace("/dev/console", str(console))
    harness = f'poweroff() {{ echo "poweroff $*" >>{console}; exit; }}\nsync() {{ :; }}\n'
    subprocess.run(
        ["sh", "-c", functions.replace(f">{console}", f">>{console}") + harness + code],
        timeout=30,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return console.read_text()


def test_stage_line_on_the_console(tmp_path: Path) -> None:
    assert re.fullmatch(r"gcs-boot: mounts \d+\.\d\d\n", run_init_functions("reached mounts", tmp_path))


def test_failure_line_names_stage_and_reason_then_powers_off(tmp_path: Path) -> None:
    shown = run_init_functions("stage=disks; must sh -c 'echo first >&2; echo second >&2; exit 3'", tmp_path)
    assert shown.startswith("gcs-boot: FAILED disks: sh -c ")
    assert shown.endswith("failed: second\npoweroff -f\n")


def test_last_setting_wins(tmp_path: Path) -> None:
    code = "settings='gcs.hostname=a quiet gcs.hostname=b=c'; option gcs.hostname d >%s; option gcs.x d >>%s"
    out = tmp_path / "console"
    assert run_init_functions(code % (out, out), tmp_path) == "b=c\nd\n"

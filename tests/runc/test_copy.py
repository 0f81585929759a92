"""gcsctl cp and what is under it: docker cp's rules both ways, streams, large files, and what kills."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gcsagent.host.client import Client
from gcsagent.host.copy import CannotCopy, Manner, download, upload
from protocol.errors import RemoteProtocolError, RpcError
from protocol.families.archive import Archived, GetArchive
from tests.cases.agents import REPO, RunningAgent
from tests.fakes.fake_agent import FakeAgent

Way = Callable[[Client, str, str, Manner], Awaitable[object]]


async def there(client: Client, source: str, target: str, manner: Manner) -> object:
    return await upload(client, source, None, target, manner)


async def back(client: Client, source: str, target: str, manner: Manner) -> object:
    return await download(client, None, source, target, manner)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """``src`` to copy from and ``dst`` to copy to; here is the guest as well."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    (src / "d").mkdir(parents=True)
    (src / "f").write_text("f")
    (src / "d" / "x").write_text("x")
    (src / "lf").symlink_to("f")
    (src / "ld").symlink_to("d")
    (dst / "dir").mkdir(parents=True)
    (dst / "old").write_text("old")
    (dst / "todir").symlink_to("dir")
    (dst / "tofile").symlink_to("old")
    return tmp_path


BEFORE = {"dir": "/", "old": "old", "todir": "-> dir", "tofile": "-> old"}


def seen(top: Path) -> dict[str, str]:
    found = {}
    for parent, directories, files in os.walk(top):
        for name in (*directories, *files):
            path = Path(parent, name)
            what = f"-> {os.readlink(path)}" if path.is_symlink() else "/" if path.is_dir() else ""
            found[str(path.relative_to(top))] = what or path.read_text()
    return found


RULES: list[tuple[str, str, dict[str, str] | str]] = [
    ("f", "new", {"new": "f"}),
    ("f", "dir", {"dir/f": "f"}),
    ("f", "dir/", {"dir/f": "f"}),
    ("f", "dir/.", {"dir/f": "f"}),
    ("f", "old", {"old": "f"}),
    ("f", "todir", {"dir/f": "f"}),
    ("f", "tofile", {"old": "f"}),
    ("f", "new/", "no such directory"),
    ("f", "old/", "is no directory"),
    ("f", "none/new", "no such directory"),
    ("f/", "new", "directory"),
    ("f/.", "new", "directory"),
    ("none", "new", "No such file or directory"),
    ("d", "new", {"new": "/", "new/x": "x"}),
    ("d", "new/", {"new": "/", "new/x": "x"}),
    ("d", "dir", {"dir/d": "/", "dir/d/x": "x"}),
    ("d/", "dir", {"dir/d": "/", "dir/d/x": "x"}),
    ("d/", "todir", {"dir/d": "/", "dir/d/x": "x"}),
    ("d/.", "dir", {"dir/x": "x"}),
    ("d/.", "new", {"new": "/", "new/x": "x"}),
    ("d", "old", "no directory"),
    ("d/.", "old", "no directory"),
    ("d", "none/new", "no such directory"),
    ("d/.", "none/new", "no such directory"),
    ("lf", "new", {"new": "-> f"}),
    ("ld", "new", {"new": "-> d"}),
    ("ld/", "new", {"new": "/", "new/x": "x"}),
    ("ld/.", "dir", {"dir/x": "x"}),
    ("-L lf", "new", {"new": "f"}),
    ("-L ld", "dir", {"dir/ld": "/", "dir/ld/x": "x"}),
]


@pytest.mark.parametrize("way", [there, back])
@pytest.mark.parametrize("source, target, expected", RULES)
def test_docker_cps_rules(
    agent: RunningAgent, world: Path, way: Way, source: str, target: str, expected: dict[str, str] | str
) -> None:
    follow, source = source.startswith("-L "), source.removeprefix("-L ")

    async def copy() -> None:
        async with await Client.connect(agent.address) as client:
            await way(client, f"{world}/src/{source}", f"{world}/dst/{target}", Manner(follow=follow))

    before = agent.holdings()
    if isinstance(expected, str):
        with pytest.raises((RpcError, CannotCopy), match=expected):
            asyncio.run(copy())
        assert seen(world / "dst") == BEFORE
    else:
        asyncio.run(copy())
        assert seen(world / "dst") == {**BEFORE, **expected}
    agent.assert_holds(before)


# -- gcsctl ---------------------------------------------------------------------------------------


def gcsctl(agent: RunningAgent, *arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "gcsagent.host", "--address", agent.address, *arguments]
    return subprocess.run(command, cwd=REPO, input=data, capture_output=True, timeout=60, check=False)


def test_an_archive_goes_through_standard_input_and_output(agent: RunningAgent, world: Path) -> None:
    out = gcsctl(agent, "cp", f":{world}/src/d", "-")
    assert (out.returncode, out.stderr) == (0, b"")
    with tarfile.open(fileobj=io.BytesIO(out.stdout)) as archive:
        assert archive.getnames() == ["d", "d/x"]
    into = gcsctl(agent, "--json", "cp", "-", f":{world}/dst", data=out.stdout)
    assert (into.returncode, json.loads(into.stdout)["entries"]) == (0, 2)
    assert seen(world / "dst") == {**BEFORE, "d": "/", "d/x": "x"}
    system = subprocess.run(["tar", "t"], input=out.stdout, capture_output=True, timeout=20, check=True)
    assert system.stdout == b"d/\nd/x\n"


def test_what_it_says_when_it_cannot(agent: RunningAgent, world: Path) -> None:
    for arguments, words in (
        (("cp", "a", "b"), "give one path here and one in the guest, as ID:PATH or :PATH"),
        (("cp", "a:b", "c:d"), "give one path here and one in the guest"),
        (("cp", "nobody:/x", str(world)), "there is no container nobody"),
        (("cp", f":{world}/none", str(world)), "No such file or directory"),
        (("cp", str(world / "none"), ":/tmp"), "No such file or directory"),
        (("cp", "-", f":{world}/dst/none"), "no such directory"),
        (("cp", "--max-size", "100", f":{world}/src/d", f"{world}/dst/new"), "more than 100 bytes"),
    ):
        done = gcsctl(agent, *arguments)
        said = done.stderr.decode()
        assert (done.returncode, said.count("\n"), words in said) == (125, 1, True), said
    assert seen(world / "dst") == BEFORE


def test_archive_mode_keeps_owners_and_set_id_bits_and_the_other_does_not(
    agent: RunningAgent, world: Path
) -> None:
    source = world / "src" / "f"
    os.chown(source, 1234, 2345)
    source.chmod(0o4711)
    os.setxattr(source, "user.note", b"kept")
    for option, owner, mode in (("-q", (0, 0), 0o711), ("-a", (1234, 2345), 0o4711)):
        assert gcsctl(agent, "cp", option, f":{source}", f"{world}/dst/here").returncode == 0
        here = (world / "dst" / "here").stat()
        assert ((here.st_uid, here.st_gid), here.st_mode & 0o7777) == (owner, mode)
        assert gcsctl(agent, "cp", option, str(source), f":{world}/dst/guest").returncode == 0
        guest = (world / "dst" / "guest").stat()
        assert (guest.st_uid, guest.st_gid) == owner
        assert os.listxattr(world / "dst" / "guest") == (["user.note"] if option == "-a" else [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_half_on_either_side(
    agent: RunningAgent, world: Path, number: signal.Signals
) -> None:
    """Standing still in the middle: the archive's own end does not come; nobody takes it."""
    large = world / "src" / "large"
    large.write_bytes(os.urandom(8 << 20))
    with tarfile.open(world / "large.tar", "w") as archive:
        archive.add(large, "large")
    half = (world / "large.tar").read_bytes()[: 4 << 20]
    command = [sys.executable, "-m", "gcsagent.host", "--address", agent.address, "cp"]
    before = agent.holdings()
    for arguments in (("-", f":{world}/dst"), (f":{large}", "-")):
        with subprocess.Popen(
            [*command, *arguments],
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as copying:
            assert copying.stdin is not None
            assert copying.stdout is not None
            assert copying.stderr is not None
            if arguments[0] == "-":
                copying.stdin.write(half)
            else:
                assert copying.stdout.read(1 << 20)
            copying.send_signal(number)
            assert copying.wait(20) == 128 + number
            assert copying.stderr.read() == b""
        agent.assert_holds(before)
    assert seen(world / "dst") == BEFORE


# -- a guest that means harm ----------------------------------------------------------------------


def hostile(*members: tuple[str, bytes, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind, target in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = kind, target, 0o6777
            archive.addfile(member)
    return buffer.getvalue()


FILE, LINK, HARD, DIR = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE


@pytest.mark.parametrize(
    "data",
    [
        hostile(("other", FILE, "")),
        hostile(("../d", FILE, "")),
        hostile(("/etc/d", FILE, "")),
        hostile(("d", LINK, "/"), ("d/x", FILE, "")),
        hostile(("d", DIR, ""), ("d/up", LINK, "../../src"), ("d/up/evil", FILE, "")),
        hostile(("d", DIR, ""), ("d/hard", HARD, "d/../../src/f")),
        hostile(("d", DIR, ""), ("other/x", FILE, "")),
        hostile(("d", DIR, ""), ("d/x", FILE, ""))[:1024],
        b"",
        b"rubbish" * 5000,
    ],
)
def test_what_a_hostile_guest_sends_goes_nowhere_else(world: Path, tmp_path: Path, data: bytes) -> None:
    sources = seen(world / "src")

    async def attempt() -> None:
        async with FakeAgent(tmp_path / "fake.sock") as fake:

            def serve(_params: GetArchive) -> Archived:
                if data:
                    fake.connections[-1].notify("archive.data", {"data": data})
                return Archived(len(data), 1)

            fake.handlers["archive.get"] = serve
            async with await Client.connect(fake.address) as client:
                await download(client, None, "/d", f"{world}/dst/new", Manner())

    with pytest.raises((CannotCopy, RemoteProtocolError)):
        asyncio.run(attempt())
    found = {name: what for name, what in seen(world / "dst").items() if not name.startswith("new")}
    assert (found, seen(world / "src")) == (BEFORE, sources)
    assert not [name for name in os.listdir(world / "dst") if name.startswith(".")]


# -- large ----------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_a_large_file_there_and_back_is_the_same(agent: RunningAgent, world: Path) -> None:
    """1 GiB with GCS_FILES=long; the agent holds none of it."""
    size = (1 << 30) if os.environ.get("GCS_FILES") == "long" else 64 << 20
    source = world / "src" / "large"
    digest = hashlib.sha256()
    with source.open("wb") as file:
        for number in range(size >> 20):
            block = hashlib.sha256(b"%d" % number).digest() * (1 << 15)
            digest.update(block)
            file.write(block)
    before, started = agent.memory_kib(), time.monotonic()

    async def both() -> float:
        async with await Client.connect(agent.address) as client:
            await upload(client, str(source), None, f"{world}/dst/there", Manner())
            middle = time.monotonic()
            await download(client, None, f"{world}/dst/there", f"{world}/dst/back", Manner())
            return middle

    middle = asyncio.run(both())
    took = middle - started, time.monotonic() - middle
    print(f"\n{size >> 20} MiB in {took[0]:.1f} s there and {took[1]:.1f} s back")
    with (world / "dst" / "back").open("rb") as copied:
        assert hashlib.file_digest(copied, "sha256").hexdigest() == digest.hexdigest()
    assert agent.memory_kib()[1] < before[1] + 8 * 1024

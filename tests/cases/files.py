"""Cases about files: archives in and out of the guest and of containers."""

from __future__ import annotations

import asyncio
import hashlib
import io
import tarfile
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from gcsagent.host.archive import get_archive, put_archive
from gcsagent.host.client import Client
from protocol.errors import Code, RpcError
from protocol.families.archive import Archived, GetArchive, PutArchive
from tests.cases import pattern
from tests.cases.oci import mapped
from tests.cases.target import (
    MIB,
    Target,
    case,
    connect,
    created,
    executing,
    expect,
    name,
    raw_answers,
    refused,
    run,
    running,
)


def tar(*members: tuple[str, bytes, dict[str, Any]]) -> bytes:
    """(name, data, attributes of the TarInfo) each."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, data, more in members:
            member = tarfile.TarInfo(path)
            member.size = len(data)
            for key, value in more.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 50_000):
        yield data[at : at + 50_000]


async def put(client: Client, container: str | None, path: str, data: bytes, **more: Any) -> Archived:
    return await put_archive(client, PutArchive(container, path, **more), pieces(data), digest=True)


async def get(client: Client, container: str | None, path: str, **more: Any) -> tuple[bytes, Archived]:
    received = bytearray()

    async def sink(data: bytes) -> None:
        received.extend(data)

    params = GetArchive(path, container, digest=True, **more)
    result = await get_archive(client, params, sink)
    return bytes(received), result


def members(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {member.name: member for member in archive}


RICH = tar(
    ("top", b"", {"type": tarfile.DIRTYPE, "mode": 0o2750, "uid": 7, "gid": 8, "mtime": 1_000_000}),
    ("top/file", b"content", {"mode": 0o4755, "uid": 1000, "gid": 2000, "mtime": 1_234_567.25}),
    ("top/link", b"", {"type": tarfile.SYMTYPE, "linkname": "/no/where", "uid": 5}),
    ("top/twin", b"", {"type": tarfile.LNKTYPE, "linkname": "top/file"}),
    (
        "top/attributes",
        b"",
        {"pax_headers": {"SCHILY.xattr.user.note": "hello", "SCHILY.xattr.trusted.mine": "there"}},
    ),
    ("top/new\nline \u00fc", b"odd", {}),
    ("top/pipe", b"", {"type": tarfile.FIFOTYPE, "mode": 0o600}),
    ("top/null", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3, "mode": 0o666}),
)


@case
async def files_keep_what_they_are_on_the_way_in_and_out(target: Target) -> None:
    """As a process in the container sees them, and as they come back."""
    async with await connect(target) as client, running(target, client) as init:
        sent = await put(client, init.container, "/srv", RICH, special=True)
        assert (sent.bytes, sent.entries, sent.skipped) == (len(RICH), 8, 0)
        script = "cd /srv/top; stat -c '%a %u %g %Y' . file; stat -c %F pipe null; cat twin; readlink link"
        seen = (await run(client, init.container, "sh", "-c", script)).stdout.decode().splitlines()
        assert seen == [
            *("2750 7 8 1000000", "4755 1000 2000 1234567", "fifo", "character special file"),
            "content/no/where",
        ]
        data, result = await get(client, init.container, "/srv/top")
        assert result.entries == 8
        back, gone = members(data), members(RICH)
        assert set(back) == set(gone)
        for path, was in gone.items():
            now = back[path]
            if path not in ("top/file", "top/twin"):  # either may be the first name of the two
                assert (now.type, now.uid, now.gid) == (was.type, was.uid, was.gid), path
        note = back["top/attributes"].pax_headers
        assert (note["SCHILY.xattr.user.note"], note["SCHILY.xattr.trusted.mine"]) == ("hello", "there")


@case
async def files_come_and_go_with_the_container_created_paused_and_stopped(target: Target) -> None:
    async with await connect(target) as client, created(target, client) as init:
        data = tar(("a", b"early", {}))
        await put(client, init.container, "/srv", data)
        await init.start()
        assert (await run(client, init.container, "cat", "/srv/a")).stdout == b"early"
        await client.pause_container(init.container)
        await put(client, init.container, "/srv", tar(("b", b"paused", {})))
        await client.resume_container(init.container)
        assert (await run(client, init.container, "cat", "/srv/b")).stdout == b"paused"
        await client.kill_container(init.container, "SIGKILL")
        await client.wait_container(init.container)
        await put(client, init.container, "/srv", tar(("c", b"late", {})))
        found = members((await get(client, init.container, "/srv/."))[0])
        assert {"./a", "./b", "./c"} <= set(found)


@case
async def in_a_user_namespace_files_belong_to_whom_they_say(target: Target) -> None:
    """Running, by what its init has; stopped, by what its spec has. So do directories that are missing."""
    data = tar(("deep/new/file", b"x", {"uid": 33, "gid": 34}))
    async with await connect(target) as client, running(target, client, spec=mapped) as init:
        await put(client, init.container, "/srv", data)
        script = "cd /srv/deep; stat -c %u:%g . new new/file"
        seen = (await run(client, init.container, "sh", "-c", script)).stdout
        assert seen.split() == [b"0:0", b"0:0", b"33:34"]
        with refused(Code.INVALID_ARGUMENT):
            await put(client, init.container, "/srv", tar(("nobody", b"", {"uid": 70_000})))
        assert await owners(client, init.container) == [(0, 0), (0, 0), (33, 34)]
        await client.kill_container(init.container, "SIGKILL")
        await client.wait_container(init.container)
        assert await owners(client, init.container) == [(0, 0), (0, 0), (33, 34)]


async def owners(client: Client, container: str) -> list[tuple[int, int]]:
    found = members((await get(client, container, "/srv/deep"))[0])
    return [(each.uid, each.gid) for each in found.values()]


@case
async def no_name_leads_out_of_a_container(target: Target) -> None:
    async with await connect(target) as client, running(target, client) as init:
        await run(client, init.container, "ln", "-s", "../../../../../../srv", "/srv/up")
        await put(client, init.container, "/srv/up", tar(("/inside", b"x", {})))
        assert (await run(client, init.container, "cat", "/srv/inside")).stdout == b"x"
        for hostile in (
            tar(("../x", b"", {})),
            tar(("w", b"", {"type": tarfile.SYMTYPE, "linkname": "/"}), ("w/x", b"", {})),
            tar(("x", b"", {"type": tarfile.LNKTYPE, "linkname": "../../x"})),
            tar(("null", b"", {"type": tarfile.CHRTYPE})),
            b"rubbish" * 1000,
        ):
            with refused(Code.INVALID_ARGUMENT):
                await put(client, init.container, "/srv", hostile)
        with refused(Code.NOT_FOUND, field="path"):
            await put(client, init.container, "/nothing/here", RICH)
        with refused(Code.NOT_FOUND):
            await get(client, init.container, "/nothing")
        with refused(Code.NOT_FOUND):
            await get(client, name("nobody"), "/")
        with refused(Code.RESOURCE_EXHAUSTED, field="max_entries"):
            await get(client, init.container, "/etc", max_entries=3)


@case
async def a_swapped_directory_leads_nowhere_else(target: Target) -> None:
    """A process in the container makes a directory a symlink and back while files are written below it."""
    swap = (
        "mkdir -p /srv/d /srv/real; echo go; while :; do mv /srv/d /srv/e; ln -s /../../../.. /srv/d;"
        " rm /srv/d; mv /srv/e /srv/d; done"
    )
    async with (
        await connect(target) as client,
        running(target, client) as init,
        executing(client, init.container, "sh", "-c", swap) as racer,
    ):
        await expect(racer.streams["stdout"], b"go")
        witness = name("escaped")
        data = tar(*((f"d/{witness}-{number}/x", b"x" * 100, {}) for number in range(300)))
        outcomes = [await outcome(put(client, init.container, "/srv", data)) for _ in range(3)]
        # The directory may not be there just then, or be the symlink.
        assert set(outcomes) <= {None, Code.NOT_FOUND, Code.FAILED_PRECONDITION}, outcomes
        await client.kill_process(init.container, racer.process, "SIGKILL")
        await racer.wait()
        for number in (0, 1, 299):
            for above in ("", "/srv", target.rootfs, f"{target.rootfs}/srv"):
                with refused(Code.NOT_FOUND):
                    await get(client, None, f"{above}/{witness}-{number}")


async def outcome(work: Awaitable[object]) -> Code | None:
    try:
        await work
    except RpcError as error:
        return error.code
    return None


@case
async def sixteen_mib_go_in_and_come_out_the_same(target: Target) -> None:
    size = 16 * MIB
    async with await connect(target) as client, running(target, client) as init:
        data = tar(("large", pattern.take(8, 0, size), {}))
        sent = await put(client, init.container, "/srv", data)
        assert sent.sha256 == hashlib.sha256(data).hexdigest()
        seen = (await run(client, init.container, "sha256sum", "/srv/large")).stdout.split()[0].decode()
        assert seen == pattern.digest(8, size)
        back, _ = await get(client, init.container, "/srv/large")
        with tarfile.open(fileobj=io.BytesIO(back)) as archive:
            large = archive.extractfile("large")
            assert large is not None
            assert hashlib.sha256(large.read()).hexdigest() == pattern.digest(8, size)


@case
async def an_archive_wants_a_connection_of_its_own(target: Target) -> None:
    waiting = ("container.wait", {"container": target.box})
    response = await raw_answers(target, [waiting, ("archive.get", {"path": "/etc"})])
    assert (response.msgid, response.error["code"]) == (101, Code.FAILED_PRECONDITION.value)


@case
async def a_put_that_is_cut_off_leaves_nothing_half(target: Target) -> None:
    big = tar(("small", b"whole", {}), ("big", b"b" * 3_000_000, {}))

    async def half(until: asyncio.Event) -> AsyncIterator[bytes]:
        yield big[:2_000_000]
        until.set()
        await asyncio.Event().wait()

    async with await connect(target) as client, running(target, client) as init:
        sent = asyncio.Event()
        params = PutArchive(init.container, "/srv")
        putting = asyncio.create_task(put_archive(client, params, half(sent)))
        await sent.wait()
        putting.cancel()
        await asyncio.gather(putting, return_exceptions=True)
        with refused(Code.DEADLINE_EXCEEDED):
            await put_archive(client, params, half(asyncio.Event()), deadline=0.5 * target.pace)
        with refused(Code.INVALID_ARGUMENT):
            await put(client, init.container, "/srv", big[:2_000_000])
        listing = await run(client, init.container, "ls", "-A", "/srv")
        assert listing.stdout.split() == [b"small"]

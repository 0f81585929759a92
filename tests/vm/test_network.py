"""A VM with a network card: configured over the wire, and containers that reach the host through it."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gcsagent.host import network
from gcsagent.host.client import Client
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.console import scan
from gcsagent.host.vm.errors import PlugError
from gcsagent.host.vm.launcher import VirtualMachine
from protocol.errors import Code
from protocol.families.network import ApplyNetwork, AttachNetwork, Interface, Route
from protocol.pods import Dns
from tests.cases.machines import PACE, Booted
from tests.cases.network import names_become
from tests.cases.target import Target, connect, refused, run, running

# The first test boots the VM, and may build its image.
pytestmark = pytest.mark.timeout(1300)
ROOTFS = "/run/gcs/disks/rootfs"
REPO = Path(__file__).resolve().parents[2]
BOOT_SECONDS, SECONDS, END_SECONDS = 240.0, 180.0, 90.0
MAC, LATER = "52:54:00:aa:bb:01", "52:54:00:aa:bb:02"
PAGE = b"served by the host\n"


@pytest.fixture(scope="module")
def wired(
    built_image: Path, rootfs_image: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Booted]:
    log = tmp_path_factory.mktemp("wired") / "console"
    config = VmConfig(
        name="wired", image=built_image, rootfs=rootfs_image, console_log=log, net="user", mac=MAC
    )
    with asyncio.Runner() as runner:
        machine = runner.run(asyncio.wait_for(VirtualMachine.launch(config), BOOT_SECONDS))
        try:
            yield Booted(machine, runner)
            runner.run(asyncio.wait_for(_power_off(machine), END_SECONDS))
            assert scan(log.read_text(errors="replace")) == []
        finally:
            print("\n".join(machine.console.lines()[-40:]))
            machine.destroy()


async def _power_off(machine: VirtualMachine) -> None:
    async with await Client.connect(machine.address) as client:
        await client.shutdown()
        ended = await machine.wait()
    assert (ended.clean, ended.status, ended.findings) == (True, 0, ()), ended


def _run(wired: Booted, work: object) -> None:
    wired.runner.run(asyncio.wait_for(work, SECONDS))  # type: ignore[arg-type]


def _target(wired: Booted) -> Target:
    return Target(wired.machine.address, ROOTFS, box="", pace=PACE[wired.machine.accel.name], execs=1)


@contextlib.asynccontextmanager
async def _serving() -> AsyncIterator[int]:
    """An HTTP server on this host's loopback: the port it has."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.0 200 OK\r\nContent-Length: {len(PAGE)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + PAGE)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


def _fetch(port: int) -> tuple[str, ...]:
    url = f"http://10.0.2.2:{port}/"
    code = f"import urllib.request as u; print(u.urlopen({url!r}, timeout=20).read().decode(), end='')"
    return ("python3", "-c", code)


def test_the_card_is_configured_by_its_address_and_only_once(wired: Booted) -> None:
    async def work() -> None:
        async with await connect(_target(wired)) as client:
            before = await network.state(client)
            card = next(each for each in before.interfaces if each.mac == MAC)
            assert (card.addresses, card.up, before.dns) == ((), False, Dns())
            done = await network.use_user_network(client, MAC)
            assert done.changes
            again = await network.use_user_network(client, MAC)
            assert again.changes == ()
            now = await network.state(client)
            card = next(each for each in now.interfaces if each.mac == MAC)
            assert (card.name, card.up, card.running) == ("eth0", True, True)
            assert "10.0.2.15/24" in card.addresses
            default = [route for route in now.routes if (route.to, route.family) == ("default", 4)]
            assert [(route.via, route.interface) for route in default] == [("10.0.2.2", "eth0")]
            assert now.dns.nameservers == ("10.0.2.3",)

    _run(wired, work())


def test_a_container_on_a_bridge_reaches_the_host(wired: Booted) -> None:
    async def work() -> None:
        target = _target(wired)
        async with await connect(target) as client, _serving() as port, running(target, client) as web:
            alone = await run(client, web.container, *_fetch(port))
            assert (alone.stdout, alone.exit.exit_code) == (b"", 1)
            subnets = ("10.88.0.0/16", "fd00:88::/64")
            found = await network.attach(client, AttachNetwork(web.container, subnets=subnets))
            assert found.interface.addresses[0] == "10.88.0.2/16"
            done = await run(client, web.container, *_fetch(port))
            assert (done.stdout, done.exit.exit_code) == (PAGE, 0), done.stderr
            guest = await network.state(client)
            assert guest.masquerade == subnets
            assert found.peer in [each.name for each in guest.interfaces]
        async with await connect(target) as client:
            await network.remove(client, "gcs0")
            assert await names_become(client, "lo", "eth0") == ["lo", "eth0"]
            assert (await network.state(client)).masquerade == ()

    _run(wired, work())


def test_a_card_moves_into_a_container_and_comes_back(wired: Booted) -> None:
    async def work() -> None:
        target = _target(wired)
        async with await connect(target) as client, _serving() as port:
            async with running(target, client) as web:
                params = ApplyNetwork(
                    web.container,
                    (Interface("net0", mac=MAC, addresses=("10.0.2.15/24",), mtu=1400),),
                    routes=(Route("default", "10.0.2.2"),),
                )
                assert (await network.apply(client, params)).changes
                assert (await network.apply(client, params)).changes == ()
                done = await run(client, web.container, *_fetch(port))
                assert (done.stdout, done.exit.exit_code) == (PAGE, 0), done.stderr
                guest = await network.state(client)
                assert MAC not in [each.mac for each in guest.interfaces]
                with refused(Code.NOT_FOUND, field="interfaces[0].mac"):
                    await network.apply(client, ApplyNetwork(interfaces=(Interface("eth0", mac=MAC),)))
            await network.use_user_network(client, MAC)
            back = next(each for each in (await network.state(client)).interfaces if each.mac == MAC)
            assert (back.name, back.addresses[0]) == ("eth0", "10.0.2.15/24")

    _run(wired, work())


def test_a_card_that_is_plugged_in_later_is_taken_when_it_comes(wired: Booted) -> None:
    async def work() -> None:
        machine, target = wired.machine, _target(wired)
        async with await connect(target) as client, _serving() as port, running(target, client) as web:
            params = ApplyNetwork(
                web.container,
                (Interface("net0", mac=LATER, addresses=("10.0.2.15/24",)),),
                routes=(Route("default", "10.0.2.2"),),
                wait_ms=60_000,
            )
            applying = asyncio.create_task(network.apply(client, params))
            await client.ping()
            assert await machine.plug_nic(LATER) == LATER
            done = await applying
            assert [(each.name, each.mac) for each in done.interfaces] == [("net0", LATER)]
            fetched = await run(client, web.container, *_fetch(port))
            assert (fetched.stdout, fetched.exit.exit_code) == (PAGE, 0), fetched.stderr
            await machine.unplug_nic(LATER)
            left = await network.state(client, web.container)
            assert [each.name for each in left.interfaces] == ["lo"]
        for mac, problem in ((MAC, "since the boot"), (LATER, "does not exist")):
            with pytest.raises(PlugError, match=problem):
                await machine.unplug_nic(mac)

    _run(wired, work())


async def _gcsctl(*words: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gcsagent.host", *words, stdout=PIPE, stderr=PIPE, cwd=REPO
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def test_gcsctl_runs_a_container_on_a_bridge(wired: Booted) -> None:
    async def work() -> None:
        address = ("--address", wired.machine.address)
        async with _serving() as port:
            script = f"cat /etc/resolv.conf && {shlex.join(_fetch(port))}"
            where = ("--rm", "--overlay", "--rootfs", ROOTFS)
            ran = await _gcsctl(*address, "run", "--network", "bridge", *where, "--", "sh", "-c", script)
            assert ran[0] == 0, ran
            assert ran[1].splitlines() == ["nameserver 10.0.2.3", PAGE.decode().strip()]
        shown = await _gcsctl(*address, "network", "show")
        assert shown[0] == 0, shown
        assert "10.0.2.15/24" in shown[1]
        assert "route default via 10.0.2.2 dev eth0" in shown[1]
        assert "masquerade 10.88.0.0/16" in shown[1]
        same = ("set", "eth0", "--mac", MAC, "--address", "10.0.2.15/24", "--gateway", "10.0.2.2")
        assert await _gcsctl(*address, "network", *same) == (0, "nothing to change\n", "")
        assert (await _gcsctl(*address, "network", "remove", "gcs0"))[0] == 0

    _run(wired, work())


def test_gcsctl_vm_run_has_the_network_it_is_asked_for(built_image: Path, rootfs_image: Path) -> None:
    async def work() -> None:
        async with _serving() as port:
            options = ("--net", "user", "--guest-image", str(built_image), "--rootfs", str(rootfs_image))
            ran = await _gcsctl("vm", "run", *options, "--", *_fetch(port))
            assert (ran[0], ran[1]) == (0, PAGE.decode()), ran

    asyncio.run(asyncio.wait_for(work(), BOOT_SECONDS))

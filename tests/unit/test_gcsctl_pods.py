"""What gcsctl's options about pods become, and what is refused at once."""

from __future__ import annotations

from typing import Any

import pytest

from gcsagent.host.cli import parser
from gcsagent.host.cli.common import UsageError
from gcsagent.host.cli.run import run_plan
from protocol.address import UnixAddress
from protocol.families.container import CreateContainer
from protocol.pods import Dns, HostsEntry, PodFiles, PodLimits, PodMember, PodNamespace, Sandbox

NETWORK, IPC, UTS, PID, USER = PodNamespace


def params(*argv: str, source: tuple[str, ...] = ("--rootfs", "/r")) -> CreateContainer:
    command = ("--", "x") if source[0] == "--rootfs" else ()
    args = parser.parse(["create", "--id", "web", *source, *argv, *command])
    return run_plan(args, UnixAddress("/s")).params


def test_without_options_there_is_no_pod() -> None:
    made = params()
    assert (made.sandbox, made.pod) == (None, None)


def test_a_sandbox_has_what_was_given() -> None:
    assert params("--sandbox").sandbox == Sandbox()
    argv = "--ip 10.0.0.5 --add-host db,store:10.0.0.6 --add-host six:[fd00::1] --add-host seven=fd00::2"
    argv += " --dns 10.0.0.1 --dns ::1 --dns-search a.net --dns-option ndots:5 --pod-files rw --shm-size 8m"
    argv += " --pod-memory 256M --pod-cpus 0.5 --pod-cpu-shares 512 --pod-pids-limit 99"
    made = params("--sandbox", "--hostname", "host", *argv.split())
    assert made.sandbox == Sandbox(
        address="10.0.0.5",
        hosts=(
            HostsEntry("10.0.0.6", ("db", "store")),
            HostsEntry("fd00::1", ("six",)),
            HostsEntry("fd00::2", ("seven",)),
        ),
        dns=Dns(("10.0.0.1", "::1"), ("a.net",), ("ndots:5",)),
        files=PodFiles.WRITABLE,
        shm_bytes=8 << 20,
        limits=PodLimits(256 << 20, 0.5, 512, 99),
    )
    assert made.spec is not None
    assert made.spec["hostname"] == "host"


@pytest.mark.parametrize(
    "argv, share",
    [
        ((), (NETWORK, IPC, UTS)),
        (("--share", "network,pid"), (NETWORK, PID)),
        (("--share", "net,net"), (NETWORK,)),
        (("--share", "user,network"), (USER, NETWORK)),
        (("--share", "none"), ()),
    ],
)
def test_a_container_of_a_pod_shares_what_is_listed(
    argv: tuple[str, ...], share: tuple[PodNamespace, ...]
) -> None:
    assert params("--pod", "web", *argv).pod == PodMember("web", share)


def test_pods_go_with_bundles() -> None:
    assert params("--pod", "web", source=("--bundle", "/b")).pod == PodMember("web")
    assert params("--sandbox", source=("--bundle", "/b")).sandbox == Sandbox()


@pytest.mark.parametrize(
    "argv",
    [
        "--sandbox --pod web",
        "--share pid",
        "--dns 10.0.0.1",
        "--add-host a:10.0.0.1 --pod web",
        "--pod-memory 1G",
        "--pod web --hostname x",
        "--pod web --network host",
        "--pod web --share pid --pid host",
        "--pod web --share user --userns 0:100000:65536",
    ],
)
def test_contradictions_are_refused(argv: str) -> None:
    with pytest.raises(UsageError):
        params(*argv.split())


@pytest.mark.parametrize(
    "argv",
    [
        ["--pod", "-x"],
        ["--share", "mount"],
        ["--share", ""],
        ["--ip", "10.0.0"],
        ["--add-host", "name"],
        ["--add-host", ":10.0.0.1"],
        ["--add-host", "a b:10.0.0.1"],
        ["--dns", "ns.example.org"],
        ["--dns-search", "a b"],
        ["--dns-option", "ndots 5"],
        ["--pod-files", "yes"],
        ["--pod-memory", "lots"],
        ["--pod-cpus", "0"],
        ["--pod-pids-limit", "many"],
    ],
    ids=" ".join,
)
def test_a_value_that_is_none_is_refused_in_one_line(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse(["run", "--rootfs", "/r", "--sandbox", *argv, "--", "x"])
    assert caught.value.code == 125
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert argv[0] in lines[0]


def test_the_pods_limits_are_changed_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    args: Any = parser.parse(["pod", "update", "--memory", "-1", "--cpus", "0.5", "--pids", "-1", "web"])
    assert (args.memory_bytes, args.cpus, args.cpu_shares, args.pids, args.id) == (-1, 0.5, None, -1, "web")

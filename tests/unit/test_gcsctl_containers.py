"""gcsctl's commands about containers that are there."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.cli.common import describe_oom
from protocol.errors import Code, RpcError
from protocol.families.agent import Pong
from protocol.method import Empty
from protocol.types import Oom, OomScope, OomVictim, Reason
from tests.fakes.fake_agent import FakeAgent, exit_record
from tests.gcsctl_process import MORE, Done, gcsctl, refusing, with_agent


def container_state(params: Any) -> dict[str, Any]:
    init = {
        "container": "c",
        "process": "init",
        "status": "stopped",
        "pid": 42,
        "args": ["sh", "-c", "echo \x1b[31mred"],
        "exit": {
            "exit_code": 137,
            "signal": 9,
            "reason": "signalled",
            "pid": 42,
            "started_at_ns": 1,
            "exited_at_ns": 2,
        },
    }
    return {
        "container": "c",
        "status": "stopped",
        "pid": 42,
        "bundle": "/b",
        "created_at_ns": 1,
        "processes": [init],
    }


EVIL = "echo \x1b[31mred"
PROCESS = {
    "pid": 213,
    "ns_pid": 7,
    "ppid": 1,
    "uid": 0,
    "process": "sh-1",
    "state": "S",
    "command": "sh",
    "running": True,
    "created_by_runtime": True,
    "zombie": False,
    "threads": 1,
    "started_at_ns": 1_764_000_000_000_000_000,
    "cpu_us": 1_250_000,
    "rss_bytes": 3 << 19,
}


def test_ps_of_a_container_asks_until_it_has_all(tmp_path: Path) -> None:
    dead = {"running": False, "created_by_runtime": False, "zombie": True, "process": "", "state": "Z"}
    pages = {
        0: {"processes": [PROCESS], "left_out": 1},
        213: {"processes": [{**PROCESS, **dead, "pid": 214, "ns_pid": 0, "rss_bytes": 0}]},
    }

    async def body(agent: FakeAgent) -> None:
        agent.handlers["container.processes"] = lambda params: pages[params.after]
        done = await gcsctl(agent, "ps", "c")
        assert done.code == 0, done.err
        header, one, two = (line.split() for line in done.out.splitlines())
        assert " ".join(header) == "PID NSPID PPID UID PROCESS STATE AGE CPU RSS COMMAND"
        assert " ".join(one[:6] + one[7:]) == "213 7 1 0 sh-1 S 1.25 1.5 MiB sh"
        assert " ".join(two[:7] + two[8:]) == "214 - 1 0 - Z zombie 1.25 0 B sh"
        document = json.loads((await gcsctl(agent, "ps", "--json", "c")).out)
        assert [(each["pid"], each["zombie"]) for each in document] == [(213, False), (214, True)]

    with_agent(tmp_path, body)


def test_wait_kill_delete_start(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers |= {
            "container.wait": lambda params: exit_record(137, signal=9),
            "container.kill": lambda params: Empty(),
            "container.delete": lambda params: {},
            "container.start": lambda params: {"pid": 8},
            "container.pause": lambda params: Empty(),
            "container.resume": lambda params: Empty(),
        }
        assert await gcsctl(agent, "pause", "c") == Done(0, "", "")
        assert await gcsctl(agent, "resume", "c") == Done(0, "", "")
        assert agent.named("container.pause") == agent.named("container.resume") == [{"container": "c"}]
        assert await gcsctl(agent, "wait", "c") == Done(137, "", "")
        done = await gcsctl(agent, "wait", "--json", "c")
        assert (done.code, json.loads(done.out)["signal"]) == (137, 9)
        assert await gcsctl(agent, "kill", "-s", "usr1", "c") == Done(0, "", "")
        assert await gcsctl(agent, "kill", "-s", "9", "c") == Done(0, "", "")
        assert [call["signal"] for call in agent.named("container.kill")] == ["USR1", 9]
        assert await gcsctl(agent, "delete", "--force", "c") == Done(0, "", "")
        assert agent.named("container.delete") == [{"container": "c", "force": True}]
        assert json.loads((await gcsctl(agent, "--json", "start", "c")).out) == {"container": "c", "pid": 8}

    with_agent(tmp_path, body)


def test_several_containers_are_each_tried_and_each_failure_is_told(tmp_path: Path) -> None:
    def only_b(params: Any) -> Any:
        if params.container == "b":
            return {}
        raise RpcError(Code.NOT_FOUND, f"there is no container {params.container}")

    async def body(agent: FakeAgent) -> None:
        agent.handlers["container.delete"] = only_b
        done = await gcsctl(agent, "--json", "delete", "-f", "a", "b", "c")
        assert [call["container"] for call in agent.named("container.delete")] == ["a", "b", "c"]
        assert (done.code, json.loads(done.out)["container"]) == (125, "b")
        told = [line.split(" (")[0] for line in done.err.splitlines()]
        assert told == ["gcsctl: there is no container a", "gcsctl: there is no container c"]
        assert await gcsctl(agent, "delete", "b", "b") == Done(0, "", "")

    with_agent(tmp_path, body)


def test_several_are_stopped_at_once(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        both = asyncio.Barrier(2)

        async def ended(params: Any) -> Any:
            await both.wait()  # for the other one
            return exit_record(0)

        agent.handlers |= {"container.kill": lambda _: Empty(), "container.wait": ended}
        assert await gcsctl(agent, "stop", "a", "b") == Done(0, "", "")
        done = await gcsctl(agent, "kill", "-a", "-p", "p1", "a", "b")
        assert (done.code, done.err.count("\n")) == (125, 1)

    with_agent(tmp_path, body)


OOM = Oom(OomScope.CONTAINER, "/gcs/c", "/gcs/c", 3, 1, (OomVictim(42, "init", "sh \x1b[2J"),))


def test_want_of_memory_is_said_in_one_line(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        killed = dataclasses.replace(exit_record(137, signal=9), reason=Reason.OOM, oom=OOM)
        agent.handlers["container.wait"] = lambda params: killed
        what = "the limit of /gcs/c was reached; 1 killed: init (pid 42), 3 so far\n"
        wanted = Done(137, "", f"gcsctl: c was killed for want of memory: {what}")
        assert await gcsctl(agent, "wait", "c") == wanted
        agent.handlers["container.wait"] = lambda params: dataclasses.replace(exit_record(6), oom=OOM)
        wanted = Done(6, "", f"gcsctl: processes of c were killed for want of memory: {what}")
        assert await gcsctl(agent, "wait", "c") == wanted
        done = await gcsctl(agent, "wait", "--json", "c")
        assert (done.err, json.loads(done.out)["oom"]["victims"][0]["pid"]) == ("", 42)

    with_agent(tmp_path, body)


def test_a_signal_goes_to_init_to_an_exec_or_to_all(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers |= {"container.kill": lambda _: Empty(), "process.kill": lambda _: Empty()}
        assert await gcsctl(agent, "kill", "-a", "-s", "rtmin+3", "c") == Done(0, "", "")
        assert await gcsctl(agent, "kill", "-p", "p1", "c") == Done(0, "", "")
        assert agent.named("container.kill") == [{"container": "c", "signal": "RTMIN+3", "all": True}]
        assert agent.named("process.kill") == [{"container": "c", "process": "p1", "signal": "SIGTERM"}]
        done = await gcsctl(agent, "kill", "-a", "-p", "p1", "c")
        assert (done.code, done.out) == (125, "")
        assert "--all" in done.err

    with_agent(tmp_path, body)


@pytest.mark.parametrize(
    "oom, shown",
    [
        (OOM, "the limit of /gcs/c was reached; 1 killed: init (pid 42), 3 so far"),
        (Oom(OomScope.MACHINE, "/gcs/c", "", 1, 1), "the whole guest ran out; 1 killed"),
        (Oom(OomScope.ANCESTOR, "/gcs/c", "/gcs", 1, 1), "the limit of /gcs was reached; 1 killed"),
        (Oom(cgroup="/gcs/c", kills=2, new=2), "in /gcs/c; 2 killed"),
        (
            Oom(cgroup="/c", kills=2, new=2, victims=(OomVictim(7, "", "cat"), OomVictim(8))),
            "in /c; 2 killed: cat (pid 7), a process (pid 8)",
        ),
    ],
)
def test_whose_memory_it_was_is_named(oom: Oom, shown: str) -> None:
    assert describe_oom(oom) == shown


def test_what_the_guest_says_cannot_drive_the_terminal(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers |= {
            "container.list": lambda params: {"containers": [container_state(None)]},
            "container.state": container_state,
            "container.processes": lambda params: {"processes": [{**PROCESS, "command": EVIL}]},
            "container.start": refusing(Code.INTERNAL, "evil \x1b]52;c;x\x07\nsecond line \u202e"),
        }
        for argv in (("ps",), ("ps", "c"), ("state", "c")):
            done = await gcsctl(agent, *argv)
            assert done.code == 0
            assert r"echo \x1b[31mred" in done.out
            assert "\x1b" not in done.out
        done = await gcsctl(agent, "start", "c")
        assert done.err == f"gcsctl: evil \\x1b]52;c;x\\x07\\nsecond line \\u202e ({MORE})\n"
        document = json.loads((await gcsctl(agent, "--json", "ps")).out)
        assert document[0]["processes"][0]["args"][2] == "echo \x1b[31mred"

    with_agent(tmp_path, body)


def test_state_shows_what_the_runtime_says_and_where_it_differs(tmp_path: Path) -> None:
    view = {"status": "paused", "pid": 4, "created_at_ns": 10**9, "init_started_at_ns": 2 * 10**9}

    async def body(agent: FakeAgent) -> None:
        agent.handlers["container.state"] = lambda params: {
            **container_state(None),
            "runtime_view": {**view, "differences": ["the agent has it as running, the runtime as paused"]},
        }
        done = await gcsctl(agent, "state", "c")
        assert agent.named("container.state") == [{"container": "c", "ask_runtime": True}]
        lines = dict(line.split(":", 1) for line in done.out.splitlines() if "process" not in line)
        assert lines["runtime says"].strip() == "paused, pid 4, created 1970-01-01T00:00:01Z"
        assert lines["init made"].strip() == "1970-01-01T00:00:02Z"
        assert lines["DIFFERENCE"].strip() == "the agent has it as running, the runtime as paused"

    with_agent(tmp_path, body)


def test_ping(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers["agent.ping"] = lambda params: Pong(3, 5000, 200)
        done = await gcsctl(agent, "ping")
        assert done.out.startswith(f"{agent.address}: up 5.0 s, generation 3, loop lag 0.2 ms, round trip ")
        document = json.loads((await gcsctl(agent, "ping", "--json")).out)
        assert (document["generation"], document["loop_lag_us"]) == (3, 200)

    with_agent(tmp_path, body)


def test_attach_needs_streams(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers["process.state"] = lambda params: container_state(None)["processes"][0]
        done = await gcsctl(agent, "attach", "c")
        assert done.code == 125
        assert "no streams to attach to" in done.err

    with_agent(tmp_path, body)


CHECKPOINT = {
    "checkpoint": "web-1",
    "container": "web",
    "path": "/run/gcs/checkpoints/web-1",
    "created_at_ns": 1,
    "size_bytes": 3 << 20,
    "leave_running": True,
}


def test_checkpoints(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers |= {
            "container.checkpoint": lambda params: CHECKPOINT,
            "container.restore": lambda params: {"pid": 8},
            "checkpoint.list": lambda params: {"checkpoints": [CHECKPOINT]},
            "checkpoint.delete": lambda params: Empty(),
        }
        made = await gcsctl(agent, "checkpoint", "create", "--leave-running", "--file-locks", "web", "web-1")
        assert made == Done(0, "web-1\n", "")
        [wanted] = agent.named("container.checkpoint")
        assert (wanted["container"], wanted["checkpoint"]) == ("web", "web-1")
        chosen = ("leave_running", "tcp_established", "ext_unix_sk", "shell_job", "file_locks")
        assert [wanted[name] for name in chosen] == [True, False, False, False, True]
        done = await gcsctl(agent, "checkpoint", "ls")
        assert re.search(r"web-1 +web +3.0 MiB .* /run/gcs/checkpoints/web-1\n", done.out), done
        done = await gcsctl(agent, "checkpoint", "ls", "--json")
        assert json.loads(done.out)[0]["size_bytes"] == 3 << 20
        assert await gcsctl(agent, "restore", "--id", "b", "web-1") == Done(0, "", "")
        assert await gcsctl(agent, "restore", "--path", "/srv/web-1") == Done(0, "", "")
        first, second = agent.named("container.restore")
        assert (first["checkpoint"], first["container"]) == ("web-1", "b")
        assert (second["path"], "container" in second) == ("/srv/web-1", False)
        done = await gcsctl(agent, "restore")
        assert (done.code, "NAME, or --path" in done.err) == (125, True)
        assert await gcsctl(agent, "checkpoint", "rm", "web-1") == Done(0, "", "")
        assert agent.named("checkpoint.delete") == [{"checkpoint": "web-1"}]

    with_agent(tmp_path, body)


def test_stats(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        found = {
            "container": "c",
            "time_ns": 1,
            "memory": {
                "current": 3 << 20,
                "limit": 1 << 30,
                "peak": 2048,
                "swap": 1 << 20,
                "swap_limit": 2 << 20,
            },
            "cpu": {"usage_us": 1_500_000, "throttled_us": 250_000, "limit": 0.5},
            "pids": {"current": 2},
            "memory_pressure": {"some_avg10": 0.25},
            "io": {"limits": [{"device": "8:0", "write_bps": 1 << 20, "write_iops": 70}]},
        }
        agent.handlers["container.stats"] = lambda params: found
        shown = await gcsctl(agent, "stats", "c")
        assert [line.split() for line in shown.out.splitlines()] == [
            ["WHAT", "NOW", "LIMIT", "PEAK", "PRESSURE"],
            ["memory", "3.0", "MiB", "1.0", "GiB", "2.0", "KiB", "0.2", "%"],
            ["working", "set", "-", "-", "-", "-"],
            ["swap", "1.0", "MiB", "2.0", "MiB", "-", "-"],
            ["cpu", "1.500", "s,", "throttled", "0.250", "s", "0.5", "CPUs", "-", "-"],
            ["pids", "2", "-", "-", "-"],
            ["read", "-", "-", "-", "-"],
            ["written", "-", "8:0", "1.0", "MiB/s,", "8:0", "70/s", "-", "-"],
        ]
        document = json.loads((await gcsctl(agent, "stats", "--json", "c")).out)
        assert document["memory"]["swap_limit"] == 2 << 20
        assert document["io_pressure"] is None

    with_agent(tmp_path, body)


def test_update(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers["container.update"] = lambda params: Empty()
        assert await gcsctl(agent, "update", "--memory", "64M", "--cpus", "0.5", "c") == Done(0, "", "")
        assert await gcsctl(agent, "update", "--pids", "7", "--memory", "2048k", "c") == Done(0, "", "")
        assert agent.named("container.update") == [
            {"container": "c", "memory_bytes": 64 << 20, "cpus": 0.5, "io": []},
            {"container": "c", "memory_bytes": 2 << 20, "pids": 7, "io": []},
        ]
        argv = "--memory-swap -1 --memory-reservation 1M --cpu-shares 512 --cpuset-cpus 0-1 --cpuset-mems 0"
        argv += " --pids -1 --io-weight 100 --io-read-bps 8:0:1M --io-read-iops /dev/vdb:5"
        argv += " --io-write-bps 8:0:0 --io-write-iops 8:0:7"
        done = await gcsctl(agent, "update", "--json", *argv.split(), "c")
        assert done.code == 0
        assert agent.named("container.update")[2] == {
            "container": "c",
            "memory_swap_bytes": -1,
            "memory_reservation_bytes": 1 << 20,
            "cpu_shares": 512,
            "cpuset_cpus": "0-1",
            "cpuset_mems": "0",
            "pids": -1,
            "io_weight": 100,
            "io": [
                {"device": "8:0", "read_bps": 1 << 20, "write_bps": 0, "write_iops": 7},
                {"device": "/dev/vdb", "read_iops": 5},
            ],
        }
        assert json.loads(done.out)["pids"] == -1

    with_agent(tmp_path, body)

"""The agent's import budget: what it has loaded when it says READY, held against a list.

Whatever a new import brings in before that costs every agent memory and every boot time. What is not on the
list belongs into :mod:`gcsagent.agent.services`, or into the function that wants it.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import msgpack
import pytest

from gcsagent.agent import methods, services, stdlib
from gcsagent.agent.call import Call
from gcsagent.agent.dispatch import Dispatcher
from gcsagent.agent.later import Later, Unloaded
from gcsagent.common import channel
from gcsagent.common.config import Settings
from protocol.errors import Code, RpcError
from protocol.method import Envelope
from protocol.methods import ATTACH, ELSEWHERE, METHODS, STREAMING

ROOT = Path(__file__).parents[2]

AGENT = """
app archives attachable bounds call calls cgroup_tree cgroups changes container counters criu dispatch
estate events failures features fifo fifos found freezing info inroot journal kernfs kmsg later leftovers logs
machine_facts methods oci oci.cgroup_path oci.look oom pods pods.join pods.pod proc process process_dir
processes quiet reach registry relay reload ring roots room runc runc_argv runtime runtime_facts runtimes
seeing seeing.logring seeing.traffic server services session signals spool spool_index spool_reader
spool_stream stdio stdlib stopwatch streams streams_attach subscription supervisor_client takeover terminal
turns unattachable upgrade wire
"""

CONTRACT = """
address checks connection dataclass errors families families.agent families.archive families.container
families.events families.process families.stream framing limits method methods pods scan schema types usage
"""

NEVER = """
ast bz2 concurrent.futures.thread ctypes dataclasses dis glob ipaddress lzma platform pythonjsonlogger random
tempfile tenacity urllib uuid zoneinfo
"""

UNTIL_READY = """
import json, os, runpy, sys
from gcsagent.agent.stdlib import StandIn, load_later
load_later()
from gcsagent.agent.supervisor_client import SupervisorClient
call = SupervisorClient.call

async def and_then_told(self, operation, arguments, fds=()):
    if operation == "ready":
        loaded = [name for name, module in sys.modules.items() if module and not isinstance(module, StandIn)]
        sys.stdout.write(json.dumps(loaded))
        sys.stdout.flush()
        os._exit(0)
    return await call(self, operation, arguments, fds)

SupervisorClient.call = and_then_told
runpy.run_module("gcsagent.agent", run_name="__main__")
"""

ANSWERS: dict[str, Any] = {
    "list": [],
    "upgrade_status": {"state": "none", "error": "", "path": "", "running": ""},
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Of an agent as a guest starts it the first time, but for the address it listens on."""
    state = tmp_path_factory.mktemp("state")
    settings = Settings(listen=(f"unix:{state}/gcs.sock",), state=str(state), watchdog=0)
    ours, theirs = channel.pair()
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": f"{ROOT}:{Path(msgpack.__file__).parents[1]}",
        "GCS_SETTINGS": settings.to_json(),
        "GCS_GENERATION": "1",
        "GCS_SUPERVISOR_PID": "1",
        "GCS_CHANNEL_FD": str(theirs.fileno()),
    }
    # -S: what a site's .pth files import is not ours.
    agent = subprocess.Popen(
        [sys.executable, "-S", "-P", "-c", UNTIL_READY],
        env=environment,
        pass_fds=[theirs.fileno()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with agent, ours:
        theirs.close()
        _answer(ours)
        said, complained = agent.communicate(timeout=30)
    assert agent.returncode == 0, complained.decode()
    return set(json.loads(said))


def _answer(supervisor: socket.socket) -> None:
    """Until the agent has ended."""
    supervisor.settimeout(30)
    while (received := channel.receive(supervisor)) is not None:
        (ident, operation, _), fds = received
        channel.close_all(fds)
        if isinstance(ident, int) and ident > 0:
            channel.send(supervisor, channel.pack([ident, None, ANSWERS.get(operation)]))


def test_an_agent_has_loaded_what_is_on_the_list_and_no_more(loaded: set[str]) -> None:
    guest = {name for name in loaded if name.startswith("gcsagent.agent.")} - {"gcsagent.agent.__main__"}
    assert guest == {f"gcsagent.agent.{name}" for name in AGENT.split()}
    assert {name for name in loaded if name.startswith("protocol.")} == {
        f"protocol.{name}" for name in CONTRACT.split()
    }


def test_nor_what_of_the_standard_library_it_rarely_needs(loaded: set[str]) -> None:
    assert loaded.isdisjoint(NEVER.split()), sorted(loaded & set(NEVER.split()))
    assert loaded.isdisjoint({*stdlib.LATER, *stdlib.NEVER, "_ssl"}), sorted(loaded)


def test_a_stand_in_hands_on_what_its_module_has() -> None:
    code = """
import sys
from gcsagent.agent.stdlib import StandIn, load_later
load_later()
import shlex, asyncio
assert type(shlex) is StandIn and type(sys.modules["inspect"]) is StandIn
assert shlex.join(["a b"]) == "'a b'"
assert type(sys.modules["shlex"]) is not StandIn
import inspect
assert inspect.iscoroutinefunction(asyncio.sleep)
from shutil import which
assert which("sh")
assert not hasattr(shlex, "__path__") and not hasattr(shlex, "nothing")
print(asyncio.run(asyncio.to_thread(lambda: "done")))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_one_that_cannot_be_loaded_now_may_be_later(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = stdlib.StandIn("gcs_absent")
    monkeypatch.setitem(sys.modules, "gcs_absent", stand_in)
    with pytest.raises(ImportError):
        _ = stand_in.anything
    assert sys.modules["gcs_absent"] is stand_in
    there = types.ModuleType("gcs_absent")
    there.anything = 5  # type: ignore[attr-defined]
    monkeypatch.setattr("builtins.__import__", lambda name: sys.modules.__setitem__(name, there))
    found = stand_in.anything
    monkeypatch.undo()
    assert found == 5


class Recorder:
    """A registry, as far as making services goes."""

    def __getattr__(self, name: str) -> Any:
        if name in ("storage", "checkpoints", "snapshots", "pressure"):
            return getattr(services, name)(
                self, *{"storage": ("/s", False), "snapshots": ("/s",)}.get(name, ())
            )
        return Recorder()


def test_the_table_has_all_of_the_contract() -> None:
    registry: Any = Recorder()
    agent: Any = Recorder()
    forwards = services.forwards(registry, "g1")
    log: Any = Recorder()
    table = methods.build(registry, agent, forwards, log)
    assert table.keys() | methods.SESSION_METHODS | STREAMING | ELSEWHERE == METHODS.keys()
    assert not table.keys() & (methods.SESSION_METHODS | STREAMING | ELSEWHERE)
    assert methods.openers(forwards).keys() | {ATTACH} == STREAMING - ELSEWHERE


def test_a_service_that_cannot_be_loaded_is_an_error_of_its_request_alone() -> None:
    """And is there for the next one, when there is memory for it again."""
    tries = []

    def make() -> dict[str, Any]:
        tries.append(1)
        if len(tries) == 1:
            raise MemoryError
        return {"pong": "made"}

    later = Later(make)
    entry: Unloaded = later.handler(lambda service: lambda _params, _call: service["pong"])
    quiet_journal: Any = None
    dispatcher = Dispatcher({"agent.ping": entry}, quiet_journal, lambda: False)
    answers: list[Any] = []
    log: Any = None

    async def ask() -> None:
        dispatcher.run(Call("agent.ping", None, log), {}, None, Envelope(), answers.append)

    for _ in range(3):
        asyncio.run(ask())
    assert isinstance(answers[0], RpcError)
    assert answers[0].code is Code.UNAVAILABLE
    assert "a part of the agent cannot be loaded (MemoryError" in answers[0].message
    assert answers[1:] == ["made", "made"]
    assert len(tries) == 2

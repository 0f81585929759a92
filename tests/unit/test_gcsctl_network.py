"""gcsctl network: from the arguments to the request, and how what comes back is shown."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.cli import network, parser
from gcsagent.host.cli.common import UsageError
from gcsagent.host.cli.run import run_plan
from protocol.address import UnixAddress
from protocol.families.network import (
    Applied,
    ApplyNetwork,
    AttachNetwork,
    Interface,
    InterfaceState,
    NetworkState,
    Route,
    RouteState,
)
from protocol.pods import Dns

MAC = "52:54:00:12:34:56"


class Client:
    """Takes the place of the connection: what it is asked is kept, what it answers given."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, ("", None)

    async def call(self, method: str, params: Any, **_more: Any) -> Any:
        self.asked = (method, params)
        return self.answer

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_what: object) -> None:
        pass


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    def ask(answer: Any, *argv: str) -> tuple[str, Any]:
        client = Client(answer)

        async def connect(_args: Any) -> Client:
            return client

        monkeypatch.setattr(network, "connect", connect)
        args = parser.parse(["network", *argv])
        assert asyncio.run(args.handler(args)) == 0
        return client.asked

    return ask


def test_set_is_one_interface(asked: Any) -> None:
    words = ["set", "eth0", "--mac", MAC, "--address", "10.0.2.15/24", "--gateway", "10.0.2.2"]
    words += ["--dns", "10.0.2.3", "--mtu", "1400", "--wait", "2.5", "--container", "web"]
    assert asked(Applied(), *words) == (
        "network.apply",
        ApplyNetwork(
            "web",
            (Interface("eth0", mac=MAC, addresses=("10.0.2.15/24",), mtu=1400),),
            routes=(Route("default", "10.0.2.2", "eth0"),),
            dns=Dns(("10.0.2.3",)),
            wait_ms=2500,
        ),
    )


def test_an_interface_s_address_is_not_the_agent_s() -> None:
    args = parser.parse(["--address", "unix:/x", "network", "set", "eth0", "--address", "10.0.0.1/8"])
    assert (args.address, args.addresses) == ("unix:/x", ["10.0.0.1/8"])


def test_what_is_not_given_is_not_asked_for(asked: Any) -> None:
    assert asked(Applied(), "set", "eth0", "--down")[1] == ApplyNetwork(None, (Interface("eth0", up=False),))


def test_apply_takes_a_file(asked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.json"
    path.write_text(json.dumps({"interfaces": [{"name": "lo"}], "masquerade": []}))
    method, params = asked(Applied(("link set dev lo up",)), "apply", "--container", "web", str(path))
    assert (method, params) == ("network.apply", ApplyNetwork("web", (Interface("lo"),), masquerade=()))
    assert capsys.readouterr().out == "link set dev lo up\n"
    path.write_text(json.dumps({"interfaces": [{"name": "a b"}]}))
    with pytest.raises(UsageError, match=r"interfaces\[0\]\.name"):
        asked(Applied(), "apply", str(path))
    with pytest.raises(UsageError, match="No such file"):
        asked(Applied(), "apply", str(tmp_path / "nothing"))


def test_attach_has_the_contract_s_defaults(asked: Any) -> None:
    from protocol.families.network import Attached

    assert asked(Attached(), "attach", "web") == ("network.attach", AttachNetwork("web"))
    words = (
        "attach",
        "web",
        "--name",
        "eth1",
        "--bridge",
        "br1",
        "--subnet",
        "10.9.0.0/24",
        "--no-masquerade",
    )
    assert asked(Attached(), *words)[1] == AttachNetwork("web", "eth1", "br1", ("10.9.0.0/24",), False)


def test_a_state_is_shown_as_people_read_it(asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    state = NetworkState(
        (InterfaceState("eth0", MAC, "", 2, 1500, True, True, addresses=("10.0.2.15/24",)),),
        (RouteState("default", 4, "10.0.2.2", "eth0", metric=5, onlink=True),),
        dns=Dns(("10.0.2.3",)),
        masquerade=("10.88.0.0/16",),
    )
    asked(state, "show")
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["NAME", "STATE", "MAC", "MTU", "BRIDGE", "ADDRESSES"],
        ["eth0", "up", MAC, "1500", "-", "10.0.2.15/24"],
        ["route", "default", "via", "10.0.2.2", "dev", "eth0", "metric", "5", "onlink"],
        ["dns", "10.0.2.3"],
        ["masquerade", "10.88.0.0/16"],
    ]


@pytest.mark.parametrize(
    "argv",
    [
        ("set", "a b"),
        ("set", "eth0", "--mac", "nonsense"),
        ("set", "eth0", "--mac", MAC, "--device", "eth1"),
        ("set", "eth0", "--address", "10.0.0.1"),
        ("attach", "web", "--subnet", "10.0.0.1/8"),
        ("remove",),
    ],
)
def test_what_is_none_is_refused_in_one_line(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse(["network", *argv])
    assert caught.value.code == 125
    assert len(capsys.readouterr().err.splitlines()) == 1


# -- run --network bridge -------------------------------------------------------------------------


def plan(*argv: str) -> Any:
    return run_plan(parser.parse(["run", "--rootfs", "/r", *argv, "--", "x"]), UnixAddress("/s"))


def test_a_bridge_brings_name_servers_unless_the_caller_has_his_own() -> None:
    made = plan("--network", "bridge")
    assert made.bridge
    mounts = [each for each in made.params.spec["mounts"] if each["destination"] == "/etc/resolv.conf"]
    assert [each["source"] for each in mounts] == ["/etc/resolv.conf"]
    assert {"type": "network"} in made.params.spec["linux"]["namespaces"]
    own = plan("--network", "bridge", "-v", "/my:/etc/resolv.conf").params.spec["mounts"]
    assert [each["source"] for each in own if each["destination"] == "/etc/resolv.conf"] == ["/my"]


def test_other_networks_bring_nothing() -> None:
    for words in ((), ("--network", "host"), ("--network", "none")):
        made = plan(*words)
        assert not made.bridge
        assert "/etc/resolv.conf" not in [each["destination"] for each in made.params.spec["mounts"]]


def test_a_pod_s_network_is_its_sandbox_s() -> None:
    with pytest.raises(UsageError, match="--sandbox"):
        plan("--network", "bridge", "--pod", "pod")
    assert plan("--network", "bridge", "--sandbox", "--dns", "10.0.0.1").bridge

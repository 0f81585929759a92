"""SPEC.md against the code: tables, examples, links, and that nothing is missing."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import msgpack
import pytest

from gcsagent.agent import wire
from gcsagent.agent.features import FEATURES
from protocol import address, connection, framing, limits, scan
from protocol.connection import Connection, Role, State
from protocol.errors import RpcError
from protocol.framing import Notification, Request, Response, decode
from protocol.methods import EVENT, METHODS
from protocol.schema import from_wire
from protocol.types import Event, ExitRecord
from tests.specgen import BLOCK, SPEC, block, render

TEXT = SPEC.read_text()


def test_the_tables_are_what_the_code_says() -> None:
    assert render(TEXT) == TEXT, "run: python -m tests.specgen"


def test_every_method_and_table_is_there() -> None:
    blocks = [match[2] for match in BLOCK.finditer(TEXT)]
    assert len(blocks) == len(set(blocks))
    assert {f"method {name}" for name in METHODS} <= set(blocks)
    assert {"states", "limits", "enum Code", "record Envelope"} <= set(blocks)


def test_a_table_nobody_can_make_is_an_error() -> None:
    with pytest.raises(KeyError):
        block("weather")


def slug(heading: str) -> str:
    """As GitHub makes anchors of headings."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_every_link_within_the_page_leads_somewhere() -> None:
    anchors = [slug(match) for match in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)]
    links = set(re.findall(r"\]\(#([^)]*)\)", TEXT))
    assert links
    assert links <= set(anchors)
    assert not [link for link in links if anchors.count(link) > 1]


def kinds_raised() -> set[str]:
    """The literal first arguments of all that makes a RemoteProtocolError, in the contract and the agent."""
    found = set()
    for module in (connection, framing, scan, wire):
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            match node:
                case ast.Call(
                    func=ast.Name(id="RemoteProtocolError"), args=[ast.Constant(value=str() as kind), _]
                ):
                    found.add(kind)
                case ast.Call(func=ast.Name(id="_error"), args=[_, ast.Constant(value=str() as kind), _]):
                    found.add(kind)
    return found


def test_every_kind_of_breach_is_explained() -> None:
    section = TEXT.split("### When the contract is broken")[1].split("\n## ")[0]
    explained = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    assert explained == kinds_raised() - {"peer"}  # peer: what the client makes of rpc.error itself


def test_every_feature_is_explained() -> None:
    listing = TEXT.split("\n`features` are names;")[1].split("\n")[0]
    named = set(re.findall(r"`([\w.]+)`(?! of)", listing))
    assert named == {"checkpoint", "shell", *FEATURES}


def test_every_address_form_is_explained() -> None:
    forms = re.findall(r"``(\w+):\w+", str(address.__doc__))
    assert forms == ["unix", "vsock", "hvsock"]
    assert all(f"| `{form}:" in TEXT for form in forms)


def fenced(heading: str) -> list[str]:
    section = TEXT.split(f"\n### {heading}\n")[1].split("\n## ")[0].split("\n### ")[0]
    return re.findall(r"```\n(.*?)```", section, re.DOTALL)


def hex_of(listing: str) -> bytes:
    """The bytes of a listing: each line's pairs of hex digits, up to its comment."""
    found = b""
    for line in listing.splitlines():
        pairs = re.match(r" *((?:[0-9a-f]{2} )+)", line)
        assert pairs, line
        found += bytes.fromhex(pairs[1])
    return found


def test_hello_in_bytes_is_hello() -> None:
    asked, answered = (hex_of(listing) for listing in fenced("Hello in bytes"))
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    [request] = server.receive(asked)
    assert isinstance(request, Request)
    assert client.request(request.msgid, request.method, request.params) == asked
    from_wire(METHODS[request.method].params, request.params)
    [response] = client.receive(answered)
    assert isinstance(response, Response)
    assert server.respond(response.msgid, response.result) == answered
    from_wire(METHODS[request.method].result, response.result)
    assert client.state is server.state is State.OPEN


class Example:
    """One connection of the worked example, with both ends."""

    def __init__(self) -> None:
        self.client, self.server = Connection(Role.CLIENT), Connection(Role.SERVER)
        self.methods: dict[int, str] = {}

    def line(self, sender: str, message: list[Any]) -> None:
        match decode(msgpack.packb(message)):
            case Request(msgid, method, params):
                assert sender == ">"
                from_wire(METHODS[method].params, params)
                self.methods[msgid] = method
                self.server.receive(self.client.request(msgid, method, params))
            case Response(msgid, None, result):
                assert sender == "<"
                from_wire(METHODS[self.methods[msgid]].result, result)
                self.client.receive(self.server.respond(msgid, result))
            case Notification(method, params):
                assert (sender, method) == ("<", EVENT)
                event = from_wire(Event, params)
                if event.type == "process.exited":
                    from_wire(ExitRecord, event.data)
                self.client.receive(self.server.notify(method, params))
            case other:
                pytest.fail(str(other))


def test_the_worked_example_works() -> None:
    transcript, _ = fenced("Running a container")
    ends = {"C": Example(), "S": Example()}
    for text in transcript.splitlines():
        name, sender, rest = text.split(" ", 2)
        if rest.startswith("["):
            ends[name].line(sender, json.loads(rest))
        else:
            assert ends[name].client.state is State.STREAM, text
    assert ends["C"].client.outstanding == 0
    for method in ("container.create", "container.start", "container.wait", "container.delete"):
        assert method in ends["C"].methods.values()


def test_the_example_of_a_failure_is_an_error() -> None:
    _, failure = fenced("Running a container")
    message = json.loads(failure.split(" ", 2)[2])
    error = RpcError.from_wire(message[2])
    assert error.to_wire() == message[2]
    assert error.details["exec_error"] == "not_found"


def test_the_vectors_named_are_the_vectors_there() -> None:
    assert "`vectors/*.json`" in TEXT
    assert len(list((SPEC.parent / "vectors").glob("*.json"))) == 6


def test_the_limits_of_hello_are_those_of_the_page() -> None:
    for name, value in vars(limits).items():
        if name.startswith("MAX_"):
            assert f"| `{name}` | {value} |" in TEXT

"""From gcsctl's arguments to what the agent is asked for; no process, no agent."""

from __future__ import annotations

import json
import os

import pytest

from gcsagent.host.cli import parser
from gcsagent.host.cli.common import UsageError
from gcsagent.host.cli.run import RunPlan, environment, exec_params, run_plan
from gcsagent.host.cli.vmrun import GUEST_ROOTFS, vm_plan
from gcsagent.host.spec import CAPABILITIES, container_spec, exec_spec, merge_env
from protocol.address import UnixAddress, VsockAddress
from protocol.types import Stdio, StreamMode, WhenFull

UNIX, VSOCK = UnixAddress("/s"), VsockAddress(3)


def plan(*argv: str, address: UnixAddress | VsockAddress = UNIX) -> RunPlan:
    return run_plan(parser.parse(["run", *argv]), address)


def modes(stdio: Stdio) -> str:
    """One letter per stream, a capital where it is a log, a dash where it is null."""
    specs = {"i": stdio.stdin, "o": stdio.stdout, "e": stdio.stderr, "t": stdio.tty}
    for spec in specs.values():
        assert (spec.when_full is WhenFull.DROP_OLDEST) is (spec.mode is StreamMode.SPOOL)
    shown = {StreamMode.STREAM: "{}", StreamMode.SPOOL: "{}", StreamMode.NULL: "-"}
    return "".join(
        shown[spec.mode].format(name if spec.mode is StreamMode.STREAM else name.upper())
        for name, spec in specs.items()
    )


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", "-oe-"),
        ("-i", "ioe-"),
        ("-t", "---t"),
        ("-it", "---t"),
        ("-d", "-OE-"),
        ("-di", "iOE-"),
        ("-dit", "---t"),
        ("--log", "-OE-"),
        ("--log -i", "iOE-"),
        ("-d --log", "-OE-"),
    ],
)
def test_streams_follow_the_flags(flags: str, expected: str) -> None:
    stdio = plan(*flags.split(), "--rootfs", "/r", "--", "x").params.stdio
    assert modes(stdio) == expected
    assert stdio.problem() is None
    assert stdio.stdin_once is (flags in ("-i", "--log -i"))


def test_the_runtime_is_the_agents_choice_unless_named() -> None:
    assert plan("--rootfs", "/r", "--", "x").params.runtime == ""
    assert plan("--rootfs", "/r", "--runtime", "crun", "--", "x").params.runtime == "crun"


def test_vsock_is_allowed_only_when_asked() -> None:
    assert plan("--rootfs", "/r", "--", "x").params.allow_vsock is False
    assert plan("--rootfs", "/r", "--allow-vsock", "--", "x").params.allow_vsock is True


def test_create_keeps_streams_only_when_asked() -> None:
    args = parser.parse(["create", "--rootfs", "/r", "--", "x"])
    assert modes(run_plan(args, UNIX).params.stdio) == "----"
    args = parser.parse(["create", "-i", "--rootfs", "/r", "--", "x"])
    stdio = run_plan(args, UNIX).params.stdio
    assert (modes(stdio), stdio.stdin_once) == ("ioe-", False)
    args = parser.parse(["create", "--log", "--rootfs", "/r", "--", "x"])
    assert modes(run_plan(args, UNIX).params.stdio) == "-OE-"


@pytest.mark.parametrize(
    "line, command",
    [
        (["--", "ls", "-l", "--rm"], ["ls", "-l", "--rm"]),
        (["ls", "-l"], ["ls", "-l"]),
        (["--", "sh", "-c", "x", "--", "y"], ["sh", "-c", "x", "--", "y"]),
        (["sh", "--", "y"], ["sh", "--", "y"]),
        (["--", "--odd"], ["--odd"]),
    ],
)
def test_the_command_is_left_alone(line: list[str], command: list[str]) -> None:
    for argv in (["run", "--rootfs", "/r", *line], ["exec", "-t", "c", *line]):
        args = parser.parse(argv)
        assert args.command == command
    assert getattr(args, "rm", False) is False


def test_json_is_taken_before_and_after_the_command() -> None:
    assert parser.parse(["--json", "ps"]).json is True
    assert parser.parse(["ps", "--json"]).json is True
    assert parser.parse(["ps"]).json is False


def test_relative_paths_are_ours_only_over_unix() -> None:
    spec = plan("--rootfs", "some/dir", "--", "x").params.spec
    assert spec is not None
    assert spec["root"]["path"] == os.path.join(os.getcwd(), "some/dir")
    with pytest.raises(UsageError, match="absolute path in the guest"):
        plan("--rootfs", "some/dir", "--", "x", address=VSOCK)


def test_a_bundle_says_what_to_run() -> None:
    params = plan("--bundle", "/b", "--overlay", "--rm").params
    assert (params.bundle, params.spec, params.overlay) == ("/b", None, True)


@pytest.mark.parametrize(
    "argv",
    [
        ["--", "x"],
        ["--rootfs", "/r", "--bundle", "/b", "--", "x"],
        ["--rootfs", "/r"],
        ["--bundle", "/b", "--", "x"],
        ["--bundle", "/b", "-t"],
        ["--bundle", "/b", "-e", "A=1"],
        ["--bundle", "/b", "-u", "1"],
        ["--bundle", "/b", "-w", "/"],
        ["--rootfs", "/r", "--log", "-t", "--", "x"],
        ["--rootfs", "/r", "--fifo", "stdout=/x", "-t", "--", "x"],
        ["--rootfs", "/r", "--fifo", "stdin=/x", "-i", "--", "x"],
    ],
    ids=" ".join,
)
def test_contradictions_are_refused(argv: list[str]) -> None:
    with pytest.raises(UsageError):
        plan(*argv)


def test_ids_are_random_and_valid() -> None:
    first, second = (plan("--rootfs", "/r", "--", "x").params.container for _ in range(2))
    assert first != second
    assert len(first) == 12
    assert exec_params(parser.parse(["exec", "c", "x"]), VSOCK).process.isalnum()


def test_a_detached_exec_cleans_up_after_itself() -> None:
    assert exec_params(parser.parse(["exec", "-d", "c", "x"]), VSOCK).auto_delete is True
    assert exec_params(parser.parse(["exec", "c", "x"]), VSOCK).auto_delete is False


def test_vm_run_uses_the_disk_under_a_layer() -> None:
    args = parser.parse(["vm", "run", "--rootfs", "/host/dir", "-i", "--", "ls", "-l"])
    params = vm_plan(args).params
    assert params.spec is not None
    assert params.spec["root"]["path"] == GUEST_ROOTFS
    assert params.spec["process"]["args"] == ["ls", "-l"]
    assert params.overlay is True
    assert params.allow_vsock is False
    assert modes(params.stdio) == "ioe-"
    assert str(args.rootfs) == "/host/dir"


def test_vm_run_with_a_network_is_in_the_guest_s() -> None:
    args = parser.parse(["vm", "run", "--net", "user", "--rootfs", "/host/dir", "--", "ls"])
    spec = vm_plan(args).params.spec
    assert spec is not None
    assert {"type": "network"} not in spec["linux"]["namespaces"]
    [dns] = [mount for mount in spec["mounts"] if mount["destination"] == "/etc/resolv.conf"]
    assert "ro" in dns["options"]


def test_the_environment_is_given_or_taken_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "yes")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert environment(["A=1", "HERE", "NOWHERE", "B="]) == ["A=1", "HERE=yes", "B="]
    assert merge_env(["A=1", "B=2"], ["A=3", "C=4=5"]) == ["A=3", "B=2", "C=4=5"]


def test_the_default_spec_is_confined() -> None:
    spec = container_spec(container="c" * 100, rootfs="/r", args=["x"], env=["PATH=/p"], terminal=True)
    process = spec["process"]
    assert process["noNewPrivileges"] is True
    assert "CAP_SYS_ADMIN" not in CAPABILITIES
    assert "ambient" not in process["capabilities"]
    assert process["env"] == ["PATH=/p", "TERM=xterm"]
    assert spec["hostname"] == "c" * 64
    kinds = {entry["type"] for entry in spec["linux"]["namespaces"]}
    assert kinds == {"pid", "ipc", "uts", "mount", "network", "cgroup"}
    read_only = {mount["destination"] for mount in spec["mounts"] if "ro" in mount.get("options", [])}
    assert read_only == {"/sys", "/sys/fs/cgroup"}
    assert {"/proc/kcore", "/sys/firmware"} <= set(spec["linux"]["maskedPaths"])


def test_an_exec_inherits_what_it_does_not_name() -> None:
    assert exec_spec(args=["x"]) == {"args": ["x"], "terminal": False}
    assert exec_spec(args=["x"], terminal=True, env=["TERM=vt100"])["env"] == ["TERM=vt100"]
    assert exec_spec(args=["x"], user="7:8")["user"] == {"uid": 7, "gid": 8}


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("90s", 90.0),
        ("1h30m", 5400.0),
        ("1.5s250ms", 1.75),
        ("2d", 172800.0),
        ("1764000000", 1764000000 * 10**9),
        ("1764000000.5", 1764000000 * 10**9 + 5 * 10**8),
        ("2025-11-24T16:00:00Z", 1764000000 * 10**9),
        ("2025-11-24T17:00:00+01:00", 1764000000 * 10**9),
    ],
)
def test_since_is_a_moment_or_how_long_ago(text: str, wanted: float) -> None:
    found = parser.parse(["logs", "--since", text, "web"]).since
    assert (found, type(found)) == (wanted, type(wanted))


@pytest.mark.parametrize("option", ["--since", "--tail"])
@pytest.mark.parametrize("text", ["", "soon", "-1s", "1h30", "9" * 20, "1e3", "5x", "\u0663"])
def test_other_words_are_no_moment_and_no_number(
    option: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse(["logs", f"{option}={text}", "web"])
    assert caught.value.code == 125
    assert capsys.readouterr().err.startswith(f"gcsctl: argument {option}: {text!r}")


def test_a_spec_is_the_callers_own() -> None:
    made = container_spec(container="web", rootfs="/r", args=("true",))
    untouched = json.dumps(made)
    made["linux"]["maskedPaths"].append("/etc/hostname")
    made["linux"]["readonlyPaths"].clear()
    made["process"]["capabilities"]["bounding"].clear()
    made["mounts"].clear()
    assert made["process"]["capabilities"]["effective"], "the three sets are three lists"
    assert json.dumps(container_spec(container="web", rootfs="/r", args=("true",))) == untouched

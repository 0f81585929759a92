"""The settings' grammar, in a guest and on the command line, and every way to get one wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from gcsagent.agent import counters
from gcsagent.agent.bounds import calls_by_cpus, limits_of
from gcsagent.common.config import LIMITS, ConfigError, Settings, parse_guest_settings, read_guest_settings
from gcsagent.options import parse
from gcsagent.supervisor import requests
from protocol.limits import Limits


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def test_a_guest_without_any_setting_has_the_documented_defaults(tmp_path: Path) -> None:
    assert read_guest_settings(str(tmp_path)) == Settings(
        listen=("vsock:1024",),
        state="/run/gcs/state",
        runtime="runc",
        log_level="info",
        guest=True,
        peer_cid=2,
        on_failure="poweroff",
    )


def test_the_command_line_wins_over_the_file_and_other_words_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "etc/gcsagent/gcsagent.conf", "# gcs.port=1\n  # gcs.x\ngcs.port=5000 gcs.runtime=crun\n")
    write(tmp_path, "proc/cmdline", "console=ttyS0 quiet gcs.port=6000 gcs.peer_cid=any panic=-1\n")
    settings = read_guest_settings(str(tmp_path))
    assert (settings.listen, settings.runtime, settings.peer_cid) == (("vsock:6000",), "crun", None)


def test_every_setting_is_taken() -> None:
    settings = parse_guest_settings(
        [
            "gcs.port=4294967294",
            "gcs.peer_cid=4294967295",
            "gcs.log_level=debug",
            "gcs.runtime=/usr/bin/crun",
            "gcs.runtimes=runc,crun,/opt/runsc",
            "gcs.runtime_args=--debug,--criu=/opt/criu,",
            "gcs.no_pivot=yes",
            "gcs.on_failure=hold",
            "gcs.hostname=guest",
            "gcs.disk.data=/mnt",
            "gcs.share.src=ro",
        ]
    )
    assert settings.listen == ("vsock:4294967294",)
    assert settings.peer_cid == 4294967295
    assert (settings.log_level, settings.runtime, settings.on_failure) == ("debug", "/usr/bin/crun", "hold")
    assert (settings.runtime_args, settings.no_pivot) == (("--debug", "--criu=/opt/criu"), True)
    assert settings.offered_runtimes == ("/usr/bin/crun", "runc", "/opt/runsc")


def test_every_limit_is_taken_in_a_guest_and_outside() -> None:
    least = tuple((name, low) for name, (low, _) in LIMITS.items())
    most = tuple((name, high) for name, (_, high) in LIMITS.items())
    for wanted in (least, most):
        assert parse_guest_settings([f"gcs.{name}={value}" for name, value in wanted]).limits == wanted
        options = [f"--{name.replace('_', '-')}={value}" for name, value in wanted]
        assert parse(["--listen", "unix:/x", *options]).limits == wanted
        carried = Settings.from_json(parse(["--listen", "unix:/x", *options]).to_json())
        assert limits_of(carried.limits) == Limits(**dict(wanted))


def test_limits_have_defaults_in_their_ranges_and_one_nobody_knows_is_passed_over() -> None:
    fixed = {"max_depth", "max_values"}
    assert {field.name for field in fields(Limits)} == set(LIMITS) | fixed
    assert all(low <= getattr(Limits(), name) <= high for name, (low, high) in LIMITS.items())
    calls = calls_by_cpus()
    usual = Limits(max_runtime_calls=calls, max_runtime_calls_total=2 * calls)
    assert limits_of(parse_guest_settings([]).limits) == usual == limits_of([("max_weather", 3)])
    assert limits_of([("max_runtime_calls", 9)]).max_runtime_calls_total == 18


def test_what_the_agent_may_be_allowed_is_within_what_the_supervisor_allows() -> None:
    """Each request and each container's deletion makes one call at a time; a stream takes two counters."""
    (_, requests_), (_, containers), (_, execs) = (
        LIMITS[name] for name in ("max_in_flight_total", "max_containers", "max_execs_total")
    )
    assert requests_ + containers < requests.MAX_CALLS
    assert (containers + execs) * 3 < counters.SLOTS


@pytest.mark.parametrize("value", ["", "0", "-1", "1k", "²", "1" * 40])
@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_that_cannot_be_used_is_named_with_what_is_allowed(name: str, value: str) -> None:
    low, high = LIMITS[name]
    with pytest.raises(ConfigError, match=f"^gcs.{name}={value}: a number from {low} to {high}$"):
        parse_guest_settings([f"gcs.{name}={value}"])
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(ConfigError, match=f"^{option} {value}: a number from {low} to {high}$"):
        parse([f"{option}={value}"])


@pytest.mark.parametrize(
    "word, says",
    [
        ("gcs.max_weather=3", "no such setting"),
        ("gcs.max_depth=3", "no such setting"),
        ("gcs.port", "gcs.NAME=VALUE"),
        ("gcs.port=", "vsock port"),
        ("gcs.port=0", "vsock port"),
        ("gcs.port=4294967295", "vsock port"),
        ("gcs.port=-1", "vsock port"),
        ("gcs.port=1k", "vsock port"),
        ("gcs.port=²", "vsock port"),
        ("gcs.port=" + "1" * 5000, "vsock port"),
        ("gcs.peer_cid=host", "a CID or 'any'"),
        ("gcs.peer_cid=²", "a CID or 'any'"),
        ("gcs.peer_cid=4294967296", "a CID or 'any'"),
        ("gcs.peer_cid=", "a CID or 'any'"),
        ("gcs.log_level=trace", "debug, info, warning, error"),
        ("gcs.runtime=", "a program's name or path"),
        ("gcs.runtime=/usr/bin/", "a program's name or path"),
        ("gcs.runtimes=runc,,crun", "separated by commas"),
        ("gcs.runtimes=crun,/usr/bin/crun", "twice"),
        ("gcs.runtime_args=debug", "--NAME=VALUE"),
        ("gcs.runtime_args=--", "--NAME=VALUE"),
        ("gcs.runtime_args=--debug,-v", "--NAME=VALUE"),
        ("gcs.runtime_args=--systemd-cgroup", "without systemd"),
        ("gcs.runtime_args=--debug,--root=/x", "state directory"),
        ("gcs.runtime_args=--log=/x", "reads the log"),
        ("gcs.no_pivot=on", "yes or no"),
        ("gcs.on_failure=reboot", "poweroff or hold"),
        ("gcs.prot=1024", "no such setting"),
        ("gcs.=1", "no such setting"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_with_what_is_allowed(word: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_guest_settings([word])
    assert says in str(caught.value)
    assert word.partition("=")[0] in str(caught.value)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--listen", "tcp:1"], "--listen"),
        (["--listen", "unix:"], "--listen"),
        (["--listen", "vsock:x"], "--listen"),
        (["--peer-cid", "²"], "--peer-cid"),
        (["--peer-cid", "host"], "--peer-cid"),
        (["--log-level", "loud"], "--log-level"),
        (["--shell", "vsock"], "--shell 'vsock': give the port, too"),
        (["--shell", "tcp:1"], "--shell 'tcp:1': an address to listen on"),
        (["--shell", "unix:/x", "--listen", "unix:/x"], "--shell unix:/x: that is where the agent listens"),
        (["--runtimes", "runc,"], "--runtimes runc,"),
        (["--runtime-arg=--systemd-cgroup"], "--runtime-arg=--systemd-cgroup: the agent places"),
        (["--guest", "--listen", "vsock"], "--guest"),
        (["--state", "/dev/null/x", "--listen", "unix:/nowhere/x"], "/dev/null/x"),
    ],
)
def test_a_bad_option_is_one_line_on_standard_error_and_exit_2(arguments: list[str], says: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "gcsagent", *arguments], capture_output=True, text=True, timeout=30
    )
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("text, seconds", [("off", 0), ("1", 1), ("3600", 3600)])
def test_the_watchdog_is_seconds_or_off(text: str, seconds: int) -> None:
    assert parse_guest_settings([f"gcs.watchdog={text}"]).watchdog == seconds


@pytest.mark.parametrize("text", ["", "0", "3601", "1.5", "-1", "on"])
def test_what_is_no_watchdog_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"gcs.watchdog={text}: seconds from 1 to 3600, or off"):
        parse_guest_settings([f"gcs.watchdog={text}"])


def test_settings_of_a_newer_supervisor_are_taken_as_far_as_they_are_known() -> None:
    settings = Settings.from_json('{"listen": ["unix:/x"], "state": "/s", "weather": "fine"}')
    assert settings == Settings(["unix:/x"], "/s")  # type: ignore[arg-type]


def test_the_debug_shell_is_off_unless_it_is_allowed() -> None:
    assert parse_guest_settings([]).shell == ""
    assert parse_guest_settings(["gcs.shell=off", "gcs.shell_port=99"]).shell == ""
    assert parse_guest_settings(["gcs.shell=on"]).shell == "vsock:1025"
    assert parse_guest_settings(["gcs.shell=on", "gcs.shell_port=2000"]).shell == "vsock:2000"


@pytest.mark.parametrize(
    "words, says",
    [
        (["gcs.shell=yes"], "gcs.shell=yes: on or off"),
        (["gcs.shell_port=0"], "gcs.shell_port=0: a vsock port is a number from 1"),
        (["gcs.shell=on", "gcs.shell_port=1024"], "gcs.shell_port=1024: that is the agent's"),
    ],
)
def test_what_is_no_setting_of_the_debug_shell(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_guest_settings(words)

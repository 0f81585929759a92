"""gcsctl as people use it: a subprocess, its exit code, what it prints, and on a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cases.agents import REPO, RunningAgent
from tests.cases.target import name

SECONDS = 30.0


class Gcsctl:
    """Runs it against one agent. ``box`` is a container that runs all the while."""

    def __init__(self, address: str, rootfs: str) -> None:
        self.rootfs = rootfs
        self.env = {**os.environ, "GCS_ADDRESS": address}
        self.box = name("box")

    def argv(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "gcsagent.host", *args]

    def __call__(self, *args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.argv(*args),
            input=stdin,
            cwd=REPO,
            env=self.env,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )

    def run(self, *args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """``run --rm`` with a throw-away layer; ``args`` are further options, ``--`` and the command."""
        return self("run", "--rm", "--overlay", "--rootfs", self.rootfs, *args, stdin=stdin)

    def json(self, *args: str) -> Any:
        done = self("--json", *args)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def gcsctl(agent: RunningAgent, rootfs: str) -> Iterator[Gcsctl]:
    before = agent.holdings()
    gcsctl = Gcsctl(agent.address, rootfs)
    options = ("-d", "--id", gcsctl.box, "--overlay", "--rootfs", rootfs)
    started = gcsctl("run", *options, "--", "sleep", "100000")
    assert (started.returncode, started.stdout, started.stderr) == (0, f"{gcsctl.box}\n".encode(), b"")
    yield gcsctl
    assert gcsctl("delete", "--force", gcsctl.box).returncode == 0
    agent.assert_holds(before)


def one_line(error: bytes) -> str:
    """The one line on stderr that an error is."""
    assert error.startswith(b"gcsctl: ")
    assert error.endswith(b"\n")
    assert error.count(b"\n") == 1, error.decode()
    return error.decode()


@pytest.mark.parametrize("code", [0, 7, 255])
def test_the_exit_code_is_the_commands(gcsctl: Gcsctl, code: int) -> None:
    done = gcsctl.run("--", "sh", "-c", f"echo out; echo err >&2; exit {code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, b"out\n", b"err\n")
    done = gcsctl("exec", gcsctl.box, "--", "sh", "-c", f"echo -n out; exit {code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, b"out", b"")


def test_a_signal_becomes_128_and_its_number(gcsctl: Gcsctl) -> None:
    assert gcsctl("exec", gcsctl.box, "--", "sh", "-c", "kill -KILL $$").returncode == 137


@pytest.mark.parametrize(
    "command, code, word",
    [
        (["no-such-program"], 127, "no-such-program"),
        (["/etc/passwd"], 126, "/etc/passwd"),
        (["/etc"], 126, "/etc"),
    ],
)
def test_what_cannot_be_executed(gcsctl: Gcsctl, command: list[str], code: int, word: str) -> None:
    for done in (gcsctl("exec", gcsctl.box, "--", *command), gcsctl.run("--", *command)):
        assert (done.returncode, done.stdout) == (code, b"")
        assert word in one_line(done.stderr)


@pytest.mark.parametrize(
    "args, word",
    [
        (["state", "nobody"], "nobody"),
        (["exec", "nobody", "--", "true"], "nobody"),
        (["start", "../x"], "id"),
        (["run", "--rootfs", "/no/such/directory", "--", "true"], "/no/such/directory"),
        (["run", "--", "true"], "--rootfs"),
        (["--address", "unix:/no/such/socket", "ping"], "/no/such/socket"),
        (["--address", "nonsense", "ping"], "nonsense"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_own_failures_are_125_and_one_line(gcsctl: Gcsctl, args: list[str], word: str) -> None:
    done = gcsctl(*args)
    assert (done.returncode, done.stdout) == (125, b"")
    assert word in one_line(done.stderr)


def test_delete_of_a_running_container_is_refused(gcsctl: Gcsctl) -> None:
    done = gcsctl("delete", gcsctl.box)
    assert done.returncode == 125
    assert "running" in one_line(done.stderr)
    assert gcsctl("exec", gcsctl.box, "--", "true").returncode == 0


def test_stdin_reaches_the_command_and_ends(gcsctl: Gcsctl) -> None:
    data = os.urandom(3_000_000)
    done = gcsctl("exec", "-i", gcsctl.box, "--", "cat", stdin=data)
    assert (done.returncode, done.stdout == data, done.stderr) == (0, True, b"")
    done = gcsctl.run("-i", "--", "wc", "-c", stdin=data)
    assert (done.returncode, done.stdout.strip()) == (0, b"3000000")


def test_without_i_the_command_has_no_input(gcsctl: Gcsctl) -> None:
    done = gcsctl("exec", gcsctl.box, "--", "cat", stdin=b"not for it")
    assert (done.returncode, done.stdout) == (0, b"")


def test_a_closed_output_ends_the_command(gcsctl: Gcsctl) -> None:
    """``gcsctl exec … yes | head -1``"""
    with subprocess.Popen(
        gcsctl.argv("exec", gcsctl.box, "--", "yes"), cwd=REPO, env=gcsctl.env, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait(SECONDS) == 141
    assert [each["process"] for each in gcsctl.json("ps", gcsctl.box)] == ["init"]


def test_options_of_the_process(gcsctl: Gcsctl) -> None:
    script = 'echo "$A $(pwd) $(id -u):$(id -g)"'
    options = ("-e", "A=b c", "-w", "/usr", "-u", "7:8")
    for done in (
        gcsctl("exec", *options, gcsctl.box, "--", "sh", "-c", script),
        gcsctl.run(*options, "--", "sh", "-c", script),
    ):
        assert (done.returncode, done.stdout, done.stderr) == (0, b"b c /usr 7:8\n", b"")


def test_the_life_of_a_container_step_by_step(gcsctl: Gcsctl) -> None:
    ident = name("steps")
    create = ("create", "--id", ident, "--overlay", "--rootfs", gcsctl.rootfs)
    assert gcsctl(*create, "--", "sh", "-c", "exit 9").stdout == f"{ident}\n".encode()
    assert gcsctl(*create, "--", "true").returncode == 125
    assert gcsctl.json("state", ident)["status"] == "created"
    assert gcsctl("start", ident).returncode == 0
    assert gcsctl("wait", ident).returncode == 9
    state = gcsctl.json("state", ident)
    assert (state["status"], state["processes"][0]["exit"]["exit_code"]) == ("stopped", 9)
    assert ident in [each["container"] for each in gcsctl.json("ps")]
    assert gcsctl("delete", ident).returncode == 0
    assert gcsctl("state", ident).returncode == 125
    told = [json.loads(line) for line in gcsctl("--json", "events", "--container", ident).stdout.splitlines()]
    assert [event["type"] for event in told][-1] == "container.deleted"
    assert {event["container"] for event in told} == {ident}
    newest = told[-1]["seq"]
    assert all(
        json.loads(line)["seq"] > newest
        for line in gcsctl("events", "--json", "--after", str(newest)).stdout.splitlines()
    )


def test_kill_and_its_exit_record(gcsctl: Gcsctl) -> None:
    ident = name("victim")
    gcsctl("run", "-d", "--id", ident, "--overlay", "--rootfs", gcsctl.rootfs, "--", "sleep", "100000")
    assert gcsctl("kill", "-s", "KILL", ident).returncode == 0
    waited = gcsctl("--json", "wait", ident)
    record = json.loads(waited.stdout)
    assert (waited.returncode, record["signal"], record["reason"]) == (137, 9, "signalled")
    assert gcsctl.json("delete", ident)["exit"] == record


@pytest.mark.parametrize("answer, ending", [("exit 3", 3), ("", 137)])
def test_stop_asks_first_and_kills_then(gcsctl: Gcsctl, answer: str, ending: int) -> None:
    ident = name("stop")
    script = f"trap '{answer}' TERM; >/ready; while :; do sleep 0.05; done"
    started = gcsctl(
        "run", "-d", "--id", ident, "--overlay", "--rootfs", gcsctl.rootfs, "--", "sh", "-c", script
    )
    assert started.returncode == 0, started.stderr
    assert gcsctl("exec", ident, "--", "sh", "-c", "until [ -e /ready ]; do :; done").returncode == 0
    patience = "1" if ending == 137 else "20"
    for _ in range(2):  # what has ended stays as it ended
        assert gcsctl.json("stop", "-t", patience, ident)["exit"]["exit_code"] == ending
    assert gcsctl("delete", ident).returncode == 0
    gone = gcsctl("stop", ident)
    assert gone.returncode == 125
    assert "there is no container" in one_line(gone.stderr)


def test_stop_of_one_that_was_never_started(gcsctl: Gcsctl) -> None:
    ident = name("created")
    assert gcsctl("create", "--id", ident, "--rootfs", gcsctl.rootfs, "--", "true").returncode == 0
    # What waits for `start` is runc's own init, which has its own answer to a signal (exit 2).
    assert gcsctl.json("stop", ident)["exit"]["exit_code"] != 0
    assert gcsctl("delete", ident).returncode == 0


def test_info_for_people(gcsctl: Gcsctl) -> None:
    shown = gcsctl("info").stdout.decode()
    for line in (
        "agent: +0",
        "features: .*spool",
        r"msgpack: +\d.* \((C|Python)\)",
        "kernel: .*x86_64",
        "limits: +frame ",
    ):
        assert re.search(f"^{line}", shown, re.MULTILINE), shown
    assert "boot:" not in shown  # this agent is not in a guest of its own


def test_json_documents(gcsctl: Gcsctl) -> None:
    assert gcsctl.json("ping")["generation"] >= 1
    info = gcsctl.json("info")
    assert info["runtime"]["name"] == "runc"
    assert info["limits"]["max_containers"] == 1024
    assert info["protocol_min"] <= 1 <= info["protocol_max"]
    assert {"spool", "network", "pods"} < set(info["features"])
    assert info["machine"]["architecture"] == os.uname().machine
    assert [each["process"] for each in gcsctl.json("ps", gcsctl.box)] == ["init"]
    started = gcsctl.json("exec", "-d", gcsctl.box, "--", "true")
    assert started["container"] == gcsctl.box
    assert started["pid"] > 0
    done = gcsctl("--json", "exec", gcsctl.box, "--", "sh", "-c", "echo out; exit 4")
    assert (done.returncode, done.stdout, json.loads(done.stderr)["exit_code"]) == (4, b"out\n", 4)


def test_detached_with_rm_cleans_up_after_itself(gcsctl: Gcsctl) -> None:
    ident = name("brief")
    options = ("--rm", "-d", "--id", ident, "--overlay", "--rootfs", gcsctl.rootfs)
    with subprocess.Popen(
        gcsctl.argv("--json", "events", "-f"), cwd=REPO, env=gcsctl.env, stdout=subprocess.PIPE
    ) as events:
        assert events.stdout is not None
        assert gcsctl("run", *options, "--", "true").stdout == f"{ident}\n".encode()
        for line in events.stdout:
            event = json.loads(line)
            if (event["type"], event["container"]) == ("container.deleted", ident):
                break
        events.send_signal(signal.SIGINT)
        assert events.wait(SECONDS) == 130
    assert gcsctl("state", ident).returncode == 125


def test_sigterm_is_passed_on(gcsctl: Gcsctl) -> None:
    script = "trap 'echo got it; exit 12' TERM; echo ready; while :; do sleep 0.02; done"
    with subprocess.Popen(
        gcsctl.argv("exec", gcsctl.box, "--", "bash", "-c", script),
        cwd=REPO,
        env=gcsctl.env,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"got it\n"
        assert process.wait(SECONDS) == 12


def test_a_bundle_directory(gcsctl: Gcsctl, tmp_path: Path) -> None:
    config = {
        "ociVersion": "1.0.2",
        "process": {"args": ["/bin/echo", "from a bundle"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": os.path.relpath(gcsctl.rootfs, tmp_path), "readonly": True},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = gcsctl("run", "--rm", "--bundle", str(tmp_path))
    assert (done.stderr, done.stdout, done.returncode) == (b"", b"from a bundle\n", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# -- on a terminal --------------------------------------------------------------------------------


class Terminal:
    """gcsctl on a pseudo-terminal of ours."""

    def __init__(self, argv: list[str], env: dict[str, str], rows: int, cols: int) -> None:
        self.master, slave = pty.openpty()
        self.resize(rows, cols)
        self.before = termios.tcgetattr(slave)
        self.process = subprocess.Popen(
            argv, cwd=REPO, env=env, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        self.slave = slave
        self.seen = b""

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def expect(self, wanted: bytes) -> None:
        deadline = time.monotonic() + SECONDS
        while wanted not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0, f"{wanted!r} never came: {self.seen!r}"
            if select.select([self.master], [], [], left)[0]:
                self.seen += os.read(self.master, 65536)
        self.seen = self.seen.partition(wanted)[2]

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def end(self) -> int:
        """Its exit status; the terminal must be as it was."""
        status = self.process.wait(SECONDS)
        assert termios.tcgetattr(self.slave) == self.before
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def open_terminal(gcsctl: Gcsctl) -> Iterator[Any]:
    terminals: list[Terminal] = []

    def start(*args: str, rows: int = 24, cols: int = 80) -> Terminal:
        terminals.append(Terminal(gcsctl.argv(*args), gcsctl.env, rows, cols))
        return terminals[-1]

    yield start
    for each in terminals:
        each.close()


def resized_and_interrupted(terminal: Terminal) -> None:
    """The shell on it sees another size, and what it runs a Ctrl-C."""
    terminal.resize(41, 141)
    terminal.process.send_signal(signal.SIGWINCH)
    terminal.type(b"until [ \"$(stty size)\" = '41 141' ]; do :; done; echo re''sized\n")
    terminal.expect(b"resized\r\n")
    # What says so is in the foreground; a Ctrl-C before that would be the shell's.
    terminal.type(b"sh -c \"echo asl''eep; exec sleep 100000\"\n")
    terminal.expect(b"asleep\r\n")
    terminal.type(b"\x03")


def test_a_shell_on_a_terminal(gcsctl: Gcsctl, open_terminal: Any) -> None:
    run = ("run", "--rm", "-it", "--overlay", "--rootfs", gcsctl.rootfs, "--", "bash", "--norc")
    terminal = open_terminal(*run, rows=31, cols=101)
    terminal.type(b"stty size; echo $((6*7))\n")
    terminal.expect(b"31 101\r\n42\r\n")
    resized_and_interrupted(terminal)
    terminal.type(b"exit 21\n")
    assert terminal.end() == 21


def test_ctrl_d_ends_an_exec_on_a_terminal(gcsctl: Gcsctl, open_terminal: Any) -> None:
    terminal = open_terminal("exec", "-it", gcsctl.box, "--", "cat")
    terminal.type(b"line\n")
    terminal.expect(b"line\r\nline\r\n")
    terminal.type(b"\x04")
    assert terminal.end() == 0


def test_attach_to_a_process_started_elsewhere(gcsctl: Gcsctl, open_terminal: Any) -> None:
    ident = name("shell")
    create = ("create", "-it", "--id", ident, "--overlay", "--rootfs", gcsctl.rootfs)
    assert gcsctl(*create, "--", "sh").returncode == 0
    try:
        assert gcsctl("start", ident).returncode == 0
        terminal = open_terminal("attach", ident)
        terminal.type(b"echo at''tached; exit 5\n")
        terminal.expect(b"attached\r\n")
        assert terminal.end() == 5
    finally:
        gcsctl("delete", "--force", ident)


def test_the_terminal_is_restored_when_the_container_is_killed(gcsctl: Gcsctl, open_terminal: Any) -> None:
    ident = name("doomed")
    run = ("run", "--id", ident, "-it", "--overlay", "--rootfs", gcsctl.rootfs)
    terminal = open_terminal(*run, "--", "sh", "-c", "echo ready; exec sleep 100000")
    terminal.expect(b"ready")
    assert gcsctl("kill", "-s", "9", ident).returncode == 0
    assert terminal.end() == 137
    assert gcsctl("delete", ident).returncode == 0


# -- logs -------------------------------------------------------------------------------------------


@pytest.fixture
def logged(gcsctl: Gcsctl) -> Iterator[str]:
    """A container that ran detached, wrote on both outputs, and has ended."""
    ident = name("logged")
    script = "printf 'out %s\n' 1 2 3; printf 'err %s\n' 1 2 >&2"
    options = ("-d", "--id", ident, "--overlay", "--rootfs", gcsctl.rootfs)
    assert gcsctl("run", *options, "--", "sh", "-c", script).returncode == 0
    assert gcsctl("wait", ident).returncode == 0
    yield ident
    assert gcsctl("delete", ident).returncode == 0


def test_what_a_detached_container_wrote_can_be_read_again_and_again(gcsctl: Gcsctl, logged: str) -> None:
    for options in ((), ("-f",), ("--since", "1h"), ("--since", "2020-01-01")):
        done = gcsctl("logs", *options, logged)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"out 1\nout 2\nout 3\n", b"err 1\nerr 2\n")
    done = gcsctl("logs", "--tail", "2", logged)
    assert (done.stdout, done.stderr) == (b"out 2\nout 3\n", b"err 1\nerr 2\n")
    done = gcsctl("logs", "--tail=0", logged)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    later = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 60))
    done = gcsctl("logs", "--since", later, logged)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = gcsctl("--json", "logs", logged)
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"stream": "stderr", "offset": 0, "text": "err 1\nerr 2\n"} in documents


def test_logs_follow_a_container_to_its_end(gcsctl: Gcsctl) -> None:
    ident = name("followed")
    options = ("-d", "-i", "--id", ident, "--overlay", "--rootfs", gcsctl.rootfs)
    assert gcsctl("run", *options, "--", "sh", "-c", "echo first; cat; echo last").returncode == 0
    with subprocess.Popen(
        gcsctl.argv("logs", "-f", ident), cwd=REPO, env=gcsctl.env, stdout=subprocess.PIPE
    ) as following:
        assert following.stdout is not None
        assert following.stdout.readline() == b"first\n"
        attached = gcsctl("attach", ident, stdin=b"middle\n")
        assert attached.returncode == 0
        rest, _ = following.communicate(timeout=SECONDS)
        assert rest == b"middle\nlast\n"
        assert following.returncode == 0
    assert gcsctl("delete", ident).returncode == 0


def test_a_detached_exec_keeps_a_log_if_asked_to(gcsctl: Gcsctl) -> None:
    ident = name("execs")
    options = ("-d", "--id", ident, "--overlay", "--rootfs", gcsctl.rootfs)
    assert gcsctl("run", *options, "--", "sleep", "1000").returncode == 0
    started = gcsctl("exec", "-d", "--log", ident, "--", "sh", "-c", "echo out; echo err >&2")
    process = started.stdout.decode().strip()
    done = gcsctl("logs", "-f", "--process", process, ident)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"out\n", b"err\n")
    done = gcsctl("logs", "--process", process, ident)  # it has ended, and its log is there
    assert (done.returncode, done.stdout, done.stderr) == (0, b"out\n", b"err\n")
    assert gcsctl("delete", "--force", ident).returncode == 0
    assert gcsctl("logs", "--process", process, ident).returncode != 0


def test_run_with_fifos(gcsctl: Gcsctl, tmp_path: Path) -> None:
    """Made by the agent and gone with the container, while the other end was somebody's here."""
    made, given, ident = tmp_path / "in", tmp_path / "out", name("fifos")
    os.mkfifo(given)
    options = ("-d", "--id", ident, "--overlay", "--rootfs", gcsctl.rootfs)
    fifos = ("--fifo", f"stdin={made}", "--fifo", f"stdout={given}")
    assert gcsctl("run", *options, *fifos, "--", "head", "-n2").returncode == 0
    with given.open("rb") as output:
        made.write_bytes(b"one\n")
        made.write_bytes(b"two\n")
        assert output.read() == b"one\ntwo\n"
    assert gcsctl("wait", ident).returncode == 0
    assert gcsctl("delete", ident).returncode == 0
    assert (made.exists(), given.is_fifo()) == (False, True)


def test_run_with_a_log_shows_and_keeps(gcsctl: Gcsctl) -> None:
    ident = name("both")
    done = gcsctl(
        "run",
        "--log",
        "--id",
        ident,
        "--overlay",
        "--rootfs",
        gcsctl.rootfs,
        "--",
        "sh",
        "-c",
        "echo hi; exit 3",
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, b"hi\n", b"")
    assert gcsctl("logs", ident).stdout == b"hi\n"
    assert gcsctl("delete", ident).returncode == 0


def test_a_container_without_a_log_says_how_to_get_one(gcsctl: Gcsctl) -> None:
    ident = name("silent")
    options = ("--id", ident, "--overlay", "--rootfs", gcsctl.rootfs)
    assert gcsctl("run", *options, "--", "true").returncode == 0
    done = gcsctl("logs", ident)
    assert done.returncode == 125
    assert "--log" in one_line(done.stderr)
    assert gcsctl("delete", ident).returncode == 0


def test_run_takes_dockers_options(gcsctl: Gcsctl, tmp_path: Path) -> None:
    """What each comes to, seen from inside."""
    tmp_path.chmod(0o755)
    (tmp_path / "data").write_text("bound\n")
    (tmp_path / "data").chmod(0o666)
    (tmp_path / "env").write_text("FROM_FILE=yes\n")
    (tmp_path / "seccomp").write_text(
        json.dumps(
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": []}],
                "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 18}],
            }
        )
    )
    script = (
        "id -u; id -G; cat /mnt/data; touch /mnt/data; touch /x; stat -fc %T /scratch; hostname"
        "; ulimit -n; echo $FROM_FILE; cat /proc/sys/net/ipv4/ip_forward; mkdir /scratch/x"
        "; grep CapBnd /proc/self/status; test -c /dev/inside && echo device; df -k /dev/shm | tail -1"
    )
    options = (
        "-u www-data:staff --group-add audio --read-only --tmpfs /scratch:mode=1777 --hostname inside"
        " --ulimit nofile=99 --sysctl net.ipv4.ip_forward=1 --cap-drop ALL --cap-add KILL --shm-size 1m"
        f" --device /dev/null:/dev/inside:r --env-file {tmp_path}/env -v {tmp_path}:/mnt:ro"
        f" --security-opt seccomp={tmp_path}/seccomp --memory 64m --pids-limit 50 --cgroup-parent pods/a"
    )
    done = gcsctl.run(*options.split(), "--", "sh", "-c", script)
    seen = done.stdout.decode().splitlines()
    assert seen[:4] == ["33", "50 29", "bound", "tmpfs"], (done.stdout, done.stderr)
    assert seen[4:8] == ["inside", "99", "yes", "1"]
    assert seen[8].split()[1] == f"{1 << 5:016x}"
    assert seen[9] == "device"
    assert seen[10].split()[1] == "1024"
    errors = done.stderr.decode()
    assert errors.count("Read-only file system") == 2, errors
    assert "cross-device" in errors.lower(), errors


def test_run_in_a_user_namespace_and_privileged(gcsctl: Gcsctl) -> None:
    done = gcsctl.run(
        "--userns", "0:100000:65536", "--", "sh", "-c", "id -u; cat /proc/self/uid_map; mkdir /x"
    )
    assert done.stdout.split() == [b"0", b"0", b"100000", b"65536"], done.stderr
    mount = "import ctypes; print(ctypes.CDLL(None).mount(b't', b'/mnt', b'tmpfs', 0, None))"
    script = f'grep NoNew /proc/self/status; python3 -c "{mount}"'
    done = gcsctl.run("--privileged", "--network", "host", "--pid", "host", "--", "sh", "-c", script)
    assert done.stdout == b"NoNewPrivs:\t0\n0\n", done.stderr


def test_exec_takes_users_and_capabilities(gcsctl: Gcsctl) -> None:
    script = "id -un; id -G; grep CapEff /proc/self/status; pwd"
    done = gcsctl(
        "exec", "-u", "www-data", "--group-add", "staff", "-w", "/srv", gcsctl.box, "sh", "-c", script
    )
    assert done.stdout.split()[:3] == [b"www-data", b"33", b"50"], done.stderr
    assert done.stdout.split()[-1] == b"/srv"
    script = "grep CapEff /proc/self/status"
    effective = []
    for option in ((), ("--cap-add", "SYS_TIME"), ("--privileged",)):
        done = gcsctl("exec", *option, gcsctl.box, "sh", "-c", script)
        effective.append(int(done.stdout.split()[1], 16))
    assert effective[1] == effective[0] | 1 << 25
    assert effective[2] | effective[1] == effective[2]
    assert effective[2].bit_count() > 30
    done = gcsctl("exec", "-u", "nobody-at-all", gcsctl.box, "true")
    assert (done.returncode, b"no user 'nobody-at-all'" in done.stderr) == (125, True), done.stderr

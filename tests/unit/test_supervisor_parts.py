"""The supervisor's small parts, each alone: store, spawn, loop, log, power button."""

from __future__ import annotations

import errno
import functools
import gc
import json
import os
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gcsagent.common import boot
from gcsagent.common.loop import MANY, READ, WRITE, Loop, Timer
from gcsagent.supervisor import machine
from gcsagent.supervisor.spawn import spawn
from gcsagent.supervisor.store import MAX_NAME, FdStore, StoreError
from tests.cases.descriptors import descriptors, settled_descriptors

ENV = {"PATH": os.environ["PATH"]}


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def null() -> int:
    return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)


# -- store ------------------------------------------------------------------------------------------


def test_what_is_put_is_got_by_name_and_closed_when_released() -> None:
    store, fd, other = FdStore(), null(), null()
    store.put("a", fd)
    store.put("b", other)
    assert (store.get("a"), store.names(), len(store)) == (fd, ["a", "b"], 2)
    assert store.release(["a", "unknown", "a"]) == 1
    assert not is_open(fd)
    assert is_open(other)
    with pytest.raises(StoreError, match="nothing is held as a"):
        store.get("a")
    store.release(["b"])


@pytest.mark.parametrize("name", ["", "x" * (MAX_NAME + 1), "taken"])
def test_a_name_that_cannot_be_used_leaves_the_descriptor_its_callers(name: str) -> None:
    store, fd = FdStore(), null()
    store.put("taken", null())
    with pytest.raises(StoreError):
        store.put(name, fd)
    assert is_open(fd)
    os.close(fd)
    store.release(["taken"])


def test_the_longest_ids_of_the_contract_make_names_that_fit() -> None:
    longest = f"fd/{'c' * 128}/{'p' * 128}/stdout.out.r"
    FdStore().check_new(longest)


def test_a_full_store_refuses_one_more_and_a_group_that_does_not_fit_whole() -> None:
    store = FdStore(limit=2)
    store.put("a", null())
    store.check_new("b")
    with pytest.raises(StoreError, match="at most 2"):
        store.check_new("b", "c")
    store.put("b", null())
    with pytest.raises(StoreError, match="at most 2"):
        store.check_new("c")
    store.release(["a", "b"])


# -- spawn ------------------------------------------------------------------------------------------

SHOW = r"""
import json, os, signal, sys
status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
out = {
    "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + fd)),
    "session_leader": os.getsid(0) == os.getpid(),
    "blocked": int(status["SigBlk"], 16),
    "env": sorted(os.environ),
    "zero": os.readlink("/proc/self/fd/0"),
}
os.write(int(sys.argv[1]), json.dumps(out).encode())
"""


def shown(fds: dict[int, int], out: int, report: int) -> dict[str, object]:
    pid = spawn([sys.executable, "-S", "-c", SHOW, str(out)], ENV, fds)
    _, status = os.waitpid(pid, 0)
    assert status == 0
    result: dict[str, object] = json.loads(os.pread(report, 65536, 0))
    return result


@pytest.fixture
def report() -> Iterator[int]:
    fd = os.memfd_create("report")
    yield fd
    os.close(fd)


def test_a_child_has_its_three_null_descriptors_what_was_named_and_nothing_else(report: int) -> None:
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and is_open(fd):
            os.set_inheritable(fd, False)  # what whoever runs the tests left open is not the matter here
    keep = [os.dup(report) for _ in range(5)]
    result = shown({9: report}, 9, report)
    assert result["fds"] == [0, 1, 2, 9]
    assert result["zero"] == "/dev/null"
    assert result["session_leader"] is True
    assert result["blocked"] == 0
    assert set(result["env"]) - {"LC_CTYPE"} == {"PATH"}  # type: ignore[call-overload]
    for fd in keep:
        os.close(fd)


def test_numbers_may_overlap_in_any_way() -> None:
    """Each target is the number of another's source; the child sees the files, not the numbers."""
    files = [os.memfd_create(f"file{index}") for index in range(3)]
    ones, twos, threes = files
    for fd, text in zip(files, (b"one", b"two", b"three"), strict=True):
        os.write(fd, text)
    code = "import os,sys; os.write(1, b' '.join(os.pread(int(n), 9, 0) for n in sys.argv[1:]))"
    argv = [sys.executable, "-S", "-c", code, str(ones), str(twos), str(threes)]
    out = os.memfd_create("out")
    files.append(out)
    os.waitpid(spawn(argv, ENV, {1: out, ones: twos, twos: threes, threes: ones}), 0)
    assert os.pread(out, 100, 0) == b"two three one"
    for fd in files:
        os.close(fd)


def test_one_descriptor_may_go_to_several_numbers(report: int) -> None:
    pid = spawn(["sh", "-c", "echo out; echo err >&2"], ENV, {1: report, 2: report})
    os.waitpid(pid, 0)
    assert os.pread(report, 100, 0) == b"out\nerr\n"


def test_ignored_signals_are_back_to_default_in_the_child() -> None:
    """Two are the interpreter's doing, others that of whoever started it."""
    assert signal.getsignal(signal.SIGPIPE) == signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        before = signal.signal(number, signal.SIG_IGN)
        pid = spawn(["sh", "-c", f"kill -{int(number)} $$; exit 0"], ENV, {})
        _, status = os.waitpid(pid, 0)
        signal.signal(number, before)
        assert os.waitstatus_to_exitcode(status) == -number


@pytest.mark.parametrize(
    "argv, code",
    [(["/nowhere/at/all"], errno.ENOENT), (["no-such-program-here"], errno.ENOENT), (["/etc"], errno.EACCES)],
)
def test_a_program_that_cannot_be_started_is_an_error_and_nothing_is_left(argv: list[str], code: int) -> None:
    before = settled_descriptors()
    with pytest.raises(OSError, match=argv[0]) as caught:
        spawn(argv, ENV, {})
    assert caught.value.errno == code
    assert descriptors() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_descriptor_that_is_not_open_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        spawn(["true"], ENV, {1: 4000})


# -- loop -------------------------------------------------------------------------------------------


def run(loop: Loop) -> None:
    """Until stopped; a loop that never is would hang the test, so it has a last timer."""
    guard = loop.after(10, lambda: pytest.fail("the loop was not stopped"))
    loop.run()
    guard.cancel()


def test_timers_run_in_the_order_they_are_due_and_cancelled_ones_do_not() -> None:
    loop, seen = Loop(), []

    def note(name: str) -> Callable[[], None]:
        return lambda: seen.append(name)

    loop.after(0.02, note("second"))
    loop.after(0.0, note("first"))
    cancelled = loop.after(0.01, note("cancelled"))
    cancelled.cancel()
    cancelled.cancel()
    loop.after(0.03, loop.stop)
    run(loop)
    assert seen == ["first", "second"]


def test_cancelled_timers_do_not_stay_until_they_are_due() -> None:
    """A runtime call's deadline may be a day, and calls come and go."""
    loop, seen = Loop(), list[int]()
    for number in range(5000):
        if number % 100 == 0:
            loop.after(number / 1e6, functools.partial(seen.append, number))
        loop.after(86_400, loop.stop).cancel()
    held = sum(isinstance(each, Timer) for each in gc.get_objects())
    assert held < 50 + 2 * MANY, f"{held} timers are held"
    loop.after(0.05, loop.stop)
    run(loop)
    assert seen == list(range(0, 5000, 100))


def test_a_timer_may_arm_and_cancel_others() -> None:
    loop, seen = Loop(), []
    doomed = loop.after(0.02, lambda: seen.append("doomed"))

    def first() -> None:
        seen.append("first")
        doomed.cancel()
        loop.after(0, loop.stop)

    loop.after(0.01, first)
    run(loop)
    assert seen == ["first"]


def test_events_may_be_changed_and_end_with_forget() -> None:
    loop = Loop()
    read_end, write_end = os.pipe()
    seen: list[str] = []

    def readable(_events: int) -> None:
        seen.append(os.read(read_end, 100).decode())
        loop.forget(read_end)
        loop.forget(read_end)
        os.write(write_end, b"nobody")
        loop.after(0.01, loop.stop)

    def writable(events: int) -> None:
        assert events & WRITE
        os.write(write_end, b"hello")
        loop.forget(write_end)

    loop.watch(write_end, lambda _events: pytest.fail("replaced"), WRITE)
    loop.watch(write_end, writable, WRITE)
    loop.watch(read_end, readable, READ)
    run(loop)
    assert seen == ["hello"]
    os.close(read_end)
    os.close(write_end)


def test_a_descriptor_forgotten_in_the_same_pass_is_not_called_nor_is_its_successor() -> None:
    """Both are ready in one pass; the first one's callback closes the other and its number is reused."""
    loop = Loop()
    seen: list[object] = []
    pipes = [os.pipe(), os.pipe()]
    for _, write_end in pipes:
        os.write(write_end, b"x")
    fresh: list[int] = []

    def on(index: int) -> Callable[[int], None]:
        def callback(_events: int) -> None:
            seen.append(index)
            mine, others = pipes[index][0], pipes[1 - index][0]
            loop.forget(others)
            os.dup2(mine, others)  # the same number, another file...
            os.read(mine, 1)  # ... which has nothing to read
            loop.watch(others, lambda _events: seen.append("stale"))
            loop.forget(mine)
            fresh.append(others)
            loop.after(0.01, loop.stop)

        return callback

    loop.watch(pipes[0][0], on(0))
    loop.watch(pipes[1][0], on(1))
    run(loop)
    assert len(seen) == 1
    assert "stale" not in seen
    for ends in pipes:
        for fd in ends:
            os.close(fd)


class FullEpoll:
    """Of a user who has used up what epoll may watch for it, but for what was there before."""

    def __init__(self, real: select.epoll) -> None:
        self._real = real

    def register(self, fd: int, events: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)


def test_what_epoll_has_no_room_for_is_watched_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    first, later = os.pipe(), os.pipe()
    seen: list[str] = []

    def readable(_events: int) -> None:
        seen.append(os.read(first[0], 100).decode())
        loop.watch(later[1], writable, WRITE)

    def writable(events: int) -> None:
        assert events & WRITE
        seen.append("writable")
        loop.watch(later[1], lambda _events: pytest.fail("not asked for"), READ)
        loop.watch(later[0], ended)
        os.write(later[1], b"x")

    def ended(_events: int) -> None:
        os.read(later[0], 1)
        loop.forget(later[0])
        loop.forget(later[1])
        os.write(later[1], b"nobody")
        os.write(first[1], b"again")
        loop.watch(first[0], lambda _events: loop.stop())

    loop.watch(first[0], readable)
    monkeypatch.setattr(loop, "_epoll", FullEpoll(loop._epoll))
    os.write(first[1], b"once")
    run(loop)
    assert seen == ["once", "writable"]
    for fd in (*first, *later):
        os.close(fd)


def test_a_successor_that_is_ready_is_called_in_the_next_pass() -> None:
    loop = Loop()
    read_end, write_end = os.pipe()
    os.write(write_end, b"x")

    def again(_events: int) -> None:
        loop.stop()

    def first(_events: int) -> None:
        loop.forget(read_end)
        loop.watch(read_end, again)

    loop.watch(read_end, first)
    run(loop)
    os.close(read_end)
    os.close(write_end)


# -- log --------------------------------------------------------------------------------------------

LOG = """
import os, sys
from gcsagent.supervisor import log
log.set_level("info")
log.log("debug", "hidden")
log.log("info", "a\\nb", container="c", odd=object)
sys.exit(3)
"""


def test_an_entry_is_one_line_of_json_above_the_level() -> None:
    result = subprocess.run([sys.executable, "-c", LOG], capture_output=True, text=True, timeout=30)
    assert result.returncode == 3
    (line,) = result.stderr.splitlines()
    entry = json.loads(line)
    assert entry["message"] == "a\nb"
    assert (entry["level"], entry["name"], entry["container"]) == ("info", "supervisor", "c")
    assert entry["time"].endswith("Z")


def test_a_standard_error_nobody_reads_or_that_is_closed_stops_nothing() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    while select.select([], [write_end], [], 0)[1]:
        os.write(write_end, b"x" * 4096)
    os.set_blocking(write_end, True)
    full = subprocess.run([sys.executable, "-c", LOG], stderr=write_end, timeout=30)
    os.close(read_end)
    broken = subprocess.run([sys.executable, "-c", LOG], stderr=write_end, timeout=30)
    os.close(write_end)
    closed = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", sys.executable, "-c", LOG], timeout=30)
    assert [full.returncode, broken.returncode, closed.returncode] == [3, 3, 3]


def test_a_boot_stage_is_one_line_even_if_the_reason_has_several(capfd: pytest.CaptureFixture[str]) -> None:
    boot.failed("agent", "it said\nno")
    assert capfd.readouterr().err == "gcs-boot: FAILED agent: it said no\n"


# -- the end of the machine ---------------------------------------------------------------------------


def test_a_driver_that_works_in_the_background_loses_its_devices(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "virtio3").mkdir()
    (tmp_path / "module").mkdir()
    machine._unbind(str(tmp_path))
    assert "a device stays with its driver" in capfd.readouterr().err
    (tmp_path / "unbind").touch()
    machine._unbind(str(tmp_path))
    assert (tmp_path / "unbind").read_text() == "virtio3"
    assert capfd.readouterr().err == ""


# -- power button -----------------------------------------------------------------------------------

EVENT = struct.Struct("llHHi")


def test_only_the_power_key_going_down_counts_and_an_unplugged_device_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "event0"
    os.mkfifo(device)
    monkeypatch.setattr("glob.glob", lambda _pattern: [str(device)])
    loop, pressed = Loop(), []
    machine.PowerButton(loop, lambda: pressed.append("now"))
    with open(device, "wb", buffering=0) as keys:
        keys.write(EVENT.pack(0, 0, 1, 30, 1) + EVENT.pack(0, 0, 1, 116, 1) + EVENT.pack(0, 0, 1, 116, 0))
        keys.write(b"short")
    loop.after(0.05, loop.stop)
    run(loop)
    assert pressed == ["now"]
    assert not [fd for fd in os.listdir("/proc/self/fd") if target(fd) == str(device)]


def target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""

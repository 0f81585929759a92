"""Cases about what a container may not do: AF_VSOCK, by every way to a socket; hold up PID 1 or the agent.

Nothing here connects, binds or listens: a socket is made and closed.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
from typing import Any

from gcsagent.host.spec import exec_spec
from gcsagent.host.spec_options import SpecOptions, apply
from protocol.errors import Code
from protocol.families.process import Exec
from tests.cases.target import (
    OUTPUT,
    Target,
    case,
    connect,
    creation,
    executing,
    expect,
    name,
    refused,
    run,
    running,
)
from tests.fakes import tracer

PROBE = """
import ctypes, socket
libc = ctypes.CDLL(None, use_errno=True)

def syscall(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_ulong, arguments))
    return ctypes.get_errno() if result < 0 else 0

def family(number):
    try:
        socket.socket(number, socket.SOCK_STREAM).close()
    except OSError as error:
        return error.errno
    return 0

print(family(40), syscall(41, 1 << 32 | 40, 1, 0), family(socket.AF_UNIX), family(socket.AF_INET))
print(syscall(425, 1, 0), syscall(426, -1, 0, 0, 0, 0, 0), syscall(427, -1, 0, 0, 0))
"""
"""Numbers of errors, 0 for none: vsock, vsock with rubbish above the int, two others; io_uring."""

COMPAT = """
import ctypes, mmap, os
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
# push rbx; mov eax, edi; mov ebx, esi; mov ecx, edx; xor edx, edx; int 0x80; pop rbx; ret
page.write(bytes.fromhex("53 89f8 89f3 89d1 31d2 cd80 5b c3"))
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint)(address)
print(-call(359, 40, 1), -call(102, 1, 0), -call(20, 0, 0) == -os.getpid())
"""
"""What 32-bit code is told by socket, by socketcall, and whether it may do anything else."""

DENIED = f"{errno.EAFNOSUPPORT} {errno.EAFNOSUPPORT} 0 0\n1 1 1\n".encode()
COMPAT_DENIED = f"{errno.EAFNOSUPPORT} 1 True\n".encode()


def logging_profile(spec: dict[str, Any]) -> None:
    """A profile of the caller's that lets just what must be denied through, and says so in a rule."""
    spec["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [
            {"names": ["getpid", "socket", "socketcall", "io_uring_setup"], "action": "SCMP_ACT_LOG"},
            {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EXDEV},
        ],
    }


def unprivileged(spec: dict[str, Any]) -> None:
    """No CAP_SYS_ADMIN and no no_new_privs: the filter must be in place before both count."""
    spec["process"].update(user={"uid": 1000, "gid": 1000}, noNewPrivileges=False)
    spec["process"]["capabilities"] = {"bounding": [], "effective": [], "permitted": []}


def privileged(spec: dict[str, Any]) -> None:
    """Everything granted that can be, and a profile of the caller's that says yes to it all."""
    made = apply(spec, SpecOptions(privileged=True, shared=("network", "pid", "ipc")))
    spec.clear()
    spec.update(made)
    everything = {"names": ["socket", "socketcall", "io_uring_setup", "getpid"], "action": "SCMP_ACT_ALLOW"}
    spec["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [everything, {**everything, "action": "SCMP_ACT_LOG"}],
    }


@case
async def a_container_has_no_vsock(target: Target) -> None:
    async with await connect(target) as client:
        for change in (None, unprivileged, logging_profile, privileged):
            python = ("python3", "-c", PROBE)
            async with running(target, client, *python, stdio=OUTPUT, spec=change) as init:
                done = await init.communicate()
                assert (done.stdout, done.stderr) == (DENIED, b""), change


@case
async def an_exec_has_no_vsock(target: Target) -> None:
    async with await connect(target) as client:
        done = await run(client, target.box, "python3", "-c", PROBE)
        assert (done.stdout, done.stderr) == (DENIED, b"")
        async with running(target, client, spec=unprivileged) as init:
            done = await run(client, init.container, "python3", "-c", PROBE)
            assert (done.stdout, done.stderr) == (DENIED, b"")


@case
async def code_of_32_bits_has_no_vsock(target: Target) -> None:
    async with await connect(target) as client:
        done = await run(client, target.box, "python3", "-c", COMPAT)
        assert (done.stdout, done.stderr) == (COMPAT_DENIED, b"")
        for change in (logging_profile, privileged):
            async with running(target, client, spec=change) as init:
                done = await run(client, init.container, "python3", "-c", COMPAT)
                assert (done.stdout, done.stderr) == (COMPAT_DENIED, b""), change


@case
async def a_callers_own_rules_stay(target: Target) -> None:
    async with (
        await connect(target) as client,
        running(target, client, "mkdir", "/x", stdio=OUTPUT, spec=logging_profile) as init,
    ):
        done = await init.communicate()
        assert b"cross-device" in done.stderr, done.stderr


@case
async def a_profile_that_cannot_be_narrowed_is_refused(target: Target) -> None:
    def change(spec: dict[str, Any]) -> None:
        above = {"index": 0, "value": 1, "op": "SCMP_CMP_GT"}
        rule = {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [above]}
        spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule]}

    async with await connect(target) as client:
        with refused(Code.INVALID_ARGUMENT, field="spec.linux.seccomp.syscalls[0].args"):
            await client.create_container(creation(target, name("c"), ("true",), spec=change))


@case
async def what_is_allowed_vsock_is_not_filtered(target: Target) -> None:
    """Seen in the process's status: no socket need be made for it."""
    status = ("grep", "^Seccomp:", "/proc/self/status")
    async with await connect(target) as client:
        for allowed, mode in ((True, b"0"), (False, b"2")):
            async with running(target, client, *status, stdio=OUTPUT, allow_vsock=allowed) as init:
                done = await init.communicate()
                assert done.stdout.split() == [b"Seccomp:", mode]


SPLICES = """
import errno, os, socket
reading, writing = socket.socketpair()
spare = os.dup(1)
writing.send(b"kept ")
try:
    os.splice(reading.fileno(), 1, 5)
except OSError as error:
    os.write(1, errno.errorcode[error.errno].encode() + b" ")
assert os.splice(reading.fileno(), 1, 5, flags=os.SPLICE_F_NONBLOCK) == 5
writing.send(b"elsewhere")
assert os.splice(reading.fileno(), spare, 9) == 9
"""


@case
async def a_splice_that_may_wait_keeps_no_standard_output_from_the_agent(target: Target) -> None:
    """With a profile of its own, too. Such a call would wait with the pipe's lock in its hands."""
    everything = {"names": ["splice", "socket"], "action": "SCMP_ACT_ALLOW"}

    def allows_by_rule(spec: dict[str, Any]) -> None:
        spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_LOG", "syscalls": [everything]}

    async with await connect(target) as client:
        for change in (None, allows_by_rule):
            args = ("python3", "-c", SPLICES)
            async with running(target, client, *args, stdio=OUTPUT, spec=change) as init:
                done = await init.communicate()
                assert (done.stdout, done.stderr) == (b"EINVAL kept elsewhere", b"")


@case
async def a_tracer_that_does_not_let_go_of_the_dead_keeps_nobody_else_waiting(target: Target) -> None:
    """It sees the end of what it traces before the supervisor may, and takes as long as it likes."""
    async with (
        await connect(target) as client,
        executing(client, target.box, "sh", "-c", "echo $$; exec sleep 100000") as traced,
    ):
        pid = (await expect(traced.streams["stdout"], rb"\d+\n")).decode().strip()
        command = ("python3", "-c", inspect.getsource(tracer), pid)
        async with executing(client, target.box, *command) as process:
            await expect(process.streams["stdout"], b"traced\n")
            await client.kill_process(target.box, traced.process, "SIGKILL")
            done = await run(client, target.box, "echo", "meanwhile")
            assert (done.stdout, done.exit.exit_code) == (b"meanwhile\n", 0)
            state = await client.process_state(target.box, traced.process)
            assert state.exit is None
            async with asyncio.TaskGroup() as tasks:
                waiting = tasks.create_task(traced.wait())
                await client.kill_process(target.box, process.process, "SIGKILL")
            assert waiting.result().signal == 9


@case
async def a_file_that_waits_in_place_of_passwd_keeps_nobody_waiting(target: Target) -> None:
    """/proc/kmsg calls itself a regular file, and its reader waits for the kernel's next word."""
    async with await connect(target) as client, running(target, client) as init:
        done = await run(client, init.container, "ln", "-sf", "/proc/kmsg", "/etc/passwd")
        assert done.exit.exit_code == 0, done.stderr
        params = Exec(init.container, name("p"), exec_spec(args=("true",), user="www-data"), OUTPUT)
        for _ in range(2):  # once there may have been something to read
            with refused(Code.NOT_FOUND, field="spec.user.username"):
                await client.exec_process(params)

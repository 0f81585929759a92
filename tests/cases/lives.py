"""Cases about containers and processes: how they come, end, and are waited for; what is refused."""

from __future__ import annotations

import asyncio
import json
import time

from protocol.errors import Code
from protocol.families.container import ContainerRef
from protocol.families.process import Exec
from protocol.schema import to_wire
from protocol.types import Reason, Status, Stdio
from tests.cases.target import (
    OUTPUT,
    PIPES,
    STREAM,
    Target,
    case,
    connect,
    created,
    creation,
    event,
    executing,
    expect,
    name,
    raw_call,
    refused,
    remove,
    run,
    running,
    terminal,
)

BAD_IDS = ("../x", "", "x" * 300, ".hidden", "-rf", "a/b", "a b", "ä", "a\0b")


@case
async def exit_codes_are_those_of_the_process(target: Target) -> None:
    async with await connect(target) as client:
        for code in (0, 7, 255):
            done = await run(client, target.box, "sh", "-c", f"exit {code}")
            assert (done.exit.exit_code, done.exit.signal, done.exit.reason) == (code, 0, Reason.EXITED)
        done = await run(client, target.box, "sh", "-c", "kill -KILL $$")
        assert (done.exit.exit_code, done.exit.signal, done.exit.reason) == (137, 9, Reason.SIGNALLED)


@case
async def the_exit_record_is_complete_and_the_same_everywhere(target: Target) -> None:
    async with await connect(target) as client, await client.events() as events:
        before = (await client.info()).time_ns
        async with running(target, client, "sh", "-c", "echo out; exit 255", stdio=OUTPUT) as init:
            done = await init.communicate()
            record, after = done.exit, (await client.info()).time_ns
            assert (record.exit_code, record.signal, record.pid) == (255, 0, init.pid)
            assert before <= record.started_at_ns <= record.exited_at_ns <= after
            assert record.streams == {"stdin": 0, "stdout": 4, "stderr": 0}
            assert record.rusage.max_rss_kib > 0
            assert record.rusage.user_us + record.rusage.system_us > 0
            assert (record.oom, record.core_dumped) == (None, False)
            told = await event(events, "process.exited", init.container)
            assert told.data == to_wire(record)
            state = await client.container_state(init.container)
            assert (state.status, state.processes[0].exit) == (Status.STOPPED, record)
            assert await client.wait_container(init.container) == record
            assert await client.delete_container(init.container) == record


@case
async def wait_twice_at_once_and_again_after_the_exit(target: Target) -> None:
    async with await connect(target) as client, running(target, client) as init:
        async with asyncio.TaskGroup() as tasks:
            waits = [tasks.create_task(client.wait_container(init.container)) for _ in range(2)]
            waits += [tasks.create_task(client.wait_process(init.container)) for _ in range(2)]
            await client.kill_container(init.container, "KILL")
        records = [wait.result() for wait in waits]
        records.append(await client.wait_container(init.container))
        assert records == [records[0]] * 5
        assert records[0].signal == 9


@case
async def a_killed_container_is_killed_once(target: Target) -> None:
    async with await connect(target) as client, running(target, client) as init:
        await client.kill_container(init.container, 9)
        assert (await client.wait_container(init.container)).exit_code == 137
        with refused(Code.FAILED_PRECONDITION):
            await client.kill_container(init.container, 9)
        with refused(Code.FAILED_PRECONDITION):
            await client.kill_process(init.container, "init", "SIGTERM")
        with refused(Code.FAILED_PRECONDITION):
            await client.start_container(init.container)


@case
async def a_signal_by_any_name_arrives(target: Target) -> None:
    script = "trap 'echo usr1' USR1; echo ready; while :; do sleep 0.01; done"
    async with (
        await connect(target) as client,
        running(target, client, "bash", "-c", script, stdio=OUTPUT) as init,
    ):
        out = init.streams["stdout"]
        await expect(out, b"ready\n")
        for signal in ("SIGUSR1", "usr1", 10):
            await client.kill_container(init.container, signal)
            await expect(out, b"usr1\n")
        with refused(Code.INVALID_ARGUMENT, field="signal"):
            await client.kill_container(init.container, "SIGNONSENSE")


@case
async def kill_all_reaches_every_process(target: Target) -> None:
    """Init, which is pid 1 there and handles nothing, is deaf to it; an exec is not."""
    async with (
        await connect(target) as client,
        running(target, client) as init,
        executing(client, init.container, "sleep", "100000") as process,
    ):
        await client.kill_container(init.container, "TERM", everyone=True)
        assert (await process.wait()).signal == 15
        assert (await client.container_state(init.container)).status is Status.RUNNING
        await client.kill_container(init.container, "KILL", everyone=True)
        assert (await client.wait_container(init.container)).signal == 9


@case
async def wait_answers_for_the_execs_first(target: Target) -> None:
    async with (
        await connect(target) as client,
        running(target, client) as init,
        executing(client, init.container, "sleep", "100000") as one,
        executing(client, init.container, "sleep", "100000") as two,
    ):
        waiting = asyncio.ensure_future(client.wait_container(init.container))
        await client.kill_container(init.container, "KILL")
        record = await waiting
        for process in (one, two):
            state = await client.process_state(init.container, process.process)
            assert state.exit is not None
            assert state.exit.signal == 9
            assert state.exit.exited_at_ns <= record.exited_at_ns


@case
async def without_a_pid_namespace_leftovers_are_killed_with_init(target: Target) -> None:
    """A child left behind holds init's stdout: that stdout ends is the proof that nobody is left."""

    def share_pids(spec: dict[str, dict[str, list[dict[str, str]]]]) -> None:
        kinds = spec["linux"]["namespaces"]
        spec["linux"]["namespaces"] = [kind for kind in kinds if kind["type"] != "pid"]

    script = "sleep 100000 & echo ready; exec sleep 100000"
    async with (
        await connect(target) as client,
        await client.events() as events,
        running(target, client, "sh", "-c", script, stdio=OUTPUT, spec=share_pids) as init,
        executing(client, init.container, "sleep", "100000") as process,
    ):
        await expect(init.streams["stdout"], b"ready\n")
        await client.kill_container(init.container, "KILL")
        record = await client.wait_container(init.container)
        assert record.signal == 9
        exec_state = await client.process_state(init.container, process.process)
        assert exec_state.exit is not None
        assert exec_state.exit.signal == 9
        ended = await event(events, "stream.end", init.container, "init")
        assert ended.data["bytes"] == (6 if ended.data["stream"] == "stdout" else 0)


@case
async def exec_before_and_after_start(target: Target) -> None:
    async with await connect(target) as client, created(target, client) as init:
        assert (await client.container_state(init.container)).status is Status.CREATED
        early = await run(client, init.container, "echo", "early")
        assert (early.stdout, early.exit.exit_code) == (b"early\n", 0)
        await init.start()
        late = await run(client, init.container, "echo", "late")
        assert (late.stdout, late.exit.exit_code) == (b"late\n", 0)
        await client.kill_container(init.container, 9)
        await client.wait_container(init.container)
        with refused(Code.FAILED_PRECONDITION):
            await run(client, init.container, "true")


@case
async def an_exec_inherits_and_adds(target: Target) -> None:
    async with await connect(target) as client:
        spec = {"args": ["sh", "-c", "echo $PATH:$ADDED:$(pwd):$(id -u):$(id -g)"], "env": ["ADDED=yes"]}
        params = Exec(target.box, name("p"), {**spec, "cwd": "/tmp", "user": {"uid": 7, "gid": 8}}, OUTPUT)
        await client.exec_process(params)
        async with await client.attach(target.box, params.process) as out:
            line = await expect(out, b".*\n")
        assert line.endswith(b"/bin:yes:/tmp:7:8\n")
        assert line.startswith(b"/usr/local/sbin:")
        await client.wait_process(target.box, params.process)
        await client.delete_process(target.box, params.process)


@case
async def many_execs_at_once(target: Target) -> None:
    async with await connect(target) as client, asyncio.TaskGroup() as tasks:
        numbers = range(target.execs)
        runs = [
            tasks.create_task(run(client, target.box, "sh", "-c", f"echo {number}; exit {number}"))
            for number in numbers
        ]
    for number, done in zip(numbers, runs, strict=True):
        assert (done.result().stdout, done.result().exit.exit_code) == (b"%d\n" % number, number)


@case
async def a_missing_program_is_a_typed_error_at_once(target: Target) -> None:
    async with await connect(target) as client:
        for args, code, exec_error in (
            (("no-such-program",), Code.NOT_FOUND, "not_found"),
            (("/no/such/program",), Code.NOT_FOUND, "not_found"),
            (("/etc/passwd",), Code.PERMISSION_DENIED, "not_executable"),
            (("/etc",), Code.PERMISSION_DENIED, "not_executable"),
        ):
            ident, began = name("p"), time.monotonic()
            with refused(code, exec_error=exec_error):
                await client.exec_process(Exec(target.box, ident, {"args": list(args)}, OUTPUT))
            assert time.monotonic() - began < 1.0 * target.pace
            with refused(Code.NOT_FOUND):
                await client.process_state(target.box, ident)
            async with executing(client, target.box, "true", process=ident) as again:  # the id is free
                assert (await again.wait()).exit_code == 0


@case
async def a_container_of_a_missing_program_leaves_nothing(target: Target) -> None:
    async with await connect(target) as client:
        params = creation(target, name("c"), ("no-such-program",), stdio=OUTPUT)
        try:
            with refused(Code.NOT_FOUND, exec_error="not_found"):
                await client.create_container(params)
                await client.start_container(params.container)
        finally:
            await remove(client, params.container)


@case
async def a_bad_working_directory_is_an_error(target: Target) -> None:
    async with await connect(target) as client:
        ident = name("p")
        for cwd, code in (("/no/such/directory", Code.NOT_FOUND), ("relative", Code.INVALID_ARGUMENT)):
            with refused(code):
                await client.exec_process(Exec(target.box, ident, {"args": ["true"], "cwd": cwd}))


@case
async def a_duplicate_id_is_refused_and_the_first_is_untouched(target: Target) -> None:
    async with await connect(target) as client, running(target, client) as init:
        with refused(Code.ALREADY_EXISTS):
            await client.create_container(creation(target, init.container, ("true",)))
        assert (await client.container_state(init.container)).status is Status.RUNNING
        async with executing(client, init.container, "sleep", "100000") as process:
            for taken in (process.process, "init"):
                with refused(Code.ALREADY_EXISTS):
                    await client.exec_process(Exec(init.container, taken, {"args": ["true"]}))
            assert (await client.process_state(init.container, process.process)).exit is None


@case
async def unknown_ids_are_not_found(target: Target) -> None:
    async with await connect(target) as client:
        for call in (
            client.container_state("nobody"),
            client.start_container("nobody"),
            client.wait_container("nobody"),
            client.kill_container("nobody"),
            client.delete_container("nobody", force=True),
            client.exec_process(Exec("nobody", "p", {"args": ["true"]})),
            client.attach("nobody"),
            client.process_state(target.box, "nobody"),
            client.wait_process(target.box, "nobody"),
            client.kill_process(target.box, "nobody"),
            client.delete_process(target.box, "nobody"),
            client.close_stdin(target.box, "nobody"),
            client.attach(target.box, "nobody"),
        ):
            with refused(Code.NOT_FOUND):
                await call


@case
async def bad_ids_are_refused_by_the_agent_itself(target: Target) -> None:
    """Our own client would not send them; somebody else's may."""
    params = to_wire(creation(target, "placeholder", ("true",)))
    for bad in BAD_IDS:
        for method, arguments, field in (
            ("container.create", {**params, "container": bad}, "container"),
            ("container.delete", {"container": bad, "force": True}, "container"),
            (
                "process.exec",
                {"container": target.box, "process": bad, "spec": {"args": ["true"]}},
                "process",
            ),
            ("process.wait", {"container": target.box, "process": bad}, "process"),
        ):
            with refused(Code.INVALID_ARGUMENT, field=field):
                await raw_call(target, method, arguments)
    with refused(Code.INVALID_ARGUMENT, field="container"):
        await raw_call(target, "container.state", {})


@case
async def delete_while_running_is_refused_and_the_container_intact(target: Target) -> None:
    async with (
        await connect(target) as client,
        running(target, client) as init,
        executing(client, init.container, "sleep", "100000") as process,
    ):
        with refused(Code.FAILED_PRECONDITION):
            await client.delete_container(init.container)
        with refused(Code.FAILED_PRECONDITION):
            await client.delete_process(init.container, process.process)
        with refused(Code.FAILED_PRECONDITION):
            await client.delete_process(init.container, "init")
        assert (await client.container_state(init.container)).status is Status.RUNNING
        assert (await run(client, init.container, "echo", "still here")).stdout == b"still here\n"


@case
async def force_delete_kills_what_runs_and_answers_its_waiters(target: Target) -> None:
    async with (
        await connect(target) as client,
        running(target, client) as init,
        executing(client, init.container, "sleep", "100000") as process,
    ):
        waits = [
            asyncio.ensure_future(client.wait_container(init.container)),
            asyncio.ensure_future(client.wait_process(init.container, process.process)),
        ]
        await client.ping()  # behind the waits on the same connection
        deleted = await client.delete_container(init.container, force=True)
        assert deleted is not None
        assert deleted.signal == 9
        assert [record.signal for record in await asyncio.gather(*waits)] == [9, 9]
        with refused(Code.NOT_FOUND):
            await client.container_state(init.container)


@case
async def a_created_container_can_be_deleted_unstarted(target: Target) -> None:
    async with await connect(target) as client, created(target, client) as init:
        await client.delete_container(init.container)
        with refused(Code.NOT_FOUND):
            await client.container_state(init.container)


@case
async def auto_delete_needs_nobody(target: Target) -> None:
    async with await connect(target) as client, await client.events() as events:
        for stdio in (Stdio(), PIPES, terminal()):  # which nobody attaches to, and nothing comes through
            params = creation(target, name("c"), ("true",), stdio=stdio, auto_delete=True)
            await client.create_container(params)
            await client.start_container(params.container)
            await event(events, "container.deleted", params.container)
            with refused(Code.NOT_FOUND):
                await client.container_state(params.container)


@case
async def auto_delete_waits_until_the_output_is_taken(target: Target) -> None:
    async with await connect(target) as client, await client.events() as events:
        stdio = Stdio(stdout=STREAM)
        async with running(
            target, client, "echo", "taken", stdio=stdio, auto_delete=True, attached=False
        ) as init:
            await client.wait_container(init.container)
            assert (await client.container_state(init.container)).status is Status.STOPPED
            async with await client.attach(init.container) as out:
                await expect(out, b"taken\n")
                await event(events, "container.deleted", init.container)


@case
async def an_overlay_leaves_the_root_untouched(target: Target) -> None:
    mark = name("mark")
    script = f"echo mine >/{mark} && cat /{mark} && rm -r /etc/os-release && ls /etc/os-release"
    async with await connect(target) as client:
        async with running(target, client, "sh", "-c", script, stdio=OUTPUT) as init:
            done = await init.communicate()
            assert (done.stdout, done.exit.exit_code) == (b"mine\n", 2)
        look = f"ls /{mark}; cat /etc/os-release"
        async with running(target, client, "sh", "-c", look, stdio=OUTPUT) as init:
            done = await init.communicate()
            assert b"PRETTY_NAME" in done.stdout
            assert mark.encode() not in done.stdout


@case
async def a_bundle_is_a_directory_with_a_relative_root(target: Target) -> None:
    """Made in the guest through a container that has the guest's /tmp."""
    place = f"/tmp/{name('bundle')}"
    # Two levels up from /tmp/NAME is the root.
    wanted = creation(target, name("c"), ("sh", "-c", "cat /etc/os-release | head -1; pwd")).spec
    assert wanted is not None
    wanted["root"] = {"path": "../.." + target.rootfs, "readonly": True}
    wanted["process"]["cwd"] = "/usr"

    def with_tmp(spec: dict[str, list[dict[str, object]]]) -> None:
        spec["mounts"].append(
            {"destination": "/host", "type": "bind", "source": "/tmp", "options": ["bind", "rw"]}
        )

    inside = place.replace("/tmp", "/host")
    script = f"mkdir {inside} && cat >{inside}/config.json"
    async with await connect(target) as client, running(target, client, spec=with_tmp) as helper:
        stdio = Stdio(STREAM, STREAM, STREAM)
        put = await run(
            client, helper.container, "sh", "-c", script, data=json.dumps(wanted).encode(), stdio=stdio
        )
        assert (put.stderr, put.exit.exit_code) == (b"", 0)
        try:
            change = {"spec": None, "bundle": place, "overlay": False, "stdio": OUTPUT}
            params = to_wire(creation(target, name("c"), ("x",)))
            params = {**params, **to_wire(change)}
            del params["spec"]
            await raw_call(target, "container.create", params)
            ident = params["container"]
            try:
                await client.call("container.start", ContainerRef(ident))
                async with await client.attach(ident) as out:
                    assert (await expect(out, b"(?s).*/usr\n")).startswith(b"PRETTY_NAME")
                assert (await client.wait_container(ident)).exit_code == 0
                state = await client.container_state(ident)
                assert state.bundle != place  # what was given is never written to
            finally:
                await remove(client, ident)
            listed = await run(client, helper.container, "ls", inside)
            assert listed.stdout == b"config.json\n"
        finally:
            await run(client, helper.container, "rm", "-r", inside)
        with refused(Code.NOT_FOUND, field="bundle"):
            await raw_call(target, "container.create", {"container": "none", "bundle": place})

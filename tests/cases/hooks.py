"""Cases about hooks: each kind runs, and one that fails says what it said and leaves nothing.

They write to a file of the guest's, which the container sees as well.
"""

from __future__ import annotations

from typing import Any

import pytest

from protocol.errors import Code, RpcError
from protocol.schema import to_wire
from tests.cases.target import (
    OUTPUT,
    Target,
    case,
    connect,
    creation,
    name,
    raw_call,
    refused,
    remove,
    run,
    running,
)

GUEST_RUN, INSIDE = "/run", "/guest-run"
AT_CREATE = ("prestart", "createRuntime", "createContainer")
KINDS = (*AT_CREATE, "startContainer", "poststart", "poststop")


def hook(script: str) -> list[dict[str, Any]]:
    """It reads the state that the runtime gives it, so that writing that cannot fail."""
    args = ["sh", "-c", f"cat >/dev/null; {script}"]
    return [{"path": "/bin/sh", "args": args, "env": ["PATH=/bin:/usr/bin"]}]


def bind_run(spec: dict[str, Any]) -> None:
    source = {"destination": INSIDE, "type": "bind", "source": GUEST_RUN}
    spec["mounts"].append({**source, "options": ["rbind", "rw"]})


@case
async def hooks_of_every_kind_run(target: Target) -> None:
    marks = name("hooks")

    def change(spec: dict[str, Any]) -> None:
        bind_run(spec)
        spec["hooks"] = {
            kind: hook(f"echo {kind} >>{INSIDE if kind == 'startContainer' else GUEST_RUN}/{marks}")
            for kind in KINDS
        }

    async with await connect(target) as client, running(target, client, spec=bind_run) as viewer:
        try:
            async with running(target, client, "true", stdio=OUTPUT, spec=change) as init:
                assert (await init.wait()).exit_code == 0
            done = await run(client, viewer.container, "cat", f"{INSIDE}/{marks}")
            seen = done.stdout.decode().split()
            assert sorted(seen) == sorted(KINDS), (seen, done.stderr)
            assert seen[:3] == list(AT_CREATE)
            assert seen[-1] == "poststop"
        finally:
            await run(client, viewer.container, "rm", "-f", f"{INSIDE}/{marks}")


@case
async def a_hook_that_fails_says_why_and_leaves_nothing(target: Target) -> None:
    def failing(kind: str) -> Any:
        def change(spec: dict[str, Any]) -> None:
            spec["hooks"] = {kind: hook("echo no such luck >&2; exit 3")}

        return change

    async with await connect(target) as client:
        for kind in AT_CREATE:
            ident = name("c")
            with pytest.raises(RpcError) as caught:
                await client.create_container(creation(target, ident, ("true",), spec=failing(kind)))
            assert caught.value.code is Code.INTERNAL
            said = str(caught.value.details)
            assert "hook" in said, caught.value
            # crun 1 leaves a hook's standard error to the container's own.
            assert "no such luck" in said or target.runtime == "crun", caught.value
            with refused(Code.NOT_FOUND):
                await client.container_state(ident)
        params = creation(target, name("c"), ("true",), spec=failing("poststop"))
        await client.create_container(params)
        await remove(client, params.container)
        with refused(Code.NOT_FOUND):
            await client.container_state(params.container)


@case
async def a_hook_that_hangs_is_ended_with_the_call(target: Target) -> None:
    def change(spec: dict[str, Any]) -> None:
        spec["hooks"] = {"createRuntime": hook("exec sleep 987654")}

    params = creation(target, name("c"), ("true",), spec=change)
    async with await connect(target) as client:
        with refused(Code.DEADLINE_EXCEEDED):
            deadline = {"deadline_ms": int(1000 * target.pace)}
            await raw_call(target, "container.create", {**to_wire(params), **deadline})
        with refused(Code.NOT_FOUND):
            await client.container_state(params.container)

        def guests_processes(spec: dict[str, Any]) -> None:
            spec["linux"]["namespaces"] = [
                each for each in spec["linux"]["namespaces"] if each["type"] != "pid"
            ]

        async with running(
            target, client, "ps", "-ewwo", "args", stdio=OUTPUT, spec=guests_processes
        ) as init:
            assert b"987654" not in (await init.communicate()).stdout

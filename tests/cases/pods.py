"""Cases about pods: what containers share with their sandbox, what they don't, and how a pod ends."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from gcsagent.host.client import Client
from protocol.pods import PodMember, PodNamespace, Sandbox
from tests.cases.target import (
    Target,
    case,
    connect,
    name,
    run,
    running,
)

NETWORK, IPC, UTS, PID = PodNamespace
LISTEN = (
    "import socket, time; s = socket.socket(); s.bind(('127.0.0.1', 8080)); s.listen()\n"
    "print('ready', flush=True); time.sleep(100000)"
)
DIAL = "import socket; socket.create_connection(('127.0.0.1', 8080), 2); print('connected')"


@contextlib.asynccontextmanager
async def sandboxed(target: Target, client: Client, **options: Any) -> AsyncIterator[str]:
    """A running sandbox; removed at the end with everything in its pod."""
    change = options.pop("spec", None)
    async with running(target, client, sandbox=Sandbox(**options), spec=change) as init:
        yield init.container


def member(sandbox: str, *share: PodNamespace) -> PodMember:
    return PodMember(sandbox, share)


async def shell(client: Client, container: str, script: str) -> tuple[int, str]:
    done = await run(client, container, "sh", "-c", script)
    return done.exit.exit_code, (done.stdout + done.stderr).decode()


async def seen(client: Client, container: str, script: str) -> str:
    status, text = await shell(client, container, script)
    assert status == 0, text
    return text.strip()


async def namespaces(client: Client, container: str) -> dict[str, str]:
    text = await seen(client, container, "cd /proc/1/ns; readlink net ipc uts pid mnt cgroup")
    return dict(line.split(":", 1) for line in text.splitlines())


@case
async def containers_of_a_pod_share_what_they_say_and_no_more(target: Target) -> None:
    """Each kind looked at from inside: ports, shared memory, names, files in /dev/shm, processes, mounts."""

    def named(spec: dict[str, Any]) -> None:
        spec["hostname"], spec["domainname"] = "web", "example.org"

    async with (
        await connect(target) as client,
        sandboxed(target, client, spec=named) as sandbox,
        running(target, client, pod=PodMember(sandbox)) as usual,
        running(target, client, pod=member(sandbox)) as nothing,
    ):
        await seen(client, sandbox, "ipcmk -M 4096 -Q >/dev/null; echo from-sandbox >/dev/shm/file")
        listening = await client.exec_process(_background(sandbox, "python3", "-c", LISTEN))
        assert listening.pid > 0
        await seen(client, sandbox, f'until python3 -c "{DIAL}" 2>/dev/null; do :; done')
        theirs, inside = await namespaces(client, sandbox), await namespaces(client, usual.container)
        assert {kind for kind in theirs if theirs[kind] == inside[kind]} == {"net", "ipc", "uts"}
        assert await seen(client, usual.container, f'python3 -c "{DIAL}"') == "connected"
        assert await seen(client, usual.container, "cat /dev/shm/file") == "from-sandbox"
        assert (await seen(client, usual.container, "ipcs -m | grep -c ^0x")) == "1"
        assert await seen(client, usual.container, "hostname; hostname -d; cat /etc/hostname") == (
            "web\nexample.org\nweb"
        )
        await seen(client, usual.container, "echo back >/dev/shm/other; echo mine >/tmp/mine")
        assert await seen(client, sandbox, "cat /dev/shm/other; ls /tmp") == "back"
        assert "100000" not in await seen(client, usual.container, "cat /proc/[2-9]*/cmdline | tr '\\0' ' '")

        alone = await namespaces(client, nothing.container)
        assert not {kind for kind in theirs if theirs[kind] == alone[kind]}
        status, text = await shell(client, nothing.container, f'python3 -c "{DIAL}"')
        assert (status, "Connection refused" in text) == (1, True)
        assert (await shell(client, nothing.container, "ls -A /dev/shm; ipcs -m | grep ^0x"))[1] == ""
        assert await seen(client, nothing.container, "hostname") == nothing.container
        assert "web" not in await seen(client, nothing.container, "cat /etc/hosts /etc/hostname")
        assert "/etc/" not in await seen(client, nothing.container, "cat /proc/self/mounts")
        states = {each.container: each for each in await client.list_containers()}
        assert (states[sandbox].pod, states[sandbox].share) == (sandbox, ())
        assert (states[usual.container].pod, states[usual.container].share) == (sandbox, (NETWORK, IPC, UTS))
        assert (states[nothing.container].pod, states[nothing.container].share) == (sandbox, ())
        pod = states[sandbox].cgroup.rpartition("/")[0]
        assert {state.cgroup.rpartition("/")[0] for state in states.values() if state.pod} == {pod}


def _background(container: str, *args: str) -> Any:
    from protocol.families.process import Exec

    return Exec(container, name("p"), {"args": list(args), "cwd": "/"}, auto_delete=True)

"""A VM and its containers for tests that are plain functions; the pytest plugin's fixtures give these.

    vm = GuestVm.launch(VmConfig(rootfs=Path("rootfs.erofs")))
    with vm.container() as container:
        assert container.run("cat", "/etc/hostname").stdout == container.id + "\\n"
    vm.stop()

An event loop in a thread of its own looks after the VM all the while, so that its console is read and its
forwards are served while a test does something else. Calls may come from any thread.
"""

from __future__ import annotations

import asyncio
import errno
import secrets
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from gcsagent.host import copy, network
from gcsagent.host.client import Client
from gcsagent.host.forward import Controls, Forwarder, ForwardStream, listen
from gcsagent.host.process import RemoteProcess
from gcsagent.host.spec import container_spec, exec_spec
from gcsagent.host.spec_options import SpecOptions, apply
from gcsagent.host.vm.config import VmConfig, VmExit
from gcsagent.host.vm.console import Finding
from gcsagent.host.vm.launcher import Progress, VirtualMachine
from protocol import checks
from protocol.errors import RpcError
from protocol.families.container import CreateContainer
from protocol.families.forward import OpenForward
from protocol.families.network import AttachNetwork
from protocol.families.process import Exec
from protocol.families.stream import StreamName
from protocol.types import ExitRecord, Stdio, StreamMode, StreamSpec, WhenFull

T = TypeVar("T")

GUEST_ROOTFS = "/run/gcs/disks/rootfs"
"""Where the guest mounts ``VmConfig.rootfs``."""

RUN_SECONDS = 60.0
END_SECONDS = 60.0
CONNECT_SECONDS = 30.0

_STREAM = StreamSpec(StreamMode.STREAM)
_LOG = StreamSpec(StreamMode.SPOOL, when_full=WhenFull.DROP_OLDEST)


class CommandFailed(AssertionError):
    """A command that was to succeed did not; the message has its output."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended. ``exit_code`` is 128 + the signal's number if a signal ended it."""

    args: tuple[str, ...]
    exit_code: int
    stdout_bytes: bytes
    stderr_bytes: bytes
    record: ExitRecord

    @property
    def stdout(self) -> str:
        return self.stdout_bytes.decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self.stderr_bytes.decode(errors="replace")

    def check(self) -> Self:
        """Itself. Raises CommandFailed unless the exit code is 0."""
        if self.exit_code:
            said = (self.stderr or self.stdout).rstrip()
            raise CommandFailed(f"{' '.join(self.args)} exited {self.exit_code}: {said or 'no output'}")
        return self


class GuestVm:
    """A running VM. Make it with :meth:`launch`, end it with :meth:`stop` or :meth:`destroy`."""

    def __init__(self, loop: _Loop, machine: VirtualMachine, client: Client) -> None:
        self._loop, self.machine, self.client = loop, machine, client

    @classmethod
    def launch(cls, config: VmConfig, *, progress: Progress | None = None) -> Self:
        """Boots a VM and connects to its agent.

        Raises VmError (its ``report()`` has the console's last lines), HostError, RpcError.
        """
        loop = _Loop()
        try:
            return cls(loop, *loop.call(_start(config, progress), None))
        except BaseException:
            loop.close()
            raise

    @property
    def address(self) -> str:
        """Where the agent is dialled, for ``gcsctl --address`` and other clients."""
        return self.machine.address

    def call(self, work: Callable[[Client], Coroutine[Any, Any, T]], *, timeout: float = RUN_SECONDS) -> T:
        """What ``work`` returns, given the asyncio client: everything that has no method here.

            vm.call(lambda client: client.info())

        Raises TimeoutError after ``timeout`` seconds, and what ``work`` raises.
        """
        return self._loop.call(work(self.client), timeout)

    def container(
        self,
        *args: str,
        id: str | None = None,
        rootfs: str = GUEST_ROOTFS,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        user: str = "",
        bridge: bool = False,
        options: SpecOptions | None = None,
    ) -> GuestContainer:
        """Starts a container that runs ``args``, or sleeps; a throw-away layer over ``rootfs`` takes writes.

        ``bridge`` connects it to the guest's network. What it writes is kept for :meth:`GuestContainer.logs`.
        Raises RpcError.
        """
        name = id or f"test-{secrets.token_hex(4)}"
        spec = container_spec(
            container=name,
            rootfs=rootfs,
            args=args or ("sleep", "infinity"),
            env=_environment(env),
            cwd=cwd,
            user=user,
        )
        params = CreateContainer(
            name, apply(spec, options or SpecOptions()), stdio=Stdio(stdout=_LOG, stderr=_LOG), overlay=True
        )
        self.call(lambda client: _begin(client, params, bridge))
        return GuestContainer(self, name)

    def run(self, *args: str, **options: Any) -> Outcome:
        """Runs one command in a container of its own, as :meth:`GuestContainer.run` does in a given one."""
        with self.container() as container:
            return container.run(*args, **options)

    def console(self, lines: int = 60) -> list[str]:
        """The last lines of the console, where kernel and agent log to."""
        return self.machine.console.lines()[-lines:]

    def findings(self) -> list[Finding]:
        """Signs of kernel trouble on the console so far: panic, oops, hung task and the like."""
        return list(self.machine.console.findings)

    def stop(self) -> VmExit:
        """Containers get TERM, then KILL; the guest unmounts and powers off."""
        try:
            return self._loop.call(_stop(self.client, self.machine), END_SECONDS)
        finally:
            self.destroy()

    def destroy(self) -> None:
        """Ends it at once, whatever state it is in; may be called again."""
        if self._loop.running:
            self._loop.call(_destroy(self.client, self.machine), END_SECONDS)
            self._loop.close()


class GuestContainer:
    """A running container. Leaving its ``with`` deletes it."""

    def __init__(self, vm: GuestVm, container: str) -> None:
        self.vm, self.id = vm, container

    def run(
        self,
        *args: str,
        input: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        user: str = "",
        cwd: str | None = None,
        check: bool = False,
        timeout: float = RUN_SECONDS,
    ) -> Outcome:
        """Runs a command in it and collects its output; ``check`` demands exit code 0.

        Raises CommandFailed, RpcError, and TimeoutError after ``timeout`` seconds, the command killed.
        """
        spec = exec_spec(args=args, env=_environment(env), user=user, cwd=cwd)
        params = Exec(self.id, secrets.token_hex(6), spec, Stdio(_STREAM, _STREAM, _STREAM))
        data = input.encode() if isinstance(input, str) else input
        outcome = self.vm.call(lambda client: _run(client, params, args, data or b""), timeout=timeout)
        return outcome.check() if check else outcome

    def put(self, source: Path | str, path: str) -> None:
        """Copies a file or directory into it, as ``docker cp`` does. Raises CannotCopy, RpcError."""
        self.vm.call(lambda client: copy.upload(client, str(source), self.id, path, copy.Manner()))

    def get(self, path: str, target: Path | str) -> None:
        """Copies a file or directory out of it. Raises CannotCopy, RpcError."""
        self.vm.call(lambda client: copy.download(client, self.id, path, str(target), copy.Manner()))

    @contextmanager
    def forwarded(self, port: int, *, wait: float = 30.0) -> Iterator[tuple[str, int]]:
        """Address and port on this machine that lead to TCP ``port`` inside it.

        Waits up to ``wait`` seconds until something listens there. Raises TimeoutError, RpcError.
        """
        target = OpenForward(self.id, port=port)
        self.vm.call(lambda client: _listening(client, target), timeout=wait)
        listener = listen(("127.0.0.1", 0))
        address, local_port = listener.getsockname()[:2]

        async def serve(client: Client) -> Forwarder:
            return Forwarder(Controls(client), listener, target, lambda error: None)

        forwarder = self.vm.call(serve)
        try:
            yield address, local_port
        finally:
            self.vm.call(lambda client: forwarder.aclose())

    def logs(self) -> tuple[str, str]:
        """What its own command has written so far to stdout and stderr; the newest 16 MiB of each."""
        return self.vm.call(lambda client: _logs(client, self.id))

    def wait(self, *, timeout: float = RUN_SECONDS) -> ExitRecord:
        """How its command ended. Raises TimeoutError after ``timeout`` seconds."""
        return self.vm.call(lambda client: client.wait_container(self.id), timeout=timeout)

    def delete(self) -> None:
        """Kills what runs in it and removes it. Raises RpcError."""
        self.vm.call(lambda client: client.delete_container(self.id, force=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.delete()


class _Loop:
    """An event loop in a thread. The thread lasts as long as the VM: QEMU dies with the thread that forked
    it (prctl(2), PR_SET_PDEATHSIG)."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gcs-vm", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def call(self, work: Coroutine[Any, Any, T], timeout: float | None) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(timeout):
                return await work

        future = asyncio.run_coroutine_threadsafe(bounded(), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C and pytest-timeout interrupt this thread, not that one
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _start(config: VmConfig, progress: Progress | None) -> tuple[VirtualMachine, Client]:
    machine = await VirtualMachine.launch(config, progress=progress)
    try:
        client = await Client.connect(machine.address, timeout=CONNECT_SECONDS)
        for nic in machine.nics:
            await network.use_user_network(client, nic.mac)
    except BaseException:
        machine.destroy()
        raise
    return machine, client


async def _stop(client: Client, machine: VirtualMachine) -> VmExit:
    await client.shutdown()
    return await machine.wait()


async def _destroy(client: Client, machine: VirtualMachine) -> None:
    await client.aclose()
    machine.destroy()


async def _begin(client: Client, params: CreateContainer, bridge: bool) -> None:
    process = await RemoteProcess.create(client, params, attached=False)
    try:
        if bridge:
            await network.attach(client, AttachNetwork(params.container))
        await process.start()
    except BaseException:
        await client.delete_container(params.container, force=True)
        raise


async def _run(client: Client, params: Exec, args: tuple[str, ...], data: bytes) -> Outcome:
    process = await RemoteProcess.exec(client, params)
    try:
        async with process:
            done = await process.communicate(data)
    except BaseException:
        await process.destroy()
        raise
    await client.delete_process(params.container, params.process)
    return Outcome(args, done.exit.exit_code, done.stdout, done.stderr, done.exit)


async def _listening(client: Client, target: OpenForward) -> None:
    async for attempt in AsyncRetrying(
        retry=retry_if_exception(_refused), wait=wait_random_exponential(multiplier=0.05, max=1.0)
    ):
        with attempt:
            async with await ForwardStream.open(client, target):
                return


def _refused(error: BaseException) -> bool:
    return isinstance(error, RpcError) and error.details.get("errno") == errno.ECONNREFUSED


async def _logs(client: Client, container: str) -> tuple[str, str]:
    stdout = await _log(client, container, StreamName.STDOUT)
    return stdout, await _log(client, container, StreamName.STDERR)


async def _log(client: Client, container: str, name: StreamName) -> str:
    where = container, checks.INIT, name
    span = await client.find_in_stream(*where)
    kept = bytearray()
    async with await client.attach_spool(
        *where, offset=span.offset, acknowledge=False, passive=True
    ) as stream:
        stream.finish_at(span.end)
        while data := await stream.read():
            kept += data
    return kept.decode(errors="replace")


def _environment(env: Mapping[str, str] | None) -> list[str]:
    return [f"{name}={value}" for name, value in (env or {}).items()]

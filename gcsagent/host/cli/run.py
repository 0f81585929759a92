"""run, create, exec and attach: what puts a process's streams on this terminal."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gcsagent.host import network, terminal
from gcsagent.host.bridge import LocalStdio, bridge
from gcsagent.host.cli import container_options, image_roots, pods, stdio
from gcsagent.host.cli.common import UsageError, complain, connect, exit_code, print_json, report_oom
from gcsagent.host.cli.image_roots import ImageRoot
from gcsagent.host.cli.signals import Signals
from gcsagent.host.client import Client
from gcsagent.host.errors import HostError
from gcsagent.host.image import settings
from gcsagent.host.process import RemoteProcess
from gcsagent.host.shell import Shell
from gcsagent.host.signalling import handled
from gcsagent.host.spec import container_spec, exec_spec, merge_env
from gcsagent.host.spec_options import apply
from gcsagent.host.spool import SpoolStream
from gcsagent.host.transport import Address
from protocol.errors import Code, RpcError
from protocol.families.container import CreateContainer
from protocol.families.network import AttachNetwork
from protocol.families.process import Exec
from protocol.types import ExitRecord

_STDIN, _STDOUT, _STDERR = 0, 1, 2


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A container to run and how much of it this gcsctl takes part in."""

    params: CreateContainer
    remove: bool = False
    detach: bool = False
    interactive: bool = False
    as_json: bool = False
    bridge: bool = False
    """Give it an interface on the guest's bridge before it starts."""
    created: Callable[[], None] = lambda: None
    """Called when the agent knows the container."""


# -- the commands ---------------------------------------------------------------------------------


async def run_command(args: argparse.Namespace) -> int:
    image = await image_roots.prepared(args)
    with Signals() as signals:
        async with await connect(args) as client, image_roots.rooted(args, client, image) as root:
            return await run_container(client, run_plan(args, client.address, root), signals)


async def create_command(args: argparse.Namespace) -> int:
    image = await image_roots.prepared(args)
    with Signals():
        async with await connect(args) as client, image_roots.rooted(args, client, image) as root:
            plan = run_plan(args, client.address, root)
            process = await RemoteProcess.create(client, plan.params, attached=False)
            plan.created()
            try:
                await _connect(client, plan)
            except BaseException:
                await _discard(client, process.container)
                raise
    _announce({"container": process.container, "pid": process.pid}, process.container, args.json)
    return 0


async def exec_command(args: argparse.Namespace) -> int:
    if not args.command:
        raise UsageError("give a command to execute after --")
    if args.log and (args.tty or not args.detach):
        raise UsageError("--log goes with -d and without -t: only output that nobody is shown is kept")
    with Signals() as signals:
        async with await connect(args) as client:
            params = exec_params(args, client.address)
            process = await RemoteProcess.exec(client, params, attached=not args.detach)
            if args.detach:
                shown = {"container": process.container, "process": process.process, "pid": process.pid}
                _announce(shown, process.process, args.json)
                return 0
            try:
                async with process:
                    record = await _converse(process, signals, args.interactive)
            except BaseException:
                await process.destroy()
                raise
            with contextlib.suppress(RpcError, HostError):
                await client.delete_process(process.container, process.process)
    return _report(record, args.json, f"{params.container}/{params.process}")


async def attach_command(args: argparse.Namespace) -> int:
    with Signals() as signals:
        async with (
            await connect(args) as client,
            await RemoteProcess.attach(client, args.id, args.process) as process,
        ):
            if not process.streams:
                raise UsageError(
                    f"process {args.process} of {args.id} has no streams to attach to;"
                    " create it with -i or -t for that"
                )
            record = await _converse(process, signals, process.input is not None)
            _report_gaps(process)
    return _report(record, args.json, f"{args.id}/{args.process}")


async def run_container(client: Client, plan: RunPlan, signals: Signals) -> int:
    """Creates, attaches, starts and waits as ``plan`` says. Returns the exit code for gcsctl."""
    container = plan.params.container
    process = await RemoteProcess.create(client, plan.params, attached=not plan.detach)
    plan.created()
    keep = False
    try:
        async with process:
            await _connect(client, plan)
            await process.start()
            keep = plan.detach or not plan.remove
            if plan.detach:
                _announce({"container": container, "pid": process.pid}, container, plan.as_json)
                return 0
            record = await _converse(process, signals, plan.interactive)
            _report_gaps(process)
    finally:
        if not keep:
            await _discard(client, container)
    return _report(record, plan.as_json, container)


async def _connect(client: Client, plan: RunPlan) -> None:
    if plan.bridge:
        await network.attach(client, AttachNetwork(plan.params.container))


# -- from the command line to the contract --------------------------------------------------------


def run_plan(args: argparse.Namespace, address: Address, image: ImageRoot | None = None) -> RunPlan:
    """``image`` is what ``--image`` has become. Raises UsageError when the options contradict each other."""
    container = args.id or secrets.token_hex(6)
    detach = getattr(args, "detach", False)
    log = getattr(args, "log", False)
    if log and args.tty:
        raise UsageError("--log cannot be given with -t: a terminal's output is not kept")
    remove = getattr(args, "rm", False)
    if sum((args.rootfs is not None, args.bundle is not None, image is not None)) != 1:
        raise UsageError("give exactly one of --rootfs DIR, --image IMAGE and --bundle DIR")

    own = _settings(args, image)
    spec, bundle = None, None
    if args.bundle is not None:
        _refuse_beside_bundle(args)
        bundle = stdio.guest_path("--bundle", args.bundle, address)
    else:
        spec = _spec(args, container, address, image, own)
    params = CreateContainer(
        container=container,
        spec=spec,
        bundle=bundle,
        stdio=stdio.wanted(args, address, quiet=detach or args.quiet, log=log or detach),
        overlay=args.overlay or image is not None,
        runtime=args.runtime,
        allow_vsock=args.allow_vsock,
        auto_delete=remove and detach,
        labels={**own.labels, **dict(getattr(args, "label", ()))},
        sandbox=pods.sandbox_of(args),
        pod=pods.member_of(args),
    )
    return RunPlan(
        params,
        remove,
        detach,
        args.interactive,
        args.json,
        bridge=_network(args) == "bridge",
        created=image.settled if image else lambda: None,
    )


def _spec(
    args: argparse.Namespace,
    container: str,
    address: Address,
    image: ImageRoot | None,
    own: settings.Settings,
) -> dict[str, Any]:
    if not own.args:
        raise UsageError("give a command to run after --" + (": the image names none" if image else ""))

    def resolve(option: str, path: str) -> str:
        return stdio.guest_path(option, path, address)

    made = container_spec(
        container=container,
        rootfs=image.path if image else resolve("--rootfs", args.rootfs),
        args=own.args,
        env=merge_env(own.env, environment(args.env_file), environment(args.env)),
        cwd=args.workdir or own.workdir,
        user=args.user or own.user,
        groups=args.group_add,
        terminal=args.tty,
    )
    options = container_options.options_of(args, container, resolve)
    if not getattr(args, "sandbox", False):  # a pod's resolv.conf is the agent's to make
        options = container_options.on_network(options, _network(args))
    return apply(made, container_options.with_volumes(options, own.volumes))


def _settings(args: argparse.Namespace, image: ImageRoot | None) -> settings.Settings:
    """What is not given on the command line: the image's, or none."""
    if image is not None:
        return settings.of(image.config, args.command, args.entrypoint)
    if getattr(args, "entrypoint", None) is not None:
        raise UsageError("--entrypoint goes with --image: otherwise give the whole command after --")
    return settings.Settings(args=tuple(args.command))


def _network(args: argparse.Namespace) -> str:
    """What is to be seen to beside the spec's namespaces; in a pod that is done once, for its sandbox."""
    chosen = getattr(args, "network", "none")
    if chosen == "bridge" and getattr(args, "pod", None):
        raise UsageError("--network bridge goes with --sandbox: a pod's containers share its network")
    return str(getattr(args, "vm_network", "none" if chosen == "host" else chosen))


def exec_params(args: argparse.Namespace, address: Address) -> Exec:
    """Raises UsageError when the options contradict each other."""
    spec = exec_spec(
        args=args.command,
        env=merge_env(environment(args.env_file), environment(args.env)),
        cwd=args.workdir,
        user=args.user or "",
        groups=args.group_add,
        privileged=args.privileged or "ALL" in args.cap_add,
        terminal=args.tty,
    )
    return Exec(
        container=args.id,
        process=secrets.token_hex(6),
        spec=spec,
        stdio=stdio.wanted(args, address, quiet=args.detach, log=args.log),
        auto_delete=args.detach and not args.log,
        add_capabilities=tuple(name for name in args.cap_add if name != "ALL"),
    )


def environment(entries: list[str]) -> list[str]:
    """``K=V`` as it is; ``K`` alone takes the value from here, and is left out where it has none."""
    given = []
    for entry in entries:
        if "=" in entry:
            given.append(entry)
        elif entry in os.environ:
            given.append(f"{entry}={os.environ[entry]}")
    return given


def _refuse_beside_bundle(args: argparse.Namespace) -> None:
    given = {
        "CMD": args.command,
        "-e": args.env,
        "-w": args.workdir,
        "--env-file": args.env_file,
        "-t": args.tty,
        **container_options.given(args),
    }
    for name, value in given.items():
        if value:
            raise UsageError(f"{name} cannot be given with --bundle: its config.json says that")


# -- at the terminal ------------------------------------------------------------------------------


async def _converse(process: RemoteProcess, signals: Signals, interactive: bool) -> ExitRecord:
    """Connects the process to this terminal until it has ended."""
    local = LocalStdio(_STDIN if interactive else None, _STDOUT, _STDERR)
    with contextlib.ExitStack() as stack:
        if process.terminal:
            stack.enter_context(resizing(process))
        if process.terminal and interactive and os.isatty(_STDIN):
            stack.enter_context(terminal.raw(_STDIN))
        else:
            signals.forward_to(process)
        return await bridge(process, local)


@contextlib.contextmanager
def resizing(process: RemoteProcess | Shell) -> Iterator[None]:
    """Gives the remote terminal this one's size, now and whenever it changes."""
    changed = asyncio.Event()
    changed.set()

    async def follow() -> None:
        while True:
            await changed.wait()
            changed.clear()
            size = terminal.winsize(_STDIN, _STDOUT, _STDERR)
            if size is not None:
                with contextlib.suppress(RpcError, HostError):  # it may have ended just now
                    await process.resize(size)

    following = asyncio.create_task(follow())
    try:
        with handled((signal.SIGWINCH,), lambda _: changed.set()):
            yield
    finally:
        following.cancel()


async def _discard(client: Client, container: str) -> None:
    try:
        await client.delete_container(container, force=True)
    except RpcError as error:
        if error.code is not Code.NOT_FOUND:
            complain(f"container {container} could not be removed: {error.message}")
    except HostError as error:
        complain(f"container {container} could not be removed: {error}")


def _report_gaps(process: RemoteProcess) -> None:
    """A log never holds its writer up, so a slow terminal or pipe here may have missed some of it."""
    for stream in process.outputs:
        if isinstance(stream, SpoolStream) and stream.dropped:
            complain(f"{stream.name}: {stream.dropped} bytes were dropped before they could be shown")


def _announce(document: dict[str, object], identifier: str, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        print(identifier, flush=True)


def _report(record: ExitRecord, as_json: bool, who: str) -> int:
    if as_json:
        # Standard output is the process's own.
        print_json(record, to_stderr=True, indent=None)
    else:
        report_oom(record, who)
    return exit_code(record)

"""gcsctl checkpoint and restore: a container saved with its processes, and made to go on."""

from __future__ import annotations

import argparse
from typing import Any

from gcsagent.host.checkpoints import (
    delete_checkpoint,
    list_checkpoints,
    make_checkpoint,
    restore_container,
)
from gcsagent.host.cli.argument_types import absolute_path, add_id, identifier
from gcsagent.host.cli.common import UsageError, connect, print_json, print_table, say
from gcsagent.host.cli.declare import Add, add_group
from gcsagent.host.cli.processes import age
from gcsagent.host.cli.resources import size
from protocol.families.checkpoint import MakeCheckpoint, Restore


def add_checkpoint_commands(commands: Any, add: Add) -> None:
    verbs = add_group(
        commands,
        "checkpoint",
        "save a container with its processes; list and remove what was saved",
        "gcsctl checkpoint create web web-1",
    )
    parser = add(
        verbs,
        "create",
        create,
        "save a container, which ends with that",
        "gcsctl checkpoint create --leave-running web web-1",
    )
    _add_options(parser)
    parser.add_argument(
        "--path", type=absolute_path, metavar="DIR", help="directory in the guest to make for it"
    )
    add_id(parser)
    parser.add_argument("checkpoint", type=identifier, metavar="NAME", help="the checkpoint's id")
    add(verbs, "ls", ls, "list checkpoints", "gcsctl checkpoint ls")
    parser = add(verbs, "rm", rm, "remove a checkpoint", "gcsctl checkpoint rm web-1")
    parser.add_argument("checkpoint", type=identifier, metavar="NAME")
    _add_restore(commands, add)


def _add_restore(commands: Any, add: Add) -> None:
    parser = add(
        commands,
        "restore",
        restore,
        "make a container of a checkpoint, going on where it was; see it with `attach` or `logs`",
        "gcsctl restore --id web2 web-1",
    )
    parser.add_argument("--id", type=identifier, metavar="ID", help="default: the id it had")
    parser.add_argument(
        "--path", type=absolute_path, metavar="DIR", help="the checkpoint's directory in the guest"
    )
    parser.add_argument("checkpoint", nargs="?", type=identifier, metavar="NAME", help="the checkpoint's id")


def _add_options(parser: argparse.ArgumentParser) -> None:
    for name, about in (
        ("--leave-running", "let it run on"),
        ("--tcp-established", "save open TCP connections, too"),
        ("--ext-unix-sk", "allow unix sockets connected to the outside"),
        ("--shell-job", "allow a session or terminal from outside"),
        ("--file-locks", "save file locks, too"),
    ):
        parser.add_argument(name, action="store_true", help=about)


async def create(args: argparse.Namespace) -> int:
    wanted = MakeCheckpoint(
        args.id,
        args.checkpoint,
        leave_running=args.leave_running,
        tcp_established=args.tcp_established,
        ext_unix_sk=args.ext_unix_sk,
        shell_job=args.shell_job,
        file_locks=args.file_locks,
        path=args.path,
    )
    async with await connect(args) as client:
        made = await make_checkpoint(client, wanted)
    if args.json:
        print_json(made)
    else:
        say(made.checkpoint)
    return 0


async def restore(args: argparse.Namespace) -> int:
    if (args.checkpoint is None) == (args.path is None):
        raise UsageError("give a checkpoint's NAME, or --path DIR")
    async with await connect(args) as client:
        created = await restore_container(client, Restore(args.checkpoint, args.path, args.id))
    if args.json:
        print_json({"checkpoint": args.checkpoint or args.path, "pid": created.pid})
    return 0


async def ls(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        found = await list_checkpoints(client)
    if args.json:
        print_json(found)
        return 0
    rows = [
        (each.checkpoint, each.container, size(each.size_bytes), age(each.created_at_ns), each.path)
        for each in found
    ]
    print_table(("CHECKPOINT", "CONTAINER", "SIZE", "AGE", "PATH"), rows)
    return 0


async def rm(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        await delete_checkpoint(client, args.checkpoint)
    if args.json:
        print_json({"checkpoint": args.checkpoint})
    return 0

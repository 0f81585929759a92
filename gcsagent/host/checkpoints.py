"""Checkpoints by way of a client: what ``gcsctl checkpoint`` and ``gcsctl restore`` are made of."""

from __future__ import annotations

from gcsagent.host.client import Client
from protocol.families.checkpoint import Checkpoint, CheckpointList, CheckpointRef, MakeCheckpoint, Restore
from protocol.families.container import Created
from protocol.method import Empty


async def make_checkpoint(
    client: Client, params: MakeCheckpoint, *, deadline: float | None = None, request_id: str | None = None
) -> Checkpoint:
    """Saves a container; it ends with that unless ``leave_running``. Raises what :meth:`Client.call` raises;
    FAILED_PRECONDITION names what CRIU cannot save (``criu_errors``), or what is missing in the guest."""
    result: Checkpoint = await client.call(
        "container.checkpoint", params, deadline=deadline, request_id=request_id
    )
    return result


async def restore_container(
    client: Client, params: Restore, *, deadline: float | None = None, request_id: str | None = None
) -> Created:
    """A new container that goes on where the saved one was. Its streams are attached to as ever."""
    result: Created = await client.call("container.restore", params, deadline=deadline, request_id=request_id)
    return result


async def list_checkpoints(client: Client) -> tuple[Checkpoint, ...]:
    result: CheckpointList = await client.call("checkpoint.list", Empty())
    return result.checkpoints


async def delete_checkpoint(client: Client, checkpoint: str) -> None:
    await client.call("checkpoint.delete", CheckpointRef(checkpoint))

"""Streams nobody attaches to: what is null, and what goes elsewhere."""

from __future__ import annotations

from gcsagent.agent.attachable import Attachment, Load
from protocol.errors import Code, RpcError
from protocol.types import StreamMode, StreamState


class Unattachable:
    """A stream nobody can attach to, and what is the same for all of that kind."""

    refusal = ""
    """What whoever tries is told."""

    def check_attachable(self, take: bool, offset: int | None = None, passive: bool = False) -> int:
        raise RpcError(Code.FAILED_PRECONDITION, self.refusal)

    def attach(self, client: Attachment) -> None:
        self.check_attachable(client.take)

    def settled(self) -> bool:
        return True

    def idle_since(self) -> float | None:
        return None

    def closing_at(self) -> int | None:
        return None

    def load(self) -> Load:
        return Load()


class NullStream(Unattachable):
    """/dev/null."""

    refusal = "this stream is null; ask for mode 'stream' when creating"

    def close_input(self, offset: int | None) -> None:
        return  # it reads end of file already

    def state(self) -> StreamState:
        return StreamState(mode=StreamMode.NULL, ended=True)

    def produced(self) -> int:
        return 0

    def process_ended(self) -> None:
        return

    def close(self) -> None:
        return

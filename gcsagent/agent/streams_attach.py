"""stream.attach: hands a connection to a stream of a process."""

from __future__ import annotations

import socket

from gcsagent.agent.attachable import Attachment, Stream
from gcsagent.agent.registry import Registry
from protocol.errors import Code, RpcError
from protocol.families.stream import Attach, Attached


class AttachStream:
    """A Takeover. The stream is looked up anew for each step: what it was may have changed in between."""

    def __init__(self, registry: Registry, params: Attach) -> None:
        self._registry, self._params = registry, params
        self._offset = 0

    def result(self) -> Attached:
        """Raises RpcError when the stream cannot be attached to now."""
        wanted = self._params
        self._offset = self._stream().check_attachable(wanted.take, wanted.offset, wanted.passive)
        return Attached(self._offset)

    def take(self, connection: socket.socket, reply: bytes, refusal: bytes) -> None:
        wanted = self._params
        self._stream().attach(
            Attachment(connection, reply, refusal, wanted.take, self._offset, wanted.passive)
        )

    def drop(self) -> None:
        return

    def _stream(self) -> Stream:
        wanted = self._params
        process = self._registry.get(wanted.container).process(wanted.process)
        asked = process.request.ident if process.request is not None else None
        if wanted.exec_request not in (None, asked):
            raise RpcError(
                Code.NOT_FOUND, f"process {wanted.process} is not that of request {wanted.exec_request}"
            )
        return process.stream(wanted.stream.value)

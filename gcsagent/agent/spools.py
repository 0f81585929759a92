"""stream.ack and stream.find: what a client asks of a spool beside its bytes."""

from __future__ import annotations

from gcsagent.agent.call import Call
from gcsagent.agent.process import Process
from gcsagent.agent.registry import Registry
from gcsagent.agent.spool_stream import SpoolStream
from protocol.errors import Code, RpcError
from protocol.families.stream import Ack, Find, Found
from protocol.method import Empty


class SpoolService:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def acknowledge(self, params: Ack, call: Call) -> Empty:
        container = self._registry.get(params.container)
        process = container.process(params.process)
        _spool_of(process, params.stream.value).acknowledge(params.offset)
        call.commit()
        self._registry.check_auto_delete(container, process)  # these may have been the last bytes owed
        return Empty()

    async def find(self, params: Find, _call: Call) -> Found:
        process = self._registry.get(params.container).process(params.process)
        stream = _spool_of(process, params.stream.value)
        offset = stream.spool.first
        if params.since_ns is not None:
            since = stream.index.since(params.since_ns)
            offset = stream.spool.written if since is None else since
        if params.tail is not None:
            offset = max(offset, await stream.spool.tail(params.tail))
        first, end = stream.spool.first, stream.spool.written
        return Found(max(offset, first), first, end)


def _spool_of(process: Process, name: str) -> SpoolStream:
    stream = process.stream(name)
    if not isinstance(stream, SpoolStream):
        raise RpcError(
            Code.FAILED_PRECONDITION, f"{name} is no spool; ask for mode 'spool' when creating the process"
        )
    return stream

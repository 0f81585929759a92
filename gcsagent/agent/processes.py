"""process.state, kill, resize, close_stdin, wait and delete, for init and execs alike."""

from __future__ import annotations

from gcsagent.agent.call import Call
from gcsagent.agent.journal import place_of
from gcsagent.agent.process import Process
from gcsagent.agent.registry import Registry
from gcsagent.agent.signals import once, signal_number
from gcsagent.agent.terminal import DiscardedTty, TtyStream
from protocol.errors import Code, RpcError
from protocol.families.container import Deleted
from protocol.families.process import CloseStdin, KillProcess, ProcessRef, Resize
from protocol.method import Empty
from protocol.types import ExitRecord, ProcessState


class ProcessService:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def _find(self, container: str, process: str) -> Process:
        return self._registry.get(container).process(process)

    def state(self, params: ProcessRef, _call: Call) -> ProcessState:
        return self._find(params.container, params.process).state()

    def kill(self, params: KillProcess, call: Call) -> Empty:
        number = signal_number(params.signal)
        with once(call):
            process = self._find(params.container, params.process)
            process.signal(0)  # before anything is written down
            self._registry.journal.begun(call.mark)
            process.signal(number)
        call.commit()
        return Empty()

    def resize(self, params: Resize, call: Call) -> Empty:
        process = self._find(params.container, params.process)
        process.resize(params.winsize.rows, params.winsize.cols)
        call.commit()
        return Empty()

    async def close_stdin(self, params: CloseStdin, call: Call) -> Empty:
        container = self._registry.get(params.container)
        process = container.process(params.process)
        stream = process.stream("tty" if process.stdio.terminal else "stdin")
        call.commit()
        if isinstance(stream, (TtyStream, DiscardedTty)):
            holding = stream.type_end(params.offset, place_of(call.mark.ident) if call.mark else "")
            if holding is not None:
                await holding
            return Empty()
        stream.close_input(params.offset)
        if process.alive:
            container.directory.update(process.pid, process.document())  # the next agent is to know, too
        return Empty()

    async def wait(self, params: ProcessRef, _call: Call) -> ExitRecord:
        return await self._find(params.container, params.process).wait()

    def delete(self, params: ProcessRef, call: Call) -> Deleted:
        container = self._registry.get(params.container)
        process = container.process(params.process)
        if process.is_init:
            raise RpcError(
                Code.FAILED_PRECONDITION, "the init process goes with its container; use container.delete"
            )
        if process.exit is None:
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"process {process.ident} is still {process.status.value}; kill it and wait first",
            )
        call.commit()
        deleted = Deleted(process.exit)
        self._registry.delete_process(container, process, call.mark, deleted)
        return deleted

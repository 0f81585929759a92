"""Which process uses which fifo: opens them for one that is about to start, removes them behind the last.

Every user of a fifo that was made by this agent has it in its own record, so that whoever is deleted last
removes it, also after a restart of the agent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from gcsagent.agent import fifo
from gcsagent.agent.container import Container
from gcsagent.agent.fifo import Fifo
from gcsagent.agent.process import Process
from gcsagent.agent.process_dir import write_json
from gcsagent.agent.stdio import PreparedStdio
from protocol.errors import Code, RpcError

Containers = Mapping[str, Container]


def open_all(
    containers: Containers,
    process: Process,
    prepared: PreparedStdio,
    directory: str,
    owner: tuple[int, int] | None,
    fields: Mapping[str, str] | None = None,
) -> None:
    """Opens every fifo of ``process``, whose directory is ``directory``, made where there is none.

    Those made here become ``owner``'s, the root of the container's user namespace if it has one; another's
    stays as it is. ``fields`` says which argument a stream's path came from if not its own. Raises what
    :func:`gcsagent.agent.fifo.claim` raises, and RESOURCE_EXHAUSTED.
    """

    def ours(found: os.stat_result) -> bool:
        return any(each.made and each.same_file(found) for each in _in_use(containers))

    for name, wanted in list(process.fifos.items()):

        def record(found: Fifo, name: str = name) -> None:
            if process.fifos[name] != found:
                process.fifos[name] = found
                write_json(os.path.join(directory, "process.json"), process.document())

        field = (fields or {}).get(name, f"stdio.{name}.path")
        temporary = _temporary(containers, process, name, wanted)
        path_fd = fifo.claim(field, wanted.path, temporary, ours, record)
        try:
            if owner is not None and process.fifos[name].made:
                os.chown(f"/proc/self/fd/{path_fd}", *owner)
            prepared.add_fifo(name, path_fd)
        except OSError as error:
            raise RpcError(Code.RESOURCE_EXHAUSTED, f"{field}: {wanted.path}: {error.strerror}") from error
        finally:
            os.close(path_fd)


def remove_made(containers: Containers, process: Process) -> None:
    """Removes the fifos that were made for ``process`` and that no other process uses. Raises OSError.

    To be called while they are still held: a held inode's number is nobody else's.
    """
    for name, each in list(process.fifos.items()):
        temporary = _temporary(containers, process, name, each)
        del process.fifos[name]  # first: of two processes that go at the same time the second removes it
        shared = any((each.device, each.inode) == (it.device, it.inode) for it in _in_use(containers))
        fifo.remove(Fifo(each.path) if shared else each, temporary)


def _in_use(containers: Containers) -> Iterator[Fifo]:
    for container in containers.values():
        for process in container.processes.values():
            yield from process.fifos.values()


def _temporary(containers: Containers, process: Process, name: str, wanted: Fifo) -> str:
    directory = containers[process.container].directory.path
    return fifo.temporary_name(wanted.path, f"{directory}/{process.ident}/{name}")

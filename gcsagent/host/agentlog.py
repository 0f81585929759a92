"""The agent's log and the guest's kernel's, entry by entry, each once, whoever is restarted meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator

from gcsagent.host.client import Client
from protocol.errors import RemoteProtocolError
from protocol.families.diagnostics import AskLogs, LogEntry, LogPage, LogSource

MAX_PAGES = 4096
"""Of one reading that does not follow; what a guest keeps of its logs makes a few dozen."""


class AgentLog:
    """``dropped`` counts entries the guest no longer had when they were asked for."""

    def __init__(self, client: Client, source: LogSource = LogSource.AGENT, after: int = 0) -> None:
        self._client, self._source, self.after = client, source, after
        self.dropped = 0

    async def last(self) -> int:
        """Number of the newest entry there is."""
        page: LogPage = await self._client.call("agent.logs", AskLogs(0, 1, source=self._source))
        return page.last

    async def entries(self, *, follow: bool = False) -> AsyncIterator[LogEntry]:
        """Those behind :attr:`after`, which goes along; with ``follow`` for ever.

        Raises what :meth:`Client.call` raises, and RemoteProtocolError for a guest that leads nowhere:
        whatever it answers, each further question has brought an entry, or the numbering begun anew.
        """
        pages = 0
        while True:
            page: LogPage = await self._client.call(
                "agent.logs", AskLogs(self.after, follow=follow, source=self._source)
            )
            pages += 1
            if pages > MAX_PAGES and not follow:
                raise _astray(f"the log does not end after {MAX_PAGES} pages")
            if page.last < self.after:  # the numbering began anew
                if self.after == 0:
                    raise _astray(f"entries of the log are numbered from 1, and the newest is {page.last}")
                self.after = 0
                continue
            self.dropped += page.dropped
            for entry in page.entries:
                if entry.seq <= self.after:
                    raise _astray(f"entry {entry.seq} of the log came behind {self.after}")
                self.after = entry.seq
                yield entry
            if follow and not page.entries:
                raise _astray("there was to be another entry of the log, and there was none")
            if not follow and (not page.entries or self.after >= page.last):
                return


def _astray(problem: str) -> RemoteProtocolError:
    return RemoteProtocolError("logs", f"the agent's answer to agent.logs: {problem}")

"""The agent's log and the guest's kernel's, entry by entry, each once, whoever is restarted meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator

from gcsagent.host.client import Client
from protocol.families.diagnostics import AskLogs, LogEntry, LogPage, LogSource


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

        Raises what :meth:`Client.call` raises.
        """
        while True:
            page: LogPage = await self._client.call(
                "agent.logs", AskLogs(self.after, follow=follow, source=self._source)
            )
            if page.last < self.after:  # the numbering began anew
                self.after = 0
                continue
            self.dropped += page.dropped
            for entry in page.entries:
                self.after = max(self.after, entry.seq)
                yield entry
            if not follow and (not page.entries or self.after >= page.last):
                return

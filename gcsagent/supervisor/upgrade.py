"""Puts other code in the agent's place, and the old code back when the new one does not do.

    none / promoted / rolled_back --begin--> trying --READY and then alive--> promoted
                                                    --ended, or its time is up--> rolled_back
    promoted / rolled_back --LOOP ends in a row before READY--> rolled_back, to what was installed

The code is a directory that goes first on the agent's PYTHONPATH. Nothing of it is ever loaded here: the
supervisor runs what it was started with until the machine ends. Every descriptor stays held meanwhile, so
that to containers and hosts it is one more restart of the agent, and a failed one two.
"""

from __future__ import annotations

from collections.abc import Callable

from gcsagent.common.loop import Loop, Timer
from gcsagent.supervisor.agentproc import END_SECONDS, AgentProcess
from gcsagent.supervisor.log import log

TYPE_CHECKING = False  # typing itself is half a megabyte
if TYPE_CHECKING:
    from typing import Any

LOOP = 5
"""Ends in a row before READY, after which promoted code is given up."""


class UpgradeError(ValueError):
    """An upgrade that cannot begin now."""


class Upgrade:
    """``told`` gets the status when it becomes ``promoted``; other ends the next agent asks for."""

    def __init__(self, loop: Loop, agent: AgentProcess, told: Callable[[dict[str, Any]], None]) -> None:
        self._loop, self._agent, self._told = loop, agent, told
        self._state, self._error = "none", ""
        self._next = self._tried = self._old = ""
        self._seconds = 0.0
        self._timer: Timer | None = None

    def status(self) -> dict[str, Any]:
        """``path`` is the code tried last, ``running`` what runs now; "" is what was installed."""
        return {
            "state": self._state,
            "error": self._error,
            "path": self._tried,
            "running": self._agent.code,
        }

    def begin(self, path: str, seconds: float) -> None:
        """The next agent runs the code in ``path``, and has ``seconds`` to prove itself.

        The present one is expected to end by itself, once it has answered whoever asked. Raises
        UpgradeError while another upgrade is under way.
        """
        if self._state == "trying":
            raise UpgradeError("an upgrade is under way")
        log("info", "upgrade begins", path=path)
        self._state, self._error = "trying", ""
        self._next = self._tried = path
        self._seconds = seconds
        self._set_timer(END_SECONDS, self._agent.kill)

    def agent_ended(self, status: int) -> bool:
        """Whether this end belongs to an upgrade; then the next agent is to be started, with its code."""
        if self._state != "trying":
            return self._agent.code != "" and self._loops(status)
        if self._next:
            self._old, self._agent.code, self._next = self._agent.code, self._next, ""
            self._set_timer(self._seconds, self._time_is_up)
        else:
            when = "before it said it is alive" if self._agent.ready else "before it was ready"
            self._roll_back(
                self._old, self._error or f"the new code ended with status {status} {when}; the log has why"
            )
        return True

    def _loops(self, status: int) -> bool:
        if self._agent.ready or self._agent.failures + 1 < LOOP:
            return False
        # Not to the code before it: the agent removes that once it runs upgraded itself.
        self._roll_back(
            "",
            f"the code that had been promoted ended {LOOP} times in a row before it was ready (status"
            f" {status}); the log has why",
        )
        return True

    def agent_alive(self) -> None:
        if self._state == "trying" and not self._next and self._agent.ready and not self._error:
            self._set_timer(0, None)
            self._state = "promoted"
            log("info", "upgrade promoted", path=self._tried, generation=self._agent.generation)
            self._told(self.status())

    def _time_is_up(self) -> None:
        what = "say it is alive" if self._agent.ready else "become ready"
        self._error = f"the new code did not {what} within {self._seconds:g} s"
        if self._agent.pid:
            self._agent.abort(self._error)
        else:  # between two tries to start it
            self._roll_back(self._old, self._error)

    def _roll_back(self, code: str, error: str) -> None:
        self._set_timer(0, None)
        self._state, self._error = "rolled_back", error
        self._agent.code = code
        log("error", "upgrade rolled back", path=self._tried, error=error)

    def _set_timer(self, seconds: float, callback: Callable[[], None] | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if callback is None else self._loop.after(seconds, callback)

"""The optional parts of the contract this agent has, by name: agent.hello and agent.info tell them."""

from __future__ import annotations

from gcsagent.agent import criu

FEATURES = (
    "archive",
    "events.replay",
    "exec_request",
    "fifo",
    "forward",
    "network",
    "pods",
    "snapshot",
    "spool",
    "tee",
    "upgrade",
)


def features() -> tuple[str, ...]:
    """With ``checkpoint`` only where CRIU is, which may be installed while the agent runs."""
    return ("checkpoint", *FEATURES) if criu.present() else FEATURES

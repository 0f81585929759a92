"""Guest agent for utility VMs: the supervisor, the agent, and the host side."""

__version__ = "0.1.0"

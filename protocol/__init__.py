"""The wire contract of gcsagent: the one place it is written.

Bytes in, messages out. Nothing in this package opens a socket, reads a clock, logs, or looks at the
environment; it imports ``msgpack`` and side-effect-free parts of the standard library. Guest and host
both build on it, so that a rule about the wire exists once. ``SPEC.md`` beside this file says the same
to people who write a client in another language, and ``vectors/`` holds frames both must agree on.
"""

PROTOCOL_MIN = 1
"""Oldest protocol version this package can speak."""

PROTOCOL_MAX = 1
"""Newest protocol version this package can speak."""

DEFAULT_PORT = 1024
"""AF_VSOCK port the agent listens on. Ports below 1024 need CAP_NET_BIND_SERVICE on Linux (vsock(7))."""

DEFAULT_SHELL_PORT = 1025
"""AF_VSOCK port of the debug shell, where it is allowed."""

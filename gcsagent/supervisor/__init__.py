"""The supervisor: PID 1 of the guest (or a subreaper outside one). It spawns, reaps, and holds descriptors.

Everything that must outlive the agent lives here, and nothing else does. It is single-threaded, decides
nothing about containers, and believes nothing the agent says: every operation is checked, and one that
fails answers with an error and changes nothing.

Import budget (held by a test): msgpack and the small part of the standard library it needs itself; no
asyncio, logging, dataclasses, typing, subprocess, threading or argparse. ctypes only outside a guest, for one
prctl.
"""

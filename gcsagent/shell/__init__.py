"""The debug shell's process: root shells in the guest or in a container's namespaces, over its own port.

Independent of the agent and of the runtime, so that it answers when they do not: PID 1 listens, starts this
at the first connection, and what it needs to know of a container it reads from the state directory. It ends
when it has been idle for a while; until somebody connects, the port costs no memory.

No asyncio, logging or argparse, and ptyprocess only once there is a shell to open: it has to start when
memory is short.
"""

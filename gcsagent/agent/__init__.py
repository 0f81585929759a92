"""The agent: listens, decides, moves bytes. It never forks, and may die at any instruction.

What starts a process or must outlive the agent is asked of the supervisor (gcsagent.supervisor); the only
module here that knows the runtime is runc is :mod:`gcsagent.agent.app`, which wires things together.
"""

"""The OCI spec of a container: read, checked, and made ready for the runtime, one concern a module.

:mod:`gcsagent.agent.bundle` puts them together. What is checked here is what the runtime would find out
only half-way, or say without naming the field; what nobody here knows is passed on as it is.
"""

"""The process that packs or unpacks one archive in the guest, at the other end of a host's connection.

The agent gives it the connection, a root directory and what is wanted, and has no part in it from there on:
neither does an archive's hostility meet the agent, nor does a large one take its time, nor does the agent's
death end it. Started by the supervisor, once for each archive; ends with it.
"""

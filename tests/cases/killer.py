"""Kills the agent in a VM: a container in the guest's pid namespace, told when by its stdin."""

from __future__ import annotations

from gcsagent.host.client import Client
from gcsagent.host.process import RemoteProcess
from tests.cases.target import expect

KILLER = """
import os, signal, sys
supervisor = %d
for line in sys.stdin:
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = open(f"/proc/{name}/stat").read()
            command = open(f"/proc/{name}/cmdline").read()
        except OSError:
            continue
        parent = int(stat.rpartition(")")[2].split()[1])
        if parent == supervisor and command.endswith("-m\\0gcsagent.agent\\0"):
            os.kill(int(name), signal.SIGKILL)
            print("killed", flush=True)
"""


def share_pids(spec: dict[str, dict[str, list[dict[str, str]]]]) -> None:
    spec["linux"]["namespaces"] = [each for each in spec["linux"]["namespaces"] if each["type"] != "pid"]


async def kill_once(client: Client, killer: RemoteProcess) -> None:
    generation = (await client.ping()).generation
    await killer.streams["stdin"].write(b"now\n")
    await expect(killer.streams["stdout"], b"killed\n")
    while (await client.ping()).generation == generation:
        pass  # answered by the one about to die: each question is a round trip, not a spin

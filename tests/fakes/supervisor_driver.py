"""The real supervisor, as a subreaper of its own, with a puppet for an agent.

usage: supervisor_driver.py STATE PUPPET [guest]

As a guest it prints what it would do to the machine and exits with status 42 instead.
"""

from __future__ import annotations

import os
import sys

from gcsagent.supervisor import agentproc, log, machine, main, standing, watchdog


def end(action: str) -> None:
    print(f"the machine's end: {action}", flush=True)
    os._exit(42)


def run(state: str, puppet: str, guest: bool) -> int:
    sys.executable = puppet  # what agentproc starts
    machine.end = end
    agentproc.END_SECONDS = 0.2
    watchdog.DUMP_SECONDS = 0.5
    # Together with the usual grace, which agents are still told of.
    main.CLEANUP_SECONDS = float(os.environ.get("DRIVER_STOP_SECONDS", "0.2")) - main.GRACE_SECONDS
    log.set_level("debug")
    standing.keep_descriptors_to_ourselves()
    standing.raise_limits()
    standing.become_subreaper()
    seconds = float(os.environ.get("DRIVER_WATCHDOG", "0"))
    return main.Supervisor(state, dict(os.environ), guest, "poweroff", seconds).run()


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2], sys.argv[3:] == ["guest"]))

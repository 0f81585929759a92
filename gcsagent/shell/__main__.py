"""``python3 -m gcsagent.shell``: started by the supervisor, which gives it the listening socket."""

from __future__ import annotations

import os
import socket
import sys

from gcsagent.common.config import Settings
from gcsagent.common.loop import Loop
from gcsagent.shell.journal import Journal
from gcsagent.shell.server import Server

LISTENER_FD, CHANNEL_FD = 3, 4


def main() -> int:
    settings = Settings.from_json(os.environ["GCS_SETTINGS"])
    for fd in (LISTENER_FD, CHANNEL_FD):
        os.set_inheritable(fd, False)
    loop = Loop()
    journal = Journal(socket.socket(fileno=CHANNEL_FD))
    server = Server(
        loop,
        socket.socket(fileno=LISTENER_FD),
        journal,
        state=settings.state,
        peer_cid=settings.peer_cid,
        supervisor=int(os.environ["GCS_SUPERVISOR_PID"]),
        generation=int(os.environ["GCS_GENERATION"]),
    )
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())

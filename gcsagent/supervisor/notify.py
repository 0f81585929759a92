"""Speaks sd_notify(3) to a service manager, where there is one.

One datagram per message to the socket named by NOTIFY_SOCKET. The variables are taken out of the
environment: they are this process's business and no child's. A manager that does not listen, or is slow,
must not stop the supervisor, so that whatever goes wrong in sending is passed over.
"""

from __future__ import annotations

import os
import socket

from gcsagent.common.loop import Loop
from gcsagent.supervisor.log import log


class Notifier:
    """Without NOTIFY_SOCKET every method does nothing. With WATCHDOG_USEC it says WATCHDOG=1 twice as often
    as the manager wants to hear it, from the loop: a supervisor that is stuck falls silent."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._socket: socket.socket | None = None
        address = os.environ.pop("NOTIFY_SOCKET", "")
        period = os.environ.pop("WATCHDOG_USEC", "")
        owner = os.environ.pop("WATCHDOG_PID", "")
        if not address.startswith(("/", "@")):
            return
        try:
            self._socket = _connect(address)
        except OSError as error:
            log("warning", "the service manager cannot be told anything", socket=address, error=str(error))
            return
        if period.isdigit() and int(period) > 0 and owner in ("", str(os.getpid())):
            self._keep_alive(int(period) / 2_000_000)

    def ready(self, status: str) -> None:
        self._tell("READY=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        self._tell(f"STATUS={status}")

    def stopping(self) -> None:
        self._tell("STOPPING=1", "STATUS=stopping containers")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _keep_alive(self, seconds: float) -> None:
        self._tell("WATCHDOG=1")
        self._loop.after(seconds, lambda: self._keep_alive(seconds))

    def _tell(self, *lines: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send("\n".join(line.replace("\n", " ") for line in lines).encode())
        except OSError:
            return


def _connect(address: str) -> socket.socket:
    """Raises OSError. A leading ``@`` stands for the NUL of an abstract address (unix(7))."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        connection.connect("\0" + address[1:] if address.startswith("@") else address)
    except OSError:
        connection.close()
        raise
    return connection

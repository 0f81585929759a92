"""An agent whose strings a test pulls: hands its channel to the test, then does as it is told.

Told one byte at a time: its exit status, 255 to be busy for ever, or nothing (the test has gone) for 0.
"""

import os
import signal
import socket
import sys

if "PUPPET_EXIT" in os.environ:
    sys.exit(int(os.environ["PUPPET_EXIT"]))
strings = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
strings.connect(os.environ["PUPPET_SOCKET"])
channel = int(os.environ["GCS_CHANNEL_FD"])
introduction = f"{os.getpid()} {os.environ['GCS_GENERATION']}".encode()
socket.send_fds(strings, [introduction], [channel])
os.close(channel)


def busy_for_ever() -> None:
    if "PUPPET_DEAF" in os.environ:  # nothing but SIGKILL ends it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGABRT])
    while True:
        pass


told = strings.recv(1)
if told == b"\xff":
    busy_for_ever()
os._exit(told[0] if told else 0)

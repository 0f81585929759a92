"""Stands in for vhost-device-vsock: makes the two sockets its `--vm` argument names and takes one connection.

With FAKE_VSOCK=refuse it complains and exits; with FAKE_VSOCK=die it exits once QEMU has connected.
"""

import os
import socket
import sys
import time


def main() -> None:
    options = dict(word.split("=", 1) for word in sys.argv[sys.argv.index("--vm") + 1].split(","))
    mode = os.environ.get("FAKE_VSOCK", "")
    if mode == "refuse":
        sys.exit("vhost-device-vsock: no such thing")
    with (
        socket.socket(socket.AF_UNIX) as hybrid,
        socket.socket(socket.AF_UNIX) as control,
    ):
        hybrid.bind(options["uds-path"])
        hybrid.listen()
        control.bind(options["socket"])
        control.listen()
        connection, _ = control.accept()
        if mode == "die":
            sys.exit("vhost-device-vsock: lost my mind")
        with connection:
            time.sleep(600)


main()

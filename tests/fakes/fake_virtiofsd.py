"""Stands in for virtiofsd: takes one connection on the listening socket `--fd` and ends with it.

With FAKE_VIRTIOFSD=refuse it complains and exits; with FAKE_VIRTIOFSD=die it does once QEMU has connected.
"""

import os
import socket
import sys
from pathlib import Path


def main() -> None:
    assert Path(sys.argv[sys.argv.index("--shared-dir") + 1]).is_dir()
    mode = os.environ.get("FAKE_VIRTIOFSD", "")
    if mode == "refuse":
        sys.exit("[ERROR virtiofsd] no namespaces here")
    with socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1])) as listener:
        connection, _ = listener.accept()
        with connection:
            if mode != "die":
                connection.recv(1)
                return
    sys.exit("[ERROR virtiofsd] lost my mind")


main()

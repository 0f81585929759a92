"""What only a guest can show: with ``allow_vsock`` a container makes such a socket, without it does not."""

from __future__ import annotations

import errno

from tests.cases.machines import Booted
from tests.cases.target import OUTPUT, Target, connect, running

MAKE = "import socket; s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM); s.close(); print('made')"


def test_a_container_that_is_allowed_vsock_makes_such_a_socket(vm: Booted) -> None:
    target = Target(vm.machine.address, "/run/gcs/disks/rootfs", box="", pace=vm.pace, execs=1)

    async def make(allowed: bool) -> tuple[bytes, bytes]:
        async with (
            await connect(target) as client,
            running(target, client, "python3", "-c", MAKE, stdio=OUTPUT, allow_vsock=allowed) as init,
        ):
            done = await init.communicate()
            return done.stdout, done.stderr

    assert vm.runner.run(make(True)) == (b"made\n", b"")
    stdout, stderr = vm.runner.run(make(False))
    assert stdout == b""
    assert f"Errno {errno.EAFNOSUPPORT}".encode() in stderr

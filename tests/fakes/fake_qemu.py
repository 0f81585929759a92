"""Stands in for QEMU at the process boundary: parses its arguments, writes a console, speaks QMP.

What it does after starting is chosen by a word `fake=...` on the guest's kernel command line.
"""

import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from gcsagent.host.vm.console import STAGES


def say(text: str) -> None:
    os.write(1, text.encode())


def boot(upto: str) -> None:
    for number, stage in enumerate(STAGES):
        if stage == upto:
            return
        say(f"gcs-boot: {stage} {number}.5\r\n")


def event(monitor: socket.socket, name: str, **data: object) -> None:
    monitor.sendall(json.dumps({"event": name, "data": data}).encode() + b"\n")


def shutdown(monitor: socket.socket, reason: str) -> None:
    event(monitor, "SHUTDOWN", guest=True, reason=reason)
    sys.exit(0)


def play(mode: str, monitor: socket.socket) -> None:
    if mode == "panic":
        boot("disks")
        say("[    2.05] Kernel panic - not syncing: sysrq triggered crash\r\n[    2.06] Call Trace:\r\n")
        shutdown(monitor, "guest-reset")
    elif mode == "fail":
        boot("disks")
        say("gcs-boot: FAILED disks: no disk named \x1b[31mrootfs\r\n")
        shutdown(monitor, "guest-shutdown")
    elif mode == "replay":
        say(Path(os.environ["FAKE_CONSOLE"]).read_text())
        shutdown(monitor, "guest-reset")
    elif mode == "hang":
        boot("network")
    elif mode == "lets-go-first":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        boot("")
    elif mode == "silent":
        return
    elif mode in ("aborts", "aborts-once"):
        say("[    1.09] mtrr: your CPUs had inconsistent MTRRdefType settings\r\n")
        before = Path(os.environ["FAKE_ABORTED"])
        if mode == "aborts-once" and before.exists():
            boot("")
        else:
            before.touch()
            print("physmem.c:2678: iotlb_to_section: Assertion failed.", file=sys.stderr, flush=True)
            os.abort()
    elif mode == "stuck":
        event(monitor, "STOP")
    elif mode == "reset-later":  # when the test says so: by then its agent has answered
        signal.signal(signal.SIGUSR1, lambda *_: shutdown(monitor, "guest-reset"))
        boot("")
    else:
        boot("")


def commands(monitor: socket.socket) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Each command with the descriptors that came with it."""
    rest = b""
    while True:
        data, fds, _, _ = socket.recv_fds(monitor, 65536, 4)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield json.loads(line), fds
            fds = []


class Refused(Exception):
    """Becomes a QMP error."""


class Slot:
    """The vsock device's place: what QEMU has been given for it, and what it says to more. And the shares.

    Each command is echoed on the console, so that a test sees them in order.
    """

    def __init__(self, mode: str, monitor: socket.socket) -> None:
        self.mode = mode
        self.monitor = monitor
        self.devices = {"vsock": "vsock0"}
        self.ports = {f"plug{number}": "" for number in range(2)}
        self.chardevs = {"vsock0": -1}
        self.fds: dict[str, int] = {}
        self.freeing = False
        self.status = "internal-error"
        found = re.search(r"socket,id=vsock0,fd=(\d+)", " ".join(sys.argv))
        self.daemon = int(found[1]) if found else -1

    def execute(self, name: str, arguments: dict[str, Any], fds: list[int]) -> object:
        if name != "x-query-virtio-status":  # asked again and again
            say(f"qmp: {name} {arguments.get('id') or arguments.get('fdname') or ''}\n")
        handler = getattr(self, name.replace("-", "_"), None)
        if handler is None:
            raise Refused(f"The command {name} has not been found")
        return handler(arguments, fds)

    def qom_list(self, arguments: dict[str, Any], fds: list[int]) -> object:
        assert arguments["path"] == "/machine/peripheral"
        return [{"name": "type", "type": "string"}, *({"name": name} for name in self.devices)]

    def x_query_virtio_status(self, arguments: dict[str, Any], fds: list[int]) -> object:
        if self.mode == "cannot-tell":
            raise Refused("The command x-query-virtio-status has not been found")
        assert arguments["path"] == "/machine/peripheral/vsock/virtio-backend"
        bits = ["VIRTIO_CONFIG_S_ACKNOWLEDGE: Valid virtio device found"]
        if self.mode != "slow-driver" or Path(os.environ["FAKE_DRIVER"]).exists():
            bits.append("VIRTIO_CONFIG_S_DRIVER_OK: Driver setup and ready")
        return {"name": "vhost-vsock", "status": {"statuses": bits}}

    def stop(self, arguments: dict[str, Any], fds: list[int]) -> object:
        self.status = "paused"
        event(self.monitor, "STOP")
        return {}

    def cont(self, arguments: dict[str, Any], fds: list[int]) -> object:
        event(self.monitor, "RESUME")
        return {}

    def query_pci(self, arguments: dict[str, Any], fds: list[int]) -> object:
        return [
            {
                "devices": [
                    {"qdev_id": port, "pci_bridge": {"devices": [{"qdev_id": device}] if device else []}}
                    for port, device in self.ports.items()
                ]
            }
        ]

    def unplug_share(self, name: str) -> object:
        if self.mode == "keeps-device":
            return {}
        self.ports = {port: "" if there == name else there for port, there in self.ports.items()}
        event(self.monitor, "DEVICE_DELETED", device=name, path=f"/machine/peripheral/{name}")
        return {}

    def device_del(self, arguments: dict[str, Any], fds: list[int]) -> object:
        if arguments["id"].startswith("share-"):
            return self.unplug_share(arguments["id"])
        if self.mode == "dies-unplugging":
            sys.exit("qemu-system-x86_64: bad slot")
        if self.mode == "keeps-device":
            return {}
        if self.mode == "refuses-unplug":
            event(self.monitor, "DEVICE_UNPLUG_GUEST_ERROR", device="vsock", path="/machine/peripheral/vsock")
            return {}
        if self.mode.startswith("waits-for-daemon"):
            return {}
        return self.delete()

    def answered(self, name: str) -> None:
        """The answer to a command has been sent."""
        if name != "device_del" or not self.mode.startswith("waits-for-daemon"):
            return
        with socket.socket(fileno=self.daemon) as daemon:
            daemon.recv(1)
        if self.mode == "waits-for-daemon":
            self.mode = ""
            self.delete()

    def delete(self) -> object:
        del self.devices["vsock"]
        self.freeing = True
        event(self.monitor, "DEVICE_DELETED", path="/machine/peripheral/vsock/virtio-backend")
        event(self.monitor, "DEVICE_DELETED", device="vsock", path="/machine/peripheral/vsock")
        return {}

    def chardev_remove(self, arguments: dict[str, Any], fds: list[int]) -> object:
        if self.freeing:
            self.freeing = False
            raise Refused(f"Chardev '{arguments['id']}' is busy")
        fd = self.chardevs.pop(arguments["id"])
        if fd >= 0 and arguments["id"].startswith("share-"):
            os.close(fd)
        return {}

    def getfd(self, arguments: dict[str, Any], fds: list[int]) -> object:
        (self.fds[arguments["fdname"]],) = fds
        return {}

    def closefd(self, arguments: dict[str, Any], fds: list[int]) -> object:
        if arguments["fdname"] not in self.fds:
            raise Refused("no such descriptor")
        os.close(self.fds.pop(arguments["fdname"]))
        return {}

    def chardev_add(self, arguments: dict[str, Any], fds: list[int]) -> object:
        backend = arguments["backend"]
        address = backend["data"]["addr"]
        assert (backend["type"], backend["data"]["server"], address["type"]) == ("socket", False, "fd")
        if self.mode == "no-chardev":
            raise Refused("no more chardevs")
        self.chardevs[arguments["id"]] = self.fds.pop(address["data"]["str"])
        return {}

    def plug_share(self, arguments: dict[str, Any]) -> object:
        assert arguments["chardev"] == arguments["id"] == f"share-{arguments['tag']}"
        with socket.socket(fileno=os.dup(self.chardevs[arguments["id"]])) as daemon:
            daemon.settimeout(0.2)  # as long as a daemon that is about to die may take
            try:
                alive = bool(daemon.recv(1))
            except TimeoutError:
                alive = True
            except ConnectionResetError:
                alive = False
        if not alive:
            raise Refused("vhost initialization failed: Protocol error")
        self.ports[arguments["bus"]] = arguments["id"]
        return {}

    def device_add(self, arguments: dict[str, Any], fds: list[int]) -> object:
        if arguments["driver"] == "vhost-user-fs-pci":
            return self.plug_share(arguments)
        assert self.chardevs.keys() == {arguments["chardev"]}
        assert (arguments["driver"], arguments["bus"]) == ("vhost-user-vsock-pci", "vsock-port")
        if self.mode == "adds-second-time":
            self.mode = ""
            raise Refused("no such luck")
        self.devices[arguments["id"]] = arguments["chardev"]
        return {}


def let_go_of_shares() -> None:
    """Their daemons end before we do, as long before as the test says."""
    for fd in re.findall(r"socket,id=share-[^,]*,fd=(\d+)", " ".join(sys.argv)):
        os.close(int(fd))


def serve(mode: str, monitor: socket.socket) -> None:
    slot = Slot(mode, monitor)
    for command, fds in commands(monitor):
        name = command["execute"]
        answer: dict[str, object] = {"return": {}}
        if name == "query-status":
            answer = {"return": {"status": slot.status}}
        elif name not in ("qmp_capabilities", "system_powerdown"):
            try:
                answer = {"return": slot.execute(name, command["arguments"], fds)}
            except Refused as error:
                answer = {"error": {"class": "GenericError", "desc": str(error)}}
        monitor.sendall(json.dumps({**answer, "id": command["id"]}).encode() + b"\n")
        slot.answered(name)
        if name == "qmp_capabilities":
            play(mode, monitor)
        elif name == "system_powerdown" and mode != "deaf":
            say(f"qmp: left {sorted(slot.chardevs)} {sorted(slot.fds)}\n")
            say("reboot: Power down\n")
            if mode == "lets-go-first":
                let_go_of_shares()
                signal.sigwait({signal.SIGUSR1})
            shutdown(monitor, "guest-shutdown")


def main() -> None:
    if "--version" in sys.argv:
        print("QEMU emulator version 10.0.2 (fake)")
        return
    words = " ".join(sys.argv)
    found = re.search(r"fake=([a-z-]+)", words)
    mode = found[1] if found else "boot"
    if mode == "refuse" or (mode == "kvm-dies" and "-accel kvm" in words):
        sys.exit("qemu-system-x86_64: it cannot be done")
    if mode == "crash":
        os.kill(os.getpid(), signal.SIGABRT)
    fd = re.search(r"socket,id=qmp,fd=(\d+)", words)
    assert fd is not None
    with socket.socket(fileno=int(fd[1])) as monitor:
        monitor.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\n')
        serve(mode, monitor)
    time.sleep(600)


main()

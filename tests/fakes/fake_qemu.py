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

STAGES = ("init", "mounts", "modules", "disks", "network", "supervisor", "agent", "ready")


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
    elif mode == "hang":
        boot("network")
    elif mode == "silent":
        return
    elif mode == "stuck":
        event(monitor, "STOP")
    elif mode == "reset-later":
        boot("")
        shutdown(monitor, "guest-reset")
    else:
        boot("")


def serve(mode: str, monitor: socket.socket) -> None:
    for line in monitor.makefile("rb"):
        command = json.loads(line)
        answer: object = {}
        if command["execute"] == "query-status":
            answer = {"status": "internal-error"}
        monitor.sendall(json.dumps({"return": answer, "id": command["id"]}).encode() + b"\n")
        if command["execute"] == "qmp_capabilities":
            play(mode, monitor)
        elif command["execute"] == "system_powerdown" and mode != "deaf":
            say("reboot: Power down\n")
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

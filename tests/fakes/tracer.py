"""Traces a process, sees it end, and does not let go of it: usage: tracer.py PID.

Until this is killed the end is nobody else's to wait for, not even the parent's (ptrace(2)).
"""

import ctypes
import os
import signal
import sys

PTRACE_SEIZE = 0x4206  # linux/ptrace.h


def main(pid: int) -> None:
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if ptrace(PTRACE_SEIZE, pid, None, None):
        raise OSError(ctypes.get_errno(), "PTRACE_SEIZE")
    os.write(1, b"traced\n")
    signal.pause()


if __name__ == "__main__":
    main(int(sys.argv[1]))

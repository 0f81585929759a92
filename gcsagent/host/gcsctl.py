"""``gcsctl``: the command line of the host side.

Everything is imported inside :func:`main`, so that Ctrl-C is an exit code from the first moment on and never
a traceback out of somebody's import.
"""

from __future__ import annotations

import io
import os
import sys

EXIT_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit code: the process's, or 125 to 127 (see ``--help``)."""
    _hold_standard_descriptors()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As on stderr: what a locale has no letter for is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from gcsagent.host.cli.program import run

        return run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _hold_standard_descriptors() -> None:
    """Started with ``>&-``, the next socket would be number 1 and everything printed would go into it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


if __name__ == "__main__":
    sys.exit(main())

"""Which descriptors this process has open, for tests that leave it with none more or fewer."""

from __future__ import annotations

import gc
import os


def descriptors() -> set[str]:
    """Those open now. What the collector would close counts: nothing of ours may wait for that."""
    return set(os.listdir("/proc/self/fd"))


def settled_descriptors() -> set[str]:
    """To compare with later: what earlier tests left to the collector cannot go in the middle any more."""
    gc.collect()
    return descriptors()

"""An event loop of epoll and timers, and nothing more: the supervisor's, and the debug shell's.

asyncio would do, at three times the memory of everything else in PID 1.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import select
import time
from collections.abc import Callable

READ, WRITE = select.EPOLLIN, select.EPOLLOUT

MANY = 64
"""Cancelled timers that may stay until they are due: a call's deadline, which may be a day, is cancelled when
the call ends, and there is no end of calls."""


class Timer:
    """A callback due at a time on the monotonic clock; :meth:`cancel` may be called any number of times."""

    __slots__ = ("_cancelled", "callback")

    def __init__(self, callback: Callable[[], None], cancelled: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback
        self._cancelled = cancelled

    def cancel(self) -> None:
        if self.callback is not None:
            self.callback = None
            self._cancelled()


class Loop:
    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._poll: select.poll | None = None  # of what epoll had no room for, and of epoll itself
        self._refused: set[int] = set()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._cancelled = 0  # of those in the heap
        self._order = itertools.count()
        self._fresh: set[int] = set()
        self._running = True

    def watch(self, fd: int, callback: Callable[[int], None], events: int = READ) -> None:
        """Calls ``callback`` with the epoll events of ``fd`` until :meth:`forget`; again: new events.

        A container whose root is ours can use up all that epoll may watch for that user (epoll(7),
        max_user_watches). poll(2), whose events have the same numbers, has no such limit.
        """
        if fd not in self._callbacks:
            self._register(fd, events)
            self._fresh.add(fd)
        elif fd in self._refused and self._poll is not None:
            self._poll.modify(fd, events)
        else:
            self._epoll.modify(fd, events)
        self._callbacks[fd] = callback

    def _register(self, fd: int, events: int) -> None:
        try:
            self._epoll.register(fd, events)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            if self._poll is None:
                self._poll = select.poll()
                self._poll.register(self._epoll.fileno(), READ)
            self._poll.register(fd, events)
            self._refused.add(fd)

    def forget(self, fd: int) -> None:
        """Must come before the descriptor is closed: its number is soon another's."""
        if self._callbacks.pop(fd, None) is None:
            return
        if fd in self._refused and self._poll is not None:
            self._refused.discard(fd)
            self._poll.unregister(fd)
        else:
            self._epoll.unregister(fd)

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback, self._note_cancelled)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def _note_cancelled(self) -> None:
        self._cancelled += 1
        if self._cancelled > MANY and self._cancelled * 2 > len(self._timers):
            self._timers = [entry for entry in self._timers if entry[2].callback is not None]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def stop(self) -> None:
        self._running = False

    def run(self) -> None:
        """Runs until :meth:`stop`. One pass per wake-up, with no wake-up unless something is due."""
        while self._running:
            ready = self._wait(self._run_timers())
            self._fresh.clear()
            for fd, events in ready:
                # An earlier callback of this pass may have dropped it, and its number may be another's
                # already: what that one has to say comes in the next pass.
                callback = self._callbacks.get(fd)
                if callback is not None and fd not in self._fresh:
                    callback(events)

    def _wait(self, seconds: float) -> list[tuple[int, int]]:
        if not self._refused or self._poll is None:
            return self._epoll.poll(seconds)
        ready = self._poll.poll(seconds * 1000)
        return [found for found in ready if found[0] in self._refused] + self._epoll.poll(0)

    def _run_timers(self) -> float:
        """Runs what is due; returns the seconds until the next timer, or -1 when there is none."""
        while self._timers and self._running:
            due, _, timer = self._timers[0]
            if timer.callback is not None:
                wait = due - time.monotonic()
                if wait > 0:
                    return wait
                callback, timer.callback = timer.callback, None
                heapq.heappop(self._timers)
                callback()
            else:
                heapq.heappop(self._timers)
                self._cancelled -= 1
        return -1.0 if self._running else 0.0

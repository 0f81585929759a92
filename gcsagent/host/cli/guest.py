"""The commands about the guest as a machine: its clock, its random numbers."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from gcsagent.host import clock as clocks
from gcsagent.host.cli.common import connect, print_json, print_pairs
from gcsagent.host.clock import ClockOffset
from protocol.families.guest import MAX_ENTROPY, AddEntropy, ClockChange, Entropy
from protocol.method import Empty

Add = Callable[..., argparse.ArgumentParser]


def add_guest_commands(commands: Any, add: Add) -> None:
    parser = add(
        commands,
        "clock",
        clock,
        "measure the guest's clock against this host's, or set it by that",
        "gcsctl --vm dev clock --set step",
    )
    parser.add_argument(
        "--set",
        type=ClockChange,
        choices=list(ClockChange),
        metavar="step|slew",
        help="step: at once; slew: half a millisecond a second, never backwards",
    )
    parser.add_argument(
        "--samples",
        type=_samples,
        default=clocks.SAMPLES,
        metavar="N",
        help="round trips, default: %(default)s",
    )
    parser = add(
        commands,
        "entropy",
        entropy,
        "show the state of the guest's random number generator, or feed it from this host's",
        "gcsctl --vm dev entropy --add 64",
    )
    parser.add_argument(
        "--add", type=_bytes, metavar="BYTES", help="this many random bytes, credited, then reseed; 1 to 4096"
    )


async def clock(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        if args.set is None:
            found = await clocks.measure(client, args.samples)
            print_json(found) if args.json else print(describe(found))
            return 0
        done = await clocks.sync(client, args.set, args.samples)
    if args.json:
        print_json(done)
    elif args.set is ClockChange.SLEW:
        print(f"was {describe(done.before)}; the guest slews {_milliseconds(done.after.slewing_ns)}")
    else:
        print(f"was {describe(done.before)}; stepped, now {describe(done.after)}")
    return 0


async def entropy(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        if args.add is None:
            found: Entropy = await client.call("guest.entropy", Empty())
        else:
            found = await client.call("guest.add_entropy", AddEntropy(os.urandom(args.add)))
    if args.json:
        print_json(found)
        return 0
    available = f"{found.available_bits} of {found.pool_bits} bits"
    print_pairs([("available", available), ("source", found.source or "no hardware generator")])
    return 0


def describe(found: ClockOffset) -> str:
    """Offset ± error, and what it was got from."""
    slewing = f", {_milliseconds(found.slewing_ns)} left to slew" if found.slewing_ns else ""
    error, round_trip = found.error_ns / 1e6, found.round_trip_ns / 1e6
    return (
        f"{_milliseconds(found.offset_ns)} ± {error:.3f} ms"
        f" (best of {found.samples} round trips {round_trip:.3f} ms{slewing})"
    )


def _milliseconds(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:+.3f} ms"


def _samples(text: str) -> int:
    return _number(text, 1, 1000)


def _bytes(text: str) -> int:
    return _number(text, 1, MAX_ENTROPY)


def _number(text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and low <= int(text) <= high):
        raise argparse.ArgumentTypeError(f"{text!r}: give a number from {low} to {high}")
    return int(text)

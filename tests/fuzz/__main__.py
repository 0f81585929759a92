"""``python -m tests.fuzz --seconds 600``: every target in turn, each in a jail; findings are kept in files.

``--replay FILE`` runs the input of one finding again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tests.fuzz import jail
from tests.fuzz.engine import Report, by_coverage, by_outcomes
from tests.fuzz.mutate import Mutator
from tests.fuzz.target import ROOT, Target

BESIDE_SECONDS = 240.0
"""What a worker may take beyond its time: to start an agent, and to see that nothing is left of it."""

INTERRUPTED = 128 + signal.SIGINT
"""Exit status, as a shell has it."""

NAMES = ("codec", "session", "handshake", "guest", "tar", "channel", "methods", "wire", "archive")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", action="append", choices=NAMES, help="only this one; may be repeated")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all of them together")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--out", type=Path, help="where findings and results are written")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="a finding, to be seen again")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.worker and options.replay:
        return replay(options.replay)
    if options.worker:
        return work(options.target[0], options.seconds, options.seed, options.out)
    directory = options.out or Path(tempfile.mkdtemp(prefix="gcs-fuzz-"))
    directory.mkdir(parents=True, exist_ok=True)
    if options.replay:
        return jailed(["--replay", str(options.replay.resolve()), "--worker"], directory, 300.0)
    names = options.target or list(NAMES)
    each = options.seconds / len(names)
    print(f"seed {options.seed}, {each:.0f} s each; results in {directory}", flush=True)
    try:
        return max([run(name, each, options.seed, directory) for name in names])
    except KeyboardInterrupt:
        print(f"interrupted: what was found until then is in {directory}", flush=True)
        return INTERRUPTED


def run(name: str, seconds: float, seed: int, directory: Path) -> int:
    given = ["--worker", "--target", name, "--seconds", str(seconds), "--seed", str(seed)]
    (directory / f"{name}.result").unlink(missing_ok=True)
    status = jailed([*given, "--out", str(directory)], directory, seconds + BESIDE_SECONDS)
    try:
        document = json.loads((directory / f"{name}.result").read_text())
    except FileNotFoundError:
        print(f"{name}: ended with status {status} and without a result: {directory}/{name}.log", flush=True)
        return 1
    print(
        f"{name}: {document['executions']} executions in {document['seconds']:.0f} s,"
        f" guided by {document['guided_by']},"
        f" {document['outcomes']} kinds of outcome, {len(document['known'])} new findings",
        flush=True,
    )
    return 1 if document["known"] or status else 0


def jailed(given: list[str], directory: Path, seconds: float) -> int:
    argv = jail.command(directory.resolve(), [sys.executable, "-m", "tests.fuzz", *given])
    named = given[given.index("--target") + 1] if "--target" in given else "replay"
    with (directory / f"{named}.log").open("wb") as log:
        output = None if named == "replay" else log
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env=jail.environment(directory.resolve()),
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is ours to pass on: an agent of the worker's is ended by that
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            print(f"{named}: not at its end {BESIDE_SECONDS:.0f} s after its time", flush=True)
            return 1
        except KeyboardInterrupt:
            _interrupt(process)
            raise


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """A worker that is in the middle of its work, to an end in order."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(BESIDE_SECONDS)
    finally:
        process.kill()


def work(name: str, seconds: float, seed: int, directory: Path) -> int:
    """In the jail."""
    atheris = _atheris()
    target, mutate = _loaded(name, atheris)
    report = Report(name, seed, directory)
    signal.signal(signal.SIGINT, lambda *_: report.interrupt())
    target.open(Path(tempfile.mkdtemp(prefix=f"{name}-")))

    def done() -> None:
        end(target, report)
        sys.stdout.flush()
        os._exit(0)  # libFuzzer would have it that an exit is a crash

    if target.coverage and atheris is not None:
        by_coverage(atheris, target, mutate, seconds, report, done)
    by_outcomes(target, mutate, seconds, report)
    done()
    return 0


def end(target: Target, report: Report) -> None:
    try:
        target.close()
    except Exception as error:
        report.note(error, b"")
    report.write()


def _atheris() -> Any:
    """None where it is not installed."""
    try:
        return importlib.import_module("atheris")
    except ImportError:
        return None


def _loaded(name: str, atheris: Any) -> tuple[Target, Mutator]:
    """What is imported here tells atheris of its branches."""
    seen = atheris.instrument_imports(include=["gcsagent", "protocol"]) if atheris else nullcontext()
    with seen:
        targets = importlib.import_module("tests.fuzz.targets").TARGETS
    make, mutate = targets[name]
    return make(), mutate


def replay(path: Path) -> int:
    document = json.loads(path.read_text())
    target, _ = _loaded(document["target"], None)
    target.open(Path(tempfile.mkdtemp(prefix="replay-")))
    try:
        print("outcome:", target.execute(bytes.fromhex(document["bytes"])))
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        target.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

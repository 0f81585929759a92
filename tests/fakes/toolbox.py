"""An agent whose programs are links in a directory of its own: any of them can be missing, broken or slow."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.cases.agents import RunningAgent
from tests.fakes.vm import script


class Toolbox:
    """The agent's whole PATH. What is changed in it is as before after the ``with``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for folder in os.environ["PATH"].split(os.pathsep):
            if Path(folder).is_dir():
                for path in Path(folder).iterdir():
                    with contextlib.suppress(FileExistsError):  # the first on the way is the one that counts
                        (directory / path.name).symlink_to(path)

    def agent(self, *options: str) -> RunningAgent:
        return RunningAgent("--log-level", "debug", *options, path=str(self.directory))

    @contextlib.contextmanager
    def without(self, *names: str) -> Iterator[None]:
        """None of these programs is there."""
        aside = Path(tempfile.mkdtemp(dir=self.directory))
        there = [name for name in names if os.path.lexists(self.directory / name)]
        for name in there:
            (self.directory / name).rename(aside / name)
        try:
            yield
        finally:
            for name in there:
                (aside / name).rename(self.directory / name)
            aside.rmdir()

    @contextlib.contextmanager
    def replaced(self, name: str, body: str) -> Iterator[None]:
        """In its place a shell script, in which ``$REAL`` is the program."""
        real = os.path.realpath(self.directory / name)
        with self.without(name):
            script(self.directory / name, f"REAL={real}\n{body}")
            yield

    @contextlib.contextmanager
    def unusable(self, name: str) -> Iterator[None]:
        """A file that is no program."""
        with self.without(name):
            (self.directory / name).write_text("nothing")
            yield

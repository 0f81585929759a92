"""The fuzzer's own words: what is raised is kept once, with what reproduces it; inputs stay what they are."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Hashable
from pathlib import Path

import msgpack
import pytest

from tests.fuzz import mutate, vectors
from tests.fuzz.engine import Report, by_outcomes
from tests.fuzz.tar import archives
from tests.fuzz.target import Broken


class Toy:
    """Takes anything but a list with something in it that is no number."""

    name, coverage = "toy", False

    def open(self, directory: Path) -> None:
        pass

    def close(self) -> None:
        pass

    def seeds(self) -> list[bytes]:
        return [msgpack.packb([1, 2, 3])]

    def execute(self, data: bytes) -> Hashable:
        try:
            value = msgpack.unpackb(data)
        except (ValueError, msgpack.UnpackException):
            return "no value"
        if isinstance(value, list) and any(not isinstance(each, (int, float)) for each in value):
            raise Broken("no number")
        return type(value).__name__


def test_a_finding_is_written_once_with_its_bytes(tmp_path: Path) -> None:
    toy, report = Toy(), Report("toy", 7, tmp_path)
    by_outcomes(toy, mutate.of_values, 0.3, report)
    assert report.executions > 100
    [path] = report.known.values()
    assert sum(report.counts.values()) > 1
    document = json.loads(Path(path).read_text())
    assert (document["target"], document["seed"], document["finding"][:6]) == ("toy", 7, "Broken")
    assert document["replay"].endswith(path)
    with pytest.raises(Broken, match="no number"):
        toy.execute(bytes.fromhex(document["bytes"]))


def test_a_seed_gives_the_same_inputs_again() -> None:
    for change, data in ((mutate.of_values, vectors.HELLO), (mutate.of_tar, archives()[0])):
        made = [[change(data, dice) for _ in range(200)] for dice in (random.Random(3), random.Random(3))]
        assert made[0] == made[1]
        assert len(set(made[0])) > 100


def test_most_changed_values_and_headers_are_well_formed() -> None:
    """Else nothing would be reached but what refuses bytes that are nothing at all."""
    dice = random.Random(1)
    frames = [mutate.of_values(vectors.HELLO, dice) for _ in range(300)]
    assert sum(_is_value(frame) for frame in frames) > 200
    tars = [mutate.of_tar(archives()[0], dice) for _ in range(300)]
    assert sum(_has_a_header(tar) for tar in tars) > 200


def _is_value(frame: bytes) -> bool:
    try:
        msgpack.unpackb(frame, strict_map_key=False)
    except (ValueError, msgpack.UnpackException):
        return False
    return True


def _has_a_header(data: bytes) -> bool:
    try:
        return tarfile.TarFile(fileobj=io.BytesIO(data)).next() is not None
    except (tarfile.TarError, ValueError, OverflowError):
        return False

"""What gcsctl makes of an image's settings and its own options, and what `gcsctl image` prints."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.cli import image_roots, parser, program
from gcsagent.host.cli.common import UsageError
from gcsagent.host.cli.image_progress import shown_progress
from gcsagent.host.cli.image_roots import ImageRoot
from gcsagent.host.cli.run import RunPlan, run_plan
from gcsagent.host.cli.vmrun import GUEST_ROOTFS, vm_plan
from gcsagent.host.image import images
from gcsagent.host.image.documents import Config
from gcsagent.host.image.limits import Limits
from protocol.address import UnixAddress
from tests.cases.agents import REPO
from tests.cases.image_files import Layout, directory, file, tar

SECONDS = 30.0

CONFIG = Config(
    "amd64",
    "linux",
    (),
    user="app",
    env=("PATH=/app", "A=image", "B=image"),
    entrypoint=("/init",),
    command=("serve",),
    workdir="/srv",
    volumes=("/data", "/tmp/x"),
    labels={"a": "image", "b": "image"},
)


def plan(*argv: str, config: Config = CONFIG) -> RunPlan:
    args = parser.parse(["run", "--image", "x", *argv])
    return run_plan(args, UnixAddress("/s"), ImageRoot("/images/root", config))


def spec(*argv: str, config: Config = CONFIG) -> dict[str, Any]:
    made = plan(*argv, config=config).params.spec
    assert made is not None
    return made


def test_an_image_says_what_to_run() -> None:
    params, made = plan().params, spec()
    assert (made["root"], params.overlay) == ({"path": "/images/root", "readonly": False}, True)
    process = made["process"]
    assert (process["args"], process["cwd"]) == (["/init", "serve"], "/srv")
    assert process["env"] == ["PATH=/app", "A=image", "B=image"]
    assert process["user"]["username"] == "app"
    assert params.labels == {"a": "image", "b": "image"}
    assert not [mount for mount in made["mounts"] if mount["destination"] in CONFIG.volumes]


def test_what_is_given_goes_before_what_the_image_says(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("A=file\nC=file\n")
    options = f"--env-file {tmp_path}/env -e C=given -u 7:8 -w /tmp --label a=given --entrypoint sh"
    made = spec(*options.split(), "--", "-c", "id")
    process = made["process"]
    assert (process["args"], process["cwd"]) == (["sh", "-c", "id"], "/tmp")
    assert process["env"] == ["PATH=/app", "A=file", "B=image", "C=given"]
    assert (process["user"]["uid"], process["user"]["gid"]) == (7, 8)
    assert plan(*options.split()).params.labels == {"a": "given", "b": "image"}


def test_volumes_stay_writable_where_the_root_is_not() -> None:
    mounts = spec("--read-only", "--tmpfs", "/data:size=1m")["mounts"]
    found = {mount["destination"]: mount["options"] for mount in mounts if mount["type"] == "tmpfs"}
    assert "tmpcopyup" in found["/tmp/x"]
    assert "tmpcopyup" not in found["/data"]
    assert "/tmp/x" not in {mount["destination"] for mount in spec()["mounts"]}


def test_vm_run_boots_with_the_image_for_its_root() -> None:
    args = parser.parse(["vm", "run", "--image", "x", "-e", "A=given", "--", "other"])
    made = vm_plan(args, ImageRoot(GUEST_ROOTFS, CONFIG)).params
    assert made.spec is not None
    assert made.spec["root"]["path"] == GUEST_ROOTFS
    assert made.spec["process"]["args"] == ["/init", "other"]
    assert "A=given" in made.spec["process"]["env"]
    assert made.overlay


@pytest.mark.parametrize(
    "argv, word",
    [
        ("run --image x --rootfs /r", "exactly one"),
        ("create --image x --bundle /b", "exactly one"),
        ("--address hvsock:/s run --image x", "image load"),
        ("--address unix:/s run --image /no/such/file", "/no/such/file"),
        ("vm run --image x --rootfs /r", "or --image"),
        ("vm run", "--image"),
        ("image rm nothing", "image ls"),
        ("image inspect /no/such/file", "/no/such/file"),
    ],
)
def test_what_cannot_be_is_one_line_and_125(
    argv: str, word: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GCS_CACHE", str(tmp_path))
    assert program.run(argv.split()) == 125
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert word in said.err


def test_nothing_to_run_and_an_entrypoint_of_nothing_are_told() -> None:
    with pytest.raises(UsageError, match="the image names none"):
        plan(config=Config("amd64", "linux", ()))
    args = parser.parse(["run", "--rootfs", "/r", "--entrypoint", "sh", "--", "x"])
    with pytest.raises(UsageError, match="--image"):
        run_plan(args, UnixAddress("/s"))


def test_no_image_is_no_work() -> None:
    args = parser.parse(["run", "--rootfs", "/r", "--", "x"])
    assert asyncio.run(image_roots.prepared(args)) is None


# -- gcsctl image ---------------------------------------------------------------------------------


def test_images_are_loaded_listed_shown_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GCS_CACHE", str(tmp_path / "cache"))
    layout = Layout(tmp_path / "layout")
    config = {"created": "2020-01-02T03:04:05Z", "config": {"Cmd": ["serve"], "Labels": {"k": "v"}}}
    layout.image(tar(directory("d"), file("d/f")), tag="app", config=config)

    def run(*argv: str) -> str:
        assert program.run(["image", *argv]) == 0
        said = capsys.readouterr()
        assert said.err == ""
        return said.out

    assert run("ls").split() == ["ID", "NAMES", "PACKED", "CREATED", "KEPT", "AS"]
    path = Path(run("load", f"{layout.root}:app").strip())
    assert path.suffix == ".erofs"
    assert path.stat().st_size > 0
    [listed] = json.loads(run("ls", "--json"))
    assert (listed["names"], listed["kept_as"]) == (["app"], ["disk"])
    assert listed["id"][7:19] in run("ls")
    for image in (str(layout.root), "app"):
        shown = json.loads(run("inspect", image))
        assert (shown["id"], shown["cmd"]) == (listed["id"], ["serve"])
        assert (shown["labels"], shown["platform"]) == ({"k": "v"}, "linux/amd64")
    assert json.loads(run("rm", "--json", listed["id"])) == {"removed": [listed["id"]]}
    assert json.loads(run("ls", "--json")) == []
    assert not path.exists()


def test_progress_is_a_line_on_a_terminal_and_nothing_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with shown_progress() as progress:
        progress("unpacking layer 1 of 2", 1 << 20, 3 << 20)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with shown_progress() as progress:
        for done in range(1000):
            progress("unpacking layer 1 of 2", done, 1 << 20)
        progress("writing it as a disk", 0, 0)
    said = capsys.readouterr().err
    assert said.startswith("\r\x1b[Kunpacking layer 1 of 2: 0 B of 1.0 MiB")
    assert said.endswith("\r\x1b[Kwriting it as a disk\r\x1b[K")
    assert said.count("unpacking") < 100


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_it_ends_at_once_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """On a terminal, where it says what it waits for: another one that makes the same image."""
    layout = Layout(tmp_path / "layout")
    layout.image(tar(directory("d")), tag="app")
    with images.opened(str(layout.root), Limits()) as image:
        making = tmp_path / "cache" / "images" / f".new-{image.ident[7:]}"
    making.mkdir(parents=True)
    outer, inner = pty.openpty()
    holder = os.open(making, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        argv = [sys.executable, "-m", "gcsagent.host", "image", "load", str(layout.root)]
        env = {**os.environ, "GCS_CACHE": str(tmp_path / "cache")}
        with subprocess.Popen(argv, cwd=REPO, env=env, stdout=subprocess.DEVNULL, stderr=inner) as process:
            shown = b""
            while b"waiting for another gcsctl" not in shown:
                assert select.select([outer], [], [], SECONDS)[0]
                shown += os.read(outer, 1000)
            process.send_signal(number)
            assert process.wait(SECONDS) == 128 + number
        assert os.listdir(making.parent) == [making.name]
        assert select.select([outer], [], [], SECONDS)[0]
        assert os.read(outer, 1000).endswith(b"\r\x1b[K")
    finally:
        for fd in (outer, inner, holder):
            os.close(fd)

"""Images in VMs, by gcsctl: a disk that is plugged in while containers use it, and one to boot with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcsagent.host.vm.tools import cache_dir
from tests.cases.agents import REPO
from tests.cases.real_images import PORT, redis_image, tool

# The first test of a session may build the image.
pytestmark = pytest.mark.timeout(1300)
SECONDS = 120.0
BOOT_SECONDS = 240.0


class Gcsctl:
    """With VMs and a cache of its own; tools and guest image are the machine's."""

    def __init__(self, work: Path, image: Path) -> None:
        tools = cache_dir() / "tools" / "current" / "bin"
        self.env = {
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "GCS_CACHE": str(work / "cache"),
            "GCS_IMAGE": str(image),
            "XDG_STATE_HOME": str(work / "state"),
        }

    def __call__(self, *args: str, seconds: float = SECONDS) -> str:
        argv = [sys.executable, "-m", "gcsagent.host", *args]
        done = subprocess.run(
            argv, cwd=REPO, env=self.env, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert done.returncode == 0, (args, done.returncode, done.stdout, done.stderr)
        return done.stdout


@pytest.fixture(scope="module")
def layout(demo_files: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return redis_image(demo_files, tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def demo_files() -> str:
    return str((cache_dir() / "demo-rootfs" / "current" / "rootfs").resolve())


@pytest.fixture
def gcsctl(built_image: Path, tmp_path: Path) -> Gcsctl:
    return Gcsctl(tmp_path, built_image)


@pytest.fixture
def vm(gcsctl: Gcsctl) -> Iterator[str]:
    gcsctl("vm", "start", "dev", seconds=BOOT_SECONDS)
    yield "dev"
    gcsctl("vm", "stop", "dev")


def test_an_image_is_in_the_vm_for_as_long_as_it_is_used(gcsctl: Gcsctl, vm: str, layout: Path) -> None:
    """Redis in one container and a second one of the same image; the disk goes with the last of them."""

    def agent(*args: str) -> str:
        return gcsctl("--vm", vm, *args)

    def there() -> tuple[int, int]:
        disks = json.loads(gcsctl("vm", "disk", "ls", vm, "--json"))
        return len(disks), len(json.loads(agent("storage", "ls", "--json")))

    image = f"{layout}:app"
    assert agent("run", "-d", "--id", "redis", "--image", image) == "redis\n"
    assert there() == (1, 1)
    script = "id; pwd; cat /opt/new; ls /srv/cache; echo written > /srv/x; cat /srv/x"
    said = agent("run", "--rm", "-u", "0", "--image", image, "--entrypoint", "sh", "--", "-ec", script)
    assert said.split("\n", 1)[1] == "/var/lib/redis/data\nsecond\nnew\nwritten\n"
    assert there() == (1, 1)
    ask = ("exec", "redis", "--", "redis-cli", "-p", str(PORT))
    assert agent(*ask, "set", "key", "value") == "OK\n"
    assert agent(*ask, "get", "key") == "value\n"
    agent("delete", "--force", "redis")
    assert there() == (0, 0)


def test_a_vm_boots_with_an_image_for_its_root(gcsctl: Gcsctl, layout: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.tar"
    tool("skopeo", "copy", f"oci:{layout}:app", f"docker-archive:{saved}:example/app:1")
    script = "id -un; pwd; cat /etc/motd /opt/new 2>&1; echo $GREETING"
    said = gcsctl(
        *("vm", "run", "--image", f"{saved}:1", "--entrypoint", "sh", "--", "-c", script),
        seconds=BOOT_SECONDS,
    )
    assert said.splitlines()[:2] == ["redis", "/var/lib/redis/data"]
    assert said.splitlines()[-2:] == ["second", "hello"]

"""Images made by umoci, skopeo and buildah, run by gcsctl: what is in them, and what their config says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases.agents import REPO, RunningAgent, eventually
from tests.cases.real_images import PORT, redis_image, tool
from tests.cases.target import name

SECONDS = 60.0


@pytest.fixture(scope="module")
def layout(rootfs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return redis_image(rootfs, tmp_path_factory.mktemp("image"))


class Gcsctl:
    """With a cache of its own."""

    def __init__(self, agent: RunningAgent, cache: Path) -> None:
        self.cache = cache
        self.env = {**os.environ, "GCS_ADDRESS": agent.address, "GCS_CACHE": str(cache)}

    def __call__(self, *args: str) -> tuple[int, str, str]:
        argv = [sys.executable, "-m", "gcsagent.host", *args]
        done = subprocess.run(
            argv, cwd=REPO, env=self.env, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        return done.returncode, done.stdout, done.stderr

    def run(self, image: object, *args: str) -> str:
        code, out, err = self("run", "--rm", "--image", str(image), *args)
        assert (code, err) == (0, ""), (code, out, err)
        return out


@pytest.fixture
def gcsctl(agent: RunningAgent, tmp_path: Path) -> Gcsctl:
    return Gcsctl(agent, tmp_path / "cache")


def test_every_format_of_an_image_is_the_same_image(
    gcsctl: Gcsctl, agent: RunningAgent, layout: Path, tmp_path: Path
) -> None:
    """Layers over each other with the whiteouts umoci makes; unpacked once, whatever file it comes from."""
    before = agent.holdings()
    saved, archive = tmp_path / "saved.tar", tmp_path / "oci.tar"
    tool("skopeo", "copy", f"oci:{layout}:app", f"docker-archive:{saved}:example/app:1")
    tool("skopeo", "copy", f"oci:{layout}:app", f"oci-archive:{archive}:other")
    script = "ls /opt; cat /opt/new; ls /srv/cache; ls /etc; stat -c '%u:%g %a' /var/lib/redis"
    expected = "new\nsecond\nnew\ngroup\npasswd\n999:998 755\n"
    for image in (f"{layout}:app", layout, f"{saved}:example/app:1", f"{saved}:1", archive):
        assert gcsctl.run(image, "--entrypoint", "sh", "--", "-ec", script) == expected
    [listed] = json.loads(gcsctl("--json", "image", "ls")[1])
    assert listed["kept_as"] == ["files"]
    shown = json.loads(gcsctl("image", "inspect", str(saved))[1])
    assert (shown["id"], shown["format"], len(shown["layers"])) == (listed["id"], "docker-archive", 3)
    assert shown["names"][0].endswith("example/app:1")
    agent.assert_holds(before)


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_what_the_config_says_is_done_and_options_go_first(
    request: pytest.FixtureRequest, tmp_path: Path, layout: Path, runtime: str
) -> None:
    """User by name, with its groups and home; a working directory that is made; env; volumes."""
    agent = request.getfixturevalue("agent" if runtime == "runc" else "crun_agent")
    before = agent.holdings()
    gcsctl = Gcsctl(agent, tmp_path / "cache")
    script = 'id; pwd; echo "$HOME $GREETING $OTHER"'
    said = gcsctl.run(layout, "-e", "OTHER=too", "--entrypoint", "sh", "--", "-c", script)
    assert said.splitlines() == [
        "uid=999(redis) gid=998(redis) groups=998(redis),997(logs)",
        "/var/lib/redis/data",
        "/var/lib/redis hello too",
    ]
    options = ("-u", "0", "-w", "/srv", "-e", "GREETING=bye")
    said = gcsctl.run(layout, *options, "--entrypoint", "sh", "--", "-c", 'id -u; pwd; echo "$GREETING"')
    assert said == "0\n/srv\nbye\n"
    assert gcsctl.run(layout, "--", "--version").startswith("Redis server v=")
    assert gcsctl.run(layout, "--entrypoint", "", "--", "ls", "/srv") == "cache\n"
    write = "echo kept > /var/lib/redis/x; cat /var/lib/redis/x; ls -a /var/lib; ! echo no > /srv/x"
    code, out, err = gcsctl(
        *("run", "--rm", "--read-only", "-u", "0", "--image", str(layout), "--entrypoint", "sh"),
        *("--", "-c", write),
    )
    assert (code, out.splitlines()[0]) == (0, "kept"), err
    assert "Read-only" in err
    agent.assert_holds(before)


def test_a_server_in_an_image(gcsctl: Gcsctl, agent: RunningAgent, layout: Path) -> None:
    """Debian's redis-server, as its image starts it; its image stays as long as it is used."""
    before = agent.holdings()
    ident = name("redis")
    code, out, err = gcsctl("run", "-d", "--id", ident, "--image", f"{layout}:app", "--label", "a=b")
    assert (code, out, err) == (0, f"{ident}\n", "")

    def ask(*words: str) -> str:
        code, out, _ = gcsctl("exec", ident, "--", "redis-cli", "-p", str(PORT), *words)
        return out.strip() if code == 0 else ""

    assert eventually(lambda: ask("ping") == "PONG", SECONDS)
    assert ask("set", "key", "value") == "OK"
    assert ask("get", "key") == "value"
    state = json.loads(gcsctl("--json", "state", ident)[1])
    assert state["labels"] == {"a": "b", "made.by": "umoci"}
    [listed] = json.loads(gcsctl("--json", "image", "ls")[1])
    code, out, err = gcsctl("image", "rm", listed["id"])
    assert (code, "delete them first" in err) == (125, True)
    assert gcsctl("delete", "--force", ident)[0] == 0
    assert gcsctl("image", "rm", listed["id"]) == (0, "", "")
    assert os.listdir(gcsctl.cache / "images") == []
    agent.assert_holds(before)


CONTAINERFILE = """\
FROM oci:{layout}:app
USER 0
RUN rm -r /srv/cache /opt && mkdir /srv/cache
RUN echo built > /srv/cache/one && ln /srv/cache/one /srv/cache/two
RUN echo more >> /srv/cache/two && rm /etc/group
ENV GREETING=bye
WORKDIR /srv/cache
ENTRYPOINT ["sh", "-c"]
CMD ["pwd; ls /srv /srv/cache; cat one; stat -c %h two; echo $GREETING; ls /etc /opt"]
"""


def test_an_image_that_buildah_has_built(gcsctl: Gcsctl, layout: Path, tmp_path: Path) -> None:
    """From a Containerfile, each step of it a layer: what RUN takes away, hard links over layers."""
    (tmp_path / "Containerfile").write_text(CONTAINERFILE.format(layout=layout))
    storage = ("--storage-driver", "vfs", "--root", f"{tmp_path}/root", "--runroot", f"{tmp_path}/run")
    buildah = ("env", f"TMPDIR={tmp_path}", "buildah", *storage)
    tool(*buildah, "bud", "--isolation", "chroot", "--layers", "-t", "built:1", str(tmp_path))
    for target in (f"docker-archive:{tmp_path}/built.tar:built:1", f"oci:{tmp_path}/built:1"):
        tool(*buildah, "push", "built:1", target)
    tool(*buildah, "rmi", "--all", "--force")
    expected = "/srv/cache\n/srv:\ncache\n\n/srv/cache:\none\ntwo\nbuilt\nmore\n2\nbye\n"
    for image in ("built.tar", "built:1"):
        code, out, err = gcsctl("run", "--rm", "--image", f"{tmp_path}/{image}")
        assert (code, out.startswith(expected), "group" in out) == (2, True, False), (out, err)
        assert "/opt" in err
    assert len(json.loads(gcsctl("--json", "image", "ls")[1])) == 1


def test_a_wrong_image_is_told_and_nothing_is_left(
    gcsctl: Gcsctl, agent: RunningAgent, layout: Path, tmp_path: Path
) -> None:
    before = agent.holdings()
    tool("cp", "-a", layout, tmp_path / "wrong")
    index = json.loads((layout / "index.json").read_text())
    manifest = json.loads((layout / "blobs/sha256" / index["manifests"][0]["digest"][7:]).read_text())
    blob = tmp_path / "wrong" / "blobs/sha256" / manifest["layers"][1]["digest"][7:]
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 0xFF
    blob.write_bytes(data)
    code, out, err = gcsctl("run", "--image", str(tmp_path / "wrong"))
    assert (code, out, err.count("\n")) == (125, "", 1), err
    assert os.listdir(gcsctl.cache / "images") == []
    agent.assert_holds(before)

"""gcsctl image: what is in the cache, what an image says of itself; and the options of run about images."""

from __future__ import annotations

import argparse
from typing import Any

from gcsagent.host.cli import image_roots
from gcsagent.host.cli.common import print_json, print_table
from gcsagent.host.cli.declare import Add, add_group
from gcsagent.host.cli.resources import size
from gcsagent.host.image import images
from gcsagent.host.image.cache import Form, ImageCache
from gcsagent.host.image.documents import Config
from gcsagent.host.image.errors import NoFile

_SHORT = 12
_FORMS = {Form.DISK: "disk", Form.TREE: "files"}

WHAT = "an image: PATH[:TAG] of an OCI layout (directory or tar) or of `docker save`, or one of `image ls`"


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """For what runs a container: run, create and vm run."""
    parser.add_argument("--image", metavar="IMAGE", help=WHAT + "; over it a throw-away layer")
    parser.add_argument(
        "--entrypoint", metavar="PROG", help="instead of the image's, and of its Cmd; empty: none"
    )


def add_image_commands(commands: Any, add: Add) -> None:
    below = add_group(
        commands,
        "image",
        "look at images, and at those that have been unpacked and are kept",
        "gcsctl image ls",
    )
    add(below, "ls", ls, "list the images in the cache", "gcsctl image ls")
    parser = add(
        below,
        "inspect",
        inspect,
        "check an image's documents, and show what it says of itself",
        "gcsctl image inspect ./app.tar:latest",
    )
    parser.add_argument("image", metavar="IMAGE", help=WHAT)
    parser = add(
        below,
        "load",
        load,
        "unpack an image into the cache as a disk, and print its path",
        "gcsctl image load ./app.tar",
    )
    parser.add_argument("image", metavar="IMAGE", help=WHAT)
    parser = add(below, "rm", rm, "remove images from the cache", "gcsctl image rm 4f53cda18c2b")
    parser.add_argument("images", nargs="+", metavar="ID|NAME", help="as `image ls` shows them")


async def ls(args: argparse.Namespace) -> int:
    entries = ImageCache().entries()
    if args.json:
        documents = [
            {
                "id": each.ident,
                "names": each.names,
                "size": each.size,
                "created": each.config.created,
                "kept_as": [_FORMS[form] for form in each.forms],
            }
            for each in entries
        ]
        print_json(documents)
        return 0
    rows = [
        (
            each.ident.partition(":")[2][:_SHORT],
            ", ".join(each.names),
            size(each.size),
            each.config.created[:10],
            ", ".join(_FORMS[form] for form in each.forms),
        )
        for each in entries
    ]
    print_table(("ID", "NAMES", "PACKED", "CREATED", "KEPT AS"), rows)
    return 0


async def inspect(args: argparse.Namespace) -> int:
    cache = ImageCache()
    try:
        with images.opened(args.image, cache.limits) as image:
            layers = [{"digest": each.digest or each.diff_id, "size": each.size} for each in image.layers]
            more = {"manifest": image.manifest or None, "format": image.format, "layers": layers}
            print_json({"id": image.ident, "names": image.names, **more, **_shown(image.config)})
    except NoFile:
        entry = cache.find(args.image)
        layers = [{"digest": each, "size": None} for each in entry.config.diff_ids]
        more = {"manifest": None, "format": None, "layers": layers}
        print_json({"id": entry.ident, "names": entry.names, **more, **_shown(entry.config)})
    return 0


async def load(args: argparse.Namespace) -> int:
    entry, path = await image_roots.unpacked(args.image, Form.DISK)
    print_json({"id": entry.ident, "path": str(path)}) if args.json else print(path)
    return 0


async def rm(args: argparse.Namespace) -> int:
    cache = ImageCache()
    entries = [cache.find(text) for text in args.images]
    for entry in entries:
        await cache.remove(entry)
    if args.json:
        print_json({"removed": [entry.ident for entry in entries]})
    return 0


def _shown(config: Config) -> dict[str, Any]:
    return {
        "platform": config.platform,
        "created": config.created,
        "entrypoint": config.entrypoint,
        "cmd": config.command,
        "env": config.env,
        "user": config.user,
        "workdir": config.workdir,
        "volumes": config.volumes,
        "stop_signal": config.stop_signal,
        "labels": dict(config.labels),
    }

"""Turns Python source into byte-code, with the interpreter that will run it: the guest's.

    python3.13 compile_tree.py compile FOLDER    every .py below FOLDER becomes a .pyc beside it
    python3.13 compile_tree.py check             imports every module of the standard library

FOLDER is a root: usr/lib/x.py is compiled as /usr/lib/x.py, which is what tracebacks show. The .pyc
stands where the .py stood (no __pycache__), which Python imports without looking for a source: half the
files. Unchecked hashes instead of time stamps: same bytes every time. Docstrings and assertions stay:
without them the image is 0.2 MB smaller and starts no faster, and assertions are part of what was tested.
(One uncompressed zip file for the standard library was no faster either.)
"""

import importlib
import os
import pkgutil
import py_compile
import sys


def compile_folder(folder: str) -> None:
    for directory, subdirectories, names in os.walk(folder):
        subdirectories.sort()
        for name in sorted(names):
            if not name.endswith(".py"):
                continue
            source = os.path.join(directory, name)
            py_compile.compile(
                source,
                cfile=source + "c",
                dfile="/" + os.path.relpath(source, folder),
                doraise=True,
                optimize=0,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )
            os.unlink(source)


def check() -> int:
    stdlib = os.path.dirname(os.__file__)
    names = [module.name for module in pkgutil.walk_packages([stdlib], onerror=lambda name: None)]
    names += [name.split(".")[0] for name in os.listdir(os.path.join(stdlib, "lib-dynload"))]
    names += ["msgpack._cmsgpack", "tenacity", "pythonjsonlogger.json", "ptyprocess"]
    failed = 0
    for name in sorted(set(names)):
        if name.endswith("__main__"):
            continue
        try:
            importlib.import_module(name)
        except BaseException as error:
            failed += 1
            print(f"compile_tree.py: cannot import {name}: {error!r}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    if sys.argv[1] == "check":
        sys.exit(1 if check() else 0)
    compile_folder(sys.argv[2])

"""What tools can check of the house: lint, format, types, import directions, and what no file says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"

# In pieces, so that this file does not contain what it looks for.
MACHINE_PATH = re.compile(r"(?<![\w$}/.])/(?:wor" + r"k|roo" + r"t|tmp/ven" + r"v)/")
REGISTRIES = re.compile(
    r"(?:pyp"
    + r"i\.org|pythonhoste"
    + r"d\.org|debia"
    + r"n\.org|ubunt"
    + r"u\.com|docke"
    + r"r\.(?:io|com)|"
    r"ghc" + r"r\.io|qua" + r"y\.io|crate" + r"s\.io|npmj" + r"s\.(?:org|com))"
)
SKIPS = re.compile(
    r"pytest\.(?:skip|xfail|importorskip|mark\.skip|mark\.xfail)|unittest\.skip|SkipTes" + r"t"
)


def run(*arguments: str) -> None:
    """A tool from this interpreter's environment; its own words are the failure."""
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    if result.returncode != 0:
        pytest.fail(f"{' '.join(arguments)}\n{result.stdout}{result.stderr}", pytrace=False)


def tracked() -> list[Path]:
    listing = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def lines_with(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]


def test_ruff_finds_nothing() -> None:
    run("-m", "ruff", "check", ".")


def test_everything_is_formatted() -> None:
    run("-m", "ruff", "format", "--check", ".")


@pytest.mark.timeout(300)
def test_types_hold_strictly() -> None:
    run("-m", "mypy")


@pytest.mark.timeout(120)
def test_imports_go_one_way() -> None:
    run("-c", LINT_IMPORTS)


def test_the_import_rules_name_modules_that_exist() -> None:
    """A rule about a module that was renamed would hold for ever and say nothing."""
    names = set(re.findall(r'"((?:gcsagent|protocol)(?:\.\w+)*)"', (ROOT / "pyproject.toml").read_text()))
    rules = names - {"gcsagent.py", "gcsagent.__version__"}
    assert {"protocol", "gcsagent.host", "gcsagent.agent", "gcsagent.supervisor"} <= rules
    for name in rules:
        place = ROOT / name.replace(".", "/")
        assert (place / "__init__.py").is_file() or place.with_suffix(".py").is_file(), name


@pytest.mark.parametrize(
    "what, pattern", [("a path of one machine", MACHINE_PATH), ("a package registry", REGISTRIES)]
)
def test_no_file_names(what: str, pattern: re.Pattern[str]) -> None:
    found = lines_with(pattern, [path for path in tracked() if path.name != "LICENSE"])
    assert not found, f"{what}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "text, pattern",
    [
        ("cd /wor" + "k/main", MACHINE_PATH),
        ("'/roo" + "t/x'", MACHINE_PATH),
        ("deb http://deb.debia" + "n.org/debian", REGISTRIES),
        ("@pytest.mark.ski" + "pif(x)", SKIPS),
    ],
)
def test_the_patterns_see_what_they_look_for(text: str, pattern: re.Pattern[str]) -> None:
    assert pattern.search(text)
    assert not pattern.search("cp -a parts $1/root/ and network/ and docker")


def test_no_test_is_skipped() -> None:
    found = lines_with(SKIPS, [path for path in tracked() if path.is_relative_to(ROOT / "tests")])
    assert not found, "a test that cannot run fails and says why:\n" + "\n".join(found)


def test_files_are_a_readers_sitting() -> None:
    """Product code: a file per concern, so that each can be read in one go."""
    product = [path for path in tracked() if path.suffix == ".py" and path.is_relative_to(ROOT / "gcsagent")]
    product += (ROOT / "protocol").glob("*.py")
    assert product
    long = [f"{path.relative_to(ROOT)}" for path in product if len(path.read_text().splitlines()) > 500]
    assert not long

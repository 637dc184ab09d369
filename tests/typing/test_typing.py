"""The public names as type checkers see them: right uses reveal the types written beside them, mistakes are errors.

Every other file of this folder is checked and never run. Two comments say what a line must lead to::

    reveal_type(execution.state)  # -> ExecutionState
    RetryPolicy(delay_ms=1_000)  # mistake: call-arg

The first names the revealed type; a name of ``ff_fast`` that is a ``Literal`` stands for its words. The second names the
codes that mypy gives; of pyright any error on the line is taken. No other line may have an error. Each checker runs once
over all files.
"""

import importlib.util
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import ff_fast

from ..conftest import ROOT

FILES = sorted(path for path in Path(__file__).parent.glob("*.py") if path.name[0] not in "_t")
REVEALED = re.compile(r"reveal_type\(.*\)  # -> (.*)$")
MISTAKE = re.compile(r"  # mistake: (.*)$")


class Seen(typing.NamedTuple):
    """What a checker must say, or says, of each line: a file and a number."""

    types: dict[tuple[str, int], set[str]]
    mistakes: dict[tuple[str, int], set[str]]


def members(text):
    """The members of a union as text, without modules; a literal is as many as it has words."""
    found = set()
    for member in re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=\w)", "", text).split(" | "):
        words = re.fullmatch(r"Literal\[(.*)\]", member)
        alias = typing.get_args(getattr(ff_fast, member, None))
        found |= set(words[1].split(", ")) if words else {repr(w) for w in alias} or {member}
    return found


def expected():
    seen = Seen({}, {})
    for path in FILES:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            if found := REVEALED.search(line):
                seen.types[path.name, number] = members(found[1])
            elif found := MISTAKE.search(line):
                seen.mistakes[path.name, number] = set(found[1].split())
    return seen


def run(*command):
    return subprocess.run(
        [sys.executable, "-m", *command, *map(str, FILES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(not importlib.util.find_spec("mypy"), reason="mypy is not installed")
@pytest.mark.timeout(180)
def test_mypy_sees_what_is_written():
    told = run("mypy", "--strict", "--no-pretty", "--no-error-summary", "--show-error-codes").stdout
    seen = Seen({}, {})
    for line in told.splitlines():
        found = re.fullmatch(r"(.+?):(\d+): (error|note): (.*?)(?:  \[([a-z-]+)\])?", line)
        assert found, told
        place = Path(found[1]).name, int(found[2])
        if revealed := re.fullmatch(r'Revealed type is "(.*)"', found[4]):
            seen.types[place] = members(revealed[1])
        elif found[3] == "error":
            seen.mistakes.setdefault(place, set()).add(found[5])
    assert seen == expected()


@pytest.mark.skipif(not importlib.util.find_spec("pyright"), reason="pyright is not installed")
@pytest.mark.timeout(180)
def test_pyright_sees_what_is_written():
    told = json.loads(run("pyright", "--pythonpath", sys.executable, "--outputjson").stdout)
    seen, wanted = Seen({}, {}), expected()
    for each in told["generalDiagnostics"]:
        place = Path(each["file"]).name, each["range"]["start"]["line"] + 1
        if revealed := re.fullmatch(r'Type of ".*" is "(.*)"', each["message"], re.DOTALL):
            seen.types[place] = members(revealed[1])
        elif each["severity"] == "error":
            seen.mistakes.setdefault(place, set()).add(each["message"])
    assert seen.types == wanted.types
    assert seen.mistakes.keys() == wanted.mistakes.keys(), seen.mistakes

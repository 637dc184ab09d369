"""The examples of README.md, docs/ and examples/ pass mypy --strict as a user's programs would."""

import os
import re
import subprocess
import sys

import pytest

from .. import documents
from ..conftest import ROOT

# Frameworks that `make types` does not install have no types there: what they decorate and are bases of is not looked at.
UNTYPED = ["--allow-untyped-decorators", "--allow-subclassing-any"]


def complaints(folder, *blocks: documents.Block) -> list[str]:
    """The lines that mypy prints for *blocks*, with the document as the name of every file."""
    pytest.importorskip("mypy", reason="mypy is not installed: it comes with the extra lint")
    for number, block in enumerate(blocks, start=1):
        (folder / f"block_{number}.py").write_text(block.source, "utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    # A cache of its own: mypy may run elsewhere in this checkout meanwhile.
    options = [
        "--cache-dir",
        str(folder / "cache"),
        "--strict",
        *UNTYPED,
        "--no-error-summary",
        "--no-pretty",
        "--hide-error-context",
    ]
    done = subprocess.run(
        [*command, *options, *(str(path) for path in sorted(folder.glob("block_*.py")))],
        cwd=ROOT,
        env={**os.environ, "MYPY_FORCE_COLOR": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=55,
    )
    assert done.returncode in (0, 1), f"mypy failed\n{done.stdout}{done.stderr}"
    return [
        re.sub(r"^.*block_(\d+)\.py:", lambda found: f"{blocks[int(found[1]) - 1].document}:", line)
        for line in done.stdout.splitlines()
    ]


def files_of_examples():
    """The programs of examples/, as blocks."""
    for path in sorted((ROOT / "examples").glob("*.py")):
        text = path.read_text("utf-8")
        yield documents.Block(f"examples/{path.name}", 1, "python", path.stem, text, text)


def test_the_examples_type_check(tmp_path):
    found = complaints(tmp_path, *documents.blocks("python"), *files_of_examples())
    assert not found, "mypy --strict on the examples:\n" + "\n".join(found)


def test_a_wrong_example_is_reported_at_its_line(tmp_path):
    text = "# Title\n\n```python\nx: int = 1\n```\n\n<!-- python\nname = 2\n-->\n\n```python\ny: str = name\n```\n"
    (line,) = complaints(tmp_path, *documents.blocks_of(text, "README.md"))
    assert line.startswith(
        'README.md:12: error: Incompatible types in assignment (expression has type "int"'
    )

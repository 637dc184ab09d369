"""``tests/README.md``: every fault that the library must survive has a test, and every test that is named exists."""

import re

import pytest

from ..conftest import ROOT

TEXT = (ROOT / "tests/README.md").read_text("utf-8")
TABLE = TEXT.split("<!-- matrix:begin -->")[1].split("<!-- matrix:end -->")[0]
ROWS = {
    int(cells[0]): [cell.strip() for cell in cells]
    for cells in (line.strip("|\n ").split(" | ") for line in TABLE.strip().splitlines()[2:])
}
DEFINED = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^ *(?:async )?def (test_\w+)", path.read_text("utf-8"), re.MULTILINE)
}


def test_every_row_is_there():
    assert set(range(1, 69)) <= ROWS.keys()
    assert list(ROWS) == sorted(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_whole_and_its_tests_exist(row):
    cells = ROWS[row]
    assert len(cells) == 5
    assert all(cells), f"row {row} has an empty cell"
    named = re.findall(r"`(\w+)`", cells[4])
    assert named
    assert set(named) <= DEFINED, set(named) - DEFINED

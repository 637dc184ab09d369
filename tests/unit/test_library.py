"""The Lua bundle: its parts, its line map, its version, its machine-read headers."""

import re
from pathlib import Path

import pytest

from ff_fast import _library

LUA = Path(__file__).parent.parent.parent / "lua"


@pytest.fixture
def assemble():
    """Assemble a library from the given parts' texts, in the order of ``PARTS``."""

    def build(**changed: str) -> _library._Assembly:
        return _library._assemble(dict.fromkeys(_library.PARTS, "x\n") | changed)

    return build


def test_parts_and_folder_agree():
    assert sorted(_library.PARTS) == sorted(path.stem for path in LUA.glob("*.lua"))


def test_a_missing_part_is_named(monkeypatch):
    monkeypatch.setattr(_library, "PARTS", ("prelude", "nowhere", "neither"))
    with pytest.raises(FileNotFoundError, match=r"has no nowhere\.lua, neither\.lua"):
        _library._read_parts()


def test_source_opens_with_the_name():
    assert _library.source().startswith(f"#!lua name={_library.NAME}\n")


def test_nothing_is_left_to_substitute():
    assert "@DIGEST@" not in _library.source()
    assert "@CONTRACT@" not in _library.source()


def test_digest_is_short_and_in_the_source():
    assert re.fullmatch("[0-9a-f]{12}", _library.digest())
    assert _library.digest() in _library.source()


def test_digest_changes_with_the_text_and_with_the_contract(assemble, monkeypatch):
    plain = assemble()
    assert assemble() == plain
    assert assemble(read="y\n").digest != plain.digest
    numbered = assemble(version="return @CONTRACT@\n")
    monkeypatch.setattr(_library, "CONTRACT", _library.CONTRACT + 1)
    assert assemble(version="return @CONTRACT@\n").digest != numbered.digest


def test_substitution(assemble):
    made = assemble(version="return '@DIGEST@', @CONTRACT@\n")
    assert f"return '{made.digest}', {_library.CONTRACT}\n" in made.text


def test_only_the_prelude_stands_outside_a_block():
    lines = _library.source().splitlines()
    assert lines.count("do") >= len(_library.PARTS) - 1
    first_block = next(n for n, line in enumerate(lines, 1) if line == "do")
    assert _library.line_of(first_block - 1).startswith("lua/prelude.lua:")


def test_line_of_finds_every_line_of_every_part():
    lines = _library.source().splitlines()
    seen = {}
    for number, line in enumerate(lines, start=1):
        seen.setdefault(_library.line_of(number), []).append(line)
    for part in _library.PARTS:
        text = (LUA / f"{part}.lua").read_text("utf-8").rstrip().splitlines()
        for number, line in enumerate(text, start=1):
            if "@" not in line:
                assert line in seen[f"lua/{part}.lua:{number}"]


@pytest.mark.parametrize("line", [0, -1, 10**6])
def test_line_of_refuses_a_line_that_is_not_there(line):
    with pytest.raises(ValueError, match="lines 1 to"):
        _library.line_of(line)


GOOD = """\
local x = 1

-- ff_renew_lease
--   keys:    core meta
--   args:    execution_id attempt_index
--            lease_id (field value)...
--   returns:
--   errors:  execution_not_found stale_owner
--
-- Anything may follow: this is for people.
local function renew() end
"""


def test_a_header_is_read():
    header = _library._parse_headers("lease", GOOD)["ff_renew_lease"]
    assert header == _library.Header(
        name="ff_renew_lease",
        keys=("core", "meta"),
        args=("execution_id", "attempt_index", "lease_id"),
        returns=(),
        errors=("execution_not_found", "stale_owner"),
        tails={"args": ("field", "value")},
        where="lua/lease.lua:3",
    )
    assert header.accepts("keys", 2)
    assert not header.accepts("keys", 3)
    assert header.accepts("args", 3)
    assert header.accepts("args", 9)
    assert not header.accepts("args", 8)
    assert not header.accepts("args", 1)
    assert header.accepts("returns", 0)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("--   keys:    core meta\n", "", "must declare keys, args, returns, errors"),
        ("--   keys:", "--   args:", "declares args twice"),
        ("--   errors:", "--   faults:", "declares keys, args, returns, faults"),
        ("core meta", "core... meta", "keys must be words, then at most one"),
        ("core meta", "core ...", "keys must be words, then at most one"),
        ("core meta", "(core meta", "keys must be words, then at most one"),
        ("execution_not_found", "not-found", "errors must be words"),
        ("--   keys:    core meta\n", "-- Renews.\n", "declares nothing"),
    ],
)
def test_a_bad_header_is_refused(old, new, message):
    assert old in GOOD
    with pytest.raises(ValueError, match=rf"lua/lease\.lua:3: .*{message}"):
        _library._parse_headers("lease", GOOD.replace(old, new, 1))


def test_a_single_word_may_repeat():
    header = _library._parse_headers("x", GOOD.replace("core meta", "core meta..."))[
        "ff_renew_lease"
    ]
    assert (header.keys, header.tails["keys"]) == (("core",), ("meta",))
    assert [count for count in range(4) if header.accepts("keys", count)] == [1, 2, 3]


def test_two_headers_of_one_function_are_refused():
    with pytest.raises(ValueError, match="two headers"):
        _library._parse_headers("lease", GOOD + GOOD)


def test_each_registered_function_has_a_header_in_its_part():
    registered = re.compile(r"register_function[({\s]*(?:function_name\s*=\s*)?['\"](\w+)['\"]")
    for part in _library.PARTS:
        text = (LUA / f"{part}.lua").read_text("utf-8")
        declared = _library._parse_headers(part, text)
        assert sorted(registered.findall(text)) == sorted(declared), f"lua/{part}.lua"


def test_both_sides_of_an_append_name_the_same_blocks():
    text = (LUA / "append.lua").read_text("utf-8")
    table = re.search(r"^ff\.BLOCK = \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)[1]
    in_lua = dict(re.findall(r"^  (\w+) = '(.)',$", table, re.MULTILINE))
    writer = (LUA.parent / "ff_fast" / "_hot" / "writer.pyx").read_text("utf-8")
    in_writer = dict(re.findall(r"^cdef bytes BLOCK_(\w+) = b\"(.)\"$", writer, re.MULTILINE))
    in_comment = {
        name: letter for letter, name in re.findall(r"^--   (.)  (\w+)", text, re.MULTILINE)
    }
    assert in_lua == in_writer == in_comment
    assert len(set(in_lua.values())) == len(in_lua) == 15

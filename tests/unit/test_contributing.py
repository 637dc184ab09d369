"""CONTRIBUTING.md agrees with the code: its states are those of Lua, and its commands and files exist."""

import re

import pytest

import ff_fast
from tools import draw_states

from ..conftest import ROOT

GUIDE = draw_states.GUIDE.read_text("utf-8")
LUA = {path.name: path.read_text("utf-8") for path in (ROOT / "lua").glob("*.lua")}
ROWS = draw_states.transitions(LUA["state.lua"])
SMALL = "ff.TRANSITIONS = {\n  a = { b = true, c = true },\n  b = {\n    c = true,\n  },\n  c = {},\n}\n"


def test_the_states_are_those_of_the_table():
    block = draw_states.drawn(ROWS)
    assert draw_states.replaced(GUIDE, block) == GUIDE, "run `python tools/draw_states.py --write`"


def test_the_script_prints_and_writes(tmp_path, monkeypatch, capsys):
    assert draw_states.main([]) == 0
    block = capsys.readouterr().out.removesuffix("\n")
    assert block in GUIDE
    path = tmp_path / "guide.md"
    path.write_text(f"before\n{draw_states.BEGIN}\nold\n{draw_states.END}\nafter\n")
    monkeypatch.setattr(draw_states, "GUIDE", path)
    assert draw_states.main(["--write"]) == 0
    assert path.read_text() == f"before\n{block}\nafter\n"


def test_a_table_is_read():
    assert draw_states.transitions(SMALL) == {"a": ("b", "c"), "b": ("c",), "c": ()}


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("TRANSITIONS", "OTHERS", "no table"),
        ("  c = {},\n", "", "no row for c"),
        ("b = true", "b = false", "b=false"),
        ("  c = {},\n", "  c = {}, -- an end\n", "anend"),
        ("  b = {\n    c = true,\n  },\n", "  b = some,\n  c = {},\n", "b=some"),
    ],
)
def test_a_table_of_another_form_is_refused(old, new, message):
    assert old in SMALL
    with pytest.raises(ValueError, match=message):
        draw_states.transitions(SMALL.replace(old, new))


@pytest.mark.parametrize("text", ["", draw_states.BEGIN, draw_states.END + draw_states.BEGIN])
def test_a_guide_without_its_markers_is_refused(text):
    with pytest.raises(ValueError, match="once each"):
        draw_states.replaced(text, "block")


def test_every_state_that_the_code_names_is_in_the_table():
    moved = {
        (name, state)
        for name, text in LUA.items()
        for state in re.findall(r"ff\.move\(\w+, '(\w+)'", text)
    }
    assert len(moved) >= 10
    assert {state for _, state in moved} <= ROWS.keys()
    compared = {
        state
        for text in LUA.values()
        for state in re.findall(r"\bexecution\.state [~=]= '(\w+)'", text)
    }
    assert compared <= ROWS.keys()


def test_an_execution_begins_in_the_states_that_are_drawn():
    (begun,) = re.findall(r"'state', delayed and '(\w+)' or '(\w+)'", LUA["execution.lua"])
    assert set(begun) == set(draw_states.FIRST)


def test_every_state_is_reached_and_the_ends_are_ends():
    reached = {target for targets in ROWS.values() for target in targets} | set(draw_states.FIRST)
    assert reached == ROWS.keys()
    (outcomes,) = re.findall(r"^ff\.OUTCOMES = \{(.*)\}", LUA["state.lua"], re.MULTILINE)
    ends = {state for state, targets in ROWS.items() if not targets}
    assert ends == set(re.findall(r"(\w+) = '", outcomes))


def test_every_file_that_is_named_exists():
    named = re.findall(
        r"`([\w.\-]+(?:/[\w.\-*]+)*/?)`", re.sub(r"```.*?```", "", GUIDE, flags=re.DOTALL)
    )
    files = [
        name for name in named if "/" in name or name.endswith((".md", ".py", ".lua", ".toml"))
    ]
    assert len(files) > 10
    for name in files:
        if name.startswith(("build/", "bench/results")):
            continue  # made by a task
        assert list(ROOT.glob(name.rstrip("/"))), name


def test_every_hop_of_the_walks_exists():
    hops = re.findall(r"`([\w/]+\.(?:pyx?|lua)):([\w.]+)`", GUIDE)
    assert len(hops) > 20
    for path, name in hops:
        text = (ROOT / path).read_text("utf-8")
        outer, _, inner = name.rpartition(".")
        defined = rf"\b(?:def|function|int|bytes|object) (?:{inner}|{re.escape(name)})\(|register_function\('{inner}'"
        assert re.search(defined, text), (path, name)
        if not path.endswith(".lua") and outer:
            assert re.search(rf"\bclass {outer}\b", text), (path, name)


def test_every_task_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", GUIDE))
    assert named <= targets
    assert targets - named <= {"help"}, "a task that CONTRIBUTING.md does not name"


def test_the_changelog_begins_with_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(r"^## (\S+) ", changelog, re.MULTILINE)[1] == ff_fast.__version__

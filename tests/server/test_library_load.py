"""The Lua library on real engines: it loads, registers what it declares, and errors have a place."""

import re

import pytest
import redis

from ff_fast import _library

from ..unit.test_ops import CALLS


@pytest.fixture
def loaded(raw):
    """The library's functions as the engine lists them: name to flags."""
    raw.function_load(_library.source(), replace=True)
    ((_, library), (_, engine_name), (_, functions), *_) = [
        tuple(pair)
        for pair in zip(*[iter(raw.function_list(library=_library.NAME)[0])] * 2, strict=True)
    ]
    assert (library, engine_name) == (_library.NAME.encode(), b"LUA")
    described = [dict(zip(*[iter(function)] * 2, strict=True)) for function in functions]
    return {each[b"name"].decode(): set(each[b"flags"]) for each in described}


def test_registers_exactly_what_the_headers_declare(engine, loaded):
    assert sorted(loaded) == sorted(_library.headers())


def test_calls_are_read_only_where_the_function_does_not_write(engine, loaded):
    read_only = {name for name, (op, _, _) in CALLS.items() if op.read_only}
    assert read_only == {name for name, flags in loaded.items() if b"no-writes" in flags}


def test_loading_twice_without_replace_is_refused(engine, raw, loaded):
    with pytest.raises(redis.ResponseError, match="already exists"):
        raw.function_load(_library.source())


def test_an_error_names_a_line_that_line_of_can_place(engine, raw):
    lines = _library.source().splitlines()
    at = next(n for n, line in enumerate(lines, 1) if _library.line_of(n) == "lua/append.lua:1")
    lines[at] = "local broken = = 1"  # line at + 1: the line below the block's `do`
    with pytest.raises(redis.ResponseError) as caught:
        raw.function_load("\n".join(lines), replace=True)
    reported = int(re.search(r"user_function:(\d+):", str(caught.value))[1])
    assert reported == at + 1
    assert _library.line_of(reported) == "lua/append.lua:1"

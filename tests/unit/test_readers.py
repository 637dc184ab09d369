"""What both shells' readers share: where a reader stands, when a wait is over."""

import importlib
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest

from ff_fast import BackendRetry, End, errors
from ff_fast._core.readers import ReaderState, closed_error, deadline
from ff_fast._hot.items import BlockingItems


class Reader(ReaderState, BlockingItems):
    """A reader without a connection: the test puts what an answer brings."""


def reader(start="0-0", ended=False):
    return Reader(SimpleNamespace(start=start, ended=ended), BackendRetry())


def item(cursor):
    return SimpleNamespace(cursor=cursor)


@pytest.mark.parametrize("start", ["0-0", "5-7", None])
def test_before_the_first_item_it_stands_at_the_start(start):
    assert reader(start).cursor == start


def test_it_stands_behind_the_item_that_was_taken_last():
    one = reader()
    one._put([item("1-1"), item("1-2")])
    assert one.cursor == "0-0"
    next(one)
    assert one.cursor == "1-1"
    # Those of the same answer that nobody has taken are still to come.
    assert [each.cursor for each in one._rest] == ["1-2"]
    assert one.cursor == "1-1"
    del one._rest
    assert one.cursor == "1-2"


def test_it_has_ended_when_the_last_item_was_taken():
    one = reader(ended=True)
    one._put([End("attempt_success", "1-1")])
    assert not one.ended
    next(one)
    assert one.ended
    assert not reader().ended


def test_it_shows_where_it_stands():
    assert repr(reader("5-7")) == "Reader(cursor='5-7', ended=False)"
    assert not reader().closed


def test_no_time_out_waits_for_ever():
    assert deadline(None) is None


@pytest.mark.parametrize("timeout, seconds", [(0, 0), (1.5, 1.5), (timedelta(seconds=2), 2)])
def test_a_wait_is_over_at_a_time(timeout, seconds):
    before = time.monotonic()
    assert before + seconds <= deadline(timeout) <= time.monotonic() + seconds


@pytest.mark.parametrize(
    "timeout", [-1, float("nan"), 31_536_001, "1", True, timedelta(seconds=-1)]
)
def test_a_time_out_that_is_none(timeout):
    with pytest.raises(errors.InvalidInput, match="timeout"):
        deadline(timeout)


def test_a_closed_reader_says_how_to_go_on():
    assert "cursor" in str(closed_error())
    assert isinstance(closed_error(), errors.Unavailable)


@pytest.mark.parametrize("shell", ["_sync", "_aio"])
@pytest.mark.parametrize("kind", ["Tail", "Follow", "Waiting", "Completions"])
def test_a_reader_that_an_interrupt_left_incomplete_goes_in_silence(shell, kind):
    made = getattr(importlib.import_module(f"ff_fast.{shell}.readers"), kind)
    unraisable = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "unraisablehook", unraisable.append)
        # As where it strikes before __init__ has begun.
        reader = made.__new__(made)
        del reader
    assert unraisable == []

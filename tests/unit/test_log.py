"""What is said how often."""

import logging

import pytest

from ff_fast import _log, errors
from ff_fast._log import say, say_seldom


@pytest.fixture
def now(monkeypatch):
    """``now[0]``: the time that the logger sees."""
    at = [1000.0]
    monkeypatch.setattr(_log.time, "monotonic", lambda: at[0])
    return at


def test_a_record_has_the_fields_that_exist(caplog):
    say(logging.WARNING, "Of %s.", "it", execution_id="e", attempt_index=None, worker_id="w")
    (record,) = caplog.records
    assert (record.name, record.levelno, record.getMessage()) == ("ff_fast", 30, "Of it.")
    assert (record.execution_id, record.worker_id) == ("e", "w")
    assert not hasattr(record, "attempt_index")


def test_a_storm_is_one_line_in_ten_seconds_and_the_next_has_its_number(caplog, now):
    for _ in range(1000):
        say_seldom(logging.WARNING, "here", "cause", "It fell.")
    say_seldom(logging.WARNING, "here", "other cause", "It fell.")
    say_seldom(logging.WARNING, "there", "cause", "It fell.")
    assert caplog.messages == ["It fell."] * 3
    now[0] += _log.AGAIN_S
    assert say_seldom(logging.WARNING, "here", "cause", "It fell.")
    assert caplog.messages[3:] == ["It fell. (999 more since the last such line.)"]
    now[0] += _log.AGAIN_S
    say_seldom(logging.WARNING, "here", "cause", "It fell.")
    assert caplog.messages[4:] == ["It fell."]


def test_what_is_not_logged_is_not_counted(caplog):
    caplog.set_level(logging.ERROR, "ff_fast")
    assert not say_seldom(logging.WARNING, "here", "cause", "It fell.")
    assert _log._told == {}


def test_only_so_many_causes_are_remembered(caplog):
    for number in range(_log._MOST + 10):
        say_seldom(logging.WARNING, "here", number, "It fell.")
    assert len(_log._told) == _log._MOST
    assert len(caplog.records) == _log._MOST + 10


def test_a_record_keeps_no_error_and_so_no_connection(caplog):
    error = errors.Unavailable()
    say(logging.WARNING, "Lost: %s", error)
    say_seldom(logging.WARNING, "here", "cause", "Lost: %s", error)
    assert [record.args for record in caplog.records] == [(str(error),)] * 2
    assert {record.exc_info for record in caplog.records} == {None}

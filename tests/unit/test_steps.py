"""Steps and commands, and what is tried again after a failure, without a server."""

import hiredis
import pytest

from ff_fast import errors, keys
from ff_fast._core import steps
from ff_fast._core.steps import (
    Command,
    Retries,
    Step,
    backoff,
    checked,
    command,
    send_one,
    time_ms,
)
from ff_fast.types import BackendRetry

from .script import run, words

AWAY = errors.Unavailable()
UNKNOWN = errors.OutcomeUnknown()
LATE = errors.DeadlineExceeded()
MISSING = errors.FunctionMissing()
REFUSED = errors.PermissionDenied()

# Pauses of 10, 20 and 40 ms, without dice.
THREE = BackendRetry(exponent_base=2, factor=10, number_of_retries=3, jitter_percent=0)


def pauses(retries, *failures):
    """What each failure in turn is followed by, in ms; None is the last word."""
    found = (retries.pause(failure) for failure in failures)
    return [None if pause is None else round(pause * 1000) for pause in found]


# -- pauses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "retry, wanted",
    [
        (THREE, [10, 20, 40]),
        (THREE.replace(number_of_retries=0), []),
        (THREE.replace(exponent_base=1), [10, 10, 10]),
        (THREE.replace(exponent_base=10, factor=100), [100, 1000, 1000]),
        (THREE.replace(factor=5_000), [1000, 1000, 1000]),
        (THREE.replace(factor=0), [0, 0, 0]),
    ],
)
def test_pauses_grow_up_to_a_second(retry, wanted):
    assert [round(pause * 1000) for pause in backoff(retry)] == wanted


def test_the_pauses_of_no_configuration_take_about_ten_seconds(monkeypatch):
    monkeypatch.setattr(steps.random, "random", lambda: 0.0)
    found = list(backoff(BackendRetry()))
    assert len(found) == 16
    assert 8 < sum(found) < 12


def test_jitter_shortens_a_pause_by_its_share(monkeypatch):
    monkeypatch.setattr(steps.random, "random", lambda: 0.5)
    assert next(backoff(THREE.replace(jitter_percent=50))) == pytest.approx(0.0075)


# -- retries --------------------------------------------------------------------------------------------------------------

RETRIED = {
    "as often as it is configured": ({}, [AWAY] * 4, [10, 20, 40, None]),
    "nothing that is refused": ({}, [REFUSED], [None]),
    "what may have been applied": ({}, [UNKNOWN], [10]),
    "no caller that has used up its time": ({}, [LATE], [None]),
    "a reader that has a time of its own": ({"retry_timeouts": True}, [LATE, AWAY], [10, 20]),
    "at once behind a library that was loaded": ({}, [MISSING, AWAY], [0, 10]),
    "a library that is lost again, like any other failure": ({}, [MISSING, MISSING], [0, 10]),
}


def test_what_is_tried_again(subtests):
    for what, (options, failures, wanted) in RETRIED.items():
        with subtests.test(f"{what!r:.60}"):
            assert pauses(Retries(THREE, **options), *failures) == wanted


def test_with_no_retries_a_missing_library_is_loaded_all_the_same():
    assert pauses(Retries(THREE.replace(number_of_retries=0)), MISSING, AWAY) == [0, None]


def test_a_library_that_is_missing_behind_an_applied_part_leaves_the_call_unknown():
    retries, missing, refused = Retries(THREE), errors.FunctionMissing(), errors.Unavailable()
    errors.make_unknown(missing, "A part of the call was applied.")
    assert pauses(retries, missing) == [0]
    retries.settle(refused)
    assert refused.outcome is errors.Outcome.UNKNOWN


def test_after_a_success_everything_counts_from_the_beginning():
    retries = Retries(THREE)
    assert pauses(retries, MISSING, AWAY, AWAY) == [0, 10, 20]
    retries.reset()
    assert pauses(retries, MISSING, AWAY, AWAY) == [0, 10, 20]


# -- commands and replies ---------------------------------------------------------------------------------------------------


def test_a_command_goes_to_the_slot_of_its_key():
    one = command(b"SET", b"{a}x", b"1")
    assert words(one.request) == [[b"SET", b"{a}x", b"1"]]
    assert one.slot == keys.key_slot(b"{a}y")
    assert Command(b"", one.request).slot is None


def test_the_commands_of_a_step_are_one_request():
    both = Step([command(b"GET", b"a"), command(b"GET", b"b")])
    assert words(both.request) == [[b"GET", b"a"], [b"GET", b"b"]]
    assert both.block_s == 0


@pytest.mark.parametrize("reply, value", [([b"x"], [b"x"]), ([], []), (None, []), (7, [])])
def test_a_plain_answer(reply, value):
    assert checked(reply) == value
    assert run(send_one(command(b"GET", b"a")), [reply]) == ([[b"GET", b"a"]], value)


@pytest.mark.parametrize(
    "reply, error",
    [
        (hiredis.ReplyError("NOPERM no"), errors.PermissionDenied),
        (hiredis.ReplyError("WRONGTYPE Operation against a key"), errors.FFError),
        (b"OK", errors.ProtocolError),
        (1.5, errors.ProtocolError),
    ],
)
def test_an_answer_that_is_none(reply, error):
    with pytest.raises(error):
        checked(reply)


def test_the_time_of_a_server():
    assert time_ms([b"1700000000", b"5999"]) == 1_700_000_000_005

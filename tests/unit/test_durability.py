"""Levels of durability: what is asked, and what may be concluded."""

import time

import pytest

from ff_fast import Durability, keys
from ff_fast._core.durability import Ask, Level, Question, can_reach, of_frames, reach
from ff_fast._core.steps import Pause
from ff_fast._hot.resp import pack_command
from ff_fast.errors import (
    InvalidInput,
    NotPrimary,
    NotReplicated,
    ProtocolError,
    SequenceGap,
    StaleOwner,
    Unavailable,
    UnsupportedServer,
)

EID = keys.new_execution_id()
KEYS = tuple(make(EID, 0) for make in (keys.head, keys.stream, keys.live, keys.summary))
MARK = pack_command(b"SET", keys.written(keys.slot_tag_of(EID)), b"1", b"PX", b"60000")
HERE = b"5000 100-7 6000 0"
STORED, ONE, TWO = Durability.stored(), Durability.replicated(), Durability.replicated(2)


def asked(level=ONE, timeout_s=0.5):
    evidence = of_frames(KEYS, b"0:%040d:1:x" % 0, (100, 7))
    ask = Ask(evidence, Level(level, timeout_s), time.monotonic() + timeout_s)
    ask.begin()
    return ask


def answered(level, ask, *replies):
    question = Question(level, (ask,))
    for reply in replies:
        question.take(reply)
    return ask


def test_a_question_has_the_evidence_a_write_and_the_wait_in_one_slot():
    question = Question(ONE, (asked(), asked()))
    first, second, mark, wait = question.step.commands
    assert question.step.alone
    assert first.request == second.request
    assert b"ff_append" in first.request
    assert mark.request == MARK
    assert wait.request.startswith(b"*3\r\n$4\r\nWAIT\r\n$1\r\n1\r\n")
    assert len({each.slot for each in question.step.commands}) == 1
    assert 0 < question.step.block_s <= 0.5
    synced = Question(Durability.synced(2), (asked(timeout_s=60),))
    assert synced.step.commands[-1].request == pack_command(b"WAITAOF", b"1", b"2", b"1000")


@pytest.mark.parametrize(
    "level, reply, reached",
    [
        (ONE, 1, ONE),
        (ONE, 2, TWO),
        (ONE, 0, None),
        (TWO, 1, None),
        (Durability.synced(), [1, 0], Durability.synced()),
        (Durability.synced(1), [1, 2], Durability.synced(2)),
        (Durability.synced(), [0, 0], None),
        (Durability.synced(1), [1, 0], None),
        (Durability.synced(1), [0, 1], None),
    ],
)
def test_a_level_is_reached_when_the_server_has_counted_enough(level, reply, reached):
    ask = answered(level, asked(level), HERE, b"OK", reply)
    assert (ask.reached, ask.failure) == (reached, None)
    assert ask.again() == (reached is None)


@pytest.mark.parametrize(
    "evidence, failure",
    [
        (b"5000 100-6 6000 0", SequenceGap),
        # Another frame has its sequence.
        (b"5000 101-7 6000 0", SequenceGap),
        ([0, b"sequence_gap", b"6", b"8"], SequenceGap),
        ([0, b"stale_owner"], StaleOwner),
        (Exception("READONLY You can't write against a read only replica."), NotPrimary),
        (None, ProtocolError),
    ],
)
def test_nothing_is_claimed_without_the_evidence(evidence, failure):
    question = Question(ONE, (asked(), other := asked()))
    first = question._asks[0]
    assert question.take(evidence)
    # It has ended at once; the other one goes on.
    assert type(first.failure) is failure
    for reply in (HERE, b"OK", 1):
        more = question.take(reply)
    assert not more
    assert (first.reached, other.reached) == (None, ONE)


def test_the_time_of_a_trimmed_frame_is_not_compared():
    assert answered(ONE, asked(), b"5000 0-7 6000 0", b"OK", 1).reached == ONE


@pytest.mark.parametrize(
    "mark, wait, failure",
    [
        (Exception("READONLY x"), 1, NotPrimary),
        (b"OK", Exception("UNBLOCKED force unblock"), Unavailable),
        (b"OK", Exception("ERR WAIT cannot be used with replica instances."), NotPrimary),
        (b"OK", Exception("ERR unknown command 'WAITAOF'"), UnsupportedServer),
        (b"OK", b"1", ProtocolError),
    ],
)
def test_nothing_is_claimed_if_the_write_or_the_wait_is_refused(mark, wait, failure):
    ask = answered(ONE, asked(), HERE, mark, wait)
    assert (type(ask.failure), ask.reached) == (failure, None)


def test_when_the_time_is_up_the_error_says_what_was_seen():
    ask = answered(TWO, asked(TWO, 0.0), HERE, b"OK", 1)
    with pytest.raises(NotReplicated) as caught:
        ask.again()
    assert (caught.value.replicas, caught.value.synced) == (1, False)


def test_a_call_asks_until_the_level_is_reached():
    ask = asked()
    steps = reach(ask.evidence, ask.level, ask.until)
    assert next(steps).alone
    assert isinstance(steps.send([HERE, b"OK", 0]), Pause)
    assert next(steps).alone
    with pytest.raises(StopIteration) as done:
        steps.send([HERE, b"OK", 1])
    assert done.value.value == ONE


def test_a_server_without_a_file_is_found_before():
    assert list(can_reach(ONE, "{fp:1}")) == []
    steps = can_reach(Durability.synced(3), "{fp:1}")
    (command,) = next(steps).commands
    assert command.request == pack_command(b"WAITAOF", b"1", b"0", b"1")
    with pytest.raises(UnsupportedServer):
        steps.send([Exception("ERR WAITAOF cannot be used when numlocal is set but appendonly is")])


def test_levels_compare_by_what_they_promise():
    assert Durability() == STORED
    assert TWO.covers(ONE)
    assert not ONE.covers(TWO)
    assert Durability.synced(1).covers(ONE)
    assert not ONE.covers(Durability.synced())
    assert STORED.covers(STORED)
    for bad in (0, 65, -1):
        with pytest.raises(InvalidInput):
            Durability.replicated(bad)

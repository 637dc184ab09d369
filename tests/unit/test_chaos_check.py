"""The oracle of ``make chaos`` reports what it is there for: each test breaks one thing that was whole."""

import asyncio
import collections
import copy
from pathlib import Path
from types import SimpleNamespace

import pytest

from ff_fast import End, Gap, StreamFrame, TailVisibility
from ff_fast._core.tail import TailCore
from ff_fast.errors import AttemptNotFound, ExecutionNotFound, StateLost

from ..cluster.chaos import check, held
from ..cluster.chaos.held import Held
from ..cluster.chaos.load import BURSTS, Execution, Load
from ..soak.account import DONE

EID = "{fp:3}:11111111-1111-4111-8111-111111111111"
LENGTH = 6


class Page(list):
    def __init__(self, items, gaps=(), end_reason="attempt_success"):
        super().__init__(items)
        self.gaps, self.end_reason = list(gaps), end_reason


class World:
    """An execution of six frames that is whole: what is stored, what was said, what was read and told."""

    def __init__(self):
        self.known = Execution(EID, BURSTS[0], LENGTH)
        self.known.created = DONE
        told = self.known.attempts[0]
        told.acknowledged, told.completed = LENGTH, True
        self.described = SimpleNamespace(state="completed", failure_reason=None, attempt_count=1)
        self.result = EID.encode()
        self.pages = [Page(self.frame(each) for each in range(1, LENGTH + 1))]
        self.known.reads = [[*self.pages[0], End("attempt_success")]]
        self.executions = {EID: self.known}
        self.completions = collections.Counter({EID: 1})
        self.writes = self

    @property
    def told(self):
        return self.known.attempts[0]

    @property
    def stored(self):
        return self.pages[0]

    @property
    def read(self):
        return self.known.reads[0]

    def frame(self, sequence, payload=None, attempt=0, ms=1):
        return StreamFrame(
            stream_id=f"{ms}-{sequence}",
            frame_type="token",
            payload=payload or self.known.payload(attempt, sequence),
            ts_ms=1,
            attempt_index=attempt,
        )

    def lose(self, first, last):
        """Frames are lost as they are to be: stored as a gap, read as one, and told to the caller."""
        gap = Gap(first, last + 1, "lost")
        del self.stored[first - 1 : last]
        self.stored.gaps.append(gap)
        self.read[first - 1 : last] = [gap]
        self.told.lost.append(range(first, last + 1))

    async def _repeated(self, call):
        return await call()

    async def describe(self, _):
        if self.described is None:
            raise ExecutionNotFound
        return self.described

    async def read_result(self, _):
        return self.result

    async def read_stream(self, _, attempt, *, count):
        if self.pages[attempt] is None:
            raise AttemptNotFound
        return self.pages[attempt]

    def found(self, *, lossy):
        found = asyncio.run(check.execution(self, self.known, lossy=lossy))
        return [*found, *check.completions(self, lossy=lossy)]


@pytest.fixture
def world():
    return World()


def reported(world, text, *, lossy=(False, True)):
    for each in lossy:
        found = world.found(lossy=each)
        assert any(text in line for line in found), (each, found)


def test_what_is_whole_is_not_reported(world):
    assert world.found(lossy=False) == []
    assert world.found(lossy=True) == []


def test_a_loss_that_everybody_was_told_of_is_allowed_where_it_may_happen(world):
    world.lose(2, 3)
    assert world.found(lossy=True) == []
    reported(world, "has gaps", lossy=[False])


@pytest.mark.parametrize("sequence", [1, 3, LENGTH])
def test_a_frame_that_is_not_stored_and_not_told_is_reported(world, sequence):
    del world.stored[sequence - 1], world.read[sequence - 1]
    reported(world, "frame" if sequence == LENGTH else f"lacks frame {sequence} in silence")


def test_a_frame_that_is_stored_twice_is_reported(world):
    world.stored.insert(3, world.stored[2])
    reported(world, "has 3 after 3")


def test_a_frame_that_stands_at_another_place_is_reported(world):
    world.stored[2:4] = [world.stored[3], world.stored[2]]
    reported(world, "after 4")


def test_a_stored_frame_with_another_payload_is_reported(world):
    world.stored[2] = world.frame(3, world.known.payload(0, 4))
    reported(world, "frame 3 has another payload")


@pytest.mark.parametrize("sequence", [1, 3, LENGTH])
def test_a_frame_that_a_reader_did_not_get_is_reported(world, sequence):
    del world.read[sequence - 1]
    reported(world, "skipped")


def test_a_frame_that_a_reader_got_twice_is_reported(world):
    world.read.insert(3, world.read[2])
    reported(world, "StreamFrame 3 after 3")


def test_a_gap_that_goes_back_to_what_was_read_is_reported(world):
    world.read[4:4] = [Gap(5, 3, "cursor_ahead"), *world.read[2:4]]
    reported(world, "got 3 to 4 twice")


def test_a_frame_of_a_claim_that_was_lost_may_be_read_before_that_of_the_next_one(world):
    world.read[0:0] = [world.frame(1, ms=0), world.frame(2, ms=0), Gap(3, 1, "cursor_ahead")]
    assert world.found(lossy=True) == []
    reported(world, "got Gap", lossy=[False])


def test_a_frame_that_a_reader_got_in_place_of_the_one_that_is_stored_is_reported(world):
    world.read[2] = world.frame(3, ms=0)
    reported(world, "got 0-3, and 1-3 is stored")


def test_a_frame_that_a_reader_got_with_another_payload_is_reported(world):
    world.read[2] = world.frame(3, b"another")
    reported(world, "another frame 3")


def test_a_gap_of_a_reader_where_the_frames_are_stored_is_reported_where_nothing_may_be_lost(world):
    world.read[1:3] = [Gap(2, 4, "lost")]
    reported(world, "got Gap", lossy=[False])


def test_a_reader_without_an_end_is_reported(world):
    world.read.pop()
    reported(world, "has no end")


def test_a_reader_that_got_another_end_than_is_stored_is_reported(world):
    world.read[-1] = End("attempt_failed")
    reported(world, "ended as")


def test_an_error_of_a_reader_is_reported_where_nothing_may_be_lost(world):
    world.read[-1] = ExecutionNotFound()
    reported(world, "the reader of attempt 0 was told", lossy=[False])


def test_a_loss_that_the_caller_was_not_told_of_is_reported(world):
    world.lose(2, 3)
    world.told.lost.clear()
    reported(world, "its caller was not told")


def test_a_loss_that_the_caller_was_told_of_in_part_is_reported(world):
    world.lose(2, 3)
    world.told.lost = [range(2, 3)]
    reported(world, "success without frame 3, and its caller was not told")


def test_a_success_that_lacks_its_tail_is_reported(world):
    del world.stored[4:], world.read[4:-1]
    reported(world, "ended as attempt_success with 4 of 6")


def test_an_acknowledged_tail_of_an_attempt_that_goes_on_elsewhere_is_reported(world):
    world.known.attempts[1].acknowledged = LENGTH
    again = [world.frame(each, attempt=1) for each in range(1, LENGTH + 1)]
    world.pages.append(Page(again))
    world.known.reads.append([*again, End("attempt_success")])
    world.described.attempt_count = 2
    world.stored.end_reason = "attempt_failed"
    world.read[-1] = End("attempt_failed")
    assert world.found(lossy=True) == []
    reported(world, "2 attempts", lossy=[False])
    world.told.completed = False
    del world.stored[4:], world.read[4:-1]
    reported(world, "6 was acknowledged, and nobody was told")
    world.told.error = StateLost()
    assert world.found(lossy=True) == []
    world.told.safe = 5
    reported(world, "5 was to be on a replica")


@pytest.mark.parametrize("state", ["active", "failed", "pending"])
def test_an_execution_that_did_not_succeed_is_reported(world, state):
    world.described.state = state
    reported(world, f"it is {state}")


def test_another_result_is_reported(world):
    world.result = b"another"
    reported(world, "its result is")


def test_an_execution_that_is_gone_is_reported_unless_it_may_be(world):
    world.described = None
    reported(world, "there is no such execution", lossy=[False])
    world.told.is_safe = True
    reported(world, "there is no such execution")


@pytest.mark.parametrize("times, lossy", [(0, [False, True]), (2, [False])])
def test_a_completion_that_is_told_twice_or_never_is_reported(world, times, lossy):
    world.completions[EID] = times
    reported(world, f"told {times} times", lossy=lossy)


def test_a_completion_of_an_execution_that_nobody_made_is_reported(world):
    world.completions["{fp:4}:22222222-2222-4222-8222-222222222222"] = 1
    reported(world, "that nobody created")


def test_an_error_of_a_caller_is_reported_where_nothing_may_be_lost(world):
    world.told.error = StateLost()
    reported(world, "was told StateLost", lossy=[False])


# -- what is held ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty():
    return Held()


def test_nothing_that_is_held_as_before_is_reported(empty):
    now = Held()
    assert [*held.after_the_streams(empty, now), *held.after_everything(empty, now)] == []


def test_the_place_of_a_reader_that_is_not_let_go_is_reported(empty):
    kept = TailCore(EID, 0, None, TailVisibility.ALL)
    now = Held()
    assert [*held.after_the_streams(empty, now)] == ["1 places are held of streams that have ended"]
    assert [*held.after_everything(empty, now)] == ["1 places are held after everything was closed"]
    del kept
    assert [*held.after_everything(empty, Held())] == []


@pytest.mark.parametrize("kind", [*held.OF_STREAMS, *held.OF_BACKENDS])
def test_whatever_is_not_let_go_is_reported(empty, kind):
    now = copy.deepcopy(empty)
    now.counts[kind] += 1
    assert [*held.after_everything(empty, now)] == [
        f"1 {kind} are held after everything was closed"
    ]
    now.counts[kind] += held.SUBSCRIPTIONS
    found = [*held.after_the_streams(empty, now)]
    assert bool(found) == (kind in held.OF_STREAMS), found


def test_memory_that_is_not_given_back_is_reported(empty):
    if "libasan" in Path("/proc/self/maps").read_text():
        pytest.skip("a sanitizer keeps what is freed")
    kept = bytearray(held.GROWTH_BYTES + (8 << 20))
    # Resident once it was written to.
    kept[::4096] = b"1" * len(kept[::4096])
    assert "the process has grown by" in "".join(held.after_everything(empty, Held()))
    del kept
    assert [*held.after_everything(empty, Held())] == []


def test_errors_that_were_noted_hold_no_frames():
    load = Load("sync", None, streams=0, length=0, rate=1, seed=0, report=None)
    known = load.executions[EID] = Execution(EID, BURSTS[0], LENGTH)
    try:
        try:
            raise ValueError
        except ValueError as error:
            raise StateLost from error
    except StateLost as error:
        known.attempts[0].error = error
        known.reads.append([error])
    load.forget_frames()
    assert known.attempts[0].error.__traceback__ is None
    assert known.attempts[0].error.__cause__.__traceback__ is None

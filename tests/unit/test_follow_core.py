"""How an execution is followed across its attempts, and waited for: without a server, the tails are scripted."""

import math
import time
from typing import ClassVar

import pytest

from ff_fast import (
    AttemptStarted,
    End,
    FailureClass,
    Gap,
    Snapshot,
    SummaryView,
    TailVisibility,
    errors,
    keys,
)
from ff_fast._core import follow
from ff_fast._core.follow import Ended, FollowCore, StateWatch, WaitCore
from ff_fast._core.ops import State
from ff_fast._hot.feed import Feed

from .script import words

EID = "{fp:1}:550e8400-e29b-41d4-a716-446655440000"
LOST = "producer_lost"


class Frame:
    def __init__(self, cursor):
        self.cursor = cursor

    def __repr__(self):
        return f"Frame({self.cursor})"


class Tail:
    """A tail whose answers are the items themselves."""

    made: ClassVar = []

    def __init__(self, execution_id, attempt_index, after, visibility):
        assert execution_id == EID
        self.attempt = attempt_index
        self.after = after
        self.visibility = visibility
        self.cursor = f"{attempt_index}.{after}"
        self.due = self.reads_end = False
        self.wake_at = math.inf
        self.pushed = []
        self.made.append(self)

    def step(self):
        return self

    def receive(self, reply):
        if isinstance(reply, Exception):
            raise reply
        if reply:
            self.cursor = reply[-1].cursor
        return list(reply)

    def take(self):
        return self.receive(self.pushed)


@pytest.fixture(autouse=True)
def scripted_tails(monkeypatch):
    monkeypatch.setattr(follow, "TailCore", Tail)
    monkeypatch.setattr(Tail, "made", [])


def reply(state, attempt=0, *, claimed=True, lapsed=False, reason="", error="", of=""):
    """What `ff_read_state` answers."""
    outcome = {"completed": "success", "active": "", "waiting": "", "delayed": ""}.get(state, state)
    if outcome and not reason:
        reason = {"completed": "attempt_success", "failed": "attempt_failure"}.get(state, "expired")
    flags = ["1" if claimed else "", "1" if lapsed else ""]
    fields = [state, str(attempt), *flags, reason, outcome, error, of]
    return [1, b"OK", *(field.encode() for field in fields)]


def document(version, cursor):
    """What `ff_read_summary` answers."""
    fields = {
        "document": '{"a":1}',
        "document_version": version,
        "version": version,
        "patch_kind": "json-merge-patch:",
        "last_updated_ms": 2,
        "first_applied_ms": 1,
        "cursor": cursor,
    }
    return [1, b"OK", [str(part).encode() for pair in fields.items() for part in pair]]


def asked(core):
    """What the next step asks for: an attempt and the place behind which it is read, or a function."""
    due = core.part.due or core.wake_at <= follow.monotonic()
    step = core.step()
    if step is None:
        return None
    if isinstance(step, Tail):
        assert core.part is step
        assert step.reads_end
        return step.attempt, str(step.after)
    # Whoever iterates is asked only then.
    assert due
    ((name, function, *_),) = words(step.request)
    assert name == b"FCALL_RO"
    return function.decode()


def play(core, *script):
    """Answer what is asked, in order; return what was brought. A pair is what is asked and its answer."""
    items = []
    for wanted, answer in script:
        assert asked(core) == wanted
        items += core.receive(answer)
    return items


def moved(core):
    """The execution has moved."""
    feed = Feed(core.part.channel)
    feed.add(core.part)
    feed.told(b"Swaiting")


LOOK = "ff_read_state"
READ = "ff_read_summary"


def test_it_begins_with_the_first_attempt_and_ends_with_the_execution():
    core = FollowCore(EID, None)
    assert (core.start, core.ended) == ("start", False)
    frame, late = Frame("0.5-1"), Frame("1.9-1")
    items = play(
        core,
        (LOOK, reply("active")),
        ((0, "0-0"), [frame]),
        ((0, "0-0"), [End("attempt_failure", "0.5-2")]),
        (LOOK, reply("active", 1)),
        ((1, "0-0"), [late, End("attempt_success", "1.9-2")]),
        (LOOK, reply("completed", 1)),
    )
    assert items == [
        AttemptStarted(0),
        frame,
        AttemptStarted(1),
        late,
        End("attempt_success", outcome="success"),
    ]
    cursors = ["0.0-0", "0.5-1", "1.0-0", "1.9-1", "1.9-2"]
    assert [item.cursor for item in items] == cursors
    assert core.ended


def test_before_the_first_claim_it_listens_to_the_execution_and_asks_only_when_it_moves():
    core = FollowCore(EID, None)
    woken = []
    core.part.on_wake = lambda: woken.append(1)
    assert core.part.channel == keys.execution_channel(EID)
    core.part.doubt(True)
    woken.clear()
    assert play(core, (LOOK, reply("waiting", claimed=False))) == []
    assert asked(core) is None
    assert 40 < core.wake_at - time.monotonic() <= 60
    moved(core)
    assert woken == [1]
    assert play(core, (LOOK, reply("active"))) == [AttemptStarted(0)]
    assert isinstance(core.part, Tail)


def test_a_subscription_that_was_made_leads_to_a_look_and_a_lost_one_waits_for_it():
    core = FollowCore(EID, None)
    play(core, (LOOK, reply("waiting", claimed=False)))
    woken = []
    core.part.on_wake = lambda: woken.append(1)
    core.part.doubt(False)
    assert core.take() == []
    assert asked(core) is None
    assert core.wake_at - time.monotonic() <= 1
    core.part.doubt(True)
    assert asked(core) == LOOK
    assert woken == [1, 1]


def test_a_subscription_that_is_refused_is_an_error_of_the_next_step():
    core = FollowCore(EID, None)
    core.part.failed(errors.PermissionDenied())
    with pytest.raises(errors.PermissionDenied):
        core.step()
    assert asked(core) == LOOK


def test_a_move_while_the_state_is_being_read_leads_to_another_look():
    core = FollowCore(EID, None)
    assert asked(core) == LOOK
    moved(core)
    core.receive(reply("waiting", claimed=False))
    assert asked(core) == LOOK


def test_without_a_push_the_state_is_read_after_half_a_minute(monkeypatch):
    core = FollowCore(EID, None)
    core.part.doubt(True)
    play(core, (LOOK, reply("delayed", claimed=False)))
    at = core.wake_at
    monkeypatch.setattr(follow, "monotonic", lambda: at - 0.001)
    assert asked(core) is None
    monkeypatch.setattr(follow, "monotonic", lambda: at)
    assert asked(core) == LOOK


@pytest.mark.parametrize(
    "state, outcome, reason, error",
    [
        ("cancelled", "cancelled", "attempt_cancelled", "nobody reads"),
        ("expired", "expired", "expired", "execution_deadline"),
    ],
)
def test_an_execution_that_ends_without_an_attempt_has_one_item(state, outcome, reason, error):
    core = FollowCore(EID, None)
    answer = reply(state, claimed=False, reason=reason, error=error)
    (end,) = play(core, (LOOK, answer))
    assert end == End(reason, outcome=outcome, error=error)
    # From there as well.
    again = FollowCore(EID, end.cursor)
    script = [((0, "0-0"), [End(reason, "0.5-1")]), (LOOK, answer)]
    assert play(again, *script) == [end]


def test_an_execution_that_ends_between_two_attempts_starts_none():
    core = FollowCore(EID, None)
    items = play(
        core,
        (LOOK, reply("active")),
        ((0, "0-0"), [End("attempt_failure", "0.5-2")]),
        (LOOK, reply("delayed", 1, claimed=False)),
    )
    assert items == [AttemptStarted(0)]
    assert isinstance(core.part, StateWatch)
    moved(core)
    answer = reply("cancelled", 1, claimed=False, reason="attempt_cancelled")
    (end,) = play(core, (LOOK, answer))
    assert end == End("attempt_cancelled", outcome="cancelled")
    assert end.cursor == "0.5-2"


def test_every_attempt_of_an_execution_that_has_ended_is_read_and_then_nothing_more_is_asked():
    core = FollowCore(EID, None)
    end = End("attempt_failure", "1.9-2")
    items = play(
        core,
        (LOOK, reply("failed", 1, error="no", of="permanent")),
        ((0, "0-0"), [End("attempt_failure", "0.5-2")]),
        ((1, "0-0"), [end]),
    )
    assert items == [
        AttemptStarted(0),
        AttemptStarted(1),
        End("attempt_failure", outcome="failed", error="no"),
    ]


class TestALostWorker:
    def test_its_attempt_is_left_when_another_one_is_claimed_and_looked_at_once_more(self):
        core = FollowCore(EID, None)
        lapse = End(LOST, "0.5-1")
        items = play(
            core,
            (LOOK, reply("active")),
            ((0, "0-0"), [Frame("0.5-1"), lapse]),
            (LOOK, reply("active", lapsed=True)),
        )
        assert len(items) == 2
        assert asked(core) is None
        moved(core)
        last = Frame("0.6-2")
        items = play(
            core,
            (LOOK, reply("active", 1)),
            ((0, "5-1"), [last, End(LOST, "0.6-3")]),
            (LOOK, reply("active", 1)),
        )
        assert items == [last, AttemptStarted(1)]

    def test_its_attempt_goes_on_where_its_claim_is_given_back(self):
        core = FollowCore(EID, None)
        play(
            core,
            (LOOK, reply("active")),
            ((0, "0-0"), [End(LOST, "0.0-0")]),
            (LOOK, reply("active", lapsed=True)),
        )
        moved(core)
        assert play(core, (LOOK, reply("waiting", claimed=False))) == []
        assert asked(core) is None
        moved(core)
        # It is the same attempt, which has started.
        frame = Frame("0.5-1")
        assert play(core, (LOOK, reply("active")), ((0, "0-0"), [frame])) == [frame]

    def test_the_end_has_the_reason_that_is_stored(self):
        core = FollowCore(EID, None)
        answer = reply("cancelled", reason="attempt_cancelled", error="why")
        items = play(
            core,
            (LOOK, reply("active")),
            ((0, "0-0"), [End(LOST, "0.0-0")]),
            (LOOK, answer),
            ((0, "0-0"), [End("attempt_cancelled", "0.7-1")]),
        )
        assert items[1:] == [End("attempt_cancelled", outcome="cancelled", error="why")]
        assert items[-1].cursor == "0.7-1"


class TestCursors:
    @pytest.mark.parametrize("after", [None, "start", "0-0"])
    def test_the_beginning(self, after):
        assert FollowCore(EID, after).start == "start"

    @pytest.mark.parametrize(
        "after", ["5-1", "x", "", "0.5", "-1.5-1", "0.5-1\n", "9" * 30 + ".5-1", 7, b"0.0-0"]
    )
    def test_what_is_none(self, after):
        with pytest.raises(errors.InvalidCursor):
            FollowCore(EID, after)

    def test_it_goes_on_in_the_attempt_of_the_cursor_and_does_not_tell_of_its_start_again(self):
        core = FollowCore(EID, "2.5-3")
        assert core.start == "2.5-3"
        frame = Frame("2.5-4")
        assert play(core, ((2, "5-3"), [frame])) == [frame]

    def test_reading_again_begins_behind_what_was_delivered(self):
        core = FollowCore(EID, None)
        play(core, (LOOK, reply("active")), ((0, "0-0"), [Frame("0.5-1"), Frame("0.5-2")]))
        core.restart()
        assert asked(core) == (0, "5-2")
        core.restart("0.5-1")
        assert asked(core) == (0, "5-1")
        core.restart("start")
        assert play(core, (LOOK, reply("active"))) == [AttemptStarted(0)]
        core.restart()
        assert asked(core) == (0, "0-0")

    def test_reading_again_at_the_end_gives_it_again(self):
        core = FollowCore(EID, None)
        script = (LOOK, reply("active")), ((0, "0-0"), [End("attempt_success", "0.5-1")])
        play(core, *script, (LOOK, reply("completed")))
        core.restart("0.0-0")
        assert not core.ended
        play(core, script[1], (LOOK, reply("completed")))
        assert core.ended


class TestWhatTheServerHasLost:
    def test_an_attempt_whose_frames_are_not_kept_has_a_gap_in_their_place(self):
        core = FollowCore(EID, "0.5-7")
        items = play(
            core,
            ((0, "5-7"), errors.AttemptNotFound()),
            (LOOK, reply("active", 1)),
        )
        assert items == [Gap(8, 1, "expired"), AttemptStarted(1)]
        assert [item.cursor for item in items] == ["0.5-7", "1.0-0"]

    def test_an_attempt_that_comes_again_is_read(self):
        core = FollowCore(EID, "0.5-7")
        assert play(core, ((0, "5-7"), errors.AttemptNotFound()), (LOOK, reply("active"))) == []
        assert asked(core) == (0, "5-7")

    def test_an_attempt_that_should_be_there_and_is_not_is_an_error(self):
        core = FollowCore(EID, "0.5-7")
        play(core, ((0, "5-7"), errors.AttemptNotFound()), (LOOK, reply("active")))
        with pytest.raises(errors.AttemptNotFound):
            play(core, ((0, "5-7"), errors.AttemptNotFound()))

    @pytest.mark.parametrize("answer", [[Gap(8, 1, "cursor_ahead", "1.0-0")], None])
    def test_an_attempt_that_is_lost_leads_back_to_the_one_before(self, answer):
        core = FollowCore(EID, "1.9-7")
        answer = errors.AttemptNotFound() if answer is None else answer
        items = play(core, ((1, "9-7"), answer), (LOOK, reply("active", 0)))
        assert items[-1] == AttemptStarted(0)
        assert asked(core) == (0, "0-0")

    def test_a_claim_that_is_lost_is_waited_for(self):
        core = FollowCore(EID, "1.9-7")
        gap = Gap(8, 1, "cursor_ahead", "1.0-0")
        script = ((1, "9-7"), [gap]), (LOOK, reply("waiting", 1, claimed=False))
        assert play(core, *script) == [gap]
        moved(core)
        assert play(core, (LOOK, reply("active", 1)), ((1, "0-0"), [])) == []

    def test_an_execution_that_is_gone_is_an_error(self):
        core = FollowCore(EID, None)
        with pytest.raises(errors.ExecutionNotFound):
            play(core, (LOOK, [0, b"execution_not_found"]))


class TestSnapshots:
    def test_it_begins_with_the_newest_attempt(self):
        core = FollowCore(EID, None, snapshot=True)
        items = play(core, (LOOK, reply("active", 2)), (READ, document(3, "5-4")))
        assert items == [Snapshot(b'{"a":1}', 3, 2)]
        assert items[0].cursor == "2.5-4"
        assert asked(core) == (2, "5-4")
        assert SummaryView(items[0]).version == 3

    def test_where_there_is_no_document_it_begins_with_the_first_frame(self):
        core = FollowCore(EID, None, snapshot=True)
        script = (LOOK, reply("active", 2)), (READ, [1, b"OK", []])
        assert play(core, *script) == [AttemptStarted(2)]
        assert asked(core) == (2, "0-0")

    def test_it_waits_for_the_attempt_that_comes_next(self):
        core = FollowCore(EID, None, snapshot=True)
        assert play(core, (LOOK, reply("delayed", 1, claimed=False))) == []
        moved(core)
        script = (LOOK, reply("active", 1)), (READ, document(1, "5-1"))
        assert play(core, *script) == [Snapshot(b'{"a":1}', 1, 1)]

    def test_where_the_last_attempt_was_never_claimed_it_has_that_of_the_one_before(self):
        core = FollowCore(EID, None, snapshot=True)
        items = play(
            core,
            (LOOK, reply("cancelled", 2, claimed=False)),
            (READ, document(1, "5-1")),
            ((1, "5-1"), [End("attempt_failure", "1.6-2")]),
        )
        assert items == [Snapshot(b'{"a":1}', 1, 1), End("expired", outcome="cancelled")]

    @pytest.mark.parametrize("after, place", [("2.5-3", "5-4"), ("2.6-9", "6-9")])
    def test_with_a_cursor_it_stands_behind_both(self, after, place):
        core = FollowCore(EID, after, snapshot=True)
        (snapshot,) = play(core, (READ, document(3, "5-4")))
        assert snapshot.cursor == f"2.{place}"
        assert asked(core) == (2, place)
        core.restart(snapshot.cursor)
        assert (asked(core) == READ) == (snapshot.cursor == after)

    def test_with_a_cursor_and_without_a_document_it_goes_on_there(self):
        core = FollowCore(EID, "2.5-3", snapshot=True)
        assert play(core, (READ, [1, b"OK", []])) == []
        assert asked(core) == (2, "5-3")


def test_pushes_are_passed_on_and_the_last_one_ends_the_attempt():
    core = FollowCore(EID, "0.0-0")
    core.part.pushed = [Frame("0.5-1")]
    assert core.take() == core.part.pushed
    core.part.pushed = [Frame("0.5-2"), End("attempt_success", "0.5-3")]
    assert [item.cursor for item in core.take()] == ["0.5-2"]
    assert core.take() == []
    assert play(core, (LOOK, reply("completed"))) == [End("attempt_success", outcome="success")]


def test_tails_see_what_the_reader_wants_to_see():
    FollowCore(EID, "0.0-0", visibility=TailVisibility.EXCLUDE_BEST_EFFORT)
    (tail,) = Tail.made
    assert tail.visibility is TailVisibility.EXCLUDE_BEST_EFFORT


class TestWaiting:
    def test_the_result_is_read_after_the_end(self):
        core = WaitCore(EID)
        assert play(core, (LOOK, reply("active"))) == []
        assert asked(core) is None
        assert core.take() == []
        moved(core)
        script = (LOOK, reply("completed")), ("ff_read_payload", [1, b"OK", b"done"])
        (end,) = play(core, *script)
        assert core.ended
        assert end.value() == b"done"
        assert end.cursor is core.start is None

    @pytest.mark.parametrize(
        "state, error",
        [
            ("failed", errors.ExecutionFailed),
            ("cancelled", errors.ExecutionCancelled),
            ("expired", errors.ExecutionExpired),
        ],
    )
    def test_any_other_end_is_an_error_with_its_reason(self, state, error):
        (end,) = play(WaitCore(EID), (LOOK, reply(state, error="why")))
        with pytest.raises(error, match=r"\(why\)") as caught:
            end.value()
        assert caught.value.reason == "why"

    def test_a_failure_has_its_class(self):
        state = State(
            *("failed", 0, True, False, "attempt_failure", "failed", "no"), FailureClass.PERMANENT
        )
        with pytest.raises(errors.ExecutionFailed) as caught:
            Ended(state, b"").value()
        assert caught.value.failure_class == "permanent"

    def test_it_can_be_read_again(self):
        core = WaitCore(EID)
        play(core, (LOOK, reply("completed")))
        core.restart()
        assert asked(core) == LOOK

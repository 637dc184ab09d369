"""Pushes to the tails of an attempt, without I/O: what is taken, what leads to a read, and what ends."""

import hiredis
import pytest

from ff_fast import End, Gap, StreamFrame, TailVisibility, Unavailable, keys
from ff_fast._core import tail as tail_core
from ff_fast._hot import feed as feed_module
from ff_fast._hot.feed import Feed
from ff_fast._hot.frames import decode_push

from ..reference_frames import block_of, entry_id, push_of, run_of
from .script import request_of

ALL = TailVisibility.ALL
EXCLUDE = TailVisibility.EXCLUDE_BEST_EFFORT
EID = "{fp:7}:6f2c1ed5-4c3a-4b0e-9d3b-0a4a6f7c8d9e"
LEASE_MS = 10_000


class Clock:
    """Monotonic time that a test moves."""

    def __init__(self, monkeypatch):
        self.now = 1_000.0
        monkeypatch.setattr(tail_core, "monotonic", self)
        monkeypatch.setattr(feed_module, "monotonic", self)

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class Attempt:
    """Storage of one attempt as the server answers it, and its pushes."""

    def __init__(self, clock):
        self.clock = clock
        self.log, self.live = [], []
        self.ms, self.last, self.visible = 0, 0, 0
        self.reason = b""
        self.lease_ms = LEASE_MS
        self.reads = 0

    def now_ms(self):
        return int(self.clock.now * 1000)

    def store(self, *payloads, mode="durable", ms=None):
        """Store frames, one batch of one shape; return the push."""
        ms = max(ms or self.now_ms(), self.ms)
        first = self.last + 1
        self.ms, self.last = ms, self.last + len(payloads)
        if mode == "durable":
            fields = [b"prev", b"%d" % self.visible] if self.visible != first - 1 else []
            for sequence, payload in enumerate(payloads, first):
                more = fields if sequence == first else []
                self.log.append([b"%d-%d" % (ms, sequence), [b"payload", payload, *more]])
            self.visible = self.last
            block = block_of(b"L", fields, payloads)
        else:
            block = block_of(b"V", [], payloads)
            fields = [b"run", run_of(payloads)]
            self.live.append([b"%d-%d" % (ms, self.last), fields])
        return push_of(b"F", ms, self.last, [block])

    def end(self, reason=b"attempt_success"):
        ms = max(self.now_ms(), self.ms)
        self.log.append(
            [b"%d-%d" % (ms, self.last + 1), [b"end", reason, b"prev", b"%d" % self.visible]]
        )
        self.reason = reason
        return b"E%d-%d %d %s" % (ms, self.last + 1, self.visible, reason)

    def answer(self, request):
        reader = hiredis.Reader()
        reader.feed(request)
        command = reader.gets()
        self.reads += 1
        if command[0] == b"XRANGE":
            _, key, after, to, _, count = command
            entries = self.log if key == keys.stream(EID, 0) else self.live
            found = [e for e in entries if entry_id(after[1:]) < entry_id(e[0]) <= entry_id(to)]
            return found[: int(count)]
        assert command[:2] == [b"FCALL_RO", b"ff_read_range"]
        _, log_after, live_after, count, _, visibility, cursor = command[7:]
        place = self.place(cursor)
        if place:
            log_after = live_after = place
        parts = []
        for entries, after in ((self.log, log_after), (self.live, live_after)):
            found = [e for e in entries if entry_id(e[0]) > entry_id(after)]
            if visibility and entries is self.live:
                found = []
            parts.append(found)
        to = b"%d-%d" % (self.ms, self.last)
        return [
            *(
                1,
                b"OK",
                parts[0],
                to,
                b"",
                parts[1],
                to,
                b"",
                to,
                b"%d" % self.visible,
                self.reason,
            ),
            *(b"%d" % self.lease_ms if self.lease_ms else b"", b"1", place, b"65536"),
        ]

    def place(self, cursor):
        """`ff.other_place`, as far as it is needed here."""
        ms, sequence = entry_id(cursor)
        if ms == 0:
            return b""
        ids = sorted(entry_id(e[0]) for e in self.log + self.live)
        for following in ids:
            if following >= (ms, sequence):
                count = 1
                for e in self.live:
                    if entry_id(e[0]) == following:
                        count = e[1][1][0]
                first = following[1] - count + 1
                if following[0] == ms and first <= sequence + 1:
                    return b""
                if first <= sequence:
                    before = [each for each in ids if each < (ms, sequence)]
                    return b"%d-%d" % before[-1] if before else b"0-0"
                break
        before = [each for each in ids if each < (ms, sequence)]
        return b"0-0" if before and before[-1][1] >= sequence else b""


class Reader:
    """Drives a tail as a shell does."""

    def __init__(self, feed, attempt, after=None, visibility=ALL):
        self.core = tail_core.TailCore(EID, 0, after, visibility)
        self.attempt = attempt
        self.woken = 0
        self.core.on_wake = self.wake
        feed.add(self.core)

    def wake(self):
        self.woken += 1

    def run(self):
        """Take and read all there is to be had at this time."""
        items, core = [], self.core
        for _ in range(100):
            items += core.take()
            if core.ended:
                return items
            step = core.step()
            if step is None:
                return items
            items += core.receive(self.attempt.answer(request_of(step)))
        raise AssertionError("the tail does not come to rest")

    def told(self):
        return told(self.run())


def told(items):
    return [item.payload if isinstance(item, StreamFrame) else item for item in items]


@pytest.fixture
def attempt(clock):
    return Attempt(clock)


@pytest.fixture
def feed():
    return Feed(keys.attempt_channel(EID, 0))


def live_reader(feed, attempt, **more):
    """A reader that has read all, behind a confirmed subscription, and past the time when more might be stored."""
    feed.doubt(True)
    reader = Reader(feed, attempt, **more)
    reader.run()
    attempt.clock.now += 1
    assert reader.run() == []
    attempt.reads = 0
    return reader


def test_it_waits_for_the_subscription_before_it_reads(feed, attempt, clock):
    reader = Reader(feed, attempt)
    attempt.store(b"a")
    assert reader.core.step() is None
    assert reader.core.wake_at > clock.now
    feed.doubt(True)
    assert reader.woken == 1
    assert reader.told() == [b"a"]
    assert attempt.reads == 1
    # A bounded time: without a subscription it asks now and then.
    late = Reader(Feed(b"other"), attempt)
    clock.now = late.core.wake_at
    assert late.told() == [b"a"]
    assert clock.now < late.core.wake_at <= clock.now + 1


def test_a_read_before_the_confirmation_does_not_stand_for_one_behind_it(feed, attempt, clock):
    reader = Reader(feed, attempt)
    clock.now = reader.core.wake_at
    step = reader.core.step()
    reply = attempt.answer(request_of(step))
    attempt.store(b"missed")
    feed.doubt(True)
    assert reader.core.receive(reply) == []
    assert reader.told() == [b"missed"]


def test_pushes_that_follow_are_taken_without_a_read(feed, attempt):
    reader = live_reader(feed, attempt)
    for payloads in ([b"a"], [b"b", b"c"], [b"d"]):
        feed.told(attempt.store(*payloads))
        assert reader.told() == payloads
        feed.told(attempt.store(*payloads, mode="best_effort"))
        assert reader.told() == payloads
    feed.told(attempt.end())
    assert reader.run() == [End("attempt_success")]
    assert attempt.reads == 0
    assert reader.core.ended


def test_a_push_wakes_a_reader_once_until_it_takes(feed, attempt):
    reader = live_reader(feed, attempt)
    before = reader.woken
    for _ in range(3):
        feed.told(attempt.store(b"x"))
    assert reader.woken == before + 1
    assert len(reader.run()) == 3
    feed.told(attempt.store(b"x"))
    assert reader.woken == before + 2


def test_a_hole_leads_to_a_read(feed, attempt):
    reader = live_reader(feed, attempt)
    attempt.store(b"lost")
    feed.told(attempt.store(b"b"))
    assert reader.told() == [b"lost", b"b"]
    assert attempt.reads == 1
    feed.told(attempt.store(b"c"))
    assert reader.told() == [b"c"]
    assert attempt.reads == 1


def test_a_push_that_comes_twice_or_late_is_dropped(feed, attempt):
    reader = live_reader(feed, attempt)
    one, two = attempt.store(b"a"), attempt.store(b"b", b"c")
    for push in (one, one, two, one, two):
        feed.told(push)
    assert reader.told() == [b"a", b"b", b"c"]
    assert attempt.reads == 0
    three, four = attempt.store(b"d"), attempt.store(b"e")
    feed.told(four)
    feed.told(three)
    assert reader.told() == [b"d", b"e"]


def test_an_end_before_frames_that_were_lost(feed, attempt):
    reader = live_reader(feed, attempt)
    attempt.store(b"lost")
    feed.told(attempt.end())
    assert reader.told() == [b"lost", End("attempt_success")]


@pytest.mark.parametrize(
    "message",
    [b"", b"R", b"?", b"F", b"F5", b"F5-1", b"F5-x ", b"F5-1 x", b"F5-1 V", b"f1-1 V\1", b"E5-1", b"E5-1 0", b"E5-1 0 ",
     b"Lx", b"F99-1 ", b"f99-1 ", b"\xff\0", b"F5-1 V\0\3\2\1", push_of(b"F", 5, 1, [block_of(b"V", [], [b"a", b"b"])])],
)  # fmt: skip
def test_what_says_nothing_else_leads_to_one_read(feed, attempt, message):
    reader = live_reader(feed, attempt)
    attempt.store(b"a")
    feed.told(message)
    assert reader.told() == [b"a"]
    assert attempt.reads == 1


def test_frames_that_are_pushed_before_they_are_stored(feed, attempt):
    reader = live_reader(feed, attempt)
    ms = attempt.now_ms()
    for sequence in (1, 2, 3):
        feed.told(push_of(b"f", ms, sequence, [block_of(b"V", [], [b"%d" % sequence])]))
        assert reader.told() == [b"%d" % sequence]
    # Whatever makes it read meanwhile, its place is ahead of storage and stays.
    feed.told(b"R")
    assert reader.told() == []
    attempt.store(b"1", b"2", b"3", b"4", mode="best_effort", ms=ms)
    feed.told(b"R")
    assert reader.told() == [b"4"]
    feed.told(attempt.end())
    assert reader.run() == [End("attempt_success")]


def test_frames_that_were_pushed_and_never_stored_end_in_a_gap(feed, attempt):
    reader = live_reader(feed, attempt)
    feed.told(attempt.store(b"a"))
    ms = attempt.now_ms()
    feed.told(push_of(b"f", ms, 3, [block_of(b"V", [], [b"b", b"c"])]))
    assert reader.told() == [b"a", b"b", b"c"]
    feed.told(attempt.end(b"attempt_failure"))
    assert reader.run() == [Gap(4, 2, "cursor_ahead"), End("attempt_failure")]


def test_a_lapsed_lease_ends_a_tail_that_is_told_nothing(feed, attempt, clock):
    reader = live_reader(feed, attempt)
    feed.told(push_of(b"f", attempt.now_ms(), 1, [block_of(b"V", [], [b"a"])]))
    assert reader.told() == [b"a"]
    clock.now = reader.core.wake_at
    attempt.reason = b"producer_lost"
    assert reader.run() == [Gap(2, 1, "cursor_ahead"), End("producer_lost")]


def test_a_read_that_was_sent_late_enough_needs_no_second_one(feed, attempt, clock):
    """Frames that were pushed before the subscription are stored by then."""
    feed.doubt(True)
    for waited, again in ((0.1, True), (0.3, False)):
        reader = Reader(feed, attempt)
        step = reader.core.step()
        # As where many others were before it.
        clock.now += waited
        reader.core.asked_at = clock.now
        clock.now += 1
        reader.core.receive(attempt.answer(request_of(step)))
        assert (reader.core.step() is not None) == again


def test_idle_tails_that_began_together_look_one_by_one(feed, attempt, clock):
    """Less than once in half a minute each, as long as no lease lapses."""
    attempt.lease_ms = 600_000
    feed.doubt(True)
    readers = [Reader(feed, attempt) for _ in range(8)]
    for _ in range(2):
        for reader in readers:
            reader.run()
        clock.now += 1
    looks = {reader.core.wake_at for reader in readers}
    assert len(looks) == len(readers)
    assert 44 <= min(looks) - clock.now <= max(looks) - clock.now <= 60


def test_a_renewal_puts_the_look_at_the_lease_off(feed, attempt, clock):
    reader = live_reader(feed, attempt)
    clock.now = reader.core.wake_at - 1
    feed.told(b"L20000")
    assert reader.core.wake_at == pytest.approx(clock.now + 20.001)
    feed.told(b"L99999999")
    assert reader.core.wake_at == pytest.approx(clock.now + 60)
    woken = reader.woken
    feed.told(b"L50")
    assert reader.woken == woken + 1
    assert reader.core.wake_at == pytest.approx(clock.now + 0.051)


def test_a_hole_that_is_not_stored_yet_is_asked_for_again_and_filled(feed, attempt, clock):
    reader = live_reader(feed, attempt)
    ms = attempt.now_ms()
    feed.told(push_of(b"f", ms, 2, [block_of(b"V", [], [b"2"])]))
    feed.told(push_of(b"f", ms, 3, [block_of(b"V", [], [b"3"])]))
    waits = []
    for _ in range(4):
        assert reader.told() == []
        waits.append(reader.core.wake_at - clock.now)
        clock.now = reader.core.wake_at
    assert waits == pytest.approx([0.03, 0.06, 0.12, 0.24])
    attempt.store(b"1", mode="best_effort", ms=ms)
    assert reader.told() == [b"1", b"2", b"3"]
    assert reader.core.wake_at > clock.now + 1


def test_a_hole_that_nothing_fills_does_not_keep_what_is_stored_from_the_reader(
    feed, attempt, clock
):
    reader = live_reader(feed, attempt)
    feed.told(push_of(b"f", attempt.now_ms(), 99, [block_of(b"V", [], [b"nobody's"])]))
    for n in range(20):
        clock.now += 0.3
        feed.told(attempt.store(b"%d" % n))
        assert reader.told() == [b"%d" % n]
    # Nothing is left that would make it read.
    attempt.reads = 0
    feed.told(attempt.store(b"x"))
    assert (reader.told(), attempt.reads) == ([b"x"], 0)


def test_frames_that_were_pushed_before_the_subscription_are_read_when_they_are_stored(
    feed, attempt, clock
):
    feed.doubt(True)
    reader = Reader(feed, attempt)
    assert reader.told() == []
    # Pushed before, stored behind the read, and nothing is pushed any more.
    attempt.store(b"a", mode="best_effort")
    assert reader.core.wake_at <= clock.now + 0.25
    clock.now = reader.core.wake_at
    assert reader.told() == [b"a"]
    assert attempt.reads == 2
    assert reader.core.wake_at > clock.now + 1


def test_nothing_is_taken_behind_a_place_that_may_be_of_another_history(feed, attempt, clock):
    reader = live_reader(feed, attempt)
    feed.told(attempt.store(b"a"))
    feed.told(push_of(b"f", attempt.now_ms(), 2, [block_of(b"V", [], [b"never stored"])]))
    assert reader.told() == [b"a", b"never stored"]
    clock.now += 1
    # Another writer, whose first frame the reader hears nothing of.
    feed.doubt(False)
    attempt.store(b"other")
    feed.doubt(True)
    feed.told(attempt.store(b"more"))
    assert reader.core.take() == []
    gap, *frames = reader.run()
    assert (gap.reason, gap.next_sequence, told(frames)) == ("rewritten", 2, [b"other", b"more"])


def test_a_push_of_another_history_is_not_followed(feed, attempt, clock):
    reader = live_reader(feed, attempt)
    feed.told(attempt.store(b"a"))
    feed.told(push_of(b"f", attempt.now_ms(), 2, [block_of(b"V", [], [b"never stored"])]))
    clock.now += 1
    ms = attempt.now_ms()
    feed.told(push_of(b"f", ms, 2, [block_of(b"V", [], [b"b"])]))
    feed.told(push_of(b"f", ms, 3, [block_of(b"V", [], [b"c"])]))
    assert reader.told() == [b"a", b"never stored"]
    attempt.store(b"b", b"c", mode="best_effort", ms=ms)
    clock.now = reader.core.wake_at
    gap, *frames = reader.run()
    assert (gap.reason, gap.next_sequence, told(frames)) == ("rewritten", 2, [b"b", b"c"])


def test_what_other_frames_stand_in_their_place_is_told(feed, attempt, clock):
    reader = live_reader(feed, attempt)
    feed.told(attempt.store(b"a"))
    feed.told(push_of(b"f", attempt.now_ms(), 2, [block_of(b"V", [], [b"never stored"])]))
    assert reader.told() == [b"a", b"never stored"]
    clock.now += 1
    feed.told(attempt.store(b"other"))
    gap, frame = reader.run()
    assert (gap.reason, gap.next_sequence, frame.payload) == ("rewritten", 2, b"other")


def test_a_reader_that_excludes_best_effort_frames_is_not_woken_by_them(feed, attempt):
    reader = live_reader(feed, attempt, visibility=EXCLUDE)
    woken = reader.woken
    for _ in range(5):
        feed.told(attempt.store(b"x", mode="best_effort"))
        feed.told(push_of(b"f", attempt.ms, attempt.last + 1, [block_of(b"V", [], [b"y"])]))
    assert reader.woken == woken
    feed.told(attempt.store(b"a", b"b"))
    assert reader.told() == [b"a", b"b"]
    feed.told(attempt.store(b"x", mode="best_effort"))
    feed.told(attempt.end())
    assert reader.run() == [End("attempt_success")]
    assert attempt.reads == 0


def test_a_missing_visible_frame_is_a_hole_for_a_reader_that_excludes(feed, attempt):
    reader = live_reader(feed, attempt, visibility=EXCLUDE)
    attempt.store(b"x", mode="best_effort")
    attempt.store(b"lost")
    attempt.store(b"x", mode="best_effort")
    feed.told(attempt.store(b"b"))
    assert reader.told() == [b"lost", b"b"]


def test_a_lost_subscription_leads_to_reads_and_a_new_one_to_a_read(feed, attempt, clock):
    reader = live_reader(feed, attempt)
    feed.doubt(False)
    attempt.store(b"a")
    assert reader.told() == []
    assert reader.core.wake_at <= clock.now + 1
    clock.now = reader.core.wake_at
    assert reader.told() == [b"a"]
    attempt.store(b"b")
    feed.doubt(True)
    assert reader.told() == [b"b"]


def test_a_subscription_that_cannot_be_had_is_an_error_of_the_next_step(feed, attempt, clock):
    reader = live_reader(feed, attempt)
    feed.failed(Unavailable("no"))
    assert reader.core.take() == []
    with pytest.raises(Unavailable):
        reader.core.step()
    # Without one it reads.
    attempt.store(b"a")
    assert reader.told() == [b"a"]


def test_a_slow_reader_is_bounded_and_loses_nothing(feed, attempt):
    slow, fast = live_reader(feed, attempt), live_reader(feed, attempt)
    assert slow.run() == []
    attempt.reads = 0
    told_fast = []
    for n in range(200):
        feed.told(attempt.store(*[b"%d" % n] * 50))
        told_fast += fast.told()
    assert attempt.reads == 0
    assert len(told_fast) == 10_000
    assert slow.told() == told_fast
    assert attempt.reads > 0


def test_items_read_and_not_delivered_are_read_again(feed, attempt):
    reader = live_reader(feed, attempt)
    feed.told(attempt.store(b"a"))
    (frame,) = reader.run()
    feed.told(attempt.store(b"b"))
    assert reader.told() == [b"b"]
    reader.core.restart(frame.cursor)
    assert reader.told() == [b"b"]


def test_all_readers_share_one_decoding(feed, attempt):
    one, two = live_reader(feed, attempt), live_reader(feed, attempt)
    assert one.run() == []
    feed.told(attempt.store(b"a"))
    assert one.run()[0] is two.run()[0]
    assert not feed.remove(one.core)
    feed.told(attempt.store(b"b"))
    assert (one.core.take(), len(two.core.take())) == ([], 1)
    assert feed.remove(two.core)


def test_a_cursor_of_a_frame_that_is_not_stored_yet(feed, attempt, clock):
    feed.doubt(True)
    ms = attempt.now_ms()
    attempt.store(b"a")
    reader = Reader(feed, attempt, after=f"0.{ms}-3")
    assert reader.run() == []
    attempt.store(b"b", b"c", b"d", mode="best_effort", ms=ms)
    clock.now = reader.core.wake_at
    assert reader.told() == [b"d"]
    # Where nothing comes in time, the cursor is ahead.
    lost = Reader(feed, attempt, after=f"0.{ms}-9")
    assert lost.run() == []
    found = []
    while not found:
        clock.now = min(lost.core.wake_at, clock.now + 1)
        found = lost.run()
    assert found == [Gap(10, 5, "cursor_ahead")]


@pytest.mark.parametrize("pushed", [False, True])
def test_frames_that_a_failover_has_lost_are_waited_for_and_not_read_twice(
    pushed, feed, attempt, clock
):
    reader = live_reader(feed, attempt)
    ms = attempt.now_ms()
    feed.told(attempt.store(b"a", ms=ms))
    feed.told(attempt.store(b"b", b"c", ms=ms))
    assert reader.told() == [b"a", b"b", b"c"]
    feed.doubt(False)
    feed.doubt(True)
    assert reader.run() == []
    assert reader.core.stored == 3
    if pushed:
        feed.told(push_of(b"f", ms, 4, [block_of(b"V", [], [b"d"])]))
        assert reader.told() == [b"d"]
        assert reader.core.stored == 3
    # The new primary has the first one alone, until the writer has found out.
    del attempt.log[1:]
    attempt.last = attempt.visible = 1
    feed.doubt(False)
    clock.now += 0.5
    feed.doubt(True)
    until = clock.now + 9
    while clock.now < until:
        assert reader.run() == []
        clock.now = min(reader.core.wake_at, until)
    attempt.store(b"b", b"c", b"d", ms=ms)
    feed.told(attempt.store(b"e"))
    clock.now = reader.core.wake_at
    assert reader.told() == [b"d", b"e"][pushed:]


def test_a_push_names_its_frames():
    message = push_of(
        b"F",
        50,
        9,
        [block_of(b"L", [b"frame_type", b"t"], [b"a"]), block_of(b"V", [], [b"b", b"c"], [-1, 2])],
    )
    pushed = decode_push(message, 3)
    assert (pushed.kind, pushed.deferred, pushed.first, pushed.last) == ("frames", False, 7, 9)
    assert [(f.cursor, f.frame_type, f.mode, f.ts_ms) for f in pushed.frames] == [
        ("3.50-7", "t", "durable", 50),
        ("3.50-8", "token", "best_effort", 49),
        ("3.50-9", "token", "best_effort", 52),
    ]
    assert [f.payload for f in pushed.visible] == [b"a"]

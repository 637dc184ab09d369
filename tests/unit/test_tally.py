"""Counters, and what is made of them."""

import math

import hypothesis
import pytest
from hypothesis import strategies as st

from ff_fast import FramesByMode, Gap, GapsByReason, Histogram, Stats, StreamFrame, errors
from ff_fast._core.deployment import Deployment
from ff_fast._core.stats import stats_of
from ff_fast._hot.tally import Listening, Tally

from .writer.core import LIVE, MERGE, OOM, Shell, in_flight, position, stored


def frame(sequence, mode="durable", payload=b"abc"):
    return StreamFrame(
        stream_id=f"1-{sequence}", frame_type="token", payload=payload, ts_ms=1, mode=mode
    )


def test_a_new_tally_gives_empty_stats():
    assert stats_of(Deployment(4), []) == Stats()


def test_items_are_counted_by_mode_and_gaps_by_reason():
    on = Deployment(4)
    on.tally.took(
        [
            frame(1),
            frame(2, "summary"),
            Gap(3, 5, "trimmed"),
            frame(5, "best_effort", b""),
            Gap(6, 7, "lost"),
        ]
    )
    on.tally.took([Gap(7, 9, "trimmed")])
    on.tally.missed("expired")
    found = stats_of(on, [])
    modes = found.frames_read
    assert (modes.durable, modes.durable_summary, modes.best_effort, modes.total) == (1, 1, 1, 3)
    assert found.bytes_read == 6
    assert found.gaps == GapsByReason(trimmed=2, expired=1, lost=1)
    assert found.gaps.total == 4


def test_events_are_counted_and_those_that_are_not_known_refused():
    on = Deployment(4)
    for _ in range(3):
        on.tally.note("reconnects")
    on.tally.note("leases_lost")
    found = stats_of(on, [])
    assert (found.reconnects, found.leases_lost) == (3, 1)
    on.tally.note("eclipses")
    with pytest.raises(TypeError):
        stats_of(on, [])


def test_readers_are_open_until_they_are_let_go():
    tally = Tally()
    listening = [Listening(tally) for _ in range(3)]
    assert tally.tails_open == 3
    del listening[0]
    assert tally.tails_open == 2
    # The tally outlives its backend as long as a reader listens.
    del tally
    listening.clear()


@hypothesis.given(st.lists(st.integers(1, 1024), max_size=20))
def test_a_batch_is_in_the_bucket_of_the_least_power_of_two_that_holds_it(sizes):
    on = Deployment(4)
    writer = Shell(tally=on.tally)
    for size in sizes:
        for _ in range(size):
            writer.write(b"x")
        stored(writer)
    found = stats_of(on, []).batch_frames
    expected = [0] * 32
    for size in sizes:
        expected[math.ceil(math.log2(size))] += 1
    assert found == Histogram(len(sizes), sum(sizes), tuple(expected))


def test_batches_that_are_sent_again_are_counted_and_their_frames_once():
    on = Deployment(4)
    writer, sent = in_flight(3, tally=on.tally)
    before = stats_of(on, [])
    assert (before.frames_written.durable, before.frames_acknowledged.durable) == (768, 0)
    writer._requeue()
    assert stats_of(on, []).resends == 3
    for _ in sent:
        batch = writer._next_batch()
        writer._acknowledge(batch, position(batch))
    found = stats_of(on, [])
    assert found.frames_written == found.frames_acknowledged == before.frames_written
    assert found.write_to_acknowledged_us.count == found.batches == 3
    assert found.bytes_written == sum(len(str(number)) for number in range(1, 769))


def test_a_refused_batch_that_is_acknowledged_by_a_later_answer_is_counted():
    on = Deployment(4)
    writer, (first, second) = in_flight(2, tally=on.tally)
    writer._acknowledge(first, OOM)
    writer._acknowledge(second, position(second))
    found = stats_of(on, [])
    assert found.frames_acknowledged.durable == 512
    assert found.write_to_acknowledged_us.count == 2


def test_each_mode_has_a_count_of_its_own():
    on = Deployment(4)
    writer = Shell(tally=on.tally)
    for mode, count in ((None, 1), (LIVE, 2), (MERGE, 3)):
        for _ in range(count):
            writer.write(b'{"a":1}', mode=mode)
    stored(writer)
    found = stats_of(on, [])
    for counted in (found.frames_written, found.frames_acknowledged):
        assert counted == FramesByMode(durable=1, durable_summary=3, best_effort=2)


def test_a_writer_without_a_tally_counts_nothing():
    writer = Shell()
    writer.write(b"a")
    assert len(stored(writer)) == 1


def test_a_quantile_is_the_bound_of_its_bucket():
    few = Histogram(4, 8, (1, 1, 1, 1, *[0] * 28))
    assert [few.quantile(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1, 1, 2, 4, 8]
    assert Histogram().quantile(0.5) == 0.0
    assert Histogram(1, 1 << 40, (*[0] * 31, 1)).quantile(0.5) == math.inf
    assert len(few.bounds) == len(few.buckets) == Histogram.BUCKETS


@pytest.mark.parametrize("share", [99, -0.1, math.nan, True, "0.5"])
def test_a_quantile_is_asked_for_by_its_share(share):
    with pytest.raises(errors.InvalidInput):
        Histogram().quantile(share)

"""The live window alone: beside the oracle, and its bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ff_fast._hot.window import LiveWindow
from ff_fast.errors import InvalidInput

from .. import reference_rate, reference_window

START_MS = 1_700_000_000_000
MAX_BATCH = 40

# Frames of a batch, µs until the next one, how many batches are on their way.
batches = st.lists(
    st.tuples(
        st.sampled_from([1, 1, 2, 5, MAX_BATCH]),
        st.sampled_from([0, 50, 1000, 20_000, 300_000]),
        st.integers(0, 3),
    ),
    max_size=200,
)


class Pair:
    """A window and its oracle, driven as by a writer whose clock the server shares."""

    def __init__(self, ttl_ms, floor, ceiling):
        self.ours = LiveWindow(ttl_ms, floor, ceiling)
        self.exact = reference_window.Window(ttl_ms, floor, ceiling)
        self.now_us = 0
        self.sequence = 0
        self.on_their_way = []
        self.first_kept = 1  # the oldest sequence that our trims leave
        self.exact_first_kept = 1

    @property
    def server_ms(self):
        return START_MS + self.now_us // 1000

    def send(self, count):
        first = self.ours.first_kept(count, self.now_us, self.server_ms)
        exact = self.exact.first_kept(count, self.ours.frames, self.server_ms)
        renews = self.ours.renew_due(True, self.now_us)
        assert renews == self.exact.renew_due(True, self.now_us)
        self.ours.sealed(count, renews, self.now_us)
        self.exact.sealed(count, renews, self.now_us)
        self.sequence += count
        self.on_their_way.append((count, self.server_ms, self.sequence, renews))
        self.first_kept = max(self.first_kept, first[1])
        self.exact_first_kept = max(self.exact_first_kept, exact[1])
        return first, exact

    def receive(self):
        count, ms, sequence, renewed = self.on_their_way.pop(0)
        self.ours.stored(count)
        self.ours.mark(ms, sequence, renewed, self.now_us)
        self.exact.mark(count, ms, sequence, renewed, self.now_us)
        assert self.ours.must_renew == self.exact.must_renew


@pytest.mark.parametrize("ttl_ms, floor", [(200, 1), (1000, 64), (15_000, 300)])
@pytest.mark.parametrize("ceiling", [300, 2000])
@given(batches)
def test_never_trims_more_than_the_oracle_and_little_less(ttl_ms, floor, ceiling, steps):
    pair = Pair(ttl_ms, floor, ceiling)
    for count, pause_us, on_their_way in steps * 3:
        pair.send(count)
        assert pair.first_kept <= pair.exact_first_kept
        # The gap between two marks, after the closest of them were forgotten.
        slack = ceiling // 8 + 2 * MAX_BATCH
        assert pair.exact_first_kept - pair.first_kept <= slack
        assert pair.ours.mark_count <= 32
        pair.now_us += pause_us
        while len(pair.on_their_way) > on_their_way:
            pair.receive()


@given(st.integers(1, 15), st.integers(1, 15), batches)
def test_a_window_of_few_frames_is_exact(floor, ceiling, steps):
    # Steps of a sixteenth of it are steps of a frame.
    pair = Pair(50, floor, max(floor, ceiling))
    for _, pause_us, on_their_way in steps:
        first, exact = pair.send(1)
        assert pair.first_kept == pair.exact_first_kept
        assert first in ((0, 0), exact)
        pair.now_us += pause_us
        while len(pair.on_their_way) > on_their_way:
            pair.receive()


@given(batches)
def test_rate_and_k_agree_with_the_oracle(steps):
    window = LiveWindow(1000, 64, 16_384, 0.3)
    exact = reference_rate.RateEstimator(0.3)
    now_us = 0
    for count, pause_us, _ in steps[:50]:
        k = reference_rate.window_size(exact.rate_hz(now_us), 1000, 64, 16_384)
        window.first_kept(count, now_us, START_MS)
        exact.record(count, now_us)
        # One either way where the last digit of the rate decides.
        assert abs(window.frames - k) <= 1
        now_us += pause_us
        assert window.rate_hz(now_us) == pytest.approx(exact.rate_hz(now_us), rel=1e-9, abs=1e-9)


def test_ceiling_alone_drops_what_is_younger_than_ttl():
    window = LiveWindow(10_000, 4, 8)
    cuts = []
    for sequence in range(1, 13):
        cuts.append(window.first_kept(1, 0, START_MS))
        window.sealed(1, False, 0)
        window.stored(1)
        window.mark(START_MS, sequence, True, 0)
    assert cuts == [(0, 0)] * 8 + [(START_MS, n) for n in range(2, 6)]


def test_what_an_earlier_writer_left_leaves_as_a_whole():
    window = LiveWindow(100, 2, 50, ms=START_MS, sequence=1000)
    assert window.first_kept(1, 0, START_MS + 500) == (0, 0)  # K frames remain first
    window.sealed(1, True, 0)
    assert window.first_kept(1, 0, START_MS + 1099) == (0, 0)  # and it may be younger than ttl
    assert window.first_kept(1, 0, START_MS + 1100) == (START_MS, 1001)
    assert window.first_kept(1, 0, START_MS + 100) == (0, 0)


def test_widens_and_never_narrows():
    window = LiveWindow(1000, 64, 1000)
    window.sealed(1, True, 0)
    for wanted, kept, renew in [
        ((500, 10, 100), (1000, 64, 1000), False),
        ((1000, 100, 500), (1000, 100, 1000), False),
        ((3000, 1, 2000), (3000, 100, 2000), True),
    ]:
        window.widen(*wanted, 0.2, 0)
        assert (window.ttl_ms, window.floor, window.ceiling) == kept
        assert window.must_renew is renew


def test_defaults_are_replaced_and_the_rate_is_kept():
    window = LiveWindow(30_000, 64, 16_384, 0.2, True, 500.0, 0)
    window.sealed(1, True, 0)
    window.widen(1000, 5, 20, 0.9, 0)
    assert (window.ttl_ms, window.floor, window.ceiling) == (1000, 5, 20)
    assert window.must_renew
    assert window.rate_hz(0) == pytest.approx(500.0)
    window.widen(500, 1, 10, 0.9, 0)
    assert (window.ttl_ms, window.floor, window.ceiling) == (1000, 5, 20)


def test_expiry_is_renewed_four_times_a_ttl_and_only_by_frames():
    window = LiveWindow(1000, 64, 1000)
    assert window.renew_due(False, 0)  # it has none yet
    window.sealed(1, True, 0)
    assert not window.renew_due(True, 249_999)
    assert window.renew_due(True, 250_000)
    assert not window.renew_due(False, 250_000)


def test_batch_that_was_on_its_way_for_longer_than_ttl_forces_a_renewal():
    window = LiveWindow(1000, 64, 1000)
    window.sealed(1, True, 0)
    window.mark(START_MS, 1, False, 1_000_000)
    assert not window.must_renew
    window.mark(START_MS, 2, True, 2_000_000)
    assert not window.must_renew
    window.mark(START_MS, 3, False, 2_000_000)
    assert window.renew_due(False, 2_000_000)


def test_rate_is_stored_once_a_second_and_at_the_end():
    window = LiveWindow(1000, 64, 1000, rate_hz=250.0)
    assert window.take_rate(False, 0) == b"250.000 %d %d %d" % (
        window.ttl_ms,
        window.floor,
        window.ceiling,
    )
    assert window.take_rate(False, 999_999) is None
    assert window.take_rate(False, 1_000_000) is not None
    assert window.take_rate(True, 1_000_000) is not None


@pytest.mark.parametrize(
    "alpha, rate_hz", [(0.0, 0.0), (1.5, 0.0), (0.2, -1.0), (0.2, float("nan"))]
)
def test_values_out_of_range(alpha, rate_hz):
    with pytest.raises(InvalidInput):
        LiveWindow(1000, 64, 1000, alpha, rate_hz=rate_hz)

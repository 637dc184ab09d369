"""The rate of a live window: true rates, the oracle, and FlowFabric's defects E1 to E3."""

import math
import pickle
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ff_fast._hot.rate import RateEstimator, window_size
from ff_fast.errors import InvalidInput

from .. import reference_rate as reference


def fed(times, alpha=0.2):
    estimator = RateEstimator(alpha)
    for count, now_us in times:
        estimator.record(count, now_us)
    return estimator


def test_rate_of_25_kilohertz_is_not_cut_at_1000_hz():
    estimator = fed((25, ms * 1000) for ms in range(2001))
    rate = estimator.rate_hz(2_000_000)
    assert rate == pytest.approx(25_000, rel=0.01)
    assert window_size(rate, 1000, 64, 100_000) == pytest.approx(50_000, rel=0.01)
    assert window_size(rate, 500, 64, 100_000) == pytest.approx(25_000, rel=0.01)


def test_a_burst_inside_one_ms_is_not_1000_hz():
    # 10 frames, 20 us apart, every 100 ms: 100 Hz.
    times = [(1, start * 100_000 + i * 20) for start in range(50) for i in range(10)]
    estimator = fed(times)
    assert 85 < estimator.rate_hz(times[-1][1]) < 115
    assert 85 < estimator.rate_hz(5_000_000) < 115


def test_regular_700_hz_is_700_hz():
    times = [(1, round(i * 1e6 / 700)) for i in range(2100)]
    assert fed(times).rate_hz(times[-1][1]) == pytest.approx(700, rel=0.01)


@pytest.mark.parametrize("hertz", [1, 20, 200, 4000, 25_000])
@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5])
def test_random_arrivals_have_their_rate(hertz, alpha):
    rng = random.Random(hertz)
    seconds = 20_000 / hertz if hertz < 1000 else 5.0
    estimator = RateEstimator(alpha)
    at, seen = 0.0, []
    for _ in range(round(seconds * hertz)):
        at += rng.expovariate(hertz) * 1e6
        while len(seen) * 100_000 < at:
            seen.append(estimator.rate_hz(len(seen) * 100_000))
        estimator.record(1, round(at))
    settled = seen[len(seen) // 10 :]
    assert sum(settled) / len(settled) == pytest.approx(hertz, rel=0.1)


@pytest.mark.parametrize("hertz", [10, 200, 4000])
def test_right_from_the_second_frame_on(hertz):
    step = round(1e6 / hertz)
    estimator = RateEstimator()
    estimator.record(1, 0)
    assert estimator.rate_hz(0) == 0.0
    rates = []
    for i in range(1, 5000):
        estimator.record(1, i * step)
        rates.append(estimator.rate_hz(i * step))
    assert rates == pytest.approx([rates[-1]] * len(rates), rel=1e-6)


def test_fades_in_a_pause():
    times = [(1, i * 1000) for i in range(3000)]
    estimator = fed(times)
    end = times[-1][1]
    tau_us = -100_000 / math.log(0.8)
    before = estimator.rate_hz(end)
    after = [estimator.rate_hz(end + round(k * tau_us)) for k in range(5)]
    assert after == pytest.approx([before * math.exp(-k) for k in range(5)], rel=0.01)
    assert estimator.rate_hz(end + 3_600_000_000) == pytest.approx(0.0, abs=1e-9)


def test_asking_changes_nothing():
    times = [(3, i * 700) for i in range(200)]
    quiet, asked = fed(times), RateEstimator()
    for count, now_us in times:
        asked.record(count, now_us)
        asked.rate_hz(now_us + 12_345)
    assert asked.rate_hz(200_000) == quiet.rate_hz(200_000)


class TestHandedOver:
    def test_continues_from_the_estimate(self):
        estimator = RateEstimator(0.2, 1234.5, 1_000_000)
        assert estimator.rate_hz(1_000_000) == pytest.approx(1234.5)

    @pytest.mark.parametrize("hertz", [10, 1000, 5000])
    def test_steady_rate_stays(self, hertz):
        estimator = RateEstimator(0.2, hertz, 0)
        step = round(1e6 / hertz)
        for i in range(1, hertz):
            estimator.record(1, i * step)
            assert estimator.rate_hz(i * step) == pytest.approx(hertz, rel=0.15)

    def test_a_wrong_estimate_fades(self):
        estimator = RateEstimator(0.2, 4000.0, 0)
        for ms in range(0, 6000, 10):
            estimator.record(1, ms * 1000)
        assert estimator.rate_hz(6_000_000) == pytest.approx(100, rel=0.05)


# -- agreement with the oracle ---------------------------------------------------------------------

steps = st.lists(
    st.tuples(st.integers(0, 500), st.integers(0, 5_000_000) | st.integers(0, 50)), max_size=30
)
alphas = st.floats(0.001, 1.0)


@given(alphas, st.just(0.0) | st.floats(0.001, 1e6), steps, st.integers(0, 3_000_000))
def test_agrees_with_the_oracle(alpha, rate, batches, later):
    ours, slow = RateEstimator(alpha, rate, 500), reference.RateEstimator(alpha, rate, 500)
    now_us = 500
    for count, pause in batches:
        now_us += pause
        if count == 0:
            continue
        ours.record(count, now_us)
        slow.record(count, now_us)
        assert ours.rate_hz(now_us) == pytest.approx(slow.rate_hz(now_us), rel=1e-6, abs=1e-9)
    now_us += later
    assert ours.rate_hz(now_us) == pytest.approx(slow.rate_hz(now_us), rel=1e-6, abs=1e-9)


@given(alphas, st.lists(st.tuples(st.integers(0, 100_000), st.integers(1, 50)), min_size=1))
def test_grouping_does_not_matter(alpha, instants):
    together, apart = RateEstimator(alpha), RateEstimator(alpha)
    now_us = 1_000_000
    for pause, count in instants:
        now_us += pause
        together.record(count, now_us)
        for _ in range(count):
            apart.record(1, now_us)
    assert apart.rate_hz(now_us) == pytest.approx(together.rate_hz(now_us), rel=1e-9)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=30))
def test_times_that_go_back_count_as_the_latest(times):
    ours, forward = RateEstimator(), RateEstimator()
    latest = times[0]
    for now_us in times:
        latest = max(latest, now_us)
        ours.record(1, now_us)
        forward.record(1, latest)
    assert ours.rate_hz(0) == ours.rate_hz(latest) == forward.rate_hz(latest)


int64 = st.integers(-(2**63), 2**63 - 1)


@given(st.floats(0, 1, exclude_min=True), st.lists(st.tuples(st.integers(0, 2**40), int64)), int64)
def test_extremes_stay_finite(alpha, batches, now_us):
    estimator = fed(batches, alpha)
    assert 0.0 <= estimator.rate_hz(now_us) < math.inf


class TestWindowSize:
    @given(
        st.floats(0, allow_nan=False, allow_infinity=False),
        st.integers(0, 2**32),
        st.tuples(st.integers(1, 2**32), st.integers(1, 2**32)).map(sorted),
    )
    def test_agrees_with_the_oracle(self, rate, ttl_ms, bounds):
        floor, ceiling = bounds
        assert window_size(rate, ttl_ms, floor, ceiling) == reference.window_size(
            rate, ttl_ms, floor, ceiling
        )

    @pytest.mark.parametrize(
        "rate, ttl_ms, size",
        [
            (0.0, 15_000, 64),
            (2.0, 15_000, 64),
            (2.2, 15_000, 66),
            (200.0, 15_000, 6000),
            (200.0001, 15_000, 6001),
            (4000.0, 15_000, 16_384),
            (1e308, 15_000, 16_384),
            (1e308, 0, 64),
        ],
    )
    def test_defaults(self, rate, ttl_ms, size):
        assert window_size(rate, ttl_ms, 64, 16_384) == size

    def test_floor_and_ceiling_may_meet(self):
        assert window_size(1e6, 1000, 7, 7) == window_size(0.0, 1000, 7, 7) == 7

    @pytest.mark.parametrize("rate", [math.nan, math.inf, -math.inf, -0.001])
    def test_refuses_what_is_no_rate(self, rate):
        with pytest.raises(InvalidInput, match="rate_hz"):
            window_size(rate, 1000, 64, 16_384)

    def test_refuses_bounds_that_cross(self):
        with pytest.raises(InvalidInput, match="floor"):
            window_size(1.0, 1000, 65, 64)
        with pytest.raises(InvalidInput, match="ttl_ms"):
            window_size(1.0, -1, 64, 65)


class TestRefusals:
    @pytest.mark.parametrize("alpha", [0.0, -0.1, 1.0000001, math.nan, math.inf])
    def test_alpha(self, alpha):
        with pytest.raises(InvalidInput, match="ema_alpha"):
            RateEstimator(alpha)

    @pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf, 1e308])
    def test_rate(self, rate):
        with pytest.raises(InvalidInput, match="rate_hz"):
            RateEstimator(1e-9, rate)

    def test_count(self):
        with pytest.raises(InvalidInput, match="count"):
            RateEstimator().record(-1, 0)

    def test_pickling(self):
        with pytest.raises(TypeError):
            pickle.dumps(RateEstimator())

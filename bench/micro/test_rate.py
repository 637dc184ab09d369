"""The rate estimator: record a batch and ask for the rate; beside it the same formula in Python."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from ff_fast._hot.rate import RateEstimator, window_size

if TYPE_CHECKING:
    from bench.micro.timing import Benchmark

BATCHES = 1_000
STEP_US = 500


class PythonEstimator:
    """The formula of ff_fast/_hot/rate.pyx, from the second batch on."""

    def __init__(self) -> None:
        self._tau_us = -100_000.0 / math.log1p(-0.2)
        self._mass = 0.0
        self._since_us = self._last_us = -1

    def record(self, count: int, now_us: int) -> None:
        if self._since_us == -1:
            self._since_us = self._last_us = now_us
            return
        self._mass *= math.exp(-(now_us - self._last_us) / self._tau_us)
        self._last_us = now_us
        self._mass += count

    def rate_hz(self, now_us: int) -> float:
        rate = self._mass * math.exp(-(now_us - self._last_us) / self._tau_us) / self._tau_us * 1e6
        return rate / -math.expm1(-max(now_us - self._since_us, 1) / self._tau_us)


def stream(kind: type[RateEstimator | PythonEstimator]) -> float:
    estimator = kind()
    rate = 0.0
    for i in range(BATCHES):
        estimator.record(2, i * STEP_US)
        rate = estimator.rate_hz(i * STEP_US)
    return rate


@pytest.mark.parametrize("kind", [RateEstimator, PythonEstimator], ids=["ff_fast", "python"])
def test_rate_of_1000_batches(
    benchmark: Benchmark, kind: type[RateEstimator | PythonEstimator]
) -> None:
    rate = benchmark(stream, kind)
    assert rate == pytest.approx(2 * 1e6 / STEP_US, rel=0.01)


def test_window_size(benchmark: Benchmark) -> None:
    assert benchmark(window_size, 4000.0, 5_000, 64, 100_000) == 40_000

"""What ``ff_fast._hot.rate`` must do, written the slow and obvious way: the tests' oracle."""

import math


class RateEstimator:
    """Keeps every frame's time and sums over all of them whenever it is asked."""

    def __init__(self, ema_alpha: float = 0.2, rate_hz: float = 0.0, now_us: int = 0) -> None:
        self.tau_s = -0.1 / math.log(1.0 - min(max(ema_alpha, 1e-9), 0.999999))
        self.handed_over = (rate_hz, now_us) if rate_hz else None
        self.times: list[int] = []

    def record(self, count: int, now_us: int) -> None:
        latest = max(self.times, default=now_us)
        if self.handed_over:
            latest = max(latest, self.handed_over[1])
        self.times += [max(now_us, latest)] * count

    def rate_hz(self, now_us: int) -> float:
        if self.handed_over:
            rate, since = self.handed_over
            now_us = max([now_us, since, *self.times])
            inherited = rate * math.exp(-(now_us - since) / 1e6 / self.tau_s)
            return inherited + sum(self._weight(now_us - t) for t in self.times)
        if not self.times:
            return 0.0
        now_us = max([now_us, *self.times])
        first = min(self.times)
        counted = [t for t in self.times if t > first]
        if not counted:
            return 0.0
        seen = -math.expm1(-(now_us - first) / 1e6 / self.tau_s)
        return sum(self._weight(now_us - t) for t in counted) / seen

    def _weight(self, age_us: int) -> float:
        return math.exp(-age_us / 1e6 / self.tau_s) / self.tau_s


def window_size(rate_hz: float, ttl_ms: int, floor: int, ceiling: int) -> int:
    wanted = rate_hz * (ttl_ms / 1000.0) * 2.0
    if math.isinf(wanted):
        return ceiling
    return min(max(math.ceil(wanted), floor), ceiling)

"""Append rate of a live window, and the window's size in frames.

The estimate is a sum of weights, one for each frame, that decay exponentially with time constant
tau:

    rate(t) = sum over frames of exp(-(t - t_frame) / tau) / tau

A batch of n frames adds n weights at once, so the grouping of frames does not matter. The estimate
decays in a pause. Times are not rounded to milliseconds, so no rate is too high.

A young sum has not seen all weights, so it is divided by their share, 1 - exp(-age / tau). Frames
of the first instant only say when the stream began: they end no interval and are not counted. So
the estimate is right from the second instant on.

`ema_alpha` is the share of the latest 100 ms in the estimate: tau = -100 ms / ln(1 - alpha).
"""

cimport cython
from libc.math cimport ceil, exp, expm1, isfinite, log1p

from ff_fast.errors import InvalidInput

cdef double BUCKET_US = 100_000.0
# alpha = 1 would make tau zero, and the smallest alphas would make it infinite. At the upper bound
# the latest 100 ms weigh all but a millionth, at the lower one tau is three years.
cdef double ALPHA_MOST = 0.999999
cdef double ALPHA_LEAST = 1e-9


cdef long long window_frames(
    double rate_hz, long long ttl_ms, long long floor, long long ceiling
) noexcept nogil:
    cdef double frames = ceil(rate_hz * (<double>ttl_ms / 1000.0) * 2.0)
    if not frames < <double>ceiling:
        return ceiling
    if frames < <double>floor:
        return floor
    return <long long>frames


def window_size(double rate_hz, long long ttl_ms, long long floor, long long ceiling):
    """Return K, how many frames the window keeps: ``clamp(ceil(rate * ttl * 2), floor, ceiling)``.

    Args:
        rate_hz: Frames a second, finite and not negative.
        ttl_ms: How long a frame stays visible, in ms, not negative.
        floor: Least K; at most *ceiling*.
        ceiling: Greatest K.

    Raises:
        InvalidInput: *rate_hz* is negative or not finite, *ttl_ms* is negative, or *floor* is above
            *ceiling*.
    """
    if not isfinite(rate_hz) or rate_hz < 0:
        raise InvalidInput("rate_hz must be finite and not negative.")
    if ttl_ms < 0:
        raise InvalidInput("ttl_ms must not be negative.")
    if floor > ceiling:
        raise InvalidInput("floor must not be above ceiling.")
    return window_frames(rate_hz, ttl_ms, floor, ceiling)


cdef inline double elapsed(long long now_us, long long then_us) noexcept nogil:
    """Return the µs from *then_us* to *now_us*, which is not earlier. Cannot overflow."""
    return <double>(<unsigned long long>now_us - <unsigned long long>then_us)


@cython.auto_pickle(False)
cdef class RateEstimator:
    """Estimates frames a second from the times of appends (see the module for the formula).

    Args:
        ema_alpha: Share of the latest 100 ms in the estimate, in (0, 1].
        rate_hz: Estimate of an earlier writer to continue from, in frames a second; 0 for none.
        now_us: The time of *rate_hz*, in µs of any monotonic clock.

    Raises:
        InvalidInput: *ema_alpha* or *rate_hz* is out of range.
    """

    def __init__(self, double ema_alpha=0.2, double rate_hz=0.0, long long now_us=0):
        if not (0.0 < ema_alpha <= 1.0):
            raise InvalidInput("ema_alpha must be in (0, 1].")
        if not isfinite(rate_hz) or rate_hz < 0:
            raise InvalidInput("rate_hz must be finite and not negative.")
        self._tau_us = -BUCKET_US / log1p(-max(min(ema_alpha, ALPHA_MOST), ALPHA_LEAST))
        self._mass = rate_hz * (self._tau_us / 1e6)
        if not isfinite(self._mass):
            raise InvalidInput("rate_hz is too large.")
        self._last_us = now_us
        # An estimate of another writer has seen all weights.
        self._start = HANDED_OVER if rate_hz > 0 else NONE
        self._since_us = now_us

    cdef void add(self, long long count, long long now_us) noexcept:
        if self._start == NONE:
            self._start = FIRST_BATCH
            self._since_us = now_us
            self._last_us = now_us
        now_us = max(now_us, self._last_us)
        if self._start == FIRST_BATCH and now_us == self._since_us:
            return
        self._mass *= exp(-elapsed(now_us, self._last_us) / self._tau_us)
        self._last_us = now_us
        self._mass += <double>count

    cdef double rate_at(self, long long now_us) noexcept:
        cdef double rate
        if self._mass == 0.0:
            return 0.0
        if now_us < self._last_us:
            now_us = self._last_us
        rate = self._mass * exp(-elapsed(now_us, self._last_us) / self._tau_us)
        rate = rate / self._tau_us * 1e6
        if self._start == FIRST_BATCH:
            # Not zero: counted frames came after the first instant, so the age is positive.
            rate /= -expm1(-elapsed(now_us, self._since_us) / self._tau_us)
        return rate

    def record(self, long long count, long long now_us):
        """Count frames that were appended at *now_us*.

        Args:
            count: How many, not negative.
            now_us: When, in µs of the same clock; an earlier time than the latest one is taken as
                the latest.

        Raises:
            InvalidInput: *count* is negative.
        """
        if count < 0:
            raise InvalidInput("count must not be negative.")
        self.add(count, now_us)

    def rate_hz(self, long long now_us):
        """Return the estimate at *now_us*, in frames a second."""
        return self.rate_at(now_us)

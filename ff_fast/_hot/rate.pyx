"""Append rate of a live window, and the window's size in frames.

The estimator is a sum of exponentially fading weights, one a frame: with time constant tau,

    rate(t) = sum over frames of exp(-(t - t_frame) / tau) / tau

A batch of n frames is n weights at once, so it does not matter how frames are grouped; a pause
fades the estimate by itself; nothing is rounded to milliseconds, so there is no upper limit. Until
the sum has run for some time it is divided by the share of the weights that it can have seen,
1 - exp(-age / tau), so it is right from the second instant on: frames of the first one say when the
stream began, and are not counted, because they end no interval.

`ema_alpha` is the share that the latest 100 ms have in the estimate:
tau = -100 ms / ln(1 - alpha).
"""

cimport cython
from libc.math cimport ceil, exp, expm1, isfinite, log1p

from ff_fast.errors import InvalidInput

cdef double BUCKET_US = 100_000.0
# alpha = 1 would be a time constant of zero, and the smallest ones an infinite one. At the one end
# the latest 100 ms weigh all but one part in a million, at the other the latest year counts.
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
        ttl_ms: How long a frame shall stay visible, in ms, not negative.
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
    """Exact to the microsecond for any two times, *now_us* not being the earlier one."""
    return <double>(<unsigned long long>now_us - <unsigned long long>then_us)


@cython.auto_pickle(False)
cdef class RateEstimator:
    """Frames a second, from when they were appended (see the module for the formula).

    Args:
        ema_alpha: Share of the latest 100 ms in the estimate, in (0, 1].
        rate_hz: Estimate to continue from, for a writer that follows another one; 0 starts anew.
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
        # An estimate that another writer hands over has no start of its own.
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
            # Not zero: what is counted came after the first batch.
            rate /= -expm1(-elapsed(now_us, self._since_us) / self._tau_us)
        return rate

    def record(self, long long count, long long now_us):
        """Count frames as appended at *now_us*.

        Args:
            count: How many, not negative.
            now_us: When, in µs; a time before the latest one counts as the latest.

        Raises:
            InvalidInput: *count* is negative.
        """
        if count < 0:
            raise InvalidInput("count must not be negative.")
        self.add(count, now_us)

    def rate_hz(self, long long now_us):
        """Return the estimate at *now_us*, in frames a second."""
        return self.rate_at(now_us)

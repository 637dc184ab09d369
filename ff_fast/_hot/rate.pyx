"""Append rate of a live window, and the window's size in frames.

The estimator is a sum of exponentially fading weights, one a frame: with time constant tau,

    rate(t) = sum over frames of exp(-(t - t_frame) / tau) / tau

A batch of n frames is n weights at once, so it does not matter how frames are grouped; a pause fades the estimate by
itself; nothing is rounded to milliseconds, so there is no upper limit. Until the sum has run for some time it is
divided by the share of the weights that it can have seen, 1 - exp(-age / tau), so it is right from the second frame on.
`ema_alpha` is the share that the latest 100 ms have in the estimate: tau = -100 ms / ln(1 - alpha).
"""

from libc.math cimport ceil, exp, expm1, isfinite, log1p

from ff_fast.errors import InvalidInput

cdef double BUCKET_US = 100_000.0
# alpha = 1 would be a time constant of zero; at this value the latest 100 ms weigh all but one part in a million.
cdef double ALPHA_LIMIT = 0.999999
# "Always been there": an estimate that another writer hands over has no start of its own.
cdef long long FOREVER = -(1 << 62)


cdef long long window_frames(double rate_hz, long long ttl_ms, long long floor, long long ceiling) noexcept nogil:
    cdef double frames = ceil(rate_hz * (<double>ttl_ms / 1000.0) * 2.0)
    if not frames < <double>ceiling:
        return ceiling
    if frames < <double>floor:
        return floor
    return <long long>frames


def window_size(double rate_hz, long long ttl_ms, long long floor, long long ceiling):
    """Return K, how many frames the live window keeps: ``clamp(ceil(rate * ttl * 2), floor, ceiling)``.

    Args:
        rate_hz: Frames a second, finite and not negative.
        ttl_ms: How long a frame shall stay visible, in ms.
        floor: Least K; at most *ceiling*.
        ceiling: Greatest K.

    Raises:
        InvalidInput: *rate_hz* is negative or not finite.
    """
    if not isfinite(rate_hz) or rate_hz < 0:
        raise InvalidInput("rate_hz must be finite and not negative.")
    return window_frames(rate_hz, ttl_ms, floor, ceiling)


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
        self._tau_us = -BUCKET_US / log1p(-min(ema_alpha, ALPHA_LIMIT))
        self._mass = rate_hz * self._tau_us / 1e6
        self._last_us = now_us
        self._since_us = FOREVER if rate_hz > 0 else -1

    cdef void add(self, long long count, long long now_us) noexcept:
        if self._since_us == -1:
            # The first batch says when the stream began; a rate needs an interval, which it closes for nobody.
            self._since_us = now_us
            self._last_us = now_us
            return
        if now_us > self._last_us:
            self._mass *= exp(-<double>(now_us - self._last_us) / self._tau_us)
            self._last_us = now_us
        self._mass += <double>count

    cdef double rate_at(self, long long now_us) noexcept:
        cdef double rate
        if self._mass == 0.0:
            return 0.0
        if now_us < self._last_us:
            now_us = self._last_us
        rate = self._mass * exp(-<double>(now_us - self._last_us) / self._tau_us) / self._tau_us * 1e6
        if self._since_us != FOREVER:
            # Below a microsecond of age the quotient is noise, not a rate.
            rate /= -expm1(-<double>max(now_us - self._since_us, 1) / self._tau_us)
        return rate

    def record(self, long long count, long long now_us):
        """Count *count* frames appended at *now_us* (µs, never going back; earlier times count as the latest)."""
        self.add(count, now_us)

    def rate_hz(self, long long now_us):
        """Return the estimate at *now_us*, in frames a second."""
        return self.rate_at(now_us)

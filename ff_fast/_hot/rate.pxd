cdef long long window_frames(
    double rate_hz, long long ttl_ms, long long floor, long long ceiling
) noexcept nogil


# Where an estimator stands: without frames; begun with its first batch; begun with an estimate.
cdef enum Start:
    NONE
    FIRST_BATCH
    HANDED_OVER


cdef class RateEstimator:
    cdef double _tau_us
    cdef double _mass
    cdef long long _last_us
    cdef long long _since_us
    cdef Start _start

    cdef void add(self, long long count, long long now_us) noexcept
    cdef double rate_at(self, long long now_us) noexcept

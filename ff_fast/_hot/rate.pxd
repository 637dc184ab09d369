cdef long long window_frames(
    double rate_hz, long long ttl_ms, long long floor, long long ceiling
) noexcept nogil


cdef enum Start:
    # No frame was counted.
    NONE
    # The first batch said when the stream began.
    FIRST_BATCH
    # The estimate continues that of an earlier writer.
    HANDED_OVER


cdef class RateEstimator:
    cdef double _tau_us
    # Sum of the weights at `_last_us`, without the factor 1 / tau.
    cdef double _mass
    cdef long long _last_us
    # When the stream began; used after FIRST_BATCH only.
    cdef long long _since_us
    cdef Start _start

    cdef void add(self, long long count, long long now_us) noexcept
    cdef double rate_at(self, long long now_us) noexcept

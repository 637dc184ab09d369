from ff_fast._hot.rate cimport RateEstimator


# Where the window stood after an acknowledged batch: how many live frames this writer had stored,
# the last id, and when.
cdef struct Mark:
    long long count
    long long ms
    long long sequence
    # When the frames up to it were stored, at the latest: the server's time, in ms.
    long long stored_ms


cdef double parse_rate(bytes stored) except -1.0


cdef class LiveWindow:
    # What the writer's frames ask for: the longest ttl, the largest floor, the largest ceiling.
    cdef readonly long long ttl_ms
    cdef readonly long long floor
    cdef readonly long long ceiling
    # Whether these are defaults, which the first best-effort frame replaces.
    cdef bint _assumed
    # K when the last batch was sealed.
    cdef readonly long long frames
    cdef RateEstimator _estimator
    # Live frames in sealed batches, and in acknowledged ones.
    cdef long long _sealed_count
    cdef long long _stored_count
    # Owned. In order of all three fields.
    cdef Mark* _marks
    cdef Py_ssize_t _mark_count
    cdef Py_ssize_t _mark_capacity
    # The next batch renews the expiry of the key, whatever it holds.
    cdef readonly bint must_renew
    # When the last batch that renews the expiry was sealed.
    cdef long long _renewed_us
    # When the estimate is to be stored again.
    cdef long long _rate_due_us

    cpdef int widen(
        self, long long ttl_ms, long long floor, long long ceiling, double ema_alpha,
        long long now_us
    ) except -1
    cpdef (long long, long long) first_kept(
        self, Py_ssize_t count, long long now_us, long long server_ms
    ) noexcept
    cpdef bint renew_due(self, bint has_frames, long long now_us) noexcept
    cpdef bytes take_rate(self, bint closing, long long now_us)
    cpdef void sealed(self, Py_ssize_t count, bint renews, long long now_us) noexcept
    cpdef void stored(self, Py_ssize_t count) noexcept
    cpdef void mark(
        self, long long ms, long long sequence, bint renewed, long long now_us,
        long long stored_ms=*
    ) noexcept
    cpdef double rate_hz(self, long long now_us) noexcept

    cdef bint _may_drop(
        self, Mark* mark, Py_ssize_t count, long long server_ms
    ) noexcept
    cdef void _forget_mark(self) noexcept

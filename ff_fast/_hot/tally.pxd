cimport cython


from ff_fast._hot.frames cimport MODES


cdef enum:
    BUCKETS = 32
    # One in so many batches that readers take is asked for its lag: a clock costs as much as taking
    # a small batch.
    LAG_EVERY = 16


cdef struct Spread:
    unsigned long long count
    unsigned long long total
    unsigned long long buckets[BUCKETS]


@cython.final
cdef class Tally:
    cdef unsigned long long _written[MODES]
    cdef unsigned long long _acknowledged[MODES]
    cdef unsigned long long _read[MODES]
    cdef unsigned long long _bytes_written
    cdef unsigned long long _bytes_read
    cdef unsigned long long _resends
    cdef Spread _batch_frames
    cdef Spread _write_to_acknowledged_us
    cdef Spread _read_lag_us
    cdef unsigned int _takes
    cdef dict _gaps
    cdef dict _events
    cdef readonly Py_ssize_t tails_open

    cdef void wrote(
        self, Py_ssize_t durable, Py_ssize_t summary, Py_ssize_t live, Py_ssize_t size
    ) noexcept
    cdef void stored(
        self, Py_ssize_t durable, Py_ssize_t summary, Py_ssize_t live, long long us
    ) noexcept
    cdef void sent_again(self, Py_ssize_t batches) noexcept
    cdef void got(self, Py_ssize_t* frames, Py_ssize_t size) noexcept
    cdef void lagged(self, long long ms) noexcept
    cdef int count_items(self, list items) except -1

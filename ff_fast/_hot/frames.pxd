cimport cython


cdef enum:
    # Places of the modes in counts of frames.
    DURABLE_FRAMES = 0
    SUMMARY_FRAMES = 1
    LIVE_FRAMES = 2
    MODES = 3


cdef enum:
    PUSHED_LOOK
    PUSHED_FRAMES
    PUSHED_END
    PUSHED_LEASE


@cython.final
cdef class StreamFrame:
    cdef long long _ms
    cdef readonly long long sequence
    cdef readonly str frame_type
    cdef readonly bytes payload
    cdef readonly long long ts_ms
    cdef readonly str mode
    cdef readonly str encoding
    cdef readonly str source
    cdef readonly str correlation_id
    cdef long long _summary_version
    cdef readonly object patch_kind
    # Sequence of the visible frame before this one; 0 for none.
    cdef long long _previous
    cdef readonly unsigned int attempt_index


@cython.final
cdef class Pushed:
    cdef int _kind
    cdef readonly bint deferred
    cdef readonly long long ms
    cdef readonly long long first
    cdef readonly long long last
    cdef StreamFrame alone
    cdef list _frames
    cdef list _visible
    cdef readonly Py_ssize_t size
    # The frames by mode, and the bytes of their payloads.
    cdef Py_ssize_t counts[MODES]
    cdef Py_ssize_t payload_bytes
    cdef readonly long long previous
    cdef readonly str end_reason
    cdef readonly str end_error
    cdef readonly long long lease_ms
    cdef Py_ssize_t count(self, bint exclude) except -1


cdef Pushed read_push(bytes message, unsigned int attempt_index)


cdef inline Py_ssize_t varint_size(unsigned long long value) noexcept nogil:
    cdef Py_ssize_t size = 1
    while value >= 128:
        value >>= 7
        size += 1
    return size


cdef inline char* put_varint(char* out, unsigned long long value) noexcept nogil:
    while value >= 128:
        out[0] = <char>(<unsigned char>(value & 127) | 128)
        out += 1
        value >>= 7
    out[0] = <char><unsigned char>value
    return out + 1

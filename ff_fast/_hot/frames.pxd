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

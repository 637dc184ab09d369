"""Functions that write RESP requests, for the other extensions to cimport. Their bodies are here so
that C inlines them.

Each takes a cursor into memory of the caller, which has room, and returns the cursor after what it
wrote. None can fail, so none needs the GIL or an error check: the caller computes sizes and checks
types before the first write.
"""

from libc.string cimport memcpy


cdef extern from "Python.h":
    int PyGC_Disable() noexcept
    int PyGC_Enable() noexcept


cdef inline Py_ssize_t digits(long long n) noexcept nogil:
    cdef Py_ssize_t count = 1
    while n >= 10:
        n //= 10
        count += 1
    return count


cdef inline Py_ssize_t bulk_size(Py_ssize_t payload) noexcept nogil:
    """Return the bytes that ``$<payload>\\r\\n...\\r\\n`` takes on the wire."""
    return 1 + digits(payload) + 2 + payload + 2


cdef inline Py_ssize_t number_size(long long n) noexcept nogil:
    """Return the bytes that the non-negative *n* takes on the wire as a bulk string."""
    return bulk_size(digits(n))


cdef inline char* put_digits(char* out, long long n) noexcept nogil:
    cdef char* end = out + digits(n)
    cdef char* at = end
    while at > out:
        at -= 1
        at[0] = <char>(c'0' + n % 10)
        n //= 10
    return end


cdef inline char* put_length(char* out, char sigil, Py_ssize_t n) noexcept nogil:
    out[0] = sigil
    out = put_digits(out + 1, n)
    out[0] = c'\r'
    out[1] = c'\n'
    return out + 2


cdef inline char* put_bulk(char* out, const char* data, Py_ssize_t size) noexcept nogil:
    out = put_length(out, c'$', size)
    memcpy(out, data, <size_t>size)
    out += size
    out[0] = c'\r'
    out[1] = c'\n'
    return out + 2


cdef inline char* put_number(char* out, long long n) noexcept nogil:
    """Write the non-negative *n* as a bulk string."""
    out = put_length(out, c'$', digits(n))
    out = put_digits(out, n)
    out[0] = c'\r'
    out[1] = c'\n'
    return out + 2


cdef inline char* put_raw(char* out, const char* data, Py_ssize_t size) noexcept nogil:
    memcpy(out, data, <size_t>size)
    return out + size


cdef Py_ssize_t bulks_size(tuple items) except -1
cdef char* put_bulks(char* out, tuple items) noexcept

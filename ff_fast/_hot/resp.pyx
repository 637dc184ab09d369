"""Packs RESP requests with one allocation each, and takes replies without a garbage collection."""

from cpython.bytes cimport (
    PyBytes_AS_STRING,
    PyBytes_CheckExact,
    PyBytes_FromStringAndSize,
    PyBytes_GET_SIZE,
)

cdef Py_ssize_t bulks_size(tuple items) except -1:
    """Return the wire size of *items*; raise TypeError if one is not exactly ``bytes``."""
    cdef Py_ssize_t total = 0
    for i, item in enumerate(items):
        if not PyBytes_CheckExact(item):
            raise TypeError(f"part {i} must be bytes, not {type(item).__name__}")
        total += bulk_size(PyBytes_GET_SIZE(item))
    return total


cdef char* put_bulks(char* out, tuple items) noexcept:
    for item in items:
        out = put_bulk(out, PyBytes_AS_STRING(item), PyBytes_GET_SIZE(item))
    return out


def pack_command(*parts):
    """Return the RESP bytes of one command.

    The exact size is computed first, then all parts are written into one ``bytes`` of this size.

    Args:
        *parts: The command and its arguments, each exactly ``bytes``.

    Raises:
        TypeError: A part is not exactly ``bytes``. The caller encodes numbers and text.

    >>> pack_command(b"PING")
    b'*1\\r\\n$4\\r\\nPING\\r\\n'
    """
    cdef tuple items = parts
    cdef Py_ssize_t count = len(items)
    cdef Py_ssize_t total = 1 + digits(count) + 2 + bulks_size(items)
    cdef bytes packed = PyBytes_FromStringAndSize(NULL, total)
    cdef char* start = PyBytes_AS_STRING(packed)
    cdef char* out = put_bulks(put_length(start, c'*', count), items)
    assert out - start == total, "sizing pass and writing pass disagree"
    return packed


def pack_fcall(
    bytes function not None, tuple keys not None, tuple argv not None, bint read_only=False
):
    """Return the RESP bytes of ``FCALL function numkeys *keys *argv``.

    Args:
        function: Name that the Lua library registers, e.g. ``b"ff_append"``.
        keys: Every key that the function uses, each exactly ``bytes``. They share one hash slot
            (``ff_fast.keys``); this is not checked here.
        argv: Second table of the Lua function, each exactly ``bytes``.
        read_only: Send ``FCALL_RO``, which replicas serve too.

    Raises:
        TypeError: An item is not exactly ``bytes``.

    >>> pack_fcall(b"ff_version", (), (b"x",))
    b'*4\\r\\n$5\\r\\nFCALL\\r\\n$10\\r\\nff_version\\r\\n$1\\r\\n0\\r\\n$1\\r\\nx\\r\\n'
    """
    cdef Py_ssize_t key_count = len(keys)
    cdef Py_ssize_t part_count = 3 + key_count + len(argv)
    cdef bytes command = b"FCALL_RO" if read_only else b"FCALL"
    cdef Py_ssize_t total = (
        1 + digits(part_count) + 2
        + bulk_size(PyBytes_GET_SIZE(command))
        + bulk_size(PyBytes_GET_SIZE(function))
        + number_size(key_count)
        + bulks_size(keys)
        + bulks_size(argv)
    )
    cdef bytes packed = PyBytes_FromStringAndSize(NULL, total)
    cdef char* start = PyBytes_AS_STRING(packed)
    cdef char* out = put_length(start, c'*', part_count)
    out = put_bulk(out, PyBytes_AS_STRING(command), PyBytes_GET_SIZE(command))
    out = put_bulk(out, PyBytes_AS_STRING(function), PyBytes_GET_SIZE(function))
    out = put_number(out, key_count)
    out = put_bulks(out, keys)
    out = put_bulks(out, argv)
    assert out - start == total, "sizing pass and writing pass disagree"
    return packed


def take_reply(gets not None):
    """Return the result of *gets*, the method of a ``hiredis.Reader``, without a collection.

    A reply of a thousand entries creates two thousand lists. These would start three collections of
    young objects, and now and then one of all objects, which find nothing: the lists are in use. No
    other thread runs while the collector is off.
    """
    cdef int collecting = PyGC_Disable()
    try:
        return gets()
    finally:
        if collecting:
            PyGC_Enable()

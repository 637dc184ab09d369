"""Packs RESP requests with one allocation each, checks the sizes that replies announce, and takes
replies without a garbage collection."""

cimport cython
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


cdef enum:
    # Elements that the headers of one reply may announce and the server has not sent yet. hiredis
    # allocates 8 bytes for each before the first one comes. The most are pages of members.
    MAX_OWED = 1 << 20
    # Bytes of a string. The largest is a result of 16 MiB.
    MAX_BULK = 64 << 20
    # Bytes of a line: a status, an error or a number.
    MAX_LINE = 1 << 16
    # Both limits above have fewer digits.
    MAX_DIGITS = 9
    # Bytes of one reply, where each value counts as VALUE_BYTES more: what its object takes.
    MAX_REPLY = 256 << 20
    VALUE_BYTES = 64

# What the next byte belongs to.
cdef enum Place:
    AT_TYPE = 0
    IN_LENGTH = 1
    IN_LINE = 2
    IN_BULK = 3


@cython.final
@cython.auto_pickle(False)
cdef class ReplyGuard:
    """Watches the replies of one connection for headers that announce more than any answer has.

    It reads the same bytes as the parser, before the parser: types and lengths alone, and it skips
    the strings. Each call costs a few ns for each element of a reply.
    """

    cdef Place _place
    # Type of the value that is being read.
    cdef char _type
    # The number of a length so far, its digits, and whether it is negative.
    cdef long long _number
    cdef int _digits
    cdef bint _negative
    # The byte before was a carriage return.
    cdef bint _returned
    # Bytes of the line so far; bytes of the string that are still to come, with its line end.
    cdef long long _line
    cdef long long _rest
    # Values of the reply that are still to come, the one that is being read included.
    cdef long long _owed
    # Bytes of the reply so far.
    cdef long long _taken

    def accepts(self, bytes data not None):
        """Take the next bytes of the connection; return whether the parser may get them.

        After False the connection is of no use.
        """
        cdef const char* at = PyBytes_AS_STRING(data)
        cdef const char* end = at + PyBytes_GET_SIZE(data)
        cdef const char* digit
        cdef long long number
        cdef char byte
        while at < end:
            if self._place == AT_TYPE:
                byte = at[0]
                at += 1
                if self._owed == 0:
                    self._owed = 1
                    self._taken = 0
                self._taken += VALUE_BYTES
                if self._taken > MAX_REPLY:
                    return False
                if byte == c'$' or byte == c'*' or byte in (c'=', c'%', c'~', c'>'):
                    # Most lengths are in one piece.
                    if end - at > MAX_DIGITS + 1:
                        number = 0
                        digit = at
                        while c'0' <= digit[0] <= c'9' and digit - at < MAX_DIGITS:
                            number = number * 10 + (digit[0] - c'0')
                            digit += 1
                        if digit > at and digit[0] == c'\r' and digit[1] == c'\n':
                            at = digit + 2
                            if not self._announced(byte, number):
                                return False
                            continue
                    self._place = IN_LENGTH
                    self._type = byte
                    self._number = 0
                    self._digits = 0
                    self._negative = False
                elif byte in (c'+', c'-', c':', c'_', c'#', c',', c'('):
                    self._place = IN_LINE
                    self._line = 0
                else:
                    # Attributes too: the parser would take them for a reply.
                    return False
                self._returned = False
            elif self._place == IN_BULK:
                if self._rest > end - at:
                    self._rest -= end - at
                    return True
                at += self._rest
                self._place = AT_TYPE
                self._owed -= 1
            elif self._place == IN_LENGTH:
                byte = at[0]
                at += 1
                if self._returned:
                    if byte != c'\n':
                        return False
                    self._place = AT_TYPE
                    if self._negative:
                        # Nil.
                        self._owed -= 1
                    elif not self._announced(self._type, self._number):
                        return False
                elif c'0' <= byte <= c'9':
                    self._digits += 1
                    if self._digits > MAX_DIGITS:
                        return False
                    self._number = self._number * 10 + (byte - c'0')
                elif byte == c'-' and not self._digits and not self._negative:
                    self._negative = True
                elif byte == c'\r' and self._digits:
                    self._returned = True
                else:
                    return False
            else:
                byte = at[0]
                at += 1
                self._line += 1
                if byte == c'\n' and self._returned:
                    self._place = AT_TYPE
                    self._owed -= 1
                    self._taken += self._line
                elif self._line > MAX_LINE:
                    return False
                self._returned = byte == c'\r'
        return True

    cdef inline bint _announced(self, char kind, long long number) noexcept:
        """Take the length of a value; return whether it may be as large."""
        if kind == c'$' or kind == c'=':
            self._rest = number + 2
            self._place = IN_BULK
            self._taken += number
            return number <= MAX_BULK
        self._owed += (number * 2 if kind == c'%' else number) - 1
        return self._owed <= MAX_OWED


def take_reply(gets not None, pushed=None):
    """Return the result of *gets*, the method of a ``hiredis.Reader``, without a collection.

    Replies of type *pushed* are skipped: the server sent them unasked.

    A reply of a thousand entries creates two thousand lists. These would start three collections of
    young objects, and now and then one of all objects, which find nothing: the lists are in use. No
    other thread runs while the collector is off.
    """
    cdef int collecting = PyGC_Disable()
    try:
        reply = gets()
        while type(reply) is pushed:
            reply = gets()
        return reply
    finally:
        if collecting:
            PyGC_Enable()


def take_pushes(gets not None, pushed not None, dict routes not None):
    """Hand what is published on channels to their *routes*, and return the first reply that is not.

    *gets* is the method of a ``hiredis.Reader``, *pushed* the type of its pushes. A push on a
    channel without a route is dropped.
    """
    cdef list push
    while True:
        reply = take_reply(gets)
        if type(reply) is not pushed:
            return reply
        push = <list>reply
        if len(push) != 3 or push[0] != b"smessage":
            return reply
        route = routes.get(push[1])
        if route is not None:
            route(push[2])

"""Batches of items to server-sent events, as bytes.

A frame is an event: `id:` with its cursor, `event:` with its type where that is asked for, and one
`data:` for each line of its payload. A payload may end in the middle of a character, which its
event cannot hold: a client decodes each event by itself. The bytes of such a character wait for the
next frame, and the id carries them, as `<cursor>~<hex>`, so that a client that is cut off there
loses none. In text a carriage return at the end waits too: a line feed may follow that belongs to
it.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.string cimport memchr, memcpy

from binascii import b2a_base64

from ff_fast._hot.frames cimport StreamFrame

cdef enum:
    # How a payload becomes data: as lines of text, as a JSON string, in base64.
    TEXT = 0
    JSON = 1
    BASE64 = 2
    # Bytes of a character whose last one is missing, at most.
    CARRY = 3
    # Digits of three numbers, their separators, and the bytes of a character in hex.
    ID = 80

_KINDS = {"text": TEXT, "json": JSON, "base64": BASE64}

cdef char* HEX = b"0123456789abcdef"


cdef int unfinished(const unsigned char* at, Py_ssize_t size) noexcept:
    """Return how many bytes at the end begin a character of UTF-8 that they do not complete."""
    cdef int back
    cdef int needed
    cdef unsigned char lead
    cdef unsigned char second
    for back in range(1, 4):
        if back > size:
            return 0
        lead = at[size - back]
        if lead < 0x80:
            return 0
        if lead < 0xC0:
            continue
        if lead < 0xC2 or lead > 0xF4:
            return 0
        needed = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        if needed <= back:
            return 0
        if back > 1:
            second = at[size - back + 1]
            if (
                (lead == 0xE0 and second < 0xA0) or (lead == 0xED and second > 0x9F)
                or (lead == 0xF0 and second < 0x90) or (lead == 0xF4 and second > 0x8F)
            ):
                return 0
        return back
    return 0


cdef int character(const unsigned char* at, const unsigned char* end) noexcept:
    """Return the size of the character of UTF-8 that begins at *at*, above ASCII; 0 for none."""
    cdef unsigned char lead = at[0]
    cdef int size = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    cdef int i
    if lead < 0xC2 or lead > 0xF4 or end - at < size:
        return 0
    for i in range(1, size):
        if at[i] & 0xC0 != 0x80:
            return 0
    if (
        (lead == 0xE0 and at[1] < 0xA0) or (lead == 0xED and at[1] > 0x9F)
        or (lead == 0xF0 and at[1] < 0x90) or (lead == 0xF4 and at[1] > 0x8F)
    ):
        return 0
    return size


@cython.final
@cython.internal
cdef class Output:
    """Bytes that grow."""

    cdef char* start
    cdef Py_ssize_t size
    cdef Py_ssize_t room

    def __cinit__(self):
        self.room = 512
        self.start = <char*>PyMem_Malloc(self.room)
        if self.start == NULL:
            raise MemoryError

    def __dealloc__(self):
        PyMem_Free(self.start)

    cdef char* reserve(self, Py_ssize_t more) except NULL:
        """Return where the next *more* bytes go."""
        cdef char* grown
        cdef Py_ssize_t room
        if self.room - self.size < more:
            room = max(2 * self.room, self.size + more)
            grown = <char*>PyMem_Realloc(self.start, room)
            if grown == NULL:
                raise MemoryError
            self.start = grown
            self.room = room
        return self.start + self.size

    cdef int put(self, const char* data, Py_ssize_t size) except -1:
        memcpy(self.reserve(size), data, size)
        self.size += size
        return 0

    cdef int put_bytes(self, bytes data) except -1:
        return self.put(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))

    cdef int put_lines(self, const char* at, Py_ssize_t size) except -1:
        """Put *size* bytes as lines of data: each begins its own `data:`, whatever ends it."""
        cdef const char* end = at + size
        cdef const char* feed = NULL
        cdef const char* carriage = NULL
        cdef const char* stop
        feed = <const char*>memchr(at, c"\n", size)
        carriage = <const char*>memchr(at, c"\r", size)
        while True:
            self.put(b"data: ", 6)
            stop = end
            if feed != NULL:
                stop = feed
            if carriage != NULL and carriage < stop:
                stop = carriage
            self.put(at, stop - at)
            self.put(b"\n", 1)
            if stop == end:
                return 0
            at = stop + 1
            if stop == carriage and at < end and at[0] == c"\n":
                at += 1
            if feed != NULL and feed < at:
                feed = <const char*>memchr(at, c"\n", end - at)
            if carriage != NULL and carriage < at:
                carriage = <const char*>memchr(at, c"\r", end - at)

    cdef int put_json(self, const char* data, Py_ssize_t size) except -1:
        """Put text as a JSON string; what is not UTF-8 becomes U+FFFD."""
        cdef const unsigned char* at = <const unsigned char*>data
        cdef const unsigned char* end = at + size
        cdef char* start = self.reserve(6 * size + 2)
        cdef char* out = start
        cdef unsigned char byte
        cdef int length
        out[0] = c'"'
        out += 1
        while at < end:
            byte = at[0]
            if byte >= 0x80:
                length = character(at, end)
                if length:
                    memcpy(out, at, length)
                    out += length
                    at += length
                    continue
                memcpy(out, b"\xef\xbf\xbd", 3)
                out += 3
            elif byte == c'"' or byte == c"\\":
                out[0] = c"\\"
                out[1] = byte
                out += 2
            elif byte >= 0x20:
                out[0] = byte
                out += 1
            elif byte == c"\n" or byte == c"\r" or byte == c"\t":
                out[0] = c"\\"
                out[1] = c"n" if byte == c"\n" else c"r" if byte == c"\r" else c"t"
                out += 2
            else:
                memcpy(out, b"\\u00", 4)
                out[4] = HEX[byte >> 4]
                out[5] = HEX[byte & 15]
                out += 6
            at += 1
        out[0] = c'"'
        self.size += out + 1 - start
        return 0

    cdef int put_name(self, str name) except -1:
        """Put a name of one line; a control character becomes a space."""
        cdef Py_ssize_t size = 0
        cdef const char* text
        cdef char* out
        cdef Py_ssize_t i
        try:
            text = PyUnicode_AsUTF8AndSize(name, &size)
        except UnicodeEncodeError:
            return self.put_name(name.encode("utf-8", "replace").decode())
        out = self.reserve(size)
        for i in range(size):
            out[i] = text[i] if <unsigned char>text[i] >= 0x20 else c" "
        self.size += size
        return 0


cdef char* put_number(char* out, unsigned long long value) noexcept:
    cdef char digits[20]
    cdef int count = 0
    while True:
        digits[count] = c"0" + <char>(value % 10)
        count += 1
        value //= 10
        if value == 0:
            break
    while count:
        count -= 1
        out[0] = digits[count]
        out += 1
    return out


@cython.final
cdef class Events:
    """Joins the items of batches, in order, to server-sent events.

    Args:
        other: Returns the bytes for an item that is not a frame.
        kind: How a payload becomes data: ``text``, ``json`` or ``base64``.
        ids: Each event has an id.
        types: Each event has the type of its frame, where that is not `default`.
        default: The type that needs no name.
        reserved: Types that other events have; a frame of one gets `frame-` in front of it.
        carry: Bytes at the beginning of a character that the client has not got.
    """

    cdef object _other
    cdef int _kind
    cdef bint _ids
    cdef bint _types
    cdef str _default
    cdef object _reserved
    cdef unsigned char _carry[CARRY]
    cdef int _carried
    # The frame that the bytes are of.
    cdef StreamFrame _of

    def __init__(
        self, other, *, str kind="text", bint ids=True, bint types=False, str default="token",
        reserved=frozenset(), bytes carry=b"",
    ):
        self._other = other
        self._kind = _KINDS[kind]
        self._ids = ids
        self._types = types
        self._default = default
        self._reserved = reserved
        self._carried = <int>len(carry)
        if self._carried:
            if self._carried > CARRY or self.waiting(carry, self._carried) != self._carried:
                raise ValueError("carry is not the beginning of a character")
            memcpy(self._carry, PyBytes_AS_STRING(carry), self._carried)

    def join(self, items):
        """Return the events of a batch."""
        cdef Output out = Output.__new__(Output)
        cdef StreamFrame frame
        for item in items:
            if type(item) is StreamFrame:
                frame = <StreamFrame>item
                if self._of is not None and self._types and frame.frame_type != self._of.frame_type:
                    self.put_carried(out)
                self.put_frame(out, frame)
            else:
                self.put_carried(out)
                out.put_bytes(self._other(item))
        return PyBytes_FromStringAndSize(out.start, out.size)

    cdef int waiting(self, const unsigned char* at, Py_ssize_t size) noexcept:
        """Return how many bytes at the end wait for the next frame."""
        if self._kind == TEXT and size and at[size - 1] == c"\r":
            return 1
        return unfinished(at, size)

    cdef int put_frame(self, Output out, StreamFrame frame) except -1:
        cdef bytes payload = frame.payload
        cdef Py_ssize_t size = PyBytes_GET_SIZE(payload)
        cdef const char* data = PyBytes_AS_STRING(payload)
        cdef int left
        if self._kind == BASE64:
            payload = b2a_base64(payload, newline=False)
            self.put_head(out, frame, 0)
            out.put_lines(PyBytes_AS_STRING(payload), PyBytes_GET_SIZE(payload))
            return out.put(b"\n", 1)
        if self._carried:
            payload = PyBytes_FromStringAndSize(<char*>self._carry, self._carried) + payload
            size = PyBytes_GET_SIZE(payload)
            data = PyBytes_AS_STRING(payload)
        left = self.waiting(<const unsigned char*>data, size)
        if left:
            memcpy(self._carry, data + size - left, left)
            self._of = frame
        else:
            self._of = None
        self._carried = left
        if left and left == size:
            # Nothing but the beginning of a character: the next event says so.
            return 0
        self.put_head(out, frame, left)
        self.put_data(out, data, size - left)
        return 0

    cdef int put_data(self, Output out, const char* data, Py_ssize_t size) except -1:
        if self._kind == JSON:
            out.put(b"data: ", 6)
            out.put_json(data, size)
            out.put(b"\n\n", 2)
        else:
            out.put_lines(data, size)
            out.put(b"\n", 1)
        return 0

    cdef int put_head(self, Output out, StreamFrame frame, int left) except -1:
        cdef char* start
        cdef char* at
        cdef int i
        if self._ids:
            start = out.reserve(ID)
            memcpy(start, b"id: ", 4)
            at = put_number(start + 4, frame.attempt_index)
            at[0] = c"."
            at = put_number(at + 1, <unsigned long long>frame._ms)
            at[0] = c"-"
            at = put_number(at + 1, <unsigned long long>frame.sequence)
            if left:
                at[0] = c"~"
                at += 1
                for i in range(left):
                    at[0] = HEX[self._carry[i] >> 4]
                    at[1] = HEX[self._carry[i] & 15]
                    at += 2
            at[0] = c"\n"
            out.size += at + 1 - start
        if self._types and frame.frame_type != self._default:
            out.put(b"event: ", 7)
            if frame.frame_type in self._reserved:
                out.put(b"frame-", 6)
            out.put_name(frame.frame_type)
            out.put(b"\n", 1)
        return 0

    cdef int put_carried(self, Output out) except -1:
        """Put the bytes of a character that is never completed."""
        cdef StreamFrame frame = self._of
        cdef int carried = self._carried
        self._of = None
        self._carried = 0
        if carried:
            if frame is not None:
                self.put_head(out, frame, 0)
            self.put_data(out, <char*>self._carry, carried)
        return 0


def event(data, *, id=None, str event=None, retry=None):
    """Return one event.

    Args:
        data: Text or bytes, of any number of lines.
        id: The id; text of one line.
        event: The type of the event; a control character in it becomes a space.
        retry: Milliseconds.
    """
    cdef Output out = Output.__new__(Output)
    cdef bytes raw = data.encode() if isinstance(data, str) else bytes(data)
    if id is not None:
        out.put(b"id: ", 4)
        out.put_name(id)
        out.put(b"\n", 1)
    if event:
        out.put(b"event: ", 7)
        out.put_name(event)
        out.put(b"\n", 1)
    if retry is not None:
        out.put_bytes(b"retry: %d\n" % retry)
    out.put_lines(PyBytes_AS_STRING(raw), PyBytes_GET_SIZE(raw))
    out.put(b"\n", 1)
    return PyBytes_FromStringAndSize(out.start, out.size)


def unfinished_bytes(bytes text not None):
    """Return how many bytes at the end of *text* begin a character that they do not complete."""
    return unfinished(text, PyBytes_GET_SIZE(text))

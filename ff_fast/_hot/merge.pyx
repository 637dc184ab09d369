"""The rolling summary: folds RFC 7396 merge patches and string appends exactly.

How a document is kept
----------------------

========  ==============================  ======================================================
JSON      node                            contents
========  ==============================  ======================================================
object    ``dict``                        key text -> node, in insertion order
array     ``list``                        nodes
string    ``bytes``, or ``_Text``         its JSON text; ``_Text`` after an append
others    ``bytes``                       the JSON text as it was written
========  ==============================  ======================================================

Numbers are never converted, so any integer and any float keep every digit.  Strings and keys have
one spelling, the shortest: UTF-8, with ``\\" \\\\ \\b \\f \\n \\r \\t`` and ``\\u00xx`` only where
JSON demands an escape.  So equal keys have equal bytes, and a document is written by copying its
texts.  The effect of later patches depends on :meth:`Document.dumps` alone: storing a document and
parsing it again changes nothing.

Rules that the RFCs leave open
------------------------------

* The string ``__ff_null__`` as a value becomes ``null``, in any spelling and place, also inside
  arrays.  As a key it is an ordinary key.
* Of equal keys in one object the last value wins and the first place is kept, as in a ``dict``.  A
  replaced member keeps its place; a member that was removed and is added again comes last.
* Objects and arrays alike may nest :data:`MAX_DEPTH` levels deep, the root being level 1.
* The root of a document and of a patch is an object.
"""

from cpython.bytes cimport (
    PyBytes_AS_STRING,
    PyBytes_CheckExact,
    PyBytes_FromStringAndSize,
    PyBytes_GET_SIZE,
)
from cpython.dict cimport (
    PyDict_CheckExact,
    PyDict_DelItem,
    PyDict_GetItemWithError,
    PyDict_Next,
    PyDict_SetItem,
    PyDict_Size,
)
from cpython.list cimport PyList_CheckExact
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.object cimport PyObject
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, strncmp

cimport cython

import sys

from ff_fast.errors import Corruption, InvalidInput, InvalidPatch, InvalidType

cdef enum:
    # Bounds the recursion of every function here.  Parsing needs most stack: 27 KiB for so many
    # levels, 70 KiB under the sanitizers.  Threads have 128 KiB or more.
    DEPTH_LIMIT = 128
    SENTINEL_SIZE = 11

SUMMARY_NULL_SENTINEL = "__ff_null__"
MAX_DEPTH = DEPTH_LIMIT
DEFAULT_MAX_BYTES = 16 * 1024 * 1024

ctypedef unsigned char byte
ctypedef const unsigned char* Bytes

cdef const char* SENTINEL = "__ff_null__"
cdef const char* SENTINEL_TEXT = "\"__ff_null__\""
cdef const char* HEX = "0123456789abcdef"


# -- text ------------------------------------------------------------------------------------------
#
# CPython ends the contents of every bytes with a NUL.  A NUL is not a plain character, a
# continuation byte or a digit, so each scan stops at `end` and never reads past it.


cdef inline Bytes skip_plain(Bytes at, Bytes end) noexcept nogil:
    """Return the first byte from *at* on that is not ASCII, is a control, a quote or a backslash.

    ``end[0]`` must be readable and NUL; it is returned when everything before it is plain.
    """
    cdef uint64_t word, quote, slash
    while end - at >= 8:
        # A borrow marks bytes only after one that is marked rightly, so "any marked" is exact.  The
        # loop below finds which one; the bit's place would depend on the byte order.
        memcpy(&word, at, 8)
        quote = word ^ 0x2222222222222222U
        slash = word ^ 0x5C5C5C5C5C5C5C5CU
        if (
            (word - 0x2020202020202020U)
            | ((quote - 0x0101010101010101U) & ~quote)
            | ((slash - 0x0101010101010101U) & ~slash)
            | word
        ) & 0x8080808080808080U:
            break
        at += 8
    while c' ' <= at[0] < 0x80 and at[0] != c'"' and at[0] != c'\\':
        at += 1
    return at


cdef inline bint follows(byte value) noexcept nogil:
    return (value & 0xC0) == 0x80


cdef inline Py_ssize_t utf8_width(Bytes at) noexcept nogil:
    """Bytes of the UTF-8 sequence at *at*, which starts at 0x80 or above; 0 if it is malformed.

    Table 3-7 of the Unicode standard: no overlong forms, no surrogates, nothing above U+10FFFF.
    """
    cdef byte lead = at[0]
    if lead < 0xC2:
        return 0
    if lead < 0xE0:
        return 2 if follows(at[1]) else 0
    if lead < 0xF0:
        if lead == 0xE0 and at[1] < 0xA0 or lead == 0xED and at[1] > 0x9F:
            return 0
        return 3 if follows(at[1]) and follows(at[2]) else 0
    if lead > 0xF4 or lead == 0xF0 and at[1] < 0x90 or lead == 0xF4 and at[1] > 0x8F:
        return 0
    return 4 if follows(at[1]) and follows(at[2]) and follows(at[3]) else 0


cdef inline byte short_escape(uint32_t code) noexcept nogil:
    """Return the letter of the two-character escape of *code*, or 0 if it needs none."""
    if code == c'"' or code == c'\\':
        return <byte>code
    if code == c'\n':
        return c'n'
    if code == c'\t':
        return c't'
    if code == c'\r':
        return c'r'
    if code == c'\b':
        return c'b'
    if code == c'\f':
        return c'f'
    return 0


cdef inline Py_ssize_t code_size(uint32_t code) noexcept nogil:
    """Bytes that ``put_code`` writes for *code*."""
    if short_escape(code):
        return 2
    if code < 0x20:
        return 6
    if code < 0x80:
        return 1
    if code < 0x800:
        return 2
    return 3 if code < 0x10000 else 4


cdef inline byte* put_code(byte* out, uint32_t code) noexcept nogil:
    """Write one code point in our spelling; return the byte after it."""
    cdef byte letter = short_escape(code)
    if letter:
        out[0] = c'\\'
        out[1] = letter
        return out + 2
    if code < 0x20:
        memcpy(out, "\\u00", 4)
        out[4] = HEX[code >> 4]
        out[5] = HEX[code & 15]
        return out + 6
    if code < 0x80:
        out[0] = <byte>code
        return out + 1
    if code < 0x800:
        out[0] = <byte>(0xC0 | code >> 6)
        out[1] = <byte>(0x80 | code & 0x3F)
        return out + 2
    if code < 0x10000:
        out[0] = <byte>(0xE0 | code >> 12)
        out[1] = <byte>(0x80 | code >> 6 & 0x3F)
        out[2] = <byte>(0x80 | code & 0x3F)
        return out + 3
    out[0] = <byte>(0xF0 | code >> 18)
    out[1] = <byte>(0x80 | code >> 12 & 0x3F)
    out[2] = <byte>(0x80 | code >> 6 & 0x3F)
    out[3] = <byte>(0x80 | code & 0x3F)
    return out + 4


cdef Py_ssize_t escaped_size(bytes text) noexcept:
    """Return the bytes of *text* inside a JSON string, or -1 - position of a byte not in UTF-8."""
    cdef Bytes start = <Bytes>PyBytes_AS_STRING(text)
    cdef Bytes end = start + PyBytes_GET_SIZE(text)
    cdef Bytes at = start
    cdef Py_ssize_t size = PyBytes_GET_SIZE(text)
    cdef Py_ssize_t width
    while True:
        at = skip_plain(at, end)
        if at == end:
            return size
        if at[0] < 0x80:
            size += code_size(at[0]) - 1
            at += 1
            continue
        width = utf8_width(at)
        if width == 0:
            return -1 - (at - start)
        at += width


cdef byte* put_escaped(byte* out, bytes text, Py_ssize_t escaped) noexcept:
    """Write *text*, which ``escaped_size`` has measured as *escaped*; return the byte after it."""
    cdef Bytes at = <Bytes>PyBytes_AS_STRING(text)
    cdef Bytes end = at + PyBytes_GET_SIZE(text)
    cdef Bytes run
    if escaped == PyBytes_GET_SIZE(text):
        memcpy(out, at, <size_t>escaped)
        return out + escaped
    while True:
        run = at
        at = skip_plain(at, end)
        while at[0] >= 0x80:
            at = skip_plain(at + 1, end)
        memcpy(out, run, <size_t>(at - run))
        out += at - run
        if at == end:
            return out
        out = put_code(out, at[0])
        at += 1


cdef bytes quoted(bytes text):
    """Return valid UTF-8 *text* as a JSON string, quotes included."""
    cdef Py_ssize_t escaped = escaped_size(text)
    cdef bytes result = PyBytes_FromStringAndSize(NULL, escaped + 2)
    cdef byte* out = <byte*>PyBytes_AS_STRING(result)
    out[0] = c'"'
    put_escaped(out + 1, text, escaped)[0] = c'"'
    return result


@cython.final
@cython.auto_pickle(False)
cdef class _Text:
    """A string that grows: its escaped contents, without quotes, in its own buffer.

    The capacity doubles, so n appends copy each byte a constant number of times.
    """

    cdef byte* data  # owned; NULL while capacity is 0
    cdef Py_ssize_t length
    cdef Py_ssize_t capacity

    def __dealloc__(self):
        PyMem_Free(self.data)

    cdef int extend(self, bytes text, Py_ssize_t escaped) except -1:
        """Append *text*, which takes *escaped* bytes; on MemoryError nothing has changed."""
        self.reserve(escaped)
        if escaped:
            put_escaped(self.data + self.length, text, escaped)
            self.length += escaped
        return 0

    cdef int reserve(self, Py_ssize_t more) except -1:
        cdef Py_ssize_t needed = self.length + more
        cdef byte* moved
        if needed > self.capacity:
            needed = max(needed, 2 * self.capacity, 64)
            moved = <byte*>PyMem_Realloc(self.data, <size_t>needed)
            if moved == NULL:
                raise MemoryError
            self.data = moved
            self.capacity = needed
        return 0


cdef _Text new_text(Bytes head, Py_ssize_t size, Py_ssize_t more):
    """Return a _Text of the *size* escaped bytes at *head*, with room for *more*."""
    cdef _Text text = _Text.__new__(_Text)
    text.reserve(size + more)
    if size:
        memcpy(text.data, head, <size_t>size)
        text.length = size
    return text


cdef inline bint makes_sentinel(Bytes head, Py_ssize_t size, bytes text) noexcept:
    """Whether the *size* bytes at *head* and then *text* spell the sentinel (it has no escapes)."""
    return (
        size + PyBytes_GET_SIZE(text) == SENTINEL_SIZE
        and (size == 0 or memcmp(head, SENTINEL, <size_t>size) == 0)
        and memcmp(PyBytes_AS_STRING(text), SENTINEL + size, <size_t>(SENTINEL_SIZE - size)) == 0
    )


# -- parsing ---------------------------------------------------------------------------------------

cdef struct Cursor:
    # All three point into one bytes that the caller holds until parsing is over.
    Bytes start
    Bytes at
    Bytes end
    bint patch


cdef object misfit(Cursor* c, Bytes at, str reason):
    """Return the error for the byte at *at*.  It shows positions, never contents."""
    cdef Py_ssize_t place = at - c.start
    cdef Py_ssize_t size = c.end - c.start
    if c.patch:
        return InvalidPatch(
            f"Send one object of strict JSON as the patch: {reason}, at byte {place} of {size}."
        )
    return Corruption(
        f"The stored summary document is not an object of strict JSON ({reason}, at byte {place} "
        f"of {size}); look for another program that writes to its key."
    )


cdef inline void skip_space(Cursor* c) noexcept nogil:
    while c.at[0] <= c' ' and (
        c.at[0] == c' ' or c.at[0] == c'\n' or c.at[0] == c'\t' or c.at[0] == c'\r'
    ):
        c.at += 1


cdef int hex4(Bytes at) noexcept nogil:
    """The value of four hexadecimal digits, or -1."""
    cdef int value = 0
    cdef int i
    cdef byte digit
    for i in range(4):
        digit = at[i]
        if c'0' <= digit <= c'9':
            value = value << 4 | digit - c'0'
        elif c'a' <= digit | 0x20 <= c'f':
            value = value << 4 | (digit | 0x20) - c'a' + 10
        else:
            return -1
    return value


cdef Bytes read_escape(Bytes at, uint32_t* code) noexcept nogil:
    """Read the escape whose backslash is at *at*; return the byte after it, NULL if malformed."""
    cdef byte letter = at[1]
    cdef int high, low
    if letter == c'"' or letter == c'\\' or letter == c'/':
        code[0] = letter
    elif letter == c'n':
        code[0] = c'\n'
    elif letter == c't':
        code[0] = c'\t'
    elif letter == c'r':
        code[0] = c'\r'
    elif letter == c'b':
        code[0] = c'\b'
    elif letter == c'f':
        code[0] = c'\f'
    elif letter == c'u':
        high = hex4(at + 2)
        if high < 0 or 0xDC00 <= high <= 0xDFFF:
            return NULL
        if not 0xD800 <= high <= 0xDBFF:
            code[0] = <uint32_t>high
            return at + 6
        if at[6] != c'\\' or at[7] != c'u':
            return NULL
        low = hex4(at + 8)
        if not 0xDC00 <= low <= 0xDFFF:
            return NULL
        code[0] = <uint32_t>(0x10000 + (high - 0xD800 << 10) + (low - 0xDC00))
        return at + 12
    else:
        return NULL
    return at + 2


cdef bytes parse_string(Cursor* c):
    """Read the string whose opening quote is at the cursor; return it in our spelling."""
    cdef Bytes start = c.at
    cdef Bytes at = start + 1
    cdef Bytes after
    cdef uint32_t code = 0
    cdef Py_ssize_t width
    cdef Py_ssize_t saved = 0  # bytes by which our spelling is shorter
    cdef bint rewrite = False
    while True:
        at = skip_plain(at, c.end)
        while at[0] >= 0x80:
            width = utf8_width(at)
            if width == 0:
                raise misfit(c, at, "the bytes of a string must be UTF-8")
            at += width
        if at[0] == c'"':
            break
        if at[0] == c'\\':
            after = read_escape(at, &code)
            if after == NULL:
                raise misfit(c, at, "a string holds an unknown escape or half a surrogate pair")
            saved += (after - at) - code_size(code)
            rewrite = rewrite or at[1] == c'u' or at[1] == c'/'
            at = after
        elif at[0] < c' ':
            if at == c.end:
                raise misfit(c, start, "a string must end with a quote")
            raise misfit(c, at, "control characters in a string must be escaped")
    at += 1
    c.at = at
    if not rewrite:
        return PyBytes_FromStringAndSize(<const char*>start, at - start)
    return respelled(start, at, at - start - saved)


cdef bytes respelled(Bytes at, Bytes end, Py_ssize_t size):
    """Return the valid string from *at* to *end* in our spelling, which takes *size* bytes."""
    cdef bytes result = PyBytes_FromStringAndSize(NULL, size)
    cdef byte* out = <byte*>PyBytes_AS_STRING(result)
    cdef uint32_t code = 0
    while at < end:
        if at[0] == c'\\':
            at = read_escape(at, &code)
            out = put_code(out, code)
        else:
            out[0] = at[0]
            out += 1
            at += 1
    assert out - <byte*>PyBytes_AS_STRING(result) == size, "measuring and writing disagree"
    return result


cdef inline Bytes skip_digits(Bytes at) noexcept nogil:
    while c'0' <= at[0] <= c'9':
        at += 1
    return at


cdef bytes parse_number(Cursor* c):
    """Read the number at the cursor; return it as it is written."""
    cdef Bytes start = c.at
    cdef Bytes at = start
    cdef Bytes digits
    if at[0] == c'-':
        at += 1
    digits = at
    at = skip_digits(at)
    if at == digits or digits[0] == c'0' and at - digits > 1:
        raise misfit(c, start, "a number needs digits, and no zero before them")
    if at[0] == c'.':
        digits = at + 1
        at = skip_digits(digits)
        if at == digits:
            raise misfit(c, start, "a number needs digits after its point")
    if at[0] == c'e' or at[0] == c'E':
        at += 1
        if at[0] == c'+' or at[0] == c'-':
            at += 1
        digits = at
        at = skip_digits(digits)
        if at == digits:
            raise misfit(c, start, "a number needs digits in its exponent")
    c.at = at
    return PyBytes_FromStringAndSize(<const char*>start, at - start)


cdef dict parse_object(Cursor* c, int depth, bint merging):
    """Read the object at the cursor, on level *depth*."""
    cdef dict members = {}
    cdef bytes key
    if depth > DEPTH_LIMIT:
        raise misfit(c, c.at, f"objects and arrays may nest {MAX_DEPTH} levels deep, not more")
    c.at += 1
    skip_space(c)
    if c.at[0] == c'}':
        c.at += 1
        return members
    while True:
        if c.at[0] != c'"':
            raise misfit(c, c.at, "a key in double quotes is missing")
        key = parse_string(c)
        skip_space(c)
        if c.at[0] != c':':
            raise misfit(c, c.at, "a colon is missing")
        c.at += 1
        skip_space(c)
        PyDict_SetItem(members, key, parse_value(c, depth + 1, merging))
        skip_space(c)
        if c.at[0] == c'}':
            c.at += 1
            return members
        if c.at[0] != c',':
            raise misfit(c, c.at, "a comma or a closing brace is missing")
        c.at += 1
        skip_space(c)


cdef list parse_array(Cursor* c, int depth):
    """Read the array at the cursor, on level *depth*."""
    cdef list items = []
    if depth > DEPTH_LIMIT:
        raise misfit(c, c.at, f"objects and arrays may nest {MAX_DEPTH} levels deep, not more")
    c.at += 1
    skip_space(c)
    if c.at[0] == c']':
        c.at += 1
        return items
    while True:
        items.append(parse_value(c, depth + 1, False))
        skip_space(c)
        if c.at[0] == c']':
            c.at += 1
            return items
        if c.at[0] != c',':
            raise misfit(c, c.at, "a comma or a closing bracket is missing")
        c.at += 1
        skip_space(c)


cdef object parse_value(Cursor* c, int depth, bint merging):
    """Read the value at the cursor; an object or array there is on level *depth*.

    With *merging*, ``null`` means "remove this member" and is returned as None.  Inside arrays it
    is an ordinary value, also in the objects there: RFC 7396 replaces arrays as a whole.
    """
    cdef byte first = c.at[0]
    cdef bytes text
    if first == c'"':
        text = parse_string(c)
        if (
            PyBytes_GET_SIZE(text) == SENTINEL_SIZE + 2
            and memcmp(PyBytes_AS_STRING(text), SENTINEL_TEXT, SENTINEL_SIZE + 2) == 0
        ):
            return b"null"
        return text
    if first == c'{':
        return parse_object(c, depth, merging)
    if first == c'[':
        return parse_array(c, depth)
    if first == c'-' or c'0' <= first <= c'9':
        return parse_number(c)
    if strncmp(<const char*>c.at, "null", 4) == 0:
        c.at += 4
        return None if merging else b"null"
    if strncmp(<const char*>c.at, "true", 4) == 0:
        c.at += 4
        return b"true"
    if strncmp(<const char*>c.at, "false", 5) == 0:
        c.at += 5
        return b"false"
    raise misfit(c, c.at, "a value is missing or is not JSON")


cdef dict parse(bytes text, bint patch):
    """Parse a patch, in which None is a removal, or a stored document."""
    cdef Cursor c
    cdef dict root
    c.start = <Bytes>PyBytes_AS_STRING(text)
    c.at = c.start
    c.end = c.start + PyBytes_GET_SIZE(text)
    c.patch = patch
    skip_space(&c)
    if c.at[0] != c'{':
        raise misfit(&c, c.at, "the root must be an object")
    root = parse_object(&c, 1, patch)
    skip_space(&c)
    if c.at != c.end:
        raise misfit(&c, c.at, "something follows the object")
    return root


# -- trees -----------------------------------------------------------------------------------------
#
# Every function here recurses at most DEPTH_LIMIT levels: a tree comes from the parser, or is
# merged level by level from two that do.


cdef inline Py_ssize_t bracket_bytes(Py_ssize_t members) noexcept:
    """Return the bytes of the brackets and commas of an object or array with so many members."""
    return members + 1 if members else 2


cdef Py_ssize_t measure(object node) noexcept:
    """Return the bytes of *node* as compact JSON.  A member whose value is a removal has none."""
    cdef Py_ssize_t position = 0
    cdef Py_ssize_t members = 0
    cdef Py_ssize_t size = 0
    cdef PyObject* key
    cdef PyObject* value
    if PyBytes_CheckExact(node):
        return PyBytes_GET_SIZE(node)
    if PyDict_CheckExact(node):
        while PyDict_Next(node, &position, &key, &value):
            if <object>value is not None:
                members += 1
                size += PyBytes_GET_SIZE(<object>key) + 1 + measure(<object>value)
        return size + bracket_bytes(members)
    if PyList_CheckExact(node):
        for item in <list>node:
            members += 1
            size += measure(item)
        return size + bracket_bytes(members)
    return (<_Text>node).length + 2


cdef Py_ssize_t growth(dict target, dict patch) except? -1:
    """Return by how much ``fold`` would change the size of *target*; nothing is changed."""
    cdef Py_ssize_t position = 0
    cdef Py_ssize_t members = PyDict_Size(target)
    cdef Py_ssize_t change = -bracket_bytes(members)
    cdef PyObject* key
    cdef PyObject* value
    cdef PyObject* old
    while PyDict_Next(patch, &position, &key, &value):
        old = PyDict_GetItemWithError(target, <object>key)
        if <object>value is None:
            if old != NULL:
                members -= 1
                change -= PyBytes_GET_SIZE(<object>key) + 1 + measure(<object>old)
        elif old == NULL:
            members += 1
            change += PyBytes_GET_SIZE(<object>key) + 1 + measure(<object>value)
        elif PyDict_CheckExact(<object>value) and PyDict_CheckExact(<object>old):
            change += growth(<dict>old, <dict>value)
        else:
            change += measure(<object>value) - measure(<object>old)
    return change + bracket_bytes(members)


cdef int prune(dict tree) except -1:
    """Delete the removals of a patch object that is added as a whole."""
    cdef Py_ssize_t position = 0
    cdef Py_ssize_t removals = 0
    cdef Py_ssize_t found = 0
    cdef PyObject* key
    cdef PyObject* value
    cdef PyObject** doomed
    while PyDict_Next(tree, &position, &key, &value):
        if <object>value is None:
            removals += 1
        elif PyDict_CheckExact(<object>value):
            prune(<dict>value)
    if removals == 0:
        return 0
    # Plain memory, because `fold` creates no tracked objects.  The keys are borrowed from *tree*.
    doomed = <PyObject**>PyMem_Malloc(<size_t>removals * sizeof(PyObject*))
    if doomed == NULL:
        raise MemoryError
    try:
        position = 0
        while PyDict_Next(tree, &position, &key, &value):
            if <object>value is None:
                doomed[found] = key
                found += 1
        for position in range(found):
            held = <object>doomed[position]
            PyDict_DelItem(tree, held)
    finally:
        PyMem_Free(doomed)
    return 0


cdef Py_ssize_t fold(dict target, dict patch) except? -1:
    """Merge *patch* into *target*; return by how much the size of *target* changed.

    Subtrees of the patch become parts of the target, so the patch cannot be used again.  No object
    is created that the garbage collector tracks, and keys and values are plain, so no Python code
    runs amid a merge.  Only a MemoryError can stop it.
    """
    cdef Py_ssize_t position = 0
    cdef Py_ssize_t change = -bracket_bytes(PyDict_Size(target))
    cdef PyObject* key
    cdef PyObject* value
    cdef PyObject* old
    while PyDict_Next(patch, &position, &key, &value):
        old = PyDict_GetItemWithError(target, <object>key)
        if <object>value is None:
            if old != NULL:
                change -= PyBytes_GET_SIZE(<object>key) + 1 + measure(<object>old)
                PyDict_DelItem(target, <object>key)
            continue
        if PyDict_CheckExact(<object>value):
            if old != NULL and PyDict_CheckExact(<object>old):
                change += fold(<dict>old, <dict>value)
                continue
            prune(<dict>value)
        if old == NULL:
            change += PyBytes_GET_SIZE(<object>key) + 1
        else:
            change -= measure(<object>old)
        change += measure(<object>value)
        PyDict_SetItem(target, <object>key, <object>value)
    return change + bracket_bytes(PyDict_Size(target))


cdef byte* put(byte* out, byte* end, const void* data, Py_ssize_t size) except NULL:
    # `end` follows from sizes that were added up patch by patch.  A wrong one must not overflow.
    if end - out < size:
        raise AssertionError("the document is larger than its recorded size")
    memcpy(out, data, <size_t>size)
    return out + size


cdef byte* put_node(byte* out, byte* end, object node) except NULL:
    """Write *node* as compact JSON; return the byte after it."""
    cdef Py_ssize_t position = 0
    cdef bint first = True
    cdef PyObject* key
    cdef PyObject* value
    if PyBytes_CheckExact(node):
        return put(out, end, PyBytes_AS_STRING(node), PyBytes_GET_SIZE(node))
    if PyDict_CheckExact(node):
        out = put(out, end, "{", 1)
        while PyDict_Next(node, &position, &key, &value):
            if not first:
                out = put(out, end, ",", 1)
            first = False
            out = put(
                out, end, PyBytes_AS_STRING(<object>key), PyBytes_GET_SIZE(<object>key)
            )
            out = put(out, end, ":", 1)
            out = put_node(out, end, <object>value)
        return put(out, end, "}", 1)
    if PyList_CheckExact(node):
        out = put(out, end, "[", 1)
        for item in <list>node:
            if not first:
                out = put(out, end, ",", 1)
            first = False
            out = put_node(out, end, item)
        return put(out, end, "]", 1)
    out = put(out, end, "\"", 1)
    if (<_Text>node).length:
        out = put(out, end, (<_Text>node).data, (<_Text>node).length)
    return put(out, end, "\"", 1)


# -- pointers --------------------------------------------------------------------------------------


cdef list split_pointer(bytes pointer):
    """Return the reference tokens of an RFC 6901 pointer, unescaped, as valid UTF-8."""
    cdef Py_ssize_t wrong = escaped_size(pointer)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(pointer)
    cdef Bytes text = <Bytes>PyBytes_AS_STRING(pointer)
    cdef Py_ssize_t i
    cdef bint escapes = False
    cdef list tokens
    if wrong < 0:
        raise InvalidPatch(
            f"Give the pointer as UTF-8; its byte {-1 - wrong} of {size} does not fit."
        )
    if size == 0:
        raise InvalidPatch(
            "Give a pointer to a member: text cannot be appended to the root, which is an object."
        )
    if text[0] != c'/':
        raise InvalidPatch("Start the pointer with a slash, as in /choices/0/text.")
    for i in range(size):
        if text[i] == c'~':
            escapes = True
            if text[i + 1] != c'0' and text[i + 1] != c'1':
                raise InvalidPatch(
                    "Write ~0 for a tilde and ~1 for a slash in the pointer; "
                    f"the tilde at its byte {i} of {size} is neither."
                )
    tokens = pointer[1:].split(b"/")
    if len(tokens) > DEPTH_LIMIT:
        raise InvalidPatch(
            f"Shorten the pointer: it has {len(tokens)} steps, and objects and arrays may nest "
            f"{MAX_DEPTH} levels deep, not more."
        )
    if escapes:
        tokens = [token.replace(b"~1", b"/").replace(b"~0", b"~") for token in tokens]
    return tokens


cdef Py_ssize_t array_index(bytes token, Py_ssize_t size) noexcept:
    """Return the index that *token* is in an array of *size* items, or -1."""
    cdef Bytes at = <Bytes>PyBytes_AS_STRING(token)
    cdef Py_ssize_t digits = PyBytes_GET_SIZE(token)
    cdef Py_ssize_t index = 0
    cdef Py_ssize_t i
    if digits == 0 or at[0] == c'0' and digits > 1:
        return -1
    for i in range(digits):
        if not c'0' <= at[i] <= c'9':
            return -1
        index = 10 * index + at[i] - c'0'
        if index >= size:
            return -1
    return index


# -- the document ----------------------------------------------------------------------------------


cdef bytes exact_bytes(str what, object value):
    if not PyBytes_CheckExact(value):
        raise InvalidType(f"Pass {what} as bytes, not as {type(value).__name__}.")
    return <bytes>value


@cython.final
@cython.auto_pickle(False)
cdef class Document:
    """A JSON object that patches are folded into, exact to the last digit.

    The effect of a patch depends on :meth:`dumps` alone.  So a document may be stored and parsed
    again anywhere in a sequence of patches, and the final bytes are the same.  The cost of a patch
    grows with the patch and the values that it replaces, not with the document.  Arguments are not
    kept.  One caller at a time: there is no lock.

    Args:
        document_json: A stored document: UTF-8, strict JSON, an object at the root, up to
            :data:`MAX_DEPTH` levels deep.  A value that is the sentinel is read as ``null``.
        max_bytes: Largest size in bytes that the document may grow to.  A stored document that is
            already larger is accepted, can shrink and cannot grow.

    Raises:
        Corruption: *document_json* is not such a document.
        InvalidType: *document_json* is not exactly ``bytes``, or *max_bytes* not an ``int``.
        InvalidInput: *max_bytes* is below 2, the size of an empty object.

    >>> document = Document(b'{"title": "Draft", "tags": []}')
    >>> document.merge(b'{"title": null, "usage": {"tokens": 12345678901234567890}}')
    >>> document.append(b"/text", b"Hello")
    >>> document.append(b"/text", b", world")
    >>> document.dumps()
    b'{"tags":[],"usage":{"tokens":12345678901234567890},"text":"Hello, world"}'
    """

    cdef dict root
    cdef Py_ssize_t total  # exact size of the document in bytes
    cdef Py_ssize_t limit
    cdef _Text append_target  # string of the last append, a node of the tree; or None
    cdef bytes append_pointer  # the pointer that named it
    cdef bint half_merged  # a merge ran out of memory half way

    def __cinit__(self):
        self.root = {}
        self.total = 2
        self.limit = DEFAULT_MAX_BYTES

    def __init__(self, document_json=b"{}", *, max_bytes=DEFAULT_MAX_BYTES):
        cdef dict root
        if type(max_bytes) is not int:
            raise InvalidType(f"Pass max_bytes as int, not as {type(max_bytes).__name__}.")
        if not 2 <= max_bytes <= sys.maxsize:
            raise InvalidInput("Pass max_bytes of 2 or more, the size of an empty object.")
        root = parse(exact_bytes("document_json", document_json), False)
        self.root = root
        self.total = measure(root)
        self.limit = max_bytes
        self.append_target = None
        self.half_merged = False

    def merge(self, patch):
        """Fold one JSON merge patch (RFC 7396) into the document, all of it or nothing.

        A member that is ``null`` removes, an object merges, anything else replaces.  A value that
        is the string ``__ff_null__`` becomes ``null``, also inside arrays, at any depth.

        Args:
            patch: UTF-8, strict JSON, an object at the root, up to :data:`MAX_DEPTH` levels deep.

        Raises:
            InvalidPatch: *patch* is not such an object, or the document would grow past its limit.
                The document is unchanged.
            InvalidType: *patch* is not exactly ``bytes``.
            MemoryError: The document is unchanged, or it has a part of the patch; then all later
                calls but ``size`` raise ``Corruption``.
            Corruption: An earlier merge ran out of memory half way: load the document again.

        >>> document = Document(b'{"a":{"b":1,"c":2},"d":[1,2]}')
        >>> document.merge(b'{"a":{"b":null},"d":["__ff_null__"],"e":{"f":null}}')
        >>> document.dumps()
        b'{"a":{"c":2},"d":[null],"e":{}}'
        """
        cdef dict root = parse(exact_bytes("the patch", patch), True)
        cdef Py_ssize_t change
        self.check_whole()
        # A patch adds at most its own size: each of its members adds itself and one comma, or
        # replaces something.  So the change is computed first only close to the limit.
        if self.total + PyBytes_GET_SIZE(patch) > self.limit:
            self.check_room(growth(self.root, root))
        self.append_target = None
        self.half_merged = True
        change = fold(self.root, root)
        self.total += change
        self.half_merged = False

    def append(self, pointer, text):
        """Append *text* to the string that *pointer* names, all of it or nothing.

        Object members that are missing on the way are created: objects, and a string at the end
        (so ``/a/0`` creates an *object* with a member ``"0"`` when ``a`` is missing).  ``null`` at
        the end counts as an empty string.  Array items are named by their index and must exist.
        Appending again at the same pointer costs the length of *text* alone, until the next merge.

        An append that makes the whole string ``__ff_null__`` is refused: as ``null`` it would be
        lost to the next append, and as a string readers would see the sentinel.  Send it together
        with the next piece.

        Args:
            pointer: JSON Pointer (RFC 6901), for example ``b"/choices/0/text"``.
            text: UTF-8, any characters; they are escaped where JSON demands it.

        Raises:
            InvalidPatch: *pointer* is malformed, names the root or something that is not a string,
                or leads through a scalar or past the end of an array; *text* is not UTF-8 or would
                complete the sentinel; the document would grow past its limit.  The document is
                unchanged.
            InvalidType: *pointer* or *text* is not exactly ``bytes``.
            Corruption: An earlier merge ran out of memory half way: load the document again.
        """
        cdef Py_ssize_t added
        if not PyBytes_CheckExact(pointer) or not PyBytes_CheckExact(text):
            exact_bytes("the pointer", pointer)
            exact_bytes("the text", text)
        added = escaped_size(<bytes>text)
        if added < 0:
            raise InvalidPatch(
                f"Append whole UTF-8 characters: byte {-1 - added} of {len(text)} does not fit. A "
                "TextDecoder joins text that was cut into bytes."
            )
        if self.append_target is None or self.append_pointer != <bytes>pointer:
            self.append_at(<bytes>pointer, <bytes>text, added)
        else:
            self.append_to(self.append_target, <bytes>text, added)

    cdef int append_to(self, _Text target, bytes text, Py_ssize_t added) except -1:
        check_sentinel(target.data, target.length, text)
        self.check_room(added)
        target.extend(text, added)
        self.total += added
        return 0

    cdef int append_at(self, bytes pointer, bytes text, Py_ssize_t added) except -1:
        """Follow *pointer* from the root, append there, and remember the string."""
        cdef list tokens = split_pointer(pointer)
        cdef Py_ssize_t steps = len(tokens)
        cdef Py_ssize_t step = 0
        cdef Py_ssize_t index = 0
        cdef object parent = self.root
        cdef object leaf
        cdef object key = None
        cdef PyObject* found
        cdef _Text target
        self.check_whole()
        while True:
            if PyDict_CheckExact(parent):
                key = quoted(<bytes>tokens[step])
                found = PyDict_GetItemWithError(parent, key)
                if found == NULL:
                    target = self.create(<dict>parent, tokens, step, text, added)
                    break
                leaf = <object>found
            elif PyList_CheckExact(parent):
                index = array_index(<bytes>tokens[step], len(<list>parent))
                if index < 0:
                    raise InvalidPatch(
                        f"Point to an item that exists: step {step + 1} of the pointer is not an "
                        f"index below {len(<list>parent)}."
                    )
                leaf = (<list>parent)[index]
            else:
                raise InvalidPatch(
                    f"Point to a string: step {step} of the pointer is neither object nor array."
                )
            step += 1
            if step < steps:
                parent = leaf
                continue
            if isinstance(leaf, _Text):
                target = <_Text>leaf
                self.append_to(target, text, added)
            else:
                target = self.to_growing_text(leaf, text, added)
                if PyDict_CheckExact(parent):
                    PyDict_SetItem(parent, key, target)
                else:
                    (<list>parent)[index] = target
                self.total += target.length + 2 - PyBytes_GET_SIZE(leaf)
            break
        self.append_target = target
        self.append_pointer = pointer
        return 0

    cdef _Text to_growing_text(self, object leaf, bytes text, Py_ssize_t added):
        """Return the _Text that replaces *leaf*, a string or null, with *text* appended."""
        cdef _Text target
        cdef Bytes head = NULL
        cdef Py_ssize_t size = 0
        cdef byte first = 0
        if PyBytes_CheckExact(leaf):
            first = <byte>PyBytes_AS_STRING(leaf)[0]
        if first == c'"':
            head = <Bytes>PyBytes_AS_STRING(leaf) + 1
            size = PyBytes_GET_SIZE(leaf) - 2
        elif first != c'n':
            raise InvalidPatch(
                "Point to a string or null: the pointer names another kind of value."
            )
        check_sentinel(head, size, text)
        self.check_room(size + added + 2 - PyBytes_GET_SIZE(leaf))
        target = new_text(head, size, added)
        target.extend(text, added)
        return target

    cdef _Text create(
        self, dict parent, list tokens, Py_ssize_t step, bytes text, Py_ssize_t added
    ):
        """Create the member that *tokens* name from *step* on; *parent* does not have it."""
        cdef _Text target = new_text(NULL, 0, added)
        cdef object member = target
        cdef bytes key
        cdef Py_ssize_t size = added + 2
        cdef Py_ssize_t i
        check_sentinel(NULL, 0, text)
        target.extend(text, added)
        for i in range(len(tokens) - 1, step, -1):
            key = quoted(<bytes>tokens[i])
            member = {key: member}
            size += 1 + PyBytes_GET_SIZE(key) + 1 + 1
        key = quoted(<bytes>tokens[step])
        size += PyBytes_GET_SIZE(key) + 1
        size += bracket_bytes(PyDict_Size(parent) + 1) - bracket_bytes(PyDict_Size(parent))
        self.check_room(size)
        PyDict_SetItem(parent, key, member)
        self.total += size
        return target

    def dumps(self):
        """Return the document as exact, compact JSON in UTF-8, of :attr:`size` bytes.

        Numbers are as they were written, members in the order in which they were added.  Non-ASCII
        characters and ``/`` are not escaped.

        Raises:
            Corruption: An earlier merge ran out of memory half way: load the document again.
        """
        cdef bytes result
        cdef byte* out
        cdef byte* end
        self.check_whole()
        result = PyBytes_FromStringAndSize(NULL, self.total)
        out = <byte*>PyBytes_AS_STRING(result)
        end = out + self.total
        if put_node(out, end, self.root) != end:
            raise AssertionError("the document is smaller than its recorded size")
        return result

    @property
    def size(self):
        """Length of :meth:`dumps` in bytes, known without building it."""
        return self.total

    @property
    def max_bytes(self):
        """The size in bytes that the document may grow to."""
        return self.limit

    def __repr__(self):
        return f"<Document of {self.total} bytes, at most {self.limit}>"

    cdef int check_whole(self) except -1:
        if self.half_merged:
            raise Corruption(
                "Load the summary document again: memory ran out while a patch was being merged."
            )
        return 0

    cdef int check_room(self, Py_ssize_t change) except -1:
        if change > 0 and change > self.limit - self.total:
            raise InvalidPatch(
                f"Remove what is no longer needed or split the summary over several executions: "
                f"the document would grow to {self.total + change} bytes, {self.limit} are allowed."
            )
        return 0


cdef int check_sentinel(Bytes head, Py_ssize_t size, bytes text) except -1:
    if makes_sentinel(head, size, text):
        raise InvalidPatch(
            "Append this piece together with the next one: alone it would make the string equal "
            "to the null sentinel."
        )
    return 0

"""The writers of one connection, without I/O: frames in, FCALL bytes out, acknowledgements in.

`write` copies a frame into the open batch of its writer. Sealing computes the size of the batch,
allocates once and writes all of it. A batch leaves when nothing of the writer is in flight, or when
it is full. Until then it fills, so its size follows the speed of the server. Sealed batches keep
their bytes until the server has acknowledged them. After a disconnect the same bytes are sent
again, in order; the sequence makes a repeat harmless.

A writer that can send registers in its `Outbox`, which makes a `Call` of what many writers have. A
part of a call is stored, refused and answered on its own. A batch keeps its bytes, so it may be
sent again in a call with others.

In a cluster a call has the writers of one slot, and an outbox those of one node. Its slot is the
`Home` of a writer, and says which outbox that is. A writer whose home has moved follows once all
that it has sent is answered or lost, so its batches never overtake one another on two nodes.

Best-effort frames are pushed before they are stored. A `Push` tells readers of a frame at once,
under an id that the writer chooses: the server's time as it is known here, and the sequence. The
frames of such a group stay in the open batch, and are stored as one run under the same ids: a tenth
of a second later, or as soon as something else is written, many frames gather, or somebody waits
for them. A writer chooses an ms only while every id before it is known, so it never goes backwards.

The sync shell calls `write`, `_seal_soon`, `_seal_last`, `_fail` and `_unstored_frames` on any
thread, and the rest on the thread that owns the connection. No method runs Python code between a
check and the change that relies on it, and none releases the GIL, so each is atomic. A garbage
collection would break that: an allocation may start one, it may call a finalizer, and a finalizer
is Python code, in which another thread can run. So the collector is off where objects are made
amid a change.

This module writes the arguments of `ff_append`. lua/append.lua has the table of its blocks,
ff_fast/_hot/frames.pyx that of the fields.
"""

cimport cython
from cpython.bytes cimport (
    PyBytes_AS_STRING,
    PyBytes_CheckExact,
    PyBytes_FromStringAndSize,
    PyBytes_GET_SIZE,
)
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.pythread cimport PyThread_get_thread_ident
from cpython.unicode cimport PyUnicode_AsUTF8String
from libc.string cimport memcpy, memmove
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

import copy
from collections import deque

from ff_fast._hot.frames import decode_entries
from ff_fast._hot.frames cimport put_varint, varint_size
from ff_fast._hot.merge import Document
from ff_fast._hot.resp cimport (
    PyGC_Disable,
    PyGC_Enable,
    bulk_size,
    digits,
    number_size,
    put_bulk,
    put_digits,
    put_length,
    put_number,
    put_raw,
)
from ff_fast._hot.tally cimport Tally
from ff_fast._hot.window cimport LiveWindow, parse_rate
from ff_fast.errors import (
    Corruption,
    InvalidInput,
    InvalidPayload,
    InvalidType,
    Outcome,
    Overloaded,
    PayloadTooLarge,
    ProtocolError,
    SequenceGap,
    StateLost,
    StreamClosed,
    Unavailable,
    WriterSuperseded,
    for_code,
    from_server_error,
    make_unknown,
)
from ff_fast.types import BestEffortLiveConfig, StreamMode

cdef enum:
    # "FCALL" and "ff_append" as bulk strings.
    HEAD_SIZE = 11 + 15
    # Bounds of a call, which keep the server's work on it below 2 ms. A batch alone may have more.
    CALL_PARTS = 128
    CALL_FRAMES = 1024
    CALL_BYTES = 1 << 20
    # Bounds of the calls of several slots that go out in one write.
    SEND_BYTES = 4 << 20
    SEND_CALLS = 256
    # So many parts are sent without waiting for more.
    FULL_PARTS = 64
    # While calls carry the parts of several writers, this is between two of them: a call costs the
    # server as much as four of its parts, and readers take it for no delay.
    PACE_US = 2000
    # A longer push says that there are frames, and readers read them.
    PUSH_BYTES = 8192
    PUSH_FRAMES = 256
    # A group is stored so long after its first frame, or with the first batch of so many frames
    # that were not pushed: where those gather, the server is busy, and a push in front would cost
    # it more.
    HOLD_US = 100_000
    HOLD_FRAMES = 8
    HOLD_BYTES = 4096
    # Looks at the groups that are due are so far apart.
    HOLD_LOOK_US = 5_000
    # Looks at what is held after its acknowledgement: how far apart, and how many writers at most.
    LOOK_US = 100_000
    LOOKS = 1024
    # Frames that live for a shorter time are not held back.
    HOLD_TTL_MS = 1_000
    # For so long after an answer the server's time is known.
    KNOWN_US = 10_000_000
    # The same limits as in lua/prelude.lua.
    MAX_PAYLOAD = 1 << 20
    MAX_FRAMES = 1024
    # The payloads of a batch, of which a single one may have as much. A run has at most 12 KB of
    # lengths and ages, and the server accepts 2 MiB.
    MAX_BATCH_BYTES = MAX_PAYLOAD
    # A run has as much at most, or one frame, since readers that wait ask for entries by number.
    RUN_BYTES = 1 << 16
    # A batch of this size is sent although earlier ones are in flight, so the server does not idle
    # between two batches. Smaller ones wait and grow with its load.
    EAGER_FRAMES = 256
    EAGER_BYTES = 1 << 16
    MAX_IN_FLIGHT = 4
    # Memory that an idle writer keeps for its next batch; the rest is freed after a burst. A
    # process may hold many writers that wait for their model.
    IDLE_FRAMES = 16
    IDLE_BYTES = 256
    IDLE_RUNS = 2
    IDLE_SHAPES = 4
    KNOWN_SHAPES = 64
    # Durable frames between two trims of the log. A trim costs the server as much as a frame.
    TRIM_EVERY = 256
    # Pending patches of fewer bytes are never replaced by a document.
    COMPACT_BYTES = 4096

# Keys that a request names beside the head.
cdef enum Use:
    USES_LOG = 1
    USES_LIVE = 2
    USES_SUMMARY = 4

cdef enum Kind:
    LOG = 0
    LIVE = 1
    PATCH = 2

# The letters of the blocks of a batch; the table in lua/append.lua says what each block holds.
cdef bytes BLOCK_LOG = b"L"
cdef bytes BLOCK_LOG_FIELDS = b"X"
cdef bytes BLOCK_LIVE = b"V"
cdef bytes BLOCK_LIVE_FIELDS = b"W"
cdef bytes BLOCK_PATCHES = b"S"
cdef bytes BLOCK_DOCUMENT = b"C"
cdef bytes BLOCK_TRIM_LIVE = b"T"
cdef bytes BLOCK_LIVE_TTL = b"P"
cdef bytes BLOCK_TRIM_LOG = b"K"
cdef bytes BLOCK_ESTIMATOR = b"E"
cdef bytes BLOCK_VISIBLE = b"H"
cdef bytes BLOCK_PUSHED_MS = b"I"
cdef bytes BLOCK_REPLAYED_MS = b"R"
cdef bytes BLOCK_LOST = b"G"
cdef bytes BLOCK_RENEWAL = b"N"
cdef tuple FRAME_BLOCKS = (
    BLOCK_LOG, BLOCK_LOG_FIELDS, BLOCK_LIVE, BLOCK_LIVE_FIELDS, BLOCK_PATCHES
)

# Summary patches are stored in the live window too. Until a best-effort frame says how long to keep
# frames, this does.
SUMMARY_WINDOW = BestEffortLiveConfig.with_ttl(30_000)


cdef inline long long now_us() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <long long>now.tv_sec * 1_000_000 + now.tv_nsec // 1000


@cython.final
@cython.auto_pickle(False)
cdef class _Shape:
    """What all frames of a run share, with the bytes that do not change already encoded."""

    cdef Kind kind
    cdef object mode
    cdef object frame_type
    cdef object correlation_id
    cdef object encoding
    cdef object source
    # BestEffortLiveConfig of frames in the live window.
    cdef long long ttl_ms
    cdef long long floor
    cdef long long ceiling
    cdef double alpha
    # Fields that differ from their defaults, RESP-encoded and as a push has them, and their number.
    cdef bytes fields
    cdef bytes pushed_fields
    cdef Py_ssize_t field_count
    # Summary frames only: ``<kind>:<pointer>`` as in the summary's field names, and the pointer.
    cdef bytes patch_name
    cdef bytes pointer


@cython.auto_pickle(False)
cdef class _Part:
    """What a call says of one attempt.

    Attributes:
        message: The call that has this part alone, as it goes on the wire.
        arguments: The arguments of the part in it.
    """

    # So a call of one part is sent without a copy. Its arguments begin at `start`: the head, and
    # what it announces; and how many these are.
    cdef readonly bytes message
    cdef Py_ssize_t start
    cdef Py_ssize_t argument_count
    # The keys: the first of `keys` ends at `meta_end`, and the others are from `keys_start` to
    # `keys_end`.
    cdef bytes keys
    cdef Py_ssize_t meta_end
    cdef Py_ssize_t keys_start
    cdef Py_ssize_t keys_end
    cdef Py_ssize_t key_count

    @property
    def arguments(self):
        return self.message[self.start:]

    cdef char* begin(self, Py_ssize_t size) except NULL:
        """Make the message, with *size* bytes of arguments; return where they are written."""
        cdef char* out
        self.start = call_head_size(
            self.key_count, self.argument_count, self.meta_end + self.keys_end - self.keys_start
        )
        self.message = PyBytes_FromStringAndSize(NULL, self.start + size)
        out = PyBytes_AS_STRING(self.message)
        out = put_call_head(out, self.key_count, self.argument_count)
        return self.put_keys(out)

    cdef char* put_keys(self, char* out) noexcept:
        cdef const char* names = PyBytes_AS_STRING(self.keys)
        out = put_raw(out, names, self.meta_end)
        return put_raw(out, names + self.keys_start, self.keys_end - self.keys_start)

    cdef Py_ssize_t size(self) noexcept:
        """Size of its arguments."""
        return PyBytes_GET_SIZE(self.message) - self.start


@cython.final
@cython.auto_pickle(False)
cdef class Batch(_Part):
    """A sealed batch, kept until it is acknowledged.

    Attributes:
        first_sequence: Sequence of its first frame.
        frame_count: How many frames it has; 0 for retention work alone.
    """

    cdef readonly long long first_sequence
    cdef readonly Py_ssize_t frame_count
    # How many frames it says to be lost; it has no other then.
    cdef readonly long long lost_count
    # How many frames are in the live window, and how many of these are patches.
    cdef Py_ssize_t live_count
    cdef Py_ssize_t patch_count
    # When its first frame was written, in µs.
    cdef long long written_us
    # The keys that it names beside the head.
    cdef int uses
    # It renews the expiry of the live window.
    cdef bint renews
    # It was sent, and the answer was lost.
    cdef bint doubtful
    # The call that had it with others was refused as a whole.
    cdef bint alone
    # The ms of all its ids, where a push has fixed it; 0 where the server chooses.
    cdef long long fixed_ms
    # Where its blocks begin in the message, behind what fixes the ms of its ids, and their number
    # of arguments.
    cdef Py_ssize_t blocks_at
    cdef Py_ssize_t block_arguments
    # The ms of the ids of its first block and of those behind it: 0 where it is not known yet.
    cdef long long first_ms
    cdef long long later_ms
    # It was acknowledged before, by a server that is lost.
    cdef bint again
    # Readers that exclude best-effort frames have every frame before it.
    cdef bint follows_visible


cdef inline long long last_of(Batch batch) noexcept:
    return batch.first_sequence + batch.frame_count + batch.lost_count - 1


@cython.auto_pickle(False)
cdef class Newest:
    """The newest frame that is known to be stored under a lease; each acknowledgement moves it.

    Attributes:
        ms, sequence: Its id; 0 and 0 for none.
        checked: Sequence up to which the server has confirmed its streams by releasing the lease.
    """

    cdef public long long ms
    cdef public long long sequence
    cdef public long long checked


# What is held of a batch, in front of its blocks. A process may hold many small ones, so this is
# what makes the batch again, and no more.
cdef struct Record:
    # When it was acknowledged, in µs.
    long long kept_us
    long long first_sequence
    long long lost_count
    long long first_ms
    long long later_ms
    # Bytes of the blocks, and their number of arguments.
    int size
    int arguments
    int frame_count
    char uses
    char follows_visible


cdef inline long long last_of_record(Record* record) noexcept nogil:
    return record.first_sequence + record.frame_count + record.lost_count - 1


@cython.final
@cython.auto_pickle(False)
cdef class Held:
    """What was acknowledged under a lease a moment ago: the writers of the lease send it again to a
    server that lacks it.

    The sequences of what is held follow one another, and end with the newest acknowledged frame.

    Args:
        ms: How long a batch is held.
        size: Most bytes that are held.
    """

    # Owned memory, NULL for none. From `_start` to `_end` it has a record and its blocks for each
    # batch, oldest first: a batch itself would take several times as much.
    cdef char* _data
    cdef Py_ssize_t _start
    cdef Py_ssize_t _end
    cdef Py_ssize_t _capacity
    cdef Py_ssize_t _most_bytes
    cdef long long _longest_us
    # The newest acknowledged frame, and the frame before what is held, which is the newest one
    # where nothing is.
    cdef long long _sequence
    cdef long long _before_sequence
    cdef long long _before_ms
    # An outbox looks at it from time to time.
    cdef bint _listed
    # The connection was lost, and the writer has heard nothing since: what is held may be needed,
    # however long that takes.
    cdef bint _doubted
    # Of the newest writer: its id as a bulk string, the number of its opening, and the document
    # after its patches.
    cdef bytes _writer
    cdef readonly long long opening
    cdef readonly long long version
    # Returns that writer, or None once it is gone.
    cdef public object owner
    cdef object document
    cdef bytes patch_kind

    def __cinit__(self):
        self._data = NULL

    def __dealloc__(self):
        PyMem_Free(self._data)

    def __init__(self, long long ms, Py_ssize_t size):
        self._longest_us = 1000 * ms
        self._most_bytes = size

    def __len__(self):
        cdef Py_ssize_t at = self._start
        cdef Py_ssize_t count = 0
        cdef Record record
        while at < self._end:
            self._read(&record, at)
            at += sizeof(Record) + record.size
            count += 1
        return count

    @property
    def writer(self):
        """Id of the newest writer; None before the first one."""
        return None if self._writer is None else of_bulk(self._writer)

    cdef int opened(self, WriterCore writer, long long ms, long long sequence) except -1:
        """Note a new writer, which goes on behind a frame."""
        self._writer = writer._writer
        self.opening = writer._opening
        self.document = writer._document
        self.version = writer._summary_version
        self.patch_kind = writer._patch_kind
        if sequence != self._sequence:
            # Somebody else has written in between.
            self._free()
        if self._data is NULL:
            self._sequence = self._before_sequence = sequence
            self._before_ms = ms
        return 0

    cdef void _read(self, Record* record, Py_ssize_t at) noexcept nogil:
        # By a copy, since records are not aligned.
        memcpy(record, self._data + at, sizeof(Record))

    cdef void _free(self) noexcept:
        PyMem_Free(self._data)
        self._data = NULL
        self._start = self._end = self._capacity = 0

    cdef int _reserve(self, Py_ssize_t size) except -1:
        """Make room for *size* bytes behind the others."""
        cdef Py_ssize_t used = self._end - self._start
        if self._end + size <= self._capacity:
            return 0
        if self._start:
            memmove(self._data, self._data + self._start, <size_t>used)
            self._start = 0
            self._end = used
        # What is held goes from the front, so some room lets it be moved seldom.
        if used + size + used // 4 > self._capacity:
            self._resize(used + size + used // 2)
        return 0

    cdef int _resize(self, Py_ssize_t capacity) except -1:
        cdef void* moved = PyMem_Realloc(self._data, <size_t>capacity)
        if moved is NULL:
            raise MemoryError()
        self._data = <char*>moved
        self._capacity = capacity
        return 0

    cdef int keep(self, Batch batch, long long now) except -1:
        """Hold a batch that was acknowledged."""
        self._add(batch, now)
        self._sequence = max(self._sequence, last_of(batch))
        # What is too old goes with the looks of the outbox, a few at a time.
        if self._end - self._start > self._most_bytes:
            self.drop(now)
        return 0

    cdef int _add(self, Batch batch, long long now) except -1:
        cdef Record record
        cdef Py_ssize_t size = PyBytes_GET_SIZE(batch.message) - batch.blocks_at
        cdef char* out
        self._reserve(sizeof(Record) + size)
        record.kept_us = now
        record.first_sequence = batch.first_sequence
        record.lost_count = batch.lost_count
        record.first_ms = batch.first_ms
        record.later_ms = batch.later_ms
        record.size = <int>size
        record.arguments = <int>batch.block_arguments
        record.frame_count = <int>batch.frame_count
        record.uses = <char>batch.uses
        record.follows_visible = batch.follows_visible
        out = put_raw(self._data + self._end, <char*>&record, sizeof(Record))
        put_raw(out, PyBytes_AS_STRING(batch.message) + batch.blocks_at, size)
        self._end += sizeof(Record) + size
        return 0

    def clear(self):
        """Let go of everything."""
        self._free()
        self.document = self.owner = None

    cdef void drop(self, long long now) noexcept:
        """Let go of what is held for long enough, and of what is too much."""
        cdef Record record
        while self._start < self._end:
            self._read(&record, self._start)
            if self._end - self._start <= self._most_bytes and (
                self._doubted or now - record.kept_us < self._longest_us
            ):
                return
            self._start += sizeof(Record) + record.size
            self._before_sequence = last_of_record(&record)
            self._before_ms = max(self._before_ms, record.later_ms)
        self._free()

    cdef long long look(self, long long now) except -1:
        """Let go of what is due; return in how many µs more is, 0 where nothing is held."""
        cdef Record record
        cdef Py_ssize_t used
        self.drop(now)
        if self._data is NULL:
            return 0
        used = self._end - self._start
        if used < self._capacity // 4:
            # A burst is over.
            memmove(self._data, self._data + self._start, <size_t>used)
            self._start = 0
            self._end = used
            self._resize(used)
        self._read(&record, self._start)
        return min(max(record.kept_us + self._longest_us - now, 1), self._longest_us)

    cdef list take(self, WriterCore writer, long long stored):
        """Return what is held behind sequence *stored*, oldest first, and hold it no longer."""
        cdef list taken = []
        cdef Py_ssize_t at = self._start
        cdef Py_ssize_t end = self._end
        cdef Record record
        while at < end:
            self._read(&record, at)
            # A batch without frames belongs behind the frame before it.
            if taken or last_of_record(&record) > stored or (
                last_of_record(&record) == stored and record.first_sequence > stored
            ):
                if not taken:
                    self._end = at
                taken.append(self._batch(writer, &record, at + sizeof(Record)))
            at += sizeof(Record) + record.size
        if self._start == self._end:
            self._free()
        return taken

    cdef Batch _batch(self, WriterCore writer, Record* record, Py_ssize_t at):
        """Return a batch whose message is its blocks alone."""
        cdef Batch batch = Batch.__new__(Batch)
        batch.first_sequence = record.first_sequence
        batch.frame_count = record.frame_count
        batch.lost_count = record.lost_count
        batch.first_ms = record.first_ms
        batch.later_ms = record.later_ms
        batch.block_arguments = record.arguments
        batch.follows_visible = record.follows_visible
        writer._name_keys(batch, record.uses)
        batch.message = PyBytes_FromStringAndSize(self._data + at, record.size)
        return batch

    cdef int give_back(self, list batches) except -1:
        """Hold what was taken and not stored again."""
        cdef long long now = now_us()
        for batch in batches:
            self._add(<Batch>batch, now)
        return 0


@cython.final
@cython.auto_pickle(False)
cdef class Push(_Part):
    """Frames that are pushed to readers before they are stored."""

    # The open batch whose frames these are, and how many of them are pushed with this.
    cdef unsigned int group
    cdef Py_ssize_t upto
    cdef Py_ssize_t upto_bytes


cdef Py_ssize_t call_head_size(
    Py_ssize_t keys, Py_ssize_t arguments, Py_ssize_t key_bytes
) noexcept:
    """Return the size of a call before the arguments of its parts."""
    return HEAD_SIZE + 1 + digits(3 + keys + arguments) + 2 + number_size(keys) + key_bytes


cdef char* put_call_head(char* out, Py_ssize_t keys, Py_ssize_t arguments) noexcept:
    """Write what stands before the keys of a call."""
    out = put_length(out, c'*', 3 + keys + arguments)
    out = put_bulk(out, "FCALL", 5)
    out = put_bulk(out, "ff_append", 9)
    return put_number(out, keys)


cdef bytes packed_call(list parts):
    """Return the call of ff_append that has *parts*, with one allocation at most."""
    cdef Py_ssize_t keys = 0
    cdef Py_ssize_t arguments = 0
    cdef Py_ssize_t key_bytes = 0
    cdef Py_ssize_t size = 0
    cdef Py_ssize_t total
    cdef bytes packed
    cdef char* start
    cdef char* out
    cdef _Part part
    if len(parts) == 1:
        return (<_Part>parts[0]).message
    for item in parts:
        part = <_Part>item
        keys += part.key_count
        arguments += part.argument_count
        key_bytes += part.meta_end + part.keys_end - part.keys_start
        size += part.size()
    total = call_head_size(keys, arguments, key_bytes) + size
    packed = PyBytes_FromStringAndSize(NULL, total)
    start = PyBytes_AS_STRING(packed)
    out = put_call_head(start, keys, arguments)
    for item in parts:
        out = (<_Part>item).put_keys(out)
    for item in parts:
        part = <_Part>item
        out = put_raw(out, PyBytes_AS_STRING(part.message) + part.start, part.size())
    assert out - start == total, "sizing pass and writing pass disagree"
    return packed


# Consecutive frames of the open batch that share a shape.
cdef struct Run:
    # Index in `_shapes`.
    Py_ssize_t shape
    # Index of the first frame in `_lengths` and `_times`, and how many.
    Py_ssize_t first
    Py_ssize_t count
    # Where the payloads begin in `_data`, and their bytes.
    Py_ssize_t offset
    Py_ssize_t size
    # Sequence of the visible frame before the run; -1 if that is the frame before it.
    long long previous
    # Summary version before the run.
    long long base_version


cdef bytes bulks(list parts):
    """Return *parts*, each exactly ``bytes``, as bulk strings back to back."""
    # Not by ``join``, which lets other threads run while it copies a MiB or more.
    cdef Py_ssize_t total = 0
    cdef bytes packed
    cdef bytes part
    cdef char* out
    for part in parts:
        total += bulk_size(PyBytes_GET_SIZE(part))
    packed = PyBytes_FromStringAndSize(NULL, total)
    out = PyBytes_AS_STRING(packed)
    for part in parts:
        out = put_bulk(out, PyBytes_AS_STRING(part), PyBytes_GET_SIZE(part))
    return packed


cdef bytes of_bulk(bytes bulk):
    """Return the bytes of a bulk string."""
    return bulk[bulk.index(b"\r\n") + 2:PyBytes_GET_SIZE(bulk) - 2]


cdef bytes push_pairs(list pairs):
    """Return *pairs*, names and values in turn, each with its length before it."""
    cdef Py_ssize_t total = 0
    cdef bytes packed
    cdef bytes part
    cdef char* out
    for part in pairs:
        total += varint_size(PyBytes_GET_SIZE(part)) + PyBytes_GET_SIZE(part)
    packed = PyBytes_FromStringAndSize(NULL, total)
    out = PyBytes_AS_STRING(packed)
    for part in pairs:
        out = put_varint(out, PyBytes_GET_SIZE(part))
        out = put_raw(out, PyBytes_AS_STRING(part), PyBytes_GET_SIZE(part))
    return packed


cdef int check_str(str name, object text) except -1:
    if type(text) is not str:
        raise InvalidType(f"{name} must be str, not {type(text).__name__}.")
    return 0


cdef bytes checked_text(str name, object text):
    """Return *text*, exactly a ``str``, as the 1 to 256 bytes of UTF-8 that a field may have."""
    cdef bytes encoded
    try:
        encoded = (<str>text).encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"{name} must be text that UTF-8 can encode.") from None
    if not 1 <= len(encoded) <= 256:
        raise InvalidInput(f"{name} must have 1 to 256 bytes of UTF-8, not {len(encoded)}.")
    return encoded


cdef _Shape make_shape(
    object mode, object frame_type, object correlation_id, object encoding, object source
):
    cdef _Shape shape = _Shape.__new__(_Shape)
    cdef list pairs = []
    shape.mode = mode
    shape.frame_type = frame_type
    shape.correlation_id = correlation_id
    shape.encoding = encoding
    shape.source = source
    if frame_type != "token":
        pairs += [b"frame_type", checked_text("frame_type", frame_type)]
    if mode.wire == "durable":
        shape.kind = LOG
    else:
        shape.kind = LIVE if mode.wire == "best_effort" else PATCH
        config = SUMMARY_WINDOW if mode.config is None else mode.config
        shape.ttl_ms = config.ttl_ms
        shape.floor = config.maxlen_floor
        shape.ceiling = config.maxlen_ceiling
        shape.alpha = config.ema_alpha
    if correlation_id is not None:
        pairs += [b"correlation_id", checked_text("correlation_id", correlation_id)]
    if encoding != "utf8":
        pairs += [b"encoding", checked_text("encoding", encoding)]
    if source != "worker":
        pairs += [b"source", checked_text("source", source)]
    if shape.kind == PATCH:
        wire = mode.patch_kind.wire.encode()
        pairs += [b"mode", mode.wire.encode(), b"patch_kind", wire]
        if mode.patch_kind.pointer is not None:
            shape.pointer = mode.patch_kind.pointer.encode()
            pairs += [b"pointer", shape.pointer]
        shape.patch_name = wire + b":" + (shape.pointer or b"")
    shape.fields = bulks(pairs)
    shape.pushed_fields = push_pairs(pairs)
    shape.field_count = len(pairs) // 2
    return shape


cdef _Shape NO_SHAPE = _Shape.__new__(_Shape)
# Of each mode, the shape of frames with the defaults: many writers share it.
cdef dict plain_shapes = {}


cdef int check_mode(object mode) except -1:
    if not isinstance(mode, StreamMode):
        raise InvalidType(f"mode must be a StreamMode, not {type(mode).__name__}.")
    return 0


cdef _Shape plain_shape(object mode):
    cdef _Shape shape
    check_mode(mode)
    shape = plain_shapes.get(mode)
    # `write` looks for the same object.
    if shape is None or shape.mode is not mode:
        shape = make_shape(mode, "token", None, "utf8", "worker")
        if len(plain_shapes) >= KNOWN_SHAPES:
            plain_shapes.clear()
        plain_shapes[mode] = shape
    return shape


cdef class WriterCore:
    """The writer of one attempt: batches frames, resends, takes acknowledgements (see the module).

    A shell subclasses it, moves the bytes and overrides the hooks `_on_ready`, `_on_linger` and
    `_on_progress`. What has no underscore is for users.

    Args:
        keys: head, log, live and summary key of the attempt.
        writer: Writer id of `ff_open_writer`, which is the fence of every append.
        mode: Mode of frames that name none.
        opened: Answer of `ff_open_writer`: ms and sequence of the last id, last visible sequence,
            stored rate, summary version, and the number of the opening if it is known.
        document: The summary at that version; None for version 0.
        retention_maxlen: Least number of durable frames that the log keeps, from 1.
        max_unacknowledged_bytes: `write` raises ``Overloaded`` instead of keeping more, from 1.
        linger_ms: How long a batch waits for more frames, 0 to 1000 ms; 0 sends at once.
        max_payload_bytes: Largest payload that `write` accepts, 1 byte to 1 MiB.
        place: The newest frame of the attempt that is known to be stored, which acknowledgements
            move (`ff_fast._core.places.Place`); None for a writer on its own.
        outbox: Takes its parts into calls; None for a writer whose owner asks `_next_batch`.
        home: Says which outbox that is, in place of *outbox*.
        tally: Counts what is written and acknowledged; None counts nothing.
        replays: The writer stores again what those before it have written, and has their document.

    Raises:
        InvalidInput: A number is out of range.
        Corruption: The stored rate or *document* is not in the form that ff_fast writes.
    """

    cdef object __weakref__
    cdef Tally _tally
    # Where it registers when a part can be sent; None for a writer that calls `_on_ready`.
    cdef Outbox _outbox
    # Says which outbox that is; None where it is always the same.
    cdef Home _home
    # What `error` returns.
    cdef object _error
    # The error that ends the writer. It is set first and refuses all writes; `_error` follows once
    # the error carries the frames that were not stored.
    cdef object _ending
    # Somebody has seen `_ending`, and with it the frames that were not stored.
    cdef bint _told
    # The shell wants `_on_progress`.
    cdef public bint _has_waiters
    cdef object _mode
    # Bulk strings of all keys, back to back, and where each of them ends.
    cdef bytes _keys
    cdef int _key_ends[4]
    # The writer id as a bulk string.
    cdef bytes _writer
    # The open batch. Owned memory: payloads back to back; length and time (in µs) of each frame;
    # runs. `_shapes` has the shape of each run.
    cdef char* _data
    cdef Py_ssize_t _size
    cdef Py_ssize_t _data_capacity
    cdef unsigned int* _lengths
    cdef long long* _times
    cdef int _count
    cdef int _capacity
    cdef Run* _runs
    cdef int _run_count
    cdef int _run_capacity
    cdef list _shapes
    # The shape of the newest frame, and the shapes of recent arguments: None while all frames have
    # the first one.
    cdef _Shape _shape
    cdef dict _known
    # Sealed batches, oldest first, in three lists that follow one another: refused, and held until
    # all batches behind them are answered; in flight; to be sent: a deque, or an empty tuple, as an
    # empty deque takes more than half a KiB.
    cdef list _returned
    cdef list _in_flight
    cdef object _unsent
    # It is registered as ready, and was not asked for a part since.
    cdef bint _notified
    # It is registered as one whose batch does not wait for others.
    cdef bint _hurried
    # The number of the last look that asked it for a part.
    cdef unsigned long long _asked
    # The group: frames of the open batch, its first run, of which readers are told before they are
    # stored. Its ms, 0 for no group; how many frames a push has reached, and how many one was made
    # for, each with their bytes; which open batch it is.
    cdef long long _group_ms
    cdef int _pushed
    cdef int _pushed_bytes
    cdef int _pushed_to
    cdef int _pushed_to_bytes
    cdef unsigned int _group
    # The push that is on its way.
    cdef Push _pushing
    # The open batch is stored with the next call. The next batch is a call of its own.
    cdef bint _store_due
    cdef bint _alone
    # Frames may be stored later than readers are told of them.
    cdef public bint _holds_back
    # Batches that are not acknowledged and have frames under an ms that the server chooses, and the
    # newest ms that was fixed.
    cdef int _unfixed
    cdef long long _fixed_ms
    # The last batch is sealed: no frame may follow.
    cdef bint _finishing
    # The open batch no longer lingers.
    cdef bint _due
    # Sequence of the newest frame, and of the newest visible (not best-effort) one.
    cdef long long _sequence
    cdef long long _visible
    # `_visible` as last sent; -1 when the server takes the last frame as visible.
    cdef long long _sent_visible
    # The newest acknowledged frame: its sequence and its ms.
    cdef long long _acked_sequence
    cdef long long _acked_ms
    # The server's time in ms as of an answer, and when that came, in µs.
    cdef long long _server_ms
    cdef long long _server_at_us
    # Up to which sequence a batch without frames has shown that the server still has all of them.
    cdef readonly long long _checked_sequence
    # What the writers of the lease share of it: the place, and what was acknowledged a moment ago,
    # None where nothing is kept.
    cdef readonly Newest _place
    cdef Held _held
    # The sequence up to which the server has what was acknowledged, -1 while nothing says that it
    # lacks any; all behind it is sent again.
    cdef long long _replay_from
    # The server has lost the opening of this writer. It is opened again before anything is sent.
    cdef readonly bint _opening_lost
    # How often it had to store frames again.
    cdef readonly int _replays
    # Sequence of the first frame of this writer, and the number of its opening.
    cdef readonly long long _first_sequence
    cdef long long _opening
    # Payloads of the open batch and arguments of the sealed ones.
    cdef Py_ssize_t _unacknowledged_bytes
    cdef Py_ssize_t _max_unacknowledged
    cdef readonly Py_ssize_t _max_payload
    cdef bint _cancel_requested
    cdef long long _lease_left_ms
    # How long a batch waits for more frames.
    cdef readonly long long _linger_us
    # Retention of the log.
    cdef long long _retention_maxlen
    cdef int _durable_since_trim
    # None until a frame is sent to the live window.
    cdef LiveWindow _window
    # Rate that an earlier writer has stored, in frames a second; 0 for none.
    cdef double _restored_rate
    # Summary: the fold of all patches written so far, and its version.
    cdef object _document
    cdef long long _summary_version
    # Bytes of the patches that follow the document on the server, and of that document.
    cdef Py_ssize_t _pending_bytes
    cdef Py_ssize_t _stored_bytes
    # Patch kind of the newest patch.
    cdef bytes _patch_kind

    def __cinit__(self):
        self._data = NULL
        self._lengths = NULL
        self._times = NULL
        self._runs = NULL
        # `write` refuses until __init__ has run.
        self._finishing = True
        self._shape = NO_SHAPE
        self._shapes = []
        self._returned = []
        self._in_flight = []
        self._unsent = ()

    def __dealloc__(self):
        PyMem_Free(self._data)
        PyMem_Free(self._lengths)
        PyMem_Free(self._times)
        PyMem_Free(self._runs)

    def __init__(
        self, *, tuple keys not None, bytes writer not None, mode, tuple opened not None,
        bytes document=None, long long retention_maxlen=10_000,
        Py_ssize_t max_unacknowledged_bytes=32 << 20, double linger_ms=0.0,
        Py_ssize_t max_payload_bytes=65536, Newest place=None, Outbox outbox=None, Home home=None,
        bint replays=False, Tally tally=None,
    ):
        cdef Py_ssize_t end = 0
        cdef Py_ssize_t i
        if retention_maxlen < 1:
            raise InvalidInput("retention_maxlen must be at least 1.")
        if not 0.0 <= linger_ms <= 1000.0:
            raise InvalidInput("linger_ms must be between 0 and 1000.")
        if max_unacknowledged_bytes < 1:
            raise InvalidInput("max_unacknowledged_bytes must be at least 1.")
        if not 1 <= max_payload_bytes <= MAX_PAYLOAD:
            raise InvalidInput("max_payload_bytes must be from 1 to 1048576.")
        self._keys = bulks(list(keys))
        self._writer = bulks([writer])
        self._replay_from = -1
        for i in range(4):
            end += bulk_size(len(keys[i]))
            self._key_ends[i] = end
        self._mode = mode
        if home is not None:
            outbox = home.outbox
        self._home = home
        self._outbox = outbox
        self._tally = tally
        (
            self._acked_ms, self._sequence, self._visible, estimator, self._summary_version, *rest
        ) = opened
        self._opening = rest[0] if rest else 0
        self._sent_visible = -1 if self._visible == self._sequence else self._visible
        self._acked_sequence = self._sequence
        self._checked_sequence = self._sequence
        self._place = place
        if place is not None:
            place.opened(self._acked_ms, self._acked_sequence)
        self._first_sequence = self._sequence + 1
        self._server_ms = self._acked_ms
        self._server_at_us = now_us()
        self._max_unacknowledged = max_unacknowledged_bytes
        self._max_payload = max_payload_bytes
        self._retention_maxlen = retention_maxlen
        # An earlier writer may have stopped just before a trim.
        self._durable_since_trim = TRIM_EVERY if self._sequence else 0
        self._linger_us = <long long>(linger_ms * 1000.0)
        self._holds_back = outbox is not None and not self._linger_us
        self._restored_rate = parse_rate(estimator)
        if document is not None:
            self._document = Document(document)
            self._stored_bytes = len(document)
        if place is not None and place.held is not None:
            self._held = <Held?>place.held
            if replays:
                self._document = self._held.document
                self._summary_version = self._held.version
                self._patch_kind = self._held.patch_kind
                self._durable_since_trim = 0
            self._held.opened(self, self._acked_ms, self._acked_sequence)
        self._shape = plain_shape(mode)
        self._finishing = False

    # -- writing --------------------------------------------------------------------------------

    cdef _Shape _shape_of(
        self, object mode, object frame_type, object correlation_id, object encoding, object source
    ):
        cdef tuple key
        cdef _Shape shape
        check_mode(mode)
        # Before the look-up, because a key of another type may be equal.
        check_str("frame_type", frame_type)
        if correlation_id is not None:
            check_str("correlation_id", correlation_id)
        check_str("encoding", encoding)
        check_str("source", source)
        key = (mode, frame_type, correlation_id, encoding, source)
        if self._known is None:
            shape = self._shape
            self._known = {
                (
                    shape.mode, shape.frame_type, shape.correlation_id, shape.encoding,
                    shape.source,
                ): shape
            }
        shape = self._known.get(key)
        if shape is None:
            shape = make_shape(mode, frame_type, correlation_id, encoding, source)
            # The table serves a few shapes that alternate; there may be any number of others.
            if len(self._known) >= KNOWN_SHAPES:
                self._known.clear()
            self._known[key] = shape
        return shape

    cdef int _reserve(self, Py_ssize_t size) except -1:
        """Make room for a frame of *size* bytes and a run. All allocations of `write` are here."""
        cdef Py_ssize_t capacity
        cdef void* moved
        if self._size + size > self._data_capacity or self._data is NULL:
            capacity = max(self._data_capacity * 2, IDLE_BYTES)
            while capacity < self._size + size:
                capacity *= 2
            moved = PyMem_Realloc(self._data, capacity)
            if moved is NULL:
                raise MemoryError()
            self._data = <char*>moved
            self._data_capacity = capacity
        if self._count == self._capacity:
            capacity = max(self._capacity * 2, IDLE_FRAMES)
            moved = PyMem_Realloc(self._lengths, capacity * sizeof(unsigned int))
            if moved is NULL:
                raise MemoryError()
            self._lengths = <unsigned int*>moved
            moved = PyMem_Realloc(self._times, capacity * sizeof(long long))
            if moved is NULL:
                raise MemoryError()
            self._times = <long long*>moved
            self._capacity = capacity
        if self._run_count == self._run_capacity:
            capacity = max(self._run_capacity * 2, IDLE_RUNS)
            moved = PyMem_Realloc(self._runs, capacity * sizeof(Run))
            if moved is NULL:
                raise MemoryError()
            self._runs = <Run*>moved
            self._run_capacity = capacity
        if len(self._shapes) == self._run_count:
            self._shapes.append(None)
        return 0

    def write(
        self, payload, frame_type="token", *, mode=None, correlation_id=None, encoding="utf8",
        source="worker",
    ):
        """Take one frame and return its sequence. Never waits, never does I/O.

        Args:
            payload: Up to ``max_payload_bytes`` of the backend, 65,536 by default. ``str`` is
                encoded as UTF-8; ``bytearray`` and ``memoryview`` are copied. In mode ``summary``
                it is a patch, checked here.
            frame_type: Classifier of the frame, 1 to 256 bytes of UTF-8.
            mode: ``StreamMode`` of the frame; None for the writer's.
            correlation_id: Text that readers get with the frame, 1 to 256 bytes of UTF-8, or None.
            encoding: ``utf8``, or how the payload is encoded otherwise, 1 to 256 bytes of UTF-8.
                Readers get this text; nothing is converted.
            source: Who made the frame, 1 to 256 bytes of UTF-8.

        Returns:
            Sequence of the frame in its attempt, from 1. The frame is stored once `flush` returns.

        Raises:
            InvalidType: An argument has the wrong type.
            InvalidPayload: The payload is a ``str`` with a surrogate or a released ``memoryview``.
            PayloadTooLarge: The payload has more than ``max_payload_bytes`` of the backend.
            InvalidPatch: The payload is not a patch that the summary can take.
            InvalidInput: A text is empty, too long or not UTF-8; or `close` was called.
            Overloaded: Too many bytes are unacknowledged. Call `drain`, then write again.
            FFError: A copy of the `error` that stopped the writer. Its ``unstored`` has the frames
                that were not stored.

        After all of these but the last the writer goes on, without this frame.
        """
        cdef _Shape shape = self._shape
        cdef Run* run
        cdef bytes data
        cdef Py_ssize_t size
        cdef long long previous, sequence
        if PyBytes_CheckExact(payload):
            data = <bytes>payload
        else:
            data = self._payload_of(payload, mode)
        size = PyBytes_GET_SIZE(data)
        if mode is None:
            mode = self._mode
        if size > self._max_payload:
            raise self._too_large(size, mode)
        if not (
            frame_type is shape.frame_type and mode is shape.mode
            and correlation_id is shape.correlation_id
            and encoding is shape.encoding and source is shape.source
        ):
            shape = self._shape_of(mode, frame_type, correlation_id, encoding, source)
        # No Python code runs from here until the frame is in the batch, so no other thread can end
        # the writer in between.
        if self._ending is not None:
            self._told = True
            raise copy.copy(self._ending)
        if self._finishing:
            raise InvalidInput("The writer is closing; write before close().")
        if self._unacknowledged_bytes + size > self._max_unacknowledged:
            if self._group_ms:
                self._seal_soon()
            raise Overloaded(
                f"{self._unacknowledged_bytes} bytes wait for the server; drain() and write again."
            )
        if self._count >= MAX_FRAMES or self._size + size > MAX_BATCH_BYTES:
            self._seal()
        self._reserve(size)
        if shape.kind == PATCH:
            self._fold(shape, data)
        if (
            shape is not self._shape or self._run_count == 0
            or (shape.kind != LIVE and self._visible != self._sequence)
            or (shape.kind != LOG and self._runs[self._run_count - 1].size + size > RUN_BYTES)
        ):
            previous = -1
            if shape.kind != LIVE and self._visible != self._sequence:
                previous = self._visible
            self._shapes[self._run_count] = shape
            self._shape = shape
            run = &self._runs[self._run_count]
            run.shape = self._run_count
            run.first = self._count
            run.count = 0
            run.offset = self._size
            run.size = 0
            run.previous = previous
            run.base_version = self._summary_version - (1 if shape.kind == PATCH else 0)
            self._run_count += 1
        run = &self._runs[self._run_count - 1]
        run.count += 1
        run.size += size
        memcpy(self._data + self._size, PyBytes_AS_STRING(data), <size_t>size)
        self._size += size
        self._lengths[self._count] = <unsigned int>size
        self._times[self._count] = now_us()
        self._count += 1
        self._sequence += 1
        if shape.kind != LIVE:
            self._visible = self._sequence
        self._unacknowledged_bytes += size
        # The hooks are Python code, in which other threads may write.
        sequence = self._sequence
        if self._count == 1 and self._linger_us:
            self._on_linger()
        if not self._notified:
            self._notify()
        elif not self._hurried and self._full():
            self._hurry()
        return sequence

    cdef object _too_large(self, Py_ssize_t size, object mode):
        if mode is None:
            mode = self._mode
        summary = isinstance(mode, StreamMode) and mode.patch_kind is not None
        return PayloadTooLarge(self._max_payload, size, "patch" if summary else "frame")

    cdef bytes _payload_of(self, object payload, object mode):
        if isinstance(payload, str):
            try:
                return PyUnicode_AsUTF8String(payload)
            except UnicodeEncodeError:
                raise InvalidPayload(
                    "The payload has a surrogate that UTF-8 cannot encode; pass bytes."
                ) from None
        if not isinstance(payload, (bytes, bytearray, memoryview)):
            raise InvalidType(
                f"The payload must be bytes, str, bytearray or memoryview, "
                f"not {type(payload).__name__}."
            )
        try:
            view = memoryview(payload)
        except ValueError:
            raise InvalidPayload("The payload is a memoryview that was released.") from None
        # Before the copy, so that a huge buffer costs nothing.
        if view.nbytes > self._max_payload:
            raise self._too_large(view.nbytes, mode)
        return view.tobytes()

    cdef int _fold(self, _Shape shape, bytes data) except -1:
        """Apply a patch to the document, or raise and leave the document unchanged."""
        cdef int collecting = PyGC_Disable()
        try:
            if self._document is None:
                self._document = Document()
            if shape.pointer is None:
                self._document.merge(data)
            else:
                self._document.append(shape.pointer, data)
        finally:
            if collecting:
                PyGC_Enable()
        self._summary_version += 1
        self._patch_kind = shape.patch_name
        self._pending_bytes += PyBytes_GET_SIZE(data)
        if self._held is not None:
            self._held.document = self._document
            self._held.version = self._summary_version
            self._held.patch_kind = shape.patch_name
        return 0

    # -- sealing --------------------------------------------------------------------------------

    cdef Py_ssize_t _run_bytes(self, Run* run, long long now) noexcept:
        """Size of the value of a run: a payload, or several in the layout of a run."""
        cdef Py_ssize_t total = varint_size(run.count) + run.size
        cdef Py_ssize_t i
        if run.count == 1:
            return run.size
        for i in range(run.first, run.first + run.count):
            total += varint_size(self._lengths[i]) + varint_size(self._moment(i, now))
        return total

    cdef inline unsigned long long _moment(self, Py_ssize_t i, long long now) noexcept:
        """Return when frame *i* of a run was written, as the run has it: the zigzag of the ms after
        the ms of its entry."""
        if self._group_ms and i < self._runs[0].count:
            # The ms of a group is that of its first frame.
            return 2 * age_ms(self._times[i], self._times[0])
        cdef unsigned long long age = age_ms(now, self._times[i])
        return 2 * age - 1 if age else 0

    cdef char* _put_run(self, char* out, Run* run, long long now) noexcept:
        cdef Py_ssize_t i
        if run.count > 1:
            out = put_varint(out, run.count)
            for i in range(run.first, run.first + run.count):
                out = put_varint(out, self._lengths[i])
            for i in range(run.first, run.first + run.count):
                out = put_varint(out, self._moment(i, now))
        return put_raw(out, self._data + run.offset, run.size)

    cdef Py_ssize_t _put_body(
        self, char* out, Py_ssize_t skip, Py_ssize_t skip_bytes, long long now, bint bare=False
    ) noexcept:
        """Write the open batch without its first *skip* frames as a push has it; return the size.

        All but a whole first run is left out at most. With NULL for *out* nothing is written. What
        is *bare* lacks what the server knows from its one block: the stream and the fields in
        front, and the end that is also the value, or the values, of the block.
        """
        cdef Py_ssize_t total = 0
        cdef Py_ssize_t index, i, first, count, size, extras
        cdef long long version
        cdef char* at = out
        cdef Run* run
        cdef _Shape shape
        for index in range(self._run_count):
            run = &self._runs[index]
            shape = <_Shape>self._shapes[index]
            first = run.first
            count = run.count
            size = run.size
            if index == 0 and skip:
                if skip == count:
                    continue
                first += skip
                count -= skip
                size -= skip_bytes
            version = version_after(run, shape)
            extras = extras_of(shape, run.previous, version)
            if bare:
                pass
            elif out is not NULL:
                at[0] = c'L' if shape.kind == LOG else c'V'
                at = put_varint(at + 1, extras)
                at = put_raw(
                    at, PyBytes_AS_STRING(shape.pushed_fields),
                    PyBytes_GET_SIZE(shape.pushed_fields),
                )
                if run.previous >= 0:
                    at = put_pair(at, "prev", 4, run.previous)
                if version > 0:
                    at = put_pair(at, "summary_version", 15, version)
            if not bare:
                total += 1 + varint_size(extras) + PyBytes_GET_SIZE(shape.pushed_fields)
                if run.previous >= 0:
                    total += pair_size(4, run.previous)
                if version > 0:
                    total += pair_size(15, version)
            size += varint_size(count)
            for i in range(first, first + count):
                size += varint_size(self._lengths[i])
                # A frame of the log has the time of its id, and so has one that is stored plain.
                if shape.kind == LOG or run.count == 1:
                    size += 1
                else:
                    size += varint_size(self._moment(i, now))
            total += varint_size(size)
            if out is not NULL:
                at = put_varint(at, size)
            if bare and shape.kind != LOG and count > 1:
                return total
            total += size - (run.size if bare else 0)
            if out is NULL:
                continue
            at = put_varint(at, count)
            size = 0
            for i in range(first, first + count):
                at = put_varint(at, self._lengths[i])
                size += self._lengths[i]
            for i in range(first, first + count):
                if shape.kind == LOG or run.count == 1:
                    at = put_varint(at, 0)
                else:
                    at = put_varint(at, self._moment(i, now))
            if not bare:
                at = put_raw(at, self._data + run.offset + run.size - size, size)
        return total

    cdef bint _is_bare(self) noexcept:
        """Whether the server completes a push with the fields and values of the open batch, as it
        is one block and no frame of it was pushed: so they cross the wire once."""
        return (
            self._run_count == 1 and self._pushed == 0
            # `prev` of a frame of the log takes a block of its own.
            and (
                self._count == 1 or self._runs[0].previous < 0
                or (<_Shape>self._shapes[0]).kind != LOG
            )
        )

    cdef bytes _pending_field(self, Run* run, _Shape shape):
        """Field name of a run in the summary hash. It has all that a reader needs to fold it."""
        cdef bytes form = b"run" if run.count > 1 else b"patch"
        cdef long long version = run.base_version + run.count
        return b"%b:%d:%d:%b" % (form, version, run.count, shape.patch_name)

    cdef int _seal(self, bint flies=False) except -1:
        """Make the open batch the last unsent one, or that in flight where it *flies*, and begin a
        new one.

        With a `_count` of 0 the batch has retention work alone. After an error the batch is still
        open.
        """
        cdef int collecting = PyGC_Disable()
        cdef Batch batch
        try:
            batch = self._sealed()
            if flies:
                self._in_flight.append(batch)
            else:
                self._unsent_queue().append(batch)
        finally:
            if collecting:
                PyGC_Enable()
        self._count = 0
        self._size = 0
        self._run_count = 0
        self._shapes.clear()
        self._due = False
        self._store_due = False
        self._alone = False
        self._group_ms = 0
        self._group += 1
        self._pushed = self._pushed_bytes = 0
        self._pushed_to = self._pushed_to_bytes = 0
        return 0

    cdef object _unsent_queue(self):
        if type(self._unsent) is tuple:
            self._unsent = deque()
        return self._unsent

    cdef Batch _sealed(self):
        """Return the open batch as a part of a call."""
        cdef Batch batch = Batch.__new__(Batch)
        cdef long long now = now_us()
        # Writer, previous sequence and push.
        cdef Py_ssize_t parts = 3
        cdef Py_ssize_t total = PyBytes_GET_SIZE(self._writer)
        cdef Py_ssize_t body, head
        cdef bint bare
        cdef Py_ssize_t durable = 0
        cdef Py_ssize_t live = 0
        cdef Py_ssize_t patches = 0
        cdef Py_ssize_t index, i, value_size, first
        cdef int uses = 0
        cdef Run* run
        cdef _Shape shape
        cdef list names = []
        cdef bytes name, tail
        cdef char* start
        cdef char* out
        cdef const char* data
        batch.first_sequence = self._sequence - self._count + 1
        batch.frame_count = self._count
        total += number_size(batch.first_sequence - 1)
        for index in range(self._run_count):
            run = &self._runs[index]
            shape = <_Shape>self._shapes[index]
            if shape.kind == LOG:
                uses |= USES_LOG
                durable += run.count
                parts += run.count
                # `prev` belongs to the first frame alone, which is therefore a separate block.
                first = 1 if run.previous >= 0 else 0
                if first:
                    total += head_size(shape, 1, run.previous, 0, &parts)
                if run.count > first:
                    total += head_size(shape, run.count - first, -1, 0, &parts)
                for i in range(run.first, run.first + run.count):
                    total += bulk_size(self._lengths[i])
                continue
            live += run.count
            uses |= USES_LIVE
            parts += 1
            name = None
            if shape.kind == PATCH:
                uses |= USES_SUMMARY
                patches += run.count
                name = self._pending_field(run, shape)
                parts += 2
                total += bulk_size(PyBytes_GET_SIZE(name)) + number_size(run.base_version)
            names.append(name)
            total += head_size(shape, run.count, run.previous, version_after(run, shape), &parts)
            total += bulk_size(self._run_bytes(run, now))
        batch.live_count = live
        batch.patch_count = patches
        body = self._push_size(now)
        total += bulk_size(body)
        if self._group_ms:
            parts += 2
            total += bulk_size(1) + number_size(self._group_ms)
        tail = self._retention(batch, now, durable, &parts, &uses)
        self._name_keys(batch, uses)
        head = 10 * parts + batch.key_count
        total += number_size(head) + PyBytes_GET_SIZE(tail)
        batch.argument_count = parts + 1
        start = batch.begin(total)
        out = put_number(start, head)
        out = put_raw(out, PyBytes_AS_STRING(self._writer), PyBytes_GET_SIZE(self._writer))
        out = put_number(out, batch.first_sequence - 1)
        out = put_length(out, c'$', body)
        if body:
            bare = body > 1 and self._is_bare()
            out[0] = c'+' if bare else c' '
            out += 1
            if body > 1:
                out += self._put_body(out, self._pushed, self._pushed_bytes, now, bare)
        out = put_raw(out, "\r\n", 2)
        if self._group_ms:
            out = put_bulk(out, PyBytes_AS_STRING(BLOCK_PUSHED_MS), 1)
            out = put_number(out, self._group_ms)
        batch.first_ms = self._group_ms
        batch.blocks_at = out - PyBytes_AS_STRING(batch.message)
        batch.block_arguments = parts - 3 - (2 if self._group_ms else 0)
        batch.follows_visible = self._sent_visible < 0
        live = 0
        for index in range(self._run_count):
            run = &self._runs[index]
            shape = <_Shape>self._shapes[index]
            if shape.kind == LOG:
                data = self._data + run.offset
                first = 1 if run.previous >= 0 else 0
                if first:
                    out = put_head(out, shape, 1, run.previous, 0)
                for i in range(run.first, run.first + run.count):
                    if i == run.first + first:
                        out = put_head(out, shape, run.count - first, -1, 0)
                    out = put_bulk(out, data, self._lengths[i])
                    data += self._lengths[i]
                continue
            out = put_head(out, shape, run.count, run.previous, version_after(run, shape))
            value_size = self._run_bytes(run, now)
            out = put_length(out, c'$', value_size)
            out = self._put_run(out, run, now)
            out = put_raw(out, "\r\n", 2)
            name = <bytes>names[live]
            live += 1
            if shape.kind == PATCH:
                out = put_bulk(out, PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))
                out = put_number(out, run.base_version)
        out = put_raw(out, PyBytes_AS_STRING(tail), PyBytes_GET_SIZE(tail))
        assert out - start == total, "sizing pass and writing pass disagree"
        # Nothing below can fail.
        if self._count:
            batch.written_us = self._times[0]
            if self._tally is not None:
                self._tally.wrote(durable, patches, batch.live_count - patches, self._size)
        batch.alone = self._alone
        if self._group_ms:
            self._fixed_ms = self._group_ms
            if self._run_count == 1:
                batch.fixed_ms = self._group_ms
        if batch.frame_count and not batch.fixed_ms:
            self._unfixed += 1
        if self._window is not None:
            self._window.sealed(batch.live_count, batch.renews, now)
        self._sent_visible = -1 if self._visible == self._sequence else self._visible
        self._unacknowledged_bytes += PyBytes_GET_SIZE(batch.message) - self._size
        return batch

    cdef Py_ssize_t _push_size(self, long long now) noexcept:
        """Return the size of what readers are told when the open batch is stored: nothing, a space,
        a space and the frames, or a plus and the frames without what the batch has anyway."""
        cdef Py_ssize_t size
        if self._count == 0:
            return 0
        if self._group_ms:
            if self._run_count == 1:
                if self._pushed == self._count:
                    return 0
            elif self._pushed < self._runs[0].count:
                # The frames of a push have one ms.
                return 1
        if (
            self._count - self._pushed > PUSH_FRAMES
            or self._size - self._pushed_bytes > PUSH_BYTES
        ):
            return 1
        size = self._put_body(NULL, self._pushed, self._pushed_bytes, now)
        if size > PUSH_BYTES:
            return 1
        if self._is_bare():
            size = self._put_body(NULL, 0, 0, now, True)
        return 1 + size

    cdef int _name_keys(self, Batch batch, int uses) noexcept:
        """Name the keys that a batch uses."""
        cdef Py_ssize_t count = 2
        batch.uses = uses
        if uses & USES_SUMMARY:
            count = 4
        elif uses == (USES_LOG | USES_LIVE):
            count = 3
        batch.keys = self._keys
        batch.key_count = count
        batch.meta_end = self._key_ends[0]
        batch.keys_start = self._key_ends[0]
        batch.keys_end = self._key_ends[count - 1]
        if uses == USES_LIVE:
            batch.keys_start = self._key_ends[1]
            batch.keys_end = self._key_ends[2]
        return 0

    cdef bytes _retention(
        self, Batch batch, long long now, Py_ssize_t durable, Py_ssize_t* parts,
        int* uses,
    ):
        """Return the blocks after the frames that are due: trims, expiry, last visible frame, rate,
        document."""
        cdef list tail = []
        cdef (long long, long long) first_kept
        cdef bytes rate
        cdef Py_ssize_t i
        self._durable_since_trim += durable
        if self._durable_since_trim >= TRIM_EVERY:
            self._durable_since_trim = 0
            tail += [BLOCK_TRIM_LOG, b"%d" % self._retention_maxlen]
            uses[0] |= USES_LOG
        if batch.live_count:
            for i in range(self._run_count):
                self._widen(<_Shape>self._shapes[i], now)
            first_kept = self._window.first_kept(
                batch.live_count, now, self._server_ms + (now - self._server_at_us) // 1000
            )
            if first_kept[1]:
                tail += [BLOCK_TRIM_LIVE, b"%d-%d" % first_kept]
        if self._window is not None and self._window.renew_due(batch.live_count > 0, now):
            batch.renews = True
            tail += [BLOCK_LIVE_TTL, b"%d" % (2 * self._window.ttl_ms)]
            uses[0] |= USES_LIVE
        if self._visible != self._sequence:
            if self._sent_visible != self._visible:
                tail += [BLOCK_VISIBLE, b"%d" % self._visible]
        elif self._sent_visible >= 0:
            tail += [BLOCK_VISIBLE, b""]
        if self._window is not None and (batch.live_count or self._finishing):
            rate = self._window.take_rate(self._finishing, now)
            if rate is not None:
                tail += [BLOCK_ESTIMATOR, rate]
        if self._pending_bytes and (
            self._finishing or self._pending_bytes > max(2 * self._stored_bytes, COMPACT_BYTES)
        ):
            # All frames so far are in this batch or before it, so this is the document after it.
            # Each document is at most 3x the previous one, so all of them together cost at most
            # 1.5x the last. A reader folds patches of at most 2x the document. On MemoryError the
            # pending patches simply stay.
            try:
                tail += [
                    BLOCK_DOCUMENT, b"%d" % self._summary_version, self._document.dumps(),
                    self._patch_kind,
                ]
                uses[0] |= USES_SUMMARY
                self._pending_bytes = 0
                self._stored_bytes = self._document.size
            except (Corruption, MemoryError):
                pass
        parts[0] += len(tail)
        return bulks(tail)

    cdef int _widen(self, _Shape shape, long long now) except -1:
        """Make the window keep what the mode of *shape* asks for; create it for the first one."""
        if shape.kind == LOG:
            return 0
        if self._window is None:
            self._window = LiveWindow(
                shape.ttl_ms, shape.floor, shape.ceiling, shape.alpha, shape.kind == PATCH,
                self._restored_rate, now, self._acked_ms, self._acked_sequence,
            )
        elif shape.kind == LIVE:
            self._window.widen(shape.ttl_ms, shape.floor, shape.ceiling, shape.alpha, now)
        return 0

    # -- sending --------------------------------------------------------------------------------

    cdef bint _full(self) noexcept:
        return self._count >= EAGER_FRAMES or self._size >= EAGER_BYTES

    cdef bint _sendable(self):
        cdef Py_ssize_t flying = len(self._in_flight)
        if (
            self._ending is not None or self._returned or self._opening_lost
            or flying >= MAX_IN_FLIGHT
        ):
            return False
        if self._unsent:
            return True
        if self._count == 0:
            return False
        if self._full():
            return True
        if not self._due and self._linger_us:
            return False
        if self._may_hold():
            return self._pushing is None and self._count > self._pushed_to
        return flying == 0

    cdef bint _may_hold(self):
        """Whether the open batch is a group, or can be one: readers are told of its frames at once,
        and the frames are stored later.

        The ms of a group is fixed by its first push. So every id before it must be fixed.
        """
        cdef _Shape shape
        if (
            self._run_count != 1 or self._store_due or not self._holds_back
            or self._finishing or self._unfixed
            # Readers may have been told of frames that an earlier writer never stored, under an ms
            # that is later than the server's time is known to be. An answer to a frame of this
            # writer shows a later one.
            or (self._opening != 1 and self._acked_sequence < self._first_sequence)
            or self._count - self._pushed_to >= HOLD_FRAMES
            or self._size - self._pushed_to_bytes > HOLD_BYTES
            or self._full() or 2 * self._unacknowledged_bytes > self._max_unacknowledged
        ):
            return False
        shape = <_Shape>self._shapes[0]
        if shape.kind != LIVE or shape.ttl_ms < HOLD_TTL_MS:
            return False
        return self._group_ms or self._outbox._now_ms(now_us()) != 0

    cdef Push _push(self):
        """Return a push of the frames of the group that no push has; begin the group with the first
        one."""
        cdef Push push = Push.__new__(Push)
        cdef long long now = now_us()
        cdef Py_ssize_t size, total
        cdef char* start
        cdef char* out
        cdef bint first = self._group_ms == 0
        if first:
            self._group_ms = max(self._outbox._now_ms(now), self._acked_ms, self._fixed_ms)
        try:
            size = self._put_body(NULL, self._pushed_to, self._pushed_to_bytes, now)
            # `f`, the id and a space.
            size += 1 + digits(self._group_ms) + 1 + digits(self._sequence) + 1
            total = number_size(21) + PyBytes_GET_SIZE(self._writer) + bulk_size(size)
            push.argument_count = 3
            push.keys = self._keys
            push.key_count = 1
            push.meta_end = push.keys_start = push.keys_end = self._key_ends[0]
            start = push.begin(total)
            if first:
                self._outbox._hold(self, self._group)
        except BaseException:
            if first:
                self._group_ms = 0
            raise
        # Two arguments behind the head, and one key.
        out = put_number(start, 21)
        out = put_raw(out, PyBytes_AS_STRING(self._writer), PyBytes_GET_SIZE(self._writer))
        out = put_length(out, c'$', size)
        out[0] = c'f'
        out = put_digits(out + 1, self._group_ms)
        out[0] = c'-'
        out = put_digits(out + 1, self._sequence)
        out[0] = c' '
        out += 1
        out += self._put_body(out, self._pushed_to, self._pushed_to_bytes, now)
        out = put_raw(out, "\r\n", 2)
        assert out - start == total, "sizing pass and writing pass disagree"
        push.group = self._group
        push.upto = self._pushed_to = self._count
        push.upto_bytes = self._pushed_to_bytes = self._size
        self._pushing = push
        return push

    cdef int _store_group(self, long long group) except -1:
        """Store the open batch if it is that group still."""
        if self._group_ms and self._group == group:
            self._store_due = True
            self._notify()
        return 0

    cdef object _next_part(self):
        """Return what to send now, or None. It is in flight from here on."""
        cdef Batch batch
        self._notified = False
        self._hurried = False
        if not self._sendable():
            return None
        if not self._unsent:
            if self._may_hold():
                return self._push()
            self._seal(True)
            batch = <Batch>self._in_flight[len(self._in_flight) - 1]
        else:
            batch = <Batch>self._unsent[0]
            self._in_flight.append(batch)
            self._unsent.popleft()
            if not self._unsent:
                self._unsent = ()
        self._notify()
        return batch

    def _next_batch(self):
        """Return the batch to send now, or None. It is in flight from here on."""
        return self._next_part()

    cdef bint _next_is_alone(self):
        """Whether what is sent next is a call of its own."""
        return (<Batch>self._unsent[0]).alone if self._unsent else self._alone

    cdef Py_ssize_t _next_frames(self):
        """Return how many frames are sent next."""
        if self._unsent:
            return (<Batch>self._unsent[0]).frame_count
        return self._count if self._store_due else self._count - self._pushed_to

    cdef Py_ssize_t _next_bytes(self):
        """Return about how many bytes are sent next."""
        if self._unsent:
            return (<Batch>self._unsent[0]).size()
        return self._size

    def _seal_soon(self):
        """End the linger of the open batch, or the hold of its frames: it is sealed as soon as
        nothing is in flight."""
        if self._count:
            self._due = True
            self._store_due = True
        self._notify()
        self._press()

    cdef bint _unchecked(self, long long checked):
        """Whether all frames are acknowledged, and those after sequence *checked* not confirmed
        since then: a failover may have lost them."""
        return (
            self._acked_sequence == self._sequence and self._acked_sequence > checked
            and (
                self._place is None or self._acked_sequence > self._place.checked
            )
        )

    def _check_soon(self):
        """Ask the server whether it still has every frame, by a batch without frames.

        Returns:
            Whether that is needed: wait until `_checked_sequence` is that of the last frame. It is
            not where frames wait for the server, whose acknowledgement shows the same.
        """
        if self._ending is not None or not self._unchecked(self._checked_sequence):
            return False
        # A batch that is on its way has no frames either.
        if self._idle:
            self._seal()
            self._notify()
            self._press()
        return True

    def _seal_last(self):
        """Queue the last batch, after which `write` refuses.

        It has the open frames, and what a later writer or reader continues from: rate and document.
        A batch with nothing asks whether the server still has every frame.
        """
        if self._ending is not None or self._finishing:
            return
        self._finishing = True
        if (
            self._count or self._pending_bytes or self._window is not None
            or (self._idle and self._unchecked(self._first_sequence - 1))
        ):
            try:
                self._seal()
            except BaseException:
                self._finishing = False
                raise
            self._notify()
        self._press()

    cdef int _notify(self) except -1:
        if not self._notified and self._sendable():
            self._notified = True
            self._hurried = self._urgent()
            if (
                self._home is not None and self._outbox is not self._home.outbox
                and not self._in_flight and self._pushing is None
            ):
                self._outbox = self._home.outbox
            try:
                if self._outbox is None:
                    self._on_ready()
                else:
                    self._outbox.register(self, self._hurried)
            except BaseException:
                # For example an interrupt. The next call tells the shell again.
                self._notified = False
                raise
        return 0

    cdef bint _urgent(self):
        """Whether what is sent next does not wait for others."""
        return self._full() or len(self._unsent) != 0

    cdef int _hurry(self) except -1:
        if self._outbox is not None and self._urgent():
            self._hurried = True
            self._outbox.hurry()
        return 0

    cdef int _press(self) except -1:
        """Somebody waits: what is ready does not linger for other writers."""
        return self._outbox.press() if self._outbox is not None and self._notified else 0

    def _requeue(self):
        """The connection is lost: queue all batches in flight again, in order.

        Their outcome is unknown; a repeat is harmless.
        """
        cdef int collecting = PyGC_Disable()
        try:
            for batch in self._in_flight:
                (<Batch>batch).doubtful = True
            if self._held is not None and self._in_flight:
                self._held._doubted = True
            if self._returned or self._in_flight:
                if self._tally is not None:
                    self._tally.sent_again(len(self._returned) + len(self._in_flight))
                self._unsent_queue().extendleft((self._returned + self._in_flight)[::-1])
            self._returned.clear()
            self._in_flight.clear()
            self._push_lost()
            if self._replay_from >= 0:
                self._replay()
        finally:
            if collecting:
                PyGC_Enable()
        if self._opening_lost:
            self._on_lost_opening()
        self._notify()

    # -- replay ---------------------------------------------------------------------------------

    def _ask(self):
        """Ask the server whether it still has every frame, where something may have been lost."""
        if self._ending is None and self._idle and self._acked_sequence:
            self._seal()
            self._notify()
            self._press()

    def _reopened(self, long long ms, long long sequence, long long opening):
        """Go on after the opening was lost and made again.

        Args:
            ms: Ms and
            sequence: sequence of the last frame that the server has.
            opening: The number of the opening.
        """
        cdef Batch batch
        cdef int collecting
        if self._ending is not None:
            return
        self._opening_lost = False
        self._opening = self._held.opening = opening
        if sequence > self._place.sequence:
            self._end(WriterSuperseded(), False)
            return
        if sequence == self._place.sequence and ms != self._place.ms:
            # Another frame has the sequence of the last one.
            self._end(SequenceGap(sequence, sequence + 1), False)
            return
        collecting = PyGC_Disable()
        try:
            # A batch up to there would not be taken from this opening.
            while self._unsent:
                batch = <Batch>self._unsent[0]
                if not batch.again or last_of(batch) > sequence:
                    break
                self._unsent.popleft()
                self._stored(batch)
                self._held.keep(batch, now_us())
                self._acked_sequence = last_of(batch)
            if sequence < self._acked_sequence:
                self._replay_from = sequence
                self._replay()
        finally:
            if collecting:
                PyGC_Enable()
        self._notify()

    cdef bint _is_newest(self) except -1:
        """Whether what is held is this writer's to store again: no other was opened after it."""
        return self._held is not None and self._held._writer == self._writer

    cdef bint _must_replay(self, Batch batch, object reply, object error) except -1:
        """Note what a refusal says of the server; return whether *batch* is sent again for that."""
        cdef long long stored
        if not self._is_newest():
            return False
        if isinstance(error, SequenceGap):
            stored = error.expected - 1
            if stored >= batch.first_sequence - 1 or stored >= self._acked_sequence:
                return False
            self._replay_from = stored
            return True
        if is_lost_opening(reply, self._opening):
            self._opening_lost = True
            return True
        return False

    cdef int _replay(self) except -1:
        """Queue, before everything else, what was acknowledged and the server has lost; where it is
        not held any more, that it is lost."""
        cdef long long stored = self._replay_from
        cdef list held = self._held.take(self, stored)
        cdef list batches = []
        cdef list renewal = None
        cdef Batch following = None
        cdef Batch batch, new
        cdef long long last = self._acked_sequence
        cdef long long ms = self._held._before_ms
        self._replay_from = -1
        self._replays += 1
        if self._tally is not None:
            self._tally.sent_again(len(held))
        if held:
            last = (<Batch>held[0]).first_sequence - 1
        if last > stored and self._summary_version > 0:
            # The document is that after the newest patch, so all patches are in batches.
            if self._count:
                self._seal()
            renewal = [
                BLOCK_RENEWAL, b"%d" % self._summary_version, self._document.dumps(),
                self._patch_kind or b"json-merge-patch:",
            ]
            self._pending_bytes = 0
            self._stored_bytes = self._document.size
            held.extend(self._unsent)
            for batch in self._unsent:
                self._unacknowledged_bytes -= PyBytes_GET_SIZE(batch.message)
            self._unsent = ()
        if last > stored:
            if held or self._unsent:
                following = <Batch>(held[0] if held else self._unsent[0])
                if following.first_ms:
                    ms = min(ms, following.first_ms)
            batches.append(self._loss(stored, last, ms, following))
        for batch in held:
            batches.append(self._rewritten(batch, renewal is not None, b"", 0))
        if renewal is not None:
            batches.append(self._renewing(<Batch>batches.pop(), renewal))
        for new in batches:
            self._unacknowledged_bytes += PyBytes_GET_SIZE(new.message)
        self._unsent_queue().extendleft(batches[::-1])
        self._acked_sequence = stored
        self._checked_sequence = min(self._checked_sequence, stored)
        self._place.checked = min(self._place.checked, stored)
        if last > stored:
            self._place.lose(stored + 1, last)
        return 0

    cdef Batch _loss(self, long long stored, long long last, long long ms, Batch following):
        """Return the batch that says that the frames behind *stored* up to *last* are lost."""
        cdef Batch batch = Batch.__new__(Batch)
        cdef list blocks = [BLOCK_LOST, b"%d" % (last - stored), BLOCK_VISIBLE]
        # Everybody hears of a loss, so it is visible. What follows may not be.
        if following is None:
            self._sent_visible = -1
            self._visible = max(self._visible, last)
            blocks.append(b"")
        else:
            blocks.append(b"" if following.follows_visible else b"%d" % last)
        batch.first_sequence = stored + 1
        batch.lost_count = last - stored
        batch.first_ms = batch.later_ms = ms
        self._name_keys(batch, USES_LOG)
        return self._written(batch, bulks(blocks), 4, True)

    cdef Batch _rewritten(self, Batch batch, bint plain, bytes more, Py_ssize_t more_arguments):
        """Return *batch* under the ids that it had, if it was acknowledged; where it is *plain*
        without its part in the summary; with *more* blocks."""
        cdef Batch new = Batch.__new__(Batch)
        cdef bytes blocks = batch.message[batch.blocks_at:]
        cdef Py_ssize_t arguments = batch.block_arguments
        if plain:
            argv = without_summary(blocks, arguments)
            arguments = len(argv)
            blocks = bulks(argv)
        new.first_sequence = batch.first_sequence
        new.frame_count = batch.frame_count
        new.lost_count = batch.lost_count
        new.first_ms = batch.first_ms
        new.later_ms = batch.later_ms
        new.follows_visible = batch.follows_visible
        self._name_keys(new, batch.uses)
        if batch.later_ms:
            return self._written(new, blocks + more, arguments + more_arguments, True)
        new.live_count = batch.live_count
        new.patch_count = batch.patch_count
        new.written_us = batch.written_us
        new.renews = batch.renews
        new.doubtful = batch.doubtful
        new.alone = batch.alone
        new.fixed_ms = batch.fixed_ms
        return self._written(new, blocks + more, arguments + more_arguments, False)

    cdef Batch _renewing(self, Batch batch, list renewal):
        """Return *batch* with the whole document, whatever the summary is."""
        batch.uses = USES_SUMMARY
        return self._rewritten(batch, False, bulks(renewal), 4)

    cdef Batch _written(self, Batch batch, bytes blocks, Py_ssize_t arguments, bint again):
        """Make the message of *batch* from its blocks. What is sent *again* has the ids that it
        had."""
        # Readers read what comes late: a push would name one time for all its frames.
        cdef list head = [of_bulk(self._writer), b"%d" % (batch.first_sequence - 1)]
        cdef bytes start
        head.append(b" " if batch.frame_count or batch.lost_count else b"")
        if not (batch.frame_count or batch.lost_count):
            pass
        elif again:
            head += [BLOCK_REPLAYED_MS, b"%d" % batch.first_ms, b"%d" % batch.later_ms]
        elif batch.first_ms:
            head += [BLOCK_PUSHED_MS, b"%d" % batch.first_ms]
        batch.again = again
        if again:
            batch.fixed_ms = batch.later_ms
        batch.block_arguments = arguments
        batch.argument_count = len(head) + arguments + 1
        head.insert(0, b"%d" % (10 * (batch.argument_count - 1) + batch.key_count))
        start = bulks(head)
        out = batch.begin(PyBytes_GET_SIZE(start) + PyBytes_GET_SIZE(blocks))
        batch.blocks_at = (
            out - PyBytes_AS_STRING(batch.message) + PyBytes_GET_SIZE(start)
        )
        out = put_raw(out, PyBytes_AS_STRING(start), PyBytes_GET_SIZE(start))
        put_raw(out, PyBytes_AS_STRING(blocks), PyBytes_GET_SIZE(blocks))
        return batch

    def _acknowledge(
        self, _Part part not None, reply, long long now_ms=0, bint shared=False
    ):
        """Take the server's answer to *part*.

        Args:
            part: A push, or the oldest batch in flight. An answer to another one belongs to an
                earlier connection and is ignored.
            reply: ``bytes``: the part is applied. ``list``: the function refused. An exception: an
                error reply.
            now_ms: The server's time in ms as of this answer; 0 where it says none.
            shared: Whether *reply* is that of a call with other parts.

        Returns:
            None, or an error after which the batch is sent again: the shell repairs the cause
            (loads the library, backs off) and asks for the next batch. After a refusal that is
            final the writer has failed and None is returned.
        """
        return self._answered(part, reply, now_ms, shared)

    cdef object _answered(self, _Part part, object reply, long long now_ms, bint shared):
        if self._ending is not None:
            return None
        if type(part) is Push:
            return self._push_answered(<Push>part, reply, now_ms, shared)
        return self._batch_answered(<Batch>part, reply, now_ms, shared)

    cdef object _batch_answered(self, Batch batch, object reply, long long now_ms, bint shared):
        # Ms and sequence of the last id, when the lease ends in ms, and 1 if a cancel is requested.
        cdef long long values[4]
        cdef long long acked, now
        cdef bint asked
        if not self._in_flight or self._in_flight[0] is not batch:
            return None
        acked = last_of(batch)
        if not (
            PyBytes_CheckExact(reply)
            and parse_numbers(<bytes>reply, "-  ", 4, values) and values[1] == acked
        ):
            return self._refused(batch, reply, shared)
        self._in_flight.pop(0)
        now = now_us()
        # The server accepts batches only in order, so this acknowledgement proves that all earlier
        # ones are stored; an earlier refusal was of a resend.
        for earlier in self._returned:
            self._stored(<Batch>earlier)
            self._count_stored(<Batch>earlier, now)
            self._keep(<Batch>earlier, self._acked_ms, now)
        self._returned.clear()
        self._replay_from = -1
        self._opening_lost = False
        self._stored(batch)
        self._count_stored(batch, now)
        asked = self._learn(values[2], values[3], now_ms, now)
        if self._held is not None:
            self._held._doubted = False
            self._keep(batch, max(values[0], self._acked_ms), now)
        if batch.frame_count or batch.lost_count:
            self._acked_sequence = acked
            self._acked_ms = max(self._acked_ms, values[0])
            if self._place is not None and acked >= self._place.sequence:
                self._place.ms = self._acked_ms
                self._place.sequence = acked
        elif values[0] != self._acked_ms and not batch.again:
            # Another frame has the sequence of the last one.
            self._end(SequenceGap(acked, acked + 1), False)
            return None
        else:
            self._checked_sequence = acked
        if batch.live_count:
            self._window.mark(
                self._acked_ms, self._acked_sequence, batch.renews, now, now_ms
            )
        if self._count == 0 and not self._in_flight and not self._unsent:
            if self._window is not None and self._window.must_renew:
                self._seal()
            else:
                self._shrink()
        try:
            self._notify()
        finally:
            if asked:
                self._on_cancel_requested()
            if self._has_waiters:
                self._on_progress()
        return None

    cdef bint _learn(
        self, long long expires_ms, long long cancel, long long now_ms, long long now
    ) noexcept:
        """Take what every answer says; return whether it is the first that asks to stop."""
        cdef bint asked = cancel != 0 and not self._cancel_requested
        self._lease_left_ms = max(expires_ms - now_ms, 0)
        self._cancel_requested = cancel != 0
        self._server_ms = now_ms
        self._server_at_us = now
        return asked

    cdef object _push_answered(self, Push push, object reply, long long now_ms, bint shared):
        cdef long long values[2]
        cdef bint asked
        if self._pushing is not push:
            return None
        self._pushing = None
        if PyBytes_CheckExact(reply) and parse_numbers(<bytes>reply, " ", 2, values):
            asked = self._learn(values[0], values[1], now_ms, now_us())
            if push.group == self._group:
                self._pushed = push.upto
                self._pushed_bytes = push.upto_bytes
            try:
                self._notify()
            finally:
                if asked:
                    self._on_cancel_requested()
            return None
        error = refusal_of(reply, self._opening)
        if (
            self._is_newest() and not self._returned
            and is_lost_opening(reply, self._opening)
        ):
            self._opening_lost = True
            self._push_lost()
            if not self._in_flight:
                self._on_lost_opening()
            return None
        if is_passing(reply, error) or shared or self._returned:
            # The frames are stored, and readers are told of all of them then.
            self._push_lost()
            if push.group == self._group:
                self._alone = shared
            self._notify()
            return error if is_passing(reply, error) else None
        self._end(error, False)
        return None

    cdef int _push_lost(self) except -1:
        """Store the group as soon as may be: its frames have reached nobody, as far as is known."""
        self._pushing = None
        if self._group_ms:
            self._pushed = self._pushed_bytes = 0
            self._store_due = True
            self._due = True
        return 0

    cdef void _stored(self, Batch batch) noexcept:
        self._unacknowledged_bytes -= PyBytes_GET_SIZE(batch.message)
        if batch.frame_count and not batch.fixed_ms:
            self._unfixed -= 1
        if batch.live_count:
            self._window.stored(batch.live_count)

    cdef void _count_stored(self, Batch batch, long long now) noexcept:
        # What is sent again after a failover was counted before.
        if self._tally is not None and batch.frame_count and not batch.again:
            self._tally.stored(
                batch.frame_count - batch.live_count, batch.patch_count,
                batch.live_count - batch.patch_count, now - batch.written_us,
            )

    cdef int _keep(self, Batch batch, long long ms, long long now) except -1:
        """Hold an acknowledged batch, whose last id has that ms; one that has nothing is let go."""
        if self._held is None or batch.block_arguments == 0:
            return 0
        if not batch.again:
            batch.later_ms = ms
            if batch.first_ms == 0:
                batch.first_ms = ms
        self._held.keep(batch, now)
        if not self._held._listed and self._outbox is not None:
            self._outbox._list(self._held)
        return 0

    cdef object _refused(self, Batch batch, object reply, bint shared):
        error = refusal_of(reply, self._opening)
        if isinstance(error, Unavailable) and error.outcome is not Outcome.NOT_APPLIED:
            batch.doubtful = True
        if self._returned:
            # A batch before this one was refused, so this refusal says only "out of order".
            error = None
        elif self._must_replay(batch, reply, error):
            error = None
        elif batch.frame_count == 0 and isinstance(error, StreamClosed):
            # Retention work only, and the attempt has ended: its keys already have their TTL.
            # Drop it. The call that ended the attempt has compared the last frame.
            self._in_flight.pop(0)
            self._stored(batch)
            self._checked_sequence = self._acked_sequence
            try:
                self._notify()
            finally:
                if self._has_waiters:
                    self._on_progress()
            return None
        elif not is_passing(reply, error):
            if shared:
                # The cause may be in another part.
                batch.alone = True
                batch.doubtful = batch.doubtful or error.outcome is not Outcome.NOT_APPLIED
                error = None
            else:
                # Those behind it need its frames, so they are refused too.
                self._end(error, False)
                return None
        # To keep the order, this batch and all behind it are sent again once all are answered.
        self._returned.append(batch)
        self._in_flight.pop(0)
        if not self._in_flight:
            self._requeue()
        return error

    cdef int _shrink(self) except -1:
        if self._capacity > IDLE_FRAMES or self._data_capacity > IDLE_BYTES:
            PyMem_Free(self._data)
            PyMem_Free(self._lengths)
            PyMem_Free(self._times)
            self._data = NULL
            self._lengths = NULL
            self._times = NULL
            self._data_capacity = 0
            self._capacity = 0
        if self._run_capacity > IDLE_RUNS:
            PyMem_Free(self._runs)
            self._runs = NULL
            self._run_capacity = 0
        if self._known is not None and len(self._known) > IDLE_SHAPES:
            self._known.clear()
        return 0

    # -- ends -----------------------------------------------------------------------------------

    def _fail(self, error, hand_back=True):
        """Stop for good. Every later `write` raises a copy of *error*. Only the first call counts.

        Args:
            error: Its ``unstored`` gets the frames that were not acknowledged. If one of them may
                be stored, its outcome becomes unknown.
            hand_back: False in a forked child: the frames are the parent's.
        """
        self._end(error, True, hand_back)

    cdef int _end(self, object error, bint answers_missing, bint hand_back=True) except -1:
        cdef Batch batch
        if self._ending is not None:
            return 0
        # First, because reading the frames back runs Python code: a frame that another thread wrote
        # meanwhile would be missed.
        self._ending = error
        try:
            if hand_back:
                error.unstored = self._unstored_frames()
                for batches in (self._returned, self._in_flight, self._unsent):
                    for batch in tuple(batches):
                        if batch.frame_count and (
                            batch.doubtful or (answers_missing and batches is self._in_flight)
                        ):
                            make_unknown(error, "Some of the unstored frames may be stored.")
            if self._held is not None:
                # Whoever releases the lease may store them again.
                self._held.give_back(
                    [
                        batch for batches in (self._returned, self._in_flight, self._unsent)
                        for batch in batches if (<Batch>batch).again
                    ]
                )
        finally:
            self._error = error
            try:
                self._on_end(error)
            finally:
                self._on_progress()
        return 0

    def _unstored_frames(self):
        """Return the frames that the server has not acknowledged, oldest first, as ``StreamFrame``.

        The millisecond part of `stream_id` is 0: the server assigns it.
        """
        cdef list frames = []
        cdef list batches
        cdef int collecting = PyGC_Disable()
        try:
            if self._count:
                self._seal()
            batches = [*self._returned, *self._in_flight, *self._unsent]
        finally:
            if collecting:
                PyGC_Enable()
        self._notify()
        for batch in batches:
            frames.extend(frames_of(<Batch>batch))
        return tuple(frames)

    def _on_ready(self):
        """Called when a batch can be sent and none could before. The shell calls `_next_batch`.

        An exception of a hook passes through to the caller. What was written stays written, and the
        next call tells the shell again.
        """

    def _on_linger(self):
        """Called when a batch begins to linger. The shell calls `_seal_soon` after `_linger_us`."""

    def _on_lost_opening(self):
        """Called when the server has lost the opening of this writer; the shell makes it again, and
        calls `_reopened`, or `_fail`."""

    def _on_end(self, error):
        """Called once, with the error that stops the writer."""

    def _on_cancel_requested(self):
        """Called when an answer is the first to say that a cancellation is requested."""

    def _on_progress(self):
        """Called after an acknowledgement if `_has_waiters` is set, and when the writer fails."""

    @property
    def mode(self):
        """``StreamMode`` of frames that name none."""
        return self._mode

    @property
    def error(self):
        """The ``FFError`` that stopped the writer; its ``unstored`` has the frames that were not
        stored. None while the writer runs. ``WriterClosed`` after `close`."""
        if self._error is not None:
            self._told = True
        return self._error

    @property
    def _failure(self):
        """The same as `error`, for a look that tells nobody."""
        return self._error

    @property
    def _writer_name(self):
        """The writer id."""
        return of_bulk(self._writer)

    @property
    def _stopped(self):
        """Whether the writer has an error."""
        return self._error is not None

    def _tell_losses(self):
        """Return how many frames are lost if the writer goes now and nobody was told of; the caller
        tells."""
        if self._told:
            return 0
        if self._error is not None:
            lost = len(self._error.unstored)
        else:
            lost = self._sequence - self._acked_sequence
        self._told = lost > 0
        return lost

    @property
    def next_sequence(self):
        """Sequence that the next frame gets, from 1."""
        return self._sequence + 1

    @property
    def last_sequence(self):
        """Sequence of the newest stored frame; 0 for none."""
        return self._acked_sequence

    @property
    def last_id(self):
        """``stream_id`` of the newest stored frame; ``0-0`` for none."""
        return f"{self._acked_ms}-{self._acked_sequence}" if self._acked_sequence else "0-0"

    @property
    def unacknowledged_bytes(self):
        """Bytes in memory that wait for the server: payloads of the open batch, and sealed ones."""
        return self._unacknowledged_bytes

    @property
    def summary_version(self):
        """Version of the summary after every patch written so far; 0 for no summary."""
        return self._summary_version

    @property
    def cancel_requested(self):
        """Whether somebody has asked to cancel the execution, as of the newest acknowledgement."""
        return bool(self._cancel_requested)

    @property
    def lease_left(self):
        """Seconds that the lease had left at the newest acknowledgement, by the server's clock; 0.0
        before the first one."""
        return self._lease_left_ms / 1000.0

    @property
    def rate_hz(self):
        """Estimated frames a second in the live window; 0 before the first one."""
        return 0.0 if self._window is None else self._window.rate_hz(now_us())

    @property
    def window_frames(self):
        """K, how many frames the live window keeps at least; 0 before the first one."""
        return 0 if self._window is None else self._window.frames

    @property
    def _idle(self):
        """Whether everything that was written is acknowledged."""
        return (
            self._count == 0 and not self._in_flight and not self._unsent
            and not self._opening_lost
        )


cdef inline unsigned long long age_ms(long long now, long long then) noexcept nogil:
    return <unsigned long long>((now - then) // 1000) if now > then else 0


cdef inline long long version_after(Run* run, _Shape shape) noexcept:
    """Return the summary version after a run of patches; 0 for other frames."""
    return run.base_version + run.count if shape.kind == PATCH else 0


cdef inline Py_ssize_t extras_of(_Shape shape, long long previous, long long version) noexcept:
    return shape.field_count + (previous >= 0) + (version > 0)


cdef Py_ssize_t head_size(
    _Shape shape, Py_ssize_t count, long long previous, long long version, Py_ssize_t* parts
) noexcept:
    """Return the size of what `put_head` writes; add the number of arguments to *parts*."""
    cdef Py_ssize_t extras = extras_of(shape, previous, version)
    cdef Py_ssize_t total = bulk_size(1) + number_size(count)
    parts[0] += 2
    if extras:
        parts[0] += 1 + 2 * extras
        total += number_size(extras) + PyBytes_GET_SIZE(shape.fields)
    if previous >= 0:
        total += bulk_size(4) + number_size(previous)
    if version > 0:
        total += bulk_size(15) + number_size(version)
    return total


cdef char* put_head(
    char* out, _Shape shape, Py_ssize_t count, long long previous, long long version
) noexcept:
    """Write the part of a block before its payloads or run."""
    cdef Py_ssize_t extras = extras_of(shape, previous, version)
    cdef bytes letter
    if shape.kind == LOG:
        letter = BLOCK_LOG_FIELDS if extras else BLOCK_LOG
    elif shape.kind == LIVE:
        letter = BLOCK_LIVE_FIELDS if extras else BLOCK_LIVE
    else:
        letter = BLOCK_PATCHES
    out = put_bulk(out, PyBytes_AS_STRING(letter), 1)
    out = put_number(out, count)
    if extras:
        out = put_number(out, extras)
        out = put_raw(out, PyBytes_AS_STRING(shape.fields), PyBytes_GET_SIZE(shape.fields))
    if previous >= 0:
        out = put_bulk(out, "prev", 4)
        out = put_number(out, previous)
    if version > 0:
        out = put_bulk(out, "summary_version", 15)
        out = put_number(out, version)
    return out


cdef inline Py_ssize_t pair_size(Py_ssize_t name, long long value) noexcept:
    """Size of a field of a push, given the size of its name and its value, a number."""
    return varint_size(name) + name + varint_size(digits(value)) + digits(value)


cdef char* put_pair(char* out, const char* name, Py_ssize_t size, long long value) noexcept:
    out = put_varint(out, size)
    out = put_raw(out, name, size)
    out = put_varint(out, digits(value))
    return put_digits(out, value)


cdef bint parse_numbers(
    bytes text, const char* separators, int count, long long* values
) noexcept:
    """Parse *count* numbers, one of *separators* between two of them; False if it is not that."""
    cdef const char* at = PyBytes_AS_STRING(text)
    cdef const char* end = at + PyBytes_GET_SIZE(text)
    cdef int i
    cdef Py_ssize_t width
    for i in range(count):
        values[i] = 0
        width = 0
        while at < end and c'0' <= at[0] <= c'9':
            if width == 16:
                return False
            values[i] = values[i] * 10 + (at[0] - c'0')
            at += 1
            width += 1
        if width == 0:
            return False
        if i < count - 1:
            if at >= end or at[0] != separators[i]:
                return False
            at += 1
    return at == end


cdef object refusal_of(object reply, long long opening):
    """Return the error of an answer that is none of success, to a writer of that opening."""
    if isinstance(reply, Exception):
        return from_server_error(str(reply))
    if (
        isinstance(reply, list) and len(reply) >= 2 and reply[0] == 0
        and PyBytes_CheckExact(reply[1])
    ):
        error = for_code(reply[1].decode("ascii", "replace"), reply[2:])
        if isinstance(error, WriterSuperseded) and len(reply) > 2 and opening:
            if PyBytes_CheckExact(reply[2]) and reply[2].isdigit():
                if int(reply[2]) <= opening:
                    # The server knows no later opening than this one's: it has lost this one.
                    return StateLost()
        return error
    return ProtocolError()


cdef bint is_lost_opening(object reply, long long opening) except -1:
    """Whether an answer says that the server knows fewer openings than that one."""
    return (
        opening > 0 and isinstance(reply, list) and len(reply) > 2
        and reply[0] == 0 and reply[1] == b"writer_superseded"
        and PyBytes_CheckExact(reply[2]) and (<bytes>reply[2]).isdigit()
        and int(reply[2]) < opening
    )


cdef bint is_passing(object reply, object error) except -1:
    """Whether the same bytes may be accepted later.

    A refusal by the function itself is final: it would refuse them again.
    """
    return (
        isinstance(reply, Exception)
        and error.retryable
        # A function that met a key on its way to another node may have stored the parts before.
        and (error.outcome is Outcome.NOT_APPLIED or isinstance(error, Unavailable))
    )


@cython.auto_pickle(False)
cdef class Call:
    """One call of ff_append with the parts of several writers; as a function, it takes the reply.

    Attributes:
        message: The request as it goes on the wire; None once it was taken.
        accepted: Whether the server has applied a part.
        error: The last error of a part that is sent again; None for none.
        home: The home of its writers, which is the same for all; None where they have none.
    """

    cdef readonly bytes message
    cdef readonly bint accepted
    cdef readonly object error
    cdef readonly Home home
    cdef Outbox _outbox
    cdef list _writers
    cdef list _parts

    def __len__(self):
        return len(self._parts)

    def take(self):
        """Return the request, and keep it no longer: its batches have all that is sent again."""
        message, self.message = self.message, None
        return message

    def __call__(self, reply):
        """Give each writer its part of *reply*; a mark of the outbox's `lost` stands for none.

        An exception of a hook passes through once every writer has its part.
        """
        cdef Py_ssize_t count = len(self._parts)
        cdef Py_ssize_t i
        cdef long long now_ms = 0
        cdef bint each
        cdef list elements
        if self._outbox is None:
            return
        outbox = self._outbox
        # The reply is taken once.
        self._outbox = None
        for mark in outbox._lost:
            if reply is mark:
                self._lose(outbox)
                return
        # The server's time and the answers: a list, or one text for one answer.
        if count == 1:
            elements = list((<bytes>reply).split(b" ", 1)) if PyBytes_CheckExact(reply) else []
        else:
            elements = <list>reply if type(reply) is list else []
        each = (
            len(elements) == count + 1 and PyBytes_CheckExact(elements[0])
            and parse_numbers(<bytes>elements[0], "", 1, &now_ms)
        )
        if each:
            outbox._heard(now_ms)
        failure = None
        for i in range(count):
            answer = elements[i + 1] if each else reply
            try:
                error = (<WriterCore>self._writers[i])._answered(
                    <_Part>self._parts[i], answer, now_ms, not each and count > 1
                )
            except BaseException as raised:
                failure = raised
                continue
            if error is not None:
                self.error = error
            elif PyBytes_CheckExact(answer):
                self.accepted = True
        outbox._calls_in_flight -= 1
        outbox._on_answer(self)
        if failure is not None:
            raise failure

    def lost(self):
        """The connection is lost: the parts are sent again."""
        outbox, self._outbox = self._outbox, None
        if outbox is not None:
            self._lose(outbox)

    cdef int _lose(self, Outbox outbox) except -1:
        outbox._calls_in_flight -= 1
        # Another connection may be to another server, with a clock of its own.
        outbox._server_ms = 0
        failure = None
        for writer in self._writers:
            try:
                (<WriterCore>writer)._requeue()
            except BaseException as raised:
                failure = raised
        if failure is not None:
            raise failure
        return 0


# Looks of all outboxes are counted together, since a writer goes from one to another.
cdef unsigned long long looks = 0


cdef inline unsigned long long next_look() noexcept:
    global looks
    looks += 1
    return looks


cdef class Home:
    """Where the writers of one slot register; without a cluster, where all do.

    Attributes:
        slot: The slot; None without a cluster.
        outbox: That of the node that has the slot. Writers follow as their answers come; those that
            are ready already, by `Outbox.withdraw`.
    """

    cdef readonly object slot
    cdef public Outbox outbox

    def __init__(self, slot, Outbox outbox):
        self.slot = slot
        self.outbox = outbox


@cython.final
cdef class _Group:
    """The writers of a call that is to be made, and their parts."""

    cdef list writers
    cdef list parts
    cdef Py_ssize_t frames
    cdef Py_ssize_t size
    # It has a part that goes alone.
    cdef bint alone

    def __cinit__(self):
        self.writers = []
        self.parts = []

    cdef bint has_room(self, WriterCore writer):
        """Whether what *writer* sends next may go with the others."""
        cdef Py_ssize_t count = len(self.parts)
        return count == 0 or not (
            count >= CALL_PARTS or writer._next_is_alone()
            or self.frames + writer._next_frames() > CALL_FRAMES
            or self.size + writer._next_bytes() > CALL_BYTES
        )

    cdef Py_ssize_t add(self, WriterCore writer) except -1:
        """Take what *writer* sends now; return its size, 0 for nothing."""
        cdef _Part part
        try:
            part = writer._next_part()
        except MemoryError:
            # Its frames are in its open batch, and the next one registers it again.
            return 0
        if part is None:
            return 0
        self.writers.append(writer)
        self.parts.append(part)
        self.size += part.size()
        if type(part) is Push:
            self.frames += 1
        else:
            self.frames += (<Batch>part).frame_count
            self.alone = (<Batch>part).alone
        return part.size()


cdef class Outbox:
    """The writers of one connection that have something to send.

    A writer registers itself. The shell overrides `_on_ready` and `_on_answer`, asks `wait_s` when
    to send, and sends what `next_call` returns, or `next_calls`.

    All but `register` is for the thread that owns the connection; no method lets another thread run
    between a check and the change that relies on it.

    Args:
        linger_ms: How long what is ready waits for more, 0 to 1000 ms.
        lost: What a call gets in place of a reply when there is none.
        thread: Ident of the only thread whose writers may register; 0 for any.
        running: Returns the event loop that runs in this thread, and
        loop: what it must be; None for any.
    """

    cdef list _ready
    # Where the ready ones begin in `_ready`.
    cdef Py_ssize_t _at
    # Registrations since the last call that do not wait for others.
    cdef Py_ssize_t _hurried
    # What is ready does not linger.
    cdef bint _pressed
    # The number of the look for what to send that is under way.
    cdef unsigned long long _calls
    # `_on_ready` was called, and `next_call` has not been since.
    cdef bint _told
    # `next_call` is under way: no hook is called, since it could raise, and what was taken would
    # never be sent.
    cdef bint _packing
    cdef long long _linger_us
    cdef tuple _lost
    cdef unsigned long _thread
    cdef object _running
    cdef object _loop
    # When the oldest ready one registered, and when the last call was made, in µs.
    cdef long long _ready_us
    cdef long long _sent_us
    # A moving average of the parts of a call.
    cdef double _usual_parts
    cdef readonly Py_ssize_t _calls_in_flight
    # Groups that are to be stored later, oldest first: when in µs, the writer, and which group.
    cdef object _held
    # What writers hold of what was acknowledged, each once.
    cdef object _kept
    # The server's time in ms as of an answer on this connection, 0 for none, and when it came.
    cdef long long _server_ms
    cdef long long _server_at_us

    def __init__(self, double linger_ms=0.0, tuple lost=(), unsigned long thread=0, running=None,
                 loop=None):
        self._ready = []
        self._held = deque()
        self._kept = deque()
        self._linger_us = <long long>(linger_ms * 1000.0)
        self._lost = lost
        self._thread = thread
        self._running = running
        self._loop = loop

    def _on_ready(self):
        """Called when a writer is ready and none was, and when there is no more reason to wait."""

    def _on_answer(self, call):
        """Called when the writers of *call* have taken its reply."""

    def _on_wrong_thread(self):
        """Called in place of `_on_ready` where a writer must not register; raises."""

    @property
    def ready(self):
        """How many writers are ready."""
        return len(self._ready) - self._at

    @property
    def holds(self):
        """Whether frames are held that are to be stored later."""
        return len(self._held) != 0

    cdef bint _is_full(self) noexcept:
        return self._hurried > 0 or len(self._ready) - self._at >= FULL_PARTS

    cdef int register(self, WriterCore writer, bint hurried) except -1:
        if self._thread and (
            self._thread != <unsigned long>PyThread_get_thread_ident()
            or self._running() is not self._loop
        ):
            self._on_wrong_thread()
        if self._at == len(self._ready):
            self._ready_us = now_us()
        self._ready.append(writer)
        if hurried:
            self._hurried += 1
        # The first hurried one ends the wait for more, and so do enough of the others.
        if (
            not self._told or (hurried and self._hurried == 1)
            or len(self._ready) - self._at == FULL_PARTS
        ):
            self._tell()
        return 0

    cdef int hurry(self) except -1:
        """A writer that is ready does not wait for others any more."""
        self._hurried += 1
        return self._tell() if self._hurried == 1 else 0

    cdef int press(self) except -1:
        """Somebody waits for a writer that is ready, so none lingers."""
        if not self._linger_us or self._pressed:
            return 0
        self._pressed = True
        return self._tell()

    cdef int _tell(self) except -1:
        if self._packing:
            return 0
        self._told = True
        try:
            self._on_ready()
        except BaseException:
            # For example an interrupt. The next registration tells the shell again.
            self._told = False
            raise
        return 0

    cdef void _heard(self, long long now_ms) noexcept:
        self._server_ms = now_ms
        self._server_at_us = now_us()

    cdef long long _now_ms(self, long long now) noexcept:
        """Return the earliest time that the server's clock can show, in ms; 0 if it is unknown."""
        if self._server_ms == 0 or now - self._server_at_us > KNOWN_US:
            return 0
        return self._server_ms + (now - self._server_at_us) // 1000

    cdef int _hold(self, WriterCore writer, long long group) except -1:
        self._held.append((now_us() + HOLD_US, writer, group))
        return 0

    def hold_s(self):
        """Register the writers whose group is due to be stored; return in how many seconds others
        are, -1 if none is held."""
        cdef long long now = now_us()
        cdef long long due, group
        while self._held:
            due, writer, group = self._held[0]
            if due > now:
                return max(due - now, HOLD_LOOK_US) / 1e6
            self._held.popleft()
            (<WriterCore>writer)._store_group(group)
        return -1.0

    cdef int _list(self, Held held) except -1:
        held._listed = True
        self._kept.append(held)
        return 0

    @property
    def keeps(self):
        """Whether something is held that was acknowledged, and is to be let go later."""
        return len(self._kept) != 0

    def let_go_s(self):
        """Let go of what was held for long enough; return in how many seconds to look again, -1 if
        nothing is held.

        A look takes a bounded time, so it may be asked for again soon.
        """
        cdef long long now = now_us()
        cdef long long due = 0
        cdef long long wait
        cdef Held held
        cdef Py_ssize_t left = min(len(self._kept), LOOKS)
        if self._calls_in_flight:
            # Time in which the server says nothing does not count.
            now = self._server_at_us
        while left:
            left -= 1
            held = <Held>self._kept.popleft()
            wait = held.look(now)
            if wait:
                self._kept.append(held)
                if due == 0:
                    due = wait
            else:
                held._listed = False
        if not self._kept:
            return -1.0
        if len(self._kept) > LOOKS:
            due = LOOK_US
        return max(due, LOOK_US) / 1e6

    def doubt(self):
        """Note that the connection is lost: writers ask the next server whether it has what they
        hold."""
        for held in tuple(self._kept):
            (<Held>held)._doubted = True
            writer = None if (<Held>held).owner is None else (<Held>held).owner()
            if writer is not None:
                (<WriterCore>writer)._ask()

    def wait_s(self):
        """Return in how many seconds the next call is due, 0 for now; -1 if nothing is ready."""
        cdef long long due
        if self._at == len(self._ready):
            return -1.0
        if self._is_full():
            return 0.0
        due = self._ready_us
        if not self._pressed:
            due += self._linger_us
        if self._usual_parts >= 2.0 or self._calls_in_flight:
            due = max(due, self._sent_us + PACE_US)
        return max(due - now_us(), 0) / 1e6

    def next_call(self):
        """Return the call to send now, or None. Its parts are in flight from here on.

        When writers are left, the shell goes on without being told.
        """
        cdef Py_ssize_t last = len(self._ready)
        cdef WriterCore writer
        cdef Call call
        cdef _Group group = _Group.__new__(_Group)
        cdef int collecting = PyGC_Disable()
        self._packing = True
        self._calls = next_look()
        try:
            while (
                self._at < last and not group.alone
                and group.has_room(<WriterCore>self._ready[self._at])
            ):
                writer = self._take_ready()
                if writer is not None:
                    group.add(writer)
            self._end_look()
            if not group.parts:
                return None
            call = self._made(group)
            self._sent(len(group.parts))
            return call
        finally:
            self._packing = False
            if collecting:
                PyGC_Enable()

    def next_calls(self):
        """Return the calls to send now, in one write: of each slot one or more, each within the
        bounds of a call, and all within those of a send. Else as `next_call`."""
        cdef list calls = []
        cdef dict groups = {}
        cdef Py_ssize_t last = len(self._ready)
        cdef Py_ssize_t count = 0
        cdef Py_ssize_t size = 0
        cdef Py_ssize_t added
        cdef WriterCore writer
        cdef _Group group
        cdef int collecting = PyGC_Disable()
        self._packing = True
        self._calls = next_look()
        try:
            try:
                while self._at < last and size < SEND_BYTES and len(calls) < SEND_CALLS:
                    writer = self._take_ready()
                    if writer is None:
                        continue
                    group = groups.get(writer._home)
                    if group is not None and not group.has_room(writer):
                        del groups[writer._home]
                        calls.append(self._made(group))
                        group = None
                    if group is None:
                        group = _Group.__new__(_Group)
                    added = group.add(writer)
                    if not added:
                        continue
                    count += 1
                    size += added
                    if group.alone:
                        groups.pop(writer._home, None)
                        calls.append(self._made(group))
                    else:
                        groups[writer._home] = group
            finally:
                # Also after an error: what was taken is in flight.
                for group in groups.values():
                    calls.append(self._made(group))
                self._end_look()
            if calls:
                self._sent(count)
            return calls
        finally:
            self._packing = False
            if collecting:
                PyGC_Enable()

    cdef WriterCore _take_ready(self):
        """Take the next writer that is ready; None if it was taken in this look already."""
        cdef WriterCore writer = <WriterCore>self._ready[self._at]
        self._ready[self._at] = None
        self._at += 1
        if writer._hurried:
            self._hurried -= 1
        # A writer whose registration was interrupted is here twice.
        if writer._asked == self._calls:
            return None
        writer._asked = self._calls
        return writer

    cdef int _end_look(self) except -1:
        """Note what is left; the shell goes on with it without being told."""
        if self._at == len(self._ready):
            self._ready = []
            self._at = 0
            self._hurried = 0
            self._pressed = False
        self._told = self._at < len(self._ready)
        if self._told:
            self._ready_us = now_us()
        return 0

    cdef Call _made(self, _Group group):
        cdef Call call = Call.__new__(Call)
        call._outbox = self
        call._writers = group.writers
        call._parts = group.parts
        call.home = (<WriterCore>group.writers[0])._home
        self._calls_in_flight += 1
        try:
            call.message = packed_call(group.parts)
        except MemoryError:
            call._lose(self)
            raise
        return call

    cdef int _sent(self, Py_ssize_t parts) except -1:
        """Note that so many parts are sent now."""
        self._sent_us = now_us()
        self._usual_parts += (parts - self._usual_parts) / 8.0
        return 0

    def homes(self):
        """Return the homes of the writers that are ready."""
        cdef set found = set()
        for writer in self._ready[self._at:]:
            found.add((<WriterCore>writer)._home)
        return found

    def withdraw(self, Home home not None):
        """Let the writers of *home* that are ready register where it says."""
        cdef list taken = []
        cdef list kept = []
        cdef int collecting = PyGC_Disable()
        try:
            for item in self._ready[self._at:]:
                (taken if (<WriterCore>item)._home is home else kept).append(item)
            self._ready = kept
        finally:
            if collecting:
                PyGC_Enable()
        self._at = 0
        self._hurried = 0
        for item in kept:
            self._hurried += (<WriterCore>item)._hurried
        if not kept:
            self._pressed = False
            self._told = False
        for item in taken:
            (<WriterCore>item)._notified = False
        for item in taken:
            (<WriterCore>item)._notify()

    def hand_over(self):
        """Let all writers that are ready or held register where their homes say; what they hold of
        what was acknowledged goes with them."""
        kept, self._kept = self._kept, deque()
        for each in kept:
            (<Held>each)._listed = False
            writer = None if (<Held>each).owner is None else (<Held>each).owner()
            if writer is not None and (<WriterCore>writer)._home is not None:
                (<WriterCore>writer)._home.outbox._list(<Held>each)
        held, self._held = self._held, deque()
        for _, writer, group in held:
            (<WriterCore>writer)._store_group(group)
        for writer in self.take_ready():
            (<WriterCore>writer)._notify()

    def forget(self):
        """Drop what is ready and held: the writers have failed."""
        self.take_ready()
        self._held.clear()
        self._kept.clear()

    def take_ready(self):
        """Return the writers that are ready; they register again with their next frame."""
        cdef list writers = self._ready[self._at:]
        self._ready = []
        self._at = 0
        self._hurried = 0
        self._pressed = False
        self._told = False
        for writer in writers:
            (<WriterCore>writer)._notified = False
        return writers


cdef list parsed(bytes message):
    import hiredis

    reader = hiredis.Reader()
    reader.feed(message)
    return reader.gets()


def arguments_of(bytes message not None):
    """Return the arguments of a call after its keys."""
    parts = parsed(message)
    return parts[3 + int(parts[2]):]


cdef list frames_of(Batch batch):
    """Return the frames of a batch, decoded from its arguments. Rare, so nothing is kept for it."""
    cdef list frames = []
    cdef long long sequence = batch.first_sequence - 1
    argv = arguments_of(batch.message)
    # Head, writer, previous sequence and push.
    at = 4
    while at < len(argv):
        letter = argv[at]
        if letter == BLOCK_REPLAYED_MS:
            at += 3
        elif letter in FRAME_BLOCKS:
            count = int(argv[at + 1])
            at += 2
            shared = []
            if letter in (BLOCK_LOG_FIELDS, BLOCK_LIVE_FIELDS, BLOCK_PATCHES):
                extras = 2 * int(argv[at])
                shared = argv[at + 1:at + 1 + extras]
                at += 1 + extras
            live = letter not in (BLOCK_LOG, BLOCK_LOG_FIELDS)
            # A live entry has all its frames, under the id of the last one.
            entry_frames = count if live else 1
            name = b"run" if entry_frames > 1 else b"payload"
            for value in argv[at:at + count // entry_frames]:
                sequence += entry_frames
                entry = [b"0-%d" % sequence, [name, value, *shared]]
                frames.extend(decode_entries([entry], 0, live=live).frames)
                at += 1
            at += 2 if letter == BLOCK_PATCHES else 0
        else:
            at += 4 if letter in (BLOCK_DOCUMENT, BLOCK_RENEWAL) else 2
    return frames


cdef list without_summary(bytes blocks, Py_ssize_t arguments):
    """Return the arguments of the blocks of a batch without its part in the summary: patches stay
    as frames of the live window."""
    cdef list out = []
    argv = parsed(b"*%d\r\n%b" % (arguments, blocks))
    at = 0
    while at < len(argv):
        letter = argv[at]
        start = at
        if letter in FRAME_BLOCKS:
            count = int(argv[at + 1])
            at += 2
            if letter in (BLOCK_LOG_FIELDS, BLOCK_LIVE_FIELDS, BLOCK_PATCHES):
                at += 1 + 2 * int(argv[at])
            at += count if letter in (BLOCK_LOG, BLOCK_LOG_FIELDS) else 1
            if letter == BLOCK_PATCHES:
                out.append(BLOCK_LIVE_FIELDS)
                out += argv[start + 1:at]
                at += 2
            else:
                out += argv[start:at]
        elif letter in (BLOCK_DOCUMENT, BLOCK_RENEWAL):
            at += 4
        else:
            at += 2
            out += argv[start:at]
    return out

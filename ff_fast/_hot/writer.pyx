"""The writer of one attempt, without I/O: frames in, FCALL bytes out, acknowledgements in.

A frame is copied into the open batch when it is written; sealing a batch sizes it, allocates once
and writes the whole request. A batch leaves when nothing is on its way, or when it is full; else
the open one goes on filling, so its size follows the speed of the server. Sealed batches are kept,
as the bytes that were sent, until the server acknowledged them; after a disconnect the same bytes
go again, in order, and the sequence makes a repeat harmless.

The sync shell calls `write`, `hurry`, `finish`, `fail` and `unstored` on any thread and the rest on
the one that owns the connection. Between checking and changing its state no method here runs Python
code, and the GIL is never released, so each is atomic. The garbage collector would break that: an
allocation may start it, and a finalizer that it calls is Python code, in which another thread can
take over. Where objects are made amid a change, it is held off.

Arguments of `ff_append`, built here: lua/append.lua names the blocks; ff_fast/_hot/frames.pyx names
the fields.
"""

cimport cython
from cpython.bytes cimport (
    PyBytes_AS_STRING,
    PyBytes_CheckExact,
    PyBytes_FromStringAndSize,
    PyBytes_GET_SIZE,
)
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.unicode cimport PyUnicode_AsUTF8String
from libc.string cimport memcpy, memmove
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

import copy
from collections import deque

from ff_fast._hot.frames import decode_entries
from ff_fast._hot.frames cimport put_varint, varint_size
from ff_fast._hot.merge import Document
from ff_fast._hot.rate cimport RateEstimator, window_frames
from ff_fast._hot.resp cimport (
    PyGC_Disable,
    PyGC_Enable,
    bulk_size,
    digits,
    number_size,
    put_bulk,
    put_length,
    put_number,
    put_raw,
)
from ff_fast.errors import (
    Corruption,
    InvalidInput,
    InvalidPayload,
    InvalidType,
    Outcome,
    Overloaded,
    PayloadTooLarge,
    ProtocolError,
    StreamClosed,
    for_code,
    from_server_error,
)
from ff_fast.types import BestEffortLiveConfig, StreamMode

cdef enum:
    # "FCALL" and "ff_append" as bulk strings.
    HEAD_SIZE = 11 + 15
    # Mirrors of lua/prelude.lua.
    MAX_PAYLOAD = 65536
    MAX_FRAMES = 1024
    # A batch beyond this is full: it holds less than this and one more frame, so a run stays below
    # 1.2 MB with its lengths and ages; the server takes 2 MiB.
    MAX_BATCH_BYTES = 1 << 20
    # From here on another batch is sent although earlier ones are on their way; the server then
    # never idles between two batches, and smaller ones still grow with its load.
    EAGER_FRAMES = 256
    EAGER_BYTES = 1 << 16
    MAX_IN_FLIGHT = 4
    # What an idle writer keeps allocated for its next batch; what a burst needed beyond it is given
    # back. A process may hold many writers that wait for their model.
    IDLE_FRAMES = 16
    IDLE_BYTES = 256
    IDLE_RUNS = 2
    IDLE_SHAPES = 4
    KNOWN_SHAPES = 64
    # The log is trimmed once in so many durable frames: a trim costs the server as much as a frame.
    TRIM_EVERY = 256
    # Patches smaller than this are not worth a fresh document.
    COMPACT_BYTES = 4096
    ESTIMATOR_EVERY_US = 1_000_000
    # The window is cut in steps of about a sixteenth; finer ones would cost the server more trims
    # than they save it frames.
    STEPS = 16
    FIRST_MARKS = 8
    MAX_MARKS = 32

# The streams and the hash that a request needs beside meta.
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
cdef tuple FRAME_BLOCKS = (
    BLOCK_LOG, BLOCK_LOG_FIELDS, BLOCK_LIVE, BLOCK_LIVE_FIELDS, BLOCK_PATCHES
)

# Beyond every rate that can be; keeps the stored estimate short.
cdef double MAX_RATE_HZ = 1e12

# Summary patches live in the same window as best-effort frames; without any of those, this is how
# long it keeps them.
SUMMARY_WINDOW = BestEffortLiveConfig.with_ttl(30_000)


cdef inline long long now_us() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <long long>now.tv_sec * 1_000_000 + now.tv_nsec // 1000


@cython.final
@cython.auto_pickle(False)
cdef class _Shape:
    """What the frames of a run share, with its constant bytes prebuilt."""

    cdef Kind kind
    cdef object mode
    cdef object frame_type
    cdef object correlation_id
    cdef object encoding
    cdef object source
    # What the frames ask of the live window.
    cdef long long ttl_ms
    cdef long long floor
    cdef long long ceiling
    cdef double alpha
    # Field-value pairs of what is not usual, as RESP, and how many pairs.
    cdef bytes fields
    cdef Py_ssize_t field_count
    # Summary frames: their patch kind with its pointer, as the summary names it, and the pointer
    # alone.
    cdef bytes patch_name
    cdef bytes pointer


@cython.final
@cython.auto_pickle(False)
cdef class Batch:
    """A sealed batch: the request as it goes on the wire, kept until it is acknowledged."""

    cdef readonly bytes message
    cdef readonly long long first_sequence
    cdef readonly Py_ssize_t frame_count
    cdef Py_ssize_t live_count
    # Whether it renews the expiry of the live window.
    cdef bint renews


cdef struct Run:
    Py_ssize_t shape
    Py_ssize_t first
    Py_ssize_t count
    Py_ssize_t offset
    Py_ssize_t size
    # Sequence of the visible frame before the run where it is not the frame before it, else -1.
    long long previous
    long long base_version


# Where the window stood once: how many live frames this writer had stored, the last id.
cdef struct Mark:
    long long count
    long long ms
    long long sequence


cdef bytes bulk(bytes text):
    return b"$%d\r\n%b\r\n" % (len(text), text)


cdef bytes bulks(list parts):
    # No comprehension: where appending runs out of memory, Cython 3.3 frees the item twice.
    cdef list out = parts[:]
    cdef Py_ssize_t i
    for i in range(len(out)):
        out[i] = bulk(<bytes>out[i])
    return b"".join(out)


cdef int check_str(str name, object text) except -1:
    if type(text) is not str:
        raise InvalidType(f"{name} must be str, not {type(text).__name__}.")
    return 0


cdef bytes checked_text(str name, object text):
    """*text*, exactly a ``str``, as UTF-8, checked to be a name that fits into a field."""
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
    shape.field_count = len(pairs) // 2
    return shape


cdef class WriterCore:
    """Frames of one attempt to requests, batched, resent and acknowledged (see the module).

    Args:
        keys: meta, log, live and summary key of the attempt.
        writer: Id under which the writer was opened; it holds the fence.
        mode: Mode of frames that name none.
        opened: What `ff_open_writer` answered: ms and sequence of the last id, last visible
            sequence, estimator state, summary version.
        document: The summary at that version; None where the version is 0.
        retention_maxlen: Least number of durable frames that the log keeps, from 1.
        max_unacknowledged_bytes: Past this many bytes kept for the server, `write` raises
            ``Overloaded``.
        linger_ms: How long a batch may wait for more frames; 0 sends at once.
    """

    cdef object __weakref__
    cdef readonly object error
    # Why it ends, from the moment on which nothing more is taken; `error` follows once it has what
    # was not stored.
    cdef object _ending
    cdef public bint waiting
    cdef object _mode
    cdef bytes _keys
    cdef Py_ssize_t _key_ends[4]
    cdef bytes _writer
    # The open batch: payloads back to back, a length and a time for each frame, runs, and the shape
    # of each run.
    cdef char* _data
    cdef Py_ssize_t _size
    cdef Py_ssize_t _data_capacity
    cdef unsigned int* _lengths
    cdef long long* _times
    cdef Py_ssize_t _count
    cdef Py_ssize_t _capacity
    cdef Run* _runs
    cdef Py_ssize_t _run_count
    cdef Py_ssize_t _run_capacity
    cdef list _shapes
    cdef _Shape _shape
    cdef dict _known
    # Sealed batches, each list in order and each after the one before: refused and waiting until
    # those sent behind them are answered too; on their way; not sent (again) yet.
    cdef list _returned
    cdef list _in_flight
    cdef object _unsent
    cdef bint _notified
    cdef bint _finishing
    cdef bint _due
    cdef long long _sequence
    cdef long long _visible
    # The last visible frame as the server was told it; -1 while that is the last frame.
    cdef long long _told_visible
    cdef long long _acked_sequence
    cdef readonly long long first_sequence
    cdef long long _acked_ms
    cdef long long _acked_at_us
    # Payloads of the open batch and requests of the sealed ones: what is kept until it is stored.
    cdef readonly Py_ssize_t unacknowledged_bytes
    cdef Py_ssize_t _max_unacknowledged
    cdef readonly bint cancel_requested
    cdef readonly long long lease_left_ms
    cdef readonly long long linger_us
    # Retention.
    cdef long long _retention_maxlen
    cdef Py_ssize_t _durable_since_trim
    # The live window: the most that any frame asked of it, 0 before the first one; whether that is
    # SUMMARY_WINDOW's, which the first best-effort frame replaces.
    cdef long long _ttl_ms
    cdef long long _floor
    cdef long long _ceiling
    cdef bint _assumed
    cdef RateEstimator _estimator
    cdef double _restored_rate
    cdef long long _live_total
    cdef long long _live_acked
    cdef Mark* _marks
    cdef Py_ssize_t _mark_count
    cdef Py_ssize_t _mark_capacity
    cdef readonly long long window_frames
    # When the last batch was sealed that renews the window's expiry; whether the next one must.
    cdef long long _renewed_us
    cdef bint _renew
    cdef long long _estimator_at_us
    # Summary: the fold of every patch written so far, and what the server holds beside its
    # document.
    cdef object _document
    cdef readonly long long summary_version
    cdef Py_ssize_t _pending_bytes
    cdef Py_ssize_t _stored_bytes
    cdef bytes _patch_kind

    def __cinit__(self):
        self._data = NULL
        self._lengths = NULL
        self._times = NULL
        self._runs = NULL
        self._marks = NULL
        # Until __init__ has run, `write` refuses.
        self._finishing = True
        self._shape = _Shape.__new__(_Shape)
        self._known = {}
        self._shapes = []
        self._returned = []
        self._in_flight = []
        self._unsent = deque()

    def __dealloc__(self):
        PyMem_Free(self._data)
        PyMem_Free(self._lengths)
        PyMem_Free(self._times)
        PyMem_Free(self._runs)
        PyMem_Free(self._marks)

    def __init__(
        self, *, tuple keys not None, bytes writer not None, mode, tuple opened not None,
        bytes document=None, long long retention_maxlen=10_000,
        Py_ssize_t max_unacknowledged_bytes=32 << 20, double linger_ms=0.0,
    ):
        cdef Py_ssize_t end = 0
        cdef Py_ssize_t i
        if retention_maxlen < 1:
            raise InvalidInput("retention_maxlen must be at least 1.")
        if not 0.0 <= linger_ms <= 1000.0:
            raise InvalidInput("linger_ms must be between 0 and 1000.")
        if max_unacknowledged_bytes < 1:
            raise InvalidInput("max_unacknowledged_bytes must be at least 1.")
        self._keys = bulks(list(keys))
        self._writer = bulks([writer])
        for i in range(4):
            end += bulk_size(len(keys[i]))
            self._key_ends[i] = end
        self._mode = mode
        self._acked_ms, self._sequence, self._visible, estimator, self.summary_version = opened
        self._told_visible = -1 if self._visible == self._sequence else self._visible
        self._acked_sequence = self._sequence
        self.first_sequence = self._sequence + 1
        self._acked_at_us = now_us()
        self._max_unacknowledged = max_unacknowledged_bytes
        self._retention_maxlen = retention_maxlen
        # An earlier writer may have left the log due for a trim.
        self._durable_since_trim = TRIM_EVERY if self._sequence else 0
        self.linger_us = <long long>(linger_ms * 1000.0)
        if estimator:
            try:
                self._restored_rate = float(estimator)
            except ValueError:
                self._restored_rate = -1.0
            if not 0.0 <= self._restored_rate <= MAX_RATE_HZ:
                raise Corruption("The rate of the live window is not a number; end the attempt.")
        if document is not None:
            self._document = Document(document)
            self._stored_bytes = len(document)
        self._shape = self._shape_of(mode, "token", None, "utf8", "worker")
        self._finishing = False

    # -- writing --------------------------------------------------------------------------------

    cdef _Shape _shape_of(
        self, object mode, object frame_type, object correlation_id, object encoding, object source
    ):
        cdef tuple key
        if not isinstance(mode, StreamMode):
            raise InvalidType(f"mode must be a StreamMode, not {type(mode).__name__}.")
        # Before the look-up, which would find an equal text of another type.
        check_str("frame_type", frame_type)
        if correlation_id is not None:
            check_str("correlation_id", correlation_id)
        check_str("encoding", encoding)
        check_str("source", source)
        key = (mode, frame_type, correlation_id, encoding, source)
        shape = self._known.get(key)
        if shape is None:
            shape = make_shape(mode, frame_type, correlation_id, encoding, source)
            # Correlation ids may be many; the table is there for the few that alternate.
            if len(self._known) >= KNOWN_SHAPES:
                self._known.clear()
            self._known[key] = shape
        return <_Shape>shape

    cdef int _reserve(self, Py_ssize_t size) except -1:
        """Room for a frame of *size* bytes in a run of its own: what can fail comes before it."""
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
            payload: 0 to 65,536 bytes. ``str`` is encoded as UTF-8; ``bytearray`` and
                ``memoryview`` are copied. In mode ``summary`` it is a patch, checked here.
            frame_type: Classifier of the frame, 1 to 256 bytes of UTF-8.
            mode: The frame's ``StreamMode``; the writer's where None.
            correlation_id: Text that readers get with the frame, 1 to 256 bytes of UTF-8.
            encoding: ``utf8`` or what else the payload is; readers get it, nothing is converted.
            source: Who wrote the frame.

        Returns:
            The frame's sequence in its attempt. It is stored once `flush` returns.

        Raises:
            InvalidType, InvalidPayload, PayloadTooLarge, InvalidPatch, InvalidInput: This frame was
                refused; the writer goes on.
            Overloaded: More than the writer's limit of bytes is unacknowledged; `drain`, then write
                again.
            FFError: What stopped the writer earlier; its ``unstored`` has the frames that were not
                stored.
        """
        cdef _Shape shape = self._shape
        cdef Run* run
        cdef bytes data
        cdef Py_ssize_t size
        cdef long long previous, sequence
        if PyBytes_CheckExact(payload):
            data = <bytes>payload
        else:
            data = self._payload_of(payload)
        size = PyBytes_GET_SIZE(data)
        if size > MAX_PAYLOAD:
            raise PayloadTooLarge(MAX_PAYLOAD, size)
        if mode is None:
            mode = self._mode
        if not (
            frame_type is shape.frame_type and mode is shape.mode
            and correlation_id is shape.correlation_id
            and encoding is shape.encoding and source is shape.source
        ):
            shape = self._shape_of(mode, frame_type, correlation_id, encoding, source)
        # From here on no Python code runs until the frame is in: another thread cannot end the
        # writer in between.
        if self._ending is not None:
            raise copy.copy(self._ending)
        if self._finishing:
            raise InvalidInput("The writer is closing; write before close().")
        if self.unacknowledged_bytes + size > self._max_unacknowledged:
            raise Overloaded(
                f"{self.unacknowledged_bytes} bytes wait for the server; drain() and write again."
            )
        if self._count >= MAX_FRAMES or self._size >= MAX_BATCH_BYTES:
            self._seal()
        self._reserve(size)
        if shape.kind == PATCH:
            self._fold(shape, data)
        if (
            shape is not self._shape or self._run_count == 0
            or (shape.kind != LIVE and self._visible != self._sequence)
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
            run.base_version = self.summary_version - (1 if shape.kind == PATCH else 0)
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
        self.unacknowledged_bytes += size
        # The hooks are Python code: other threads may write meanwhile.
        sequence = self._sequence
        if self._count == 1 and self.linger_us:
            self._on_linger()
        if not self._notified:
            self._notify()
        return sequence

    cdef bytes _payload_of(self, object payload):
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
        # Checked before the copy, so that a huge buffer costs nothing.
        if view.nbytes > MAX_PAYLOAD:
            raise PayloadTooLarge(MAX_PAYLOAD, view.nbytes)
        return view.tobytes()

    cdef int _fold(self, _Shape shape, bytes data) except -1:
        """Apply a patch to the document, or refuse it, with the document unchanged."""
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
        self.summary_version += 1
        self._patch_kind = shape.patch_name
        self._pending_bytes += PyBytes_GET_SIZE(data)
        return 0

    # -- sealing --------------------------------------------------------------------------------

    cdef Py_ssize_t _run_bytes(self, Run* run, long long now) noexcept:
        """Size of the run's value: one payload, or the layout of several."""
        cdef Py_ssize_t total = varint_size(run.count) + run.size
        cdef Py_ssize_t i
        if run.count == 1:
            return run.size
        for i in range(run.first, run.first + run.count):
            total += varint_size(self._lengths[i]) + varint_size(age_ms(now, self._times[i]))
        return total

    cdef char* _put_run(self, char* out, Run* run, long long now) noexcept:
        cdef Py_ssize_t i
        if run.count > 1:
            out = put_varint(out, run.count)
            for i in range(run.first, run.first + run.count):
                out = put_varint(out, self._lengths[i])
            for i in range(run.first, run.first + run.count):
                out = put_varint(out, age_ms(now, self._times[i]))
        return put_raw(out, self._data + run.offset, run.size)

    cdef bytes _pending_field(self, Run* run, _Shape shape):
        """Name under which the summary keeps a run's patches: what a reader needs to fold them."""
        cdef bytes form = b"run" if run.count > 1 else b"patch"
        cdef long long version = run.base_version + run.count
        return b"%b:%d:%d:%b" % (form, version, run.count, shape.patch_name)

    cdef int _seal(self) except -1:
        """Make the open batch the last unsent one, and begin a new one.

        `_count` may be 0: then only retention work is sent. After an error the batch is still open.
        """
        cdef int collecting = PyGC_Disable()
        try:
            self._unsent.append(self._sealed())
        finally:
            if collecting:
                PyGC_Enable()
        self._count = 0
        self._size = 0
        self._run_count = 0
        self._shapes.clear()
        self._due = False
        return 0

    cdef Batch _sealed(self):
        """The open batch as a request."""
        cdef Batch batch = Batch.__new__(Batch)
        cdef long long now = now_us()
        # FCALL, the function, the number of keys, writer and previous sequence; keys come later.
        cdef Py_ssize_t parts = 5
        cdef Py_ssize_t total = HEAD_SIZE + PyBytes_GET_SIZE(self._writer)
        cdef Py_ssize_t durable = 0
        cdef Py_ssize_t live = 0
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
                # `prev` belongs to the first frame alone, so that one is a block of its own.
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
                name = self._pending_field(run, shape)
                parts += 2
                total += bulk_size(PyBytes_GET_SIZE(name)) + number_size(run.base_version)
            names.append(name)
            total += head_size(shape, run.count, run.previous, version_after(run, shape), &parts)
            total += bulk_size(self._run_bytes(run, now))
        batch.live_count = live
        tail = self._retention(batch, now, durable, &parts, &uses)
        total += self._put_keys(NULL, uses, &parts)
        total += 1 + digits(parts) + 2 + PyBytes_GET_SIZE(tail)
        batch.message = PyBytes_FromStringAndSize(NULL, total)
        start = PyBytes_AS_STRING(batch.message)
        out = put_length(start, c'*', parts)
        out = put_bulk(out, "FCALL", 5)
        out = put_bulk(out, "ff_append", 9)
        out += self._put_keys(out, uses, &parts)
        out = put_raw(out, PyBytes_AS_STRING(self._writer), PyBytes_GET_SIZE(self._writer))
        out = put_number(out, batch.first_sequence - 1)
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
        # Nothing below fails.
        if batch.renews:
            self._renew = False
            self._renewed_us = now
        self._told_visible = -1 if self._visible == self._sequence else self._visible
        self._live_total += batch.live_count
        self.unacknowledged_bytes += total - self._size
        return batch

    cdef Py_ssize_t _put_keys(self, char* out, int uses, Py_ssize_t* parts) noexcept:
        """Write the number of keys and the keys that a request needs, and return their size; where
        *out* is NULL only count them among its *parts*."""
        cdef const char* keys = PyBytes_AS_STRING(self._keys)
        cdef Py_ssize_t meta_end = self._key_ends[0]
        cdef Py_ssize_t start = meta_end
        cdef Py_ssize_t count = 2
        cdef Py_ssize_t end
        if uses & USES_SUMMARY:
            count = 4
        elif uses == (USES_LOG | USES_LIVE):
            count = 3
        end = self._key_ends[count - 1]
        if uses == USES_LIVE:
            start = self._key_ends[1]
            end = self._key_ends[2]
        if out is NULL:
            parts[0] += count
        else:
            out = put_number(out, count)
            out = put_raw(out, keys, meta_end)
            put_raw(out, keys + start, end - start)
        return number_size(count) + meta_end + end - start

    cdef bytes _retention(
        self, Batch batch, long long now, Py_ssize_t durable, Py_ssize_t* parts,
        int* uses,
    ):
        """The blocks behind the frames: trims, expiry, estimator state and a fresh document, where
        they are due."""
        cdef list tail = []
        cdef double rate
        cdef Py_ssize_t i
        cdef Mark cut
        self._durable_since_trim += durable
        if self._durable_since_trim >= TRIM_EVERY:
            self._durable_since_trim = 0
            tail += [BLOCK_TRIM_LOG, b"%d" % self._retention_maxlen]
            uses[0] |= USES_LOG
        if batch.live_count:
            for i in range(self._run_count):
                self._widen(<_Shape>self._shapes[i], now)
            rate = self._estimator.rate_at(now)
            self._estimator.add(batch.live_count, now)
            self.window_frames = window_frames(rate, self._ttl_ms, self._floor, self._ceiling)
            i = 0
            while i < self._mark_count and self._may_drop(&self._marks[i], batch.live_count, now):
                cut = self._marks[i]
                i += 1
            if i:
                self._mark_count -= i
                memmove(self._marks, self._marks + i, self._mark_count * sizeof(Mark))
                tail += [BLOCK_TRIM_LIVE, b"%d-%d" % (cut.ms, cut.sequence + 1)]
        # Renewed four times a ttl: the key outlives its newest frame by more than half of one, and
        # `acknowledge` sees to batches that were on their way for longer.
        if self._renew or (batch.live_count and now >= self._renewed_us + self._ttl_ms * 250):
            batch.renews = True
            tail += [BLOCK_LIVE_TTL, b"%d" % (2 * self._ttl_ms)]
            uses[0] |= USES_LIVE
        if self._visible != self._sequence:
            if self._told_visible != self._visible:
                tail += [BLOCK_VISIBLE, b"%d" % self._visible]
        elif self._told_visible >= 0:
            tail += [BLOCK_VISIBLE, b""]
        if self._estimator is not None and (batch.live_count or self._finishing):
            if now >= self._estimator_at_us or self._finishing:
                self._estimator_at_us = now + ESTIMATOR_EVERY_US
                tail += [BLOCK_ESTIMATOR, b"%.3f" % min(self._estimator.rate_at(now), MAX_RATE_HZ)]
        if self._pending_bytes and (
            self._finishing or self._pending_bytes > max(2 * self._stored_bytes, COMPACT_BYTES)
        ):
            # Every frame written so far is in this batch or before it, so the document is the one
            # after this batch. Each is three times the one before at the most, so all together are
            # half as much again as the last one; a reader folds twice a document at the most.
            # Without memory for it the server keeps the patches.
            try:
                tail += [
                    BLOCK_DOCUMENT, b"%d" % self.summary_version, self._document.dumps(),
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
        """Let the window keep what frames of *shape* ask of it."""
        cdef void* marks
        if shape.kind == LOG or (shape.kind == PATCH and self._ttl_ms):
            return 0
        if self._marks is NULL:
            marks = PyMem_Realloc(NULL, FIRST_MARKS * sizeof(Mark))
            if marks is NULL:
                raise MemoryError()
            self._marks = <Mark*>marks
            self._mark_capacity = FIRST_MARKS
            if self._acked_sequence:
                # What an earlier writer left, or what the log holds: counted as nothing.
                self._marks[0].count = 0
                self._marks[0].ms = self._acked_ms
                self._marks[0].sequence = self._acked_sequence
                self._mark_count = 1
        if self._ttl_ms == 0 or self._assumed:
            self._estimator = RateEstimator(
                shape.alpha,
                self._restored_rate if self._estimator is None else self._estimator.rate_at(now),
                now,
            )
            self._assumed = shape.kind == PATCH
            self._ttl_ms = shape.ttl_ms
            self._floor = shape.floor
            self._ceiling = shape.ceiling
            self._renew = True
        if shape.ttl_ms > self._ttl_ms:
            self._ttl_ms = shape.ttl_ms
            self._renew = True
        self._floor = max(self._floor, shape.floor)
        self._ceiling = max(self._ceiling, shape.ceiling)
        return 0

    cdef bint _may_drop(self, Mark* mark, Py_ssize_t live, long long now) noexcept:
        """Whether everything up to a mark may leave the window: without it there are K frames, the
        *live* new ones included, and all younger than ttl, or as many as the ceiling allows. The
        server's clock has gone on by at least what ours has since its last answer."""
        cdef long long behind = self._live_total + live - mark.count
        cdef long long server_ms = self._acked_ms + (now - self._acked_at_us) // 1000
        if behind >= self._ceiling:
            return True
        return behind >= self.window_frames and server_ms - mark.ms >= self._ttl_ms

    # -- sending --------------------------------------------------------------------------------

    cdef bint _full(self) noexcept:
        return self._count >= EAGER_FRAMES or self._size >= EAGER_BYTES

    cdef bint _sendable(self):
        cdef Py_ssize_t flying = len(self._in_flight)
        if self._ending is not None or self._returned or flying >= MAX_IN_FLIGHT:
            return False
        if self._unsent:
            return True
        if self._count == 0:
            return False
        return self._full() or (flying == 0 and (self._due or self.linger_us == 0))

    def next_batch(self):
        """Return the batch to send now, or None. It counts as on its way from here on."""
        cdef Batch batch
        self._notified = False
        if not self._sendable():
            return None
        if not self._unsent:
            self._seal()
        batch = <Batch>self._unsent[0]
        self._in_flight.append(batch)
        self._unsent.popleft()
        self._notify()
        return batch

    def hurry(self):
        """Let the open batch leave as soon as nothing is on its way: its linger is over, or
        somebody waits for it."""
        if self._count:
            self._due = True
        self._notify()

    def finish(self):
        """Queue the last batch, with the state that a later writer or reader continues from; no
        frame may follow."""
        if self._ending is not None or self._finishing:
            return
        self._finishing = True
        if self._count or self._pending_bytes or self._estimator is not None:
            try:
                self._seal()
            except BaseException:
                self._finishing = False
                raise
            self._notify()

    cdef int _notify(self) except -1:
        if not self._notified and self._sendable():
            self._notified = True
            try:
                self._on_ready()
            except BaseException:
                # An interrupt, perhaps: whoever calls next tells the shell again.
                self._notified = False
                raise
        return 0

    def disconnected(self):
        """Everything on its way has an unknown outcome: it goes again, in order, on the next
        connection."""
        cdef int collecting = PyGC_Disable()
        try:
            self._unsent.extendleft((self._returned + self._in_flight)[::-1])
            self._returned.clear()
            self._in_flight.clear()
        finally:
            if collecting:
                PyGC_Enable()
        self._notify()

    def acknowledge(self, Batch batch not None, reply):
        """Take the server's answer to *batch*.

        Args:
            batch: The oldest batch on its way.
            reply: Bytes (the position), a list (a refusal of the function) or an exception (an
                error reply).

        Returns:
            None, or the error after which the batch waits to be sent again: the shell repairs what
            it says (loads the library, backs off) and asks for the next batch.
        """
        cdef long long values[5]
        cdef long long acked, now
        if self._ending is not None or not self._in_flight or self._in_flight[0] is not batch:
            return None
        acked = batch.first_sequence + batch.frame_count - 1
        if not (
            PyBytes_CheckExact(reply)
            and parse_position(<bytes>reply, values) and values[1] == acked
        ):
            return self._refused(batch, reply)
        self._in_flight.pop(0)
        # The server takes no batch before those in front of it. What it refused there, for want of
        # memory perhaps, was a repeat of what it had stored before the connection broke.
        for earlier in self._returned:
            self._stored(<Batch>earlier)
        self._returned.clear()
        self._stored(batch)
        now = now_us()
        self.lease_left_ms = max(values[3] - values[2], 0)
        self.cancel_requested = values[4] != 0
        if batch.frame_count:
            self._acked_sequence = acked
            self._acked_ms = max(self._acked_ms, values[0])
            self._acked_at_us = now
        if batch.live_count:
            self._mark()
            if not batch.renews and now > self._renewed_us + self._ttl_ms * 1000:
                # It was long on its way, the key's life has gone on meanwhile, and it may even have
                # been made anew, without an end.
                self._renew = True
        if self._count == 0 and not self._in_flight and not self._unsent:
            if self._renew:
                self._seal()
            else:
                self._shrink()
        try:
            self._notify()
        finally:
            if self.waiting:
                self._on_progress()
        return None

    cdef void _stored(self, Batch batch) noexcept:
        self.unacknowledged_bytes -= PyBytes_GET_SIZE(batch.message)
        self._live_acked += batch.live_count

    cdef object _refused(self, Batch batch, object reply):
        if isinstance(reply, Exception):
            error = from_server_error(str(reply))
        elif (
            isinstance(reply, list) and len(reply) >= 2 and reply[0] == 0
            and PyBytes_CheckExact(reply[1])
        ):
            error = for_code(reply[1].decode("ascii", "replace"), reply[2:])
        else:
            error = ProtocolError()
        if self._returned:
            # The answer to a batch behind a refused one says only that it came too early.
            error = None
        elif batch.frame_count == 0 and isinstance(error, StreamClosed):
            # Care for what an ended attempt keeps; its end has set the retention of every key.
            self._in_flight.pop(0)
            self._stored(batch)
            try:
                self._notify()
            finally:
                if self.waiting:
                    self._on_progress()
            return None
        elif not (
            # What the function itself refuses it refuses again: the same bytes go again.
            isinstance(reply, Exception)
            and error.retryable and error.outcome is Outcome.NOT_APPLIED
        ):
            self.fail(error)
            return None
        # Keep the order: this batch and all behind it wait until each of them has been answered.
        self._returned.append(batch)
        self._in_flight.pop(0)
        if not self._in_flight:
            self.disconnected()
        return error

    cdef void _mark(self) noexcept:
        """Remember where the window stands after an acknowledged batch, in steps.

        A mark that is left out makes a later trim coarser, no more.
        """
        cdef Mark* mark
        cdef void* moved
        cdef long long frames, ms
        if self._mark_count:
            mark = &self._marks[self._mark_count - 1]
            frames = self._live_acked - mark.count
            ms = self._acked_ms - mark.ms
            if frames < self._ceiling // STEPS and (
                ms < self._ttl_ms // STEPS or frames < self._floor // STEPS
            ):
                return
        if self._mark_count == self._mark_capacity:
            moved = NULL
            if self._mark_capacity < MAX_MARKS:
                moved = PyMem_Realloc(self._marks, 2 * self._mark_capacity * sizeof(Mark))
            if moved is not NULL:
                self._marks = <Mark*>moved
                self._mark_capacity *= 2
            else:
                self._forget_mark()
        mark = &self._marks[self._mark_count]
        mark.count = self._live_acked
        mark.ms = self._acked_ms
        mark.sequence = self._acked_sequence
        self._mark_count += 1

    cdef void _forget_mark(self) noexcept:
        """Leave out the mark whose neighbours stand closest, the one to come included."""
        cdef Py_ssize_t i, least
        cdef long long behind, gap, least_gap
        least = 1
        least_gap = -1
        for i in range(1, self._mark_count):
            behind = self._live_acked
            if i + 1 < self._mark_count:
                behind = self._marks[i + 1].count
            gap = behind - self._marks[i - 1].count
            if least_gap < 0 or gap < least_gap:
                least = i
                least_gap = gap
        self._mark_count -= 1
        memmove(
            self._marks + least, self._marks + least + 1,
            (self._mark_count - least) * sizeof(Mark),
        )

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
        if len(self._known) > IDLE_SHAPES:
            self._known.clear()
        return 0

    # -- ends -----------------------------------------------------------------------------------

    def fail(self, error):
        """Stop for good: every later `write` raises a copy of *error*, which carries what was not
        stored."""
        if self._ending is not None:
            return
        # First, because reading the frames back runs Python code: none that is written meanwhile
        # may be missed.
        self._ending = error
        try:
            error.unstored = self.unstored()
        finally:
            self.error = error
            self._on_progress()

    def unstored(self):
        """Return the frames that the server has not acknowledged, oldest first, as ``StreamFrame``.

        Their ids have no time yet: it is the server's.
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
        """Called when there is something to send and was not before; a shell overrides it.

        What a hook raises passes through, and everything is as if the hook had not been called:
        what was written stays written, and the next call tells the shell again.
        """

    def _on_linger(self):
        """Called when a batch begins to linger; a shell calls `hurry` after `linger_us`."""

    def _on_progress(self):
        """Called when `waiting` is set and something was acknowledged, and when the writer
        fails."""

    @property
    def next_sequence(self):
        return self._sequence + 1

    @property
    def last_sequence(self):
        """Sequence of the newest acknowledged frame, 0 for none."""
        return self._acked_sequence

    @property
    def last_id(self):
        """Id of the newest acknowledged frame, ``0-0`` for none."""
        return f"{self._acked_ms}-{self._acked_sequence}" if self._acked_sequence else "0-0"

    @property
    def rate_hz(self):
        return self._estimator.rate_at(now_us()) if self._estimator is not None else 0.0

    @property
    def idle(self):
        """Whether everything that was written is acknowledged."""
        return self._count == 0 and not self._in_flight and not self._unsent


cdef inline unsigned long long age_ms(long long now, long long then) noexcept nogil:
    return <unsigned long long>((now - then) // 1000) if now > then else 0


cdef inline long long version_after(Run* run, _Shape shape) noexcept:
    """Version of the document after a run of patches; 0 for other frames."""
    return run.base_version + run.count if shape.kind == PATCH else 0


cdef inline Py_ssize_t extras_of(_Shape shape, long long previous, long long version) noexcept:
    return shape.field_count + (previous >= 0) + (version > 0)


cdef Py_ssize_t head_size(
    _Shape shape, Py_ssize_t count, long long previous, long long version, Py_ssize_t* parts
) noexcept:
    """Size of what `put_head` writes; its arguments are added to *parts*."""
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
    """What stands in a block before its payloads, or its run."""
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


cdef bint parse_position(bytes reply, long long* values) noexcept:
    """``<ms>-<sequence> <now> <expires> <cancel>``."""
    cdef const char* at = PyBytes_AS_STRING(reply)
    cdef const char* end = at + PyBytes_GET_SIZE(reply)
    cdef const char* separators = "-   "
    cdef int i
    cdef Py_ssize_t width
    for i in range(5):
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
        if i < 4:
            if at >= end or at[0] != separators[i]:
                return False
            at += 1
    return at == end


def arguments_of(bytes message not None):
    """Return the arguments that a request gives to its function, from the first after the keys."""
    import hiredis

    reader = hiredis.Reader()
    reader.feed(message)
    parts = reader.gets()
    return parts[3 + int(parts[2]):]


cdef list frames_of(Batch batch):
    """The frames of a batch, read back from its request: rare, so they are not kept twice."""
    cdef list frames = []
    cdef long long sequence = batch.first_sequence - 1
    argv = arguments_of(batch.message)
    at = 2
    while at < len(argv):
        letter = argv[at]
        if letter in FRAME_BLOCKS:
            count = int(argv[at + 1])
            at += 2
            shared = []
            if letter in (BLOCK_LOG_FIELDS, BLOCK_LIVE_FIELDS, BLOCK_PATCHES):
                extras = 2 * int(argv[at])
                shared = argv[at + 1:at + 1 + extras]
                at += 1 + extras
            live = letter not in (BLOCK_LOG, BLOCK_LOG_FIELDS)
            # A live entry stands for all its frames, under the id of the last one.
            entry_frames = count if live else 1
            name = b"run" if entry_frames > 1 else b"payload"
            for value in argv[at:at + count // entry_frames]:
                sequence += entry_frames
                entry = [b"0-%d" % sequence, [name, value, *shared]]
                frames.extend(decode_entries([entry], 0, live=live).frames)
                at += 1
            at += 2 if letter == BLOCK_PATCHES else 0
        else:
            at += 4 if letter == BLOCK_DOCUMENT else 2
    return frames

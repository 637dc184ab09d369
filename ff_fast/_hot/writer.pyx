"""The writer of one attempt, without I/O: frames in, FCALL bytes out, acknowledgements in.

A frame is copied into the open batch when it is written; sealing a batch sizes it, allocates once and writes the whole
request. A batch leaves when nothing is on its way, or when it is full; else the open one goes on filling, so its size
follows the speed of the server. Sealed batches are kept, as the bytes that were sent, until the server acknowledged
them; after a disconnect the same bytes go again, in order, and the sequence makes a repeat harmless.

The shells of ff_fast call `write` on any thread and everything else on the one that owns the connection. Between
checking and changing its state no method here runs Python code, and the GIL is never released, so each is atomic.

Arguments of `ff_append`, built here: lua/append.lua names the blocks; ff_fast/_hot/frames.pyx names the fields.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from collections import deque

from ff_fast._hot.frames import decode_entries
from ff_fast._hot.frames cimport put_varint, varint_size
from ff_fast._hot.merge import Document
from ff_fast._hot.rate cimport RateEstimator, window_frames
from ff_fast._hot.resp cimport (
    bulk_size,
    digits,
    number_size,
    put_bulk,
    put_digits,
    put_length,
    put_number,
    put_raw,
)
from ff_fast.errors import (
    Corruption,
    FFError,
    InvalidInput,
    InvalidPayload,
    InvalidType,
    Outcome,
    Overloaded,
    PayloadTooLarge,
    ProtocolError,
    for_code,
    from_server_error,
)
from ff_fast.types import BestEffortLiveConfig, StreamMode

cdef enum:
    # Mirrors of lua/prelude.lua.
    MAX_PAYLOAD = 65536
    MAX_FRAMES = 1024
    # A batch beyond this is full: it holds at most this and one more frame, below the server's limit for a run.
    MAX_BATCH_BYTES = 1 << 20
    # From here on another batch is sent although earlier ones are on their way; the server then never idles between
    # two batches, and smaller ones still grow with its load.
    EAGER_FRAMES = 256
    EAGER_BYTES = 1 << 16
    MAX_IN_FLIGHT = 4
    # Arrays of an idle writer beyond this many frames or bytes are given back.
    IDLE_FRAMES = 64
    IDLE_BYTES = 1024
    # The log is trimmed once in so many durable frames: a trim costs the server as much as half a frame.
    TRIM_EVERY = 128
    # Patches smaller than this are not worth a fresh document.
    COMPACT_BYTES = 4096
    ESTIMATOR_EVERY_US = 1_000_000

cdef enum Kind:
    LOG = 0
    LIVE = 1
    PATCH = 2

# Summary patches live in the same window as best-effort frames; without any of those, this is how long it keeps them.
SUMMARY_WINDOW = BestEffortLiveConfig.with_ttl(30_000)


cdef inline long long now_us() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <long long>now.tv_sec * 1_000_000 + now.tv_nsec // 1000


@cython.final
cdef class Shape:
    """What consecutive frames share, so that they can be one run, with its constant bytes prebuilt."""

    cdef Kind kind
    cdef object mode
    cdef object frame_type
    cdef object correlation_id
    cdef object encoding
    cdef object source
    cdef object config
    # For the log: the frame type. For the live window: empty.
    cdef bytes name
    # Field-value pairs as RESP, and how many pairs.
    cdef bytes fields
    cdef Py_ssize_t field_count
    # Summary frames: their patch kind with its pointer, as the summary names it, and the pointer alone.
    cdef bytes patch_name
    cdef bytes pointer


@cython.final
cdef class Batch:
    """A sealed batch: the request as it goes on the wire, kept until it is acknowledged."""

    cdef readonly bytes message
    cdef readonly long long first_sequence
    cdef readonly Py_ssize_t frame_count
    cdef Py_ssize_t live_count
    cdef Py_ssize_t payload_bytes


cdef struct Run:
    Py_ssize_t shape
    Py_ssize_t first
    Py_ssize_t count
    Py_ssize_t offset
    Py_ssize_t size
    # Sequence of the visible frame before the run where it is not the frame before it, else -1.
    long long previous
    long long base_version


cdef bytes bulk(bytes text):
    return b"$%d\r\n%b\r\n" % (len(text), text)


cdef bytes checked_text(str name, object text):
    """*text* as UTF-8, checked to be a name that fits into a field."""
    cdef bytes encoded
    if type(text) is not str:
        raise InvalidType(f"{name} must be str, not {type(text).__name__}.")
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"{name} must be text that UTF-8 can encode.") from None
    if not 1 <= len(encoded) <= 256:
        raise InvalidInput(f"{name} must have 1 to 256 bytes of UTF-8, not {len(encoded)}.")
    return encoded


cdef Shape make_shape(object mode, object frame_type, object correlation_id, object encoding, object source):
    cdef Shape shape = Shape.__new__(Shape)
    cdef list pairs = []
    if not isinstance(mode, StreamMode):
        raise InvalidType(f"mode must be a StreamMode, not {type(mode).__name__}.")
    shape.mode = mode
    shape.frame_type = frame_type
    shape.correlation_id = correlation_id
    shape.encoding = encoding
    shape.source = source
    shape.name = checked_text("frame_type", frame_type)
    shape.config = mode.config
    if mode.wire == "durable":
        shape.kind = LOG
    else:
        shape.kind = LIVE if mode.wire == "best_effort" else PATCH
        pairs += [b"mode", mode.wire.encode(), b"frame_type", shape.name]
    if correlation_id is not None:
        pairs += [b"correlation_id", checked_text("correlation_id", correlation_id)]
    if encoding != "utf8":
        pairs += [b"encoding", checked_text("encoding", encoding)]
    if source != "worker":
        pairs += [b"source", checked_text("source", source)]
    if shape.kind == PATCH:
        wire = mode.patch_kind.wire.encode()
        pairs += [b"patch_kind", wire]
        if mode.patch_kind.pointer is not None:
            shape.pointer = mode.patch_kind.pointer.encode()
            pairs += [b"pointer", shape.pointer]
        shape.patch_name = wire + b":" + (shape.pointer or b"")
    shape.fields = b"".join([bulk(part) for part in pairs])
    shape.field_count = len(pairs) // 2
    return shape


cdef class WriterCore:
    """Frames of one attempt to `ff_append` requests, batched, resent and acknowledged (see the module).

    Args:
        keys: core, log, live, meta and summary key of the attempt.
        fence: attempt index, lease id, lease epoch and writer id, as they go to the server.
        mode: Mode of frames that name none.
        opened: What `ff_open_writer` answered: last sequence, last ms, last visible sequence, estimator state, summary
            version.
        document: The summary at that version; None where the version is 0.
        retention_maxlen: Least number of durable frames that the log keeps, from 1.
        max_unacknowledged_bytes: Past this many bytes of payload, `write` raises ``Overloaded``.
        linger_ms: How long a batch may wait for more frames; 0 sends at once.
    """

    cdef object __weakref__
    cdef readonly object error
    cdef public bint waiting
    cdef object _mode
    cdef bytes _constant
    cdef bytes _pending_prefix
    # The open batch: payloads back to back, a length and a time for each frame, runs, and the shape of each run.
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
    cdef Shape _shape
    cdef dict _known
    # Sealed batches: on their way, and not sent (again) yet.
    cdef object _in_flight
    cdef object _unsent
    cdef bint _resync
    cdef bint _notified
    cdef bint _finishing
    cdef bint _due
    cdef long long _sequence
    cdef long long _visible
    cdef long long _acked_sequence
    cdef readonly long long first_sequence
    cdef long long _acked_ms
    cdef long long _acked_at_us
    cdef readonly Py_ssize_t unacknowledged_bytes
    cdef Py_ssize_t _max_unacknowledged
    cdef readonly bint cancel_requested
    cdef readonly long long lease_left_ms
    cdef readonly long long linger_us
    # Retention.
    cdef long long _retention_maxlen
    cdef Py_ssize_t _durable_since_trim
    cdef object _config
    cdef RateEstimator _estimator
    cdef double _restored_rate
    cdef long long _live_total
    cdef object _marks
    cdef tuple _newest_mark
    cdef readonly long long window_frames
    cdef long long _expire_at_us
    cdef long long _estimator_at_us
    # Summary: the fold of every patch written so far, and what the server holds beside its document.
    cdef object _document
    cdef readonly long long summary_version
    cdef Py_ssize_t _pending_bytes
    cdef bytes _patch_kind

    def __cinit__(self):
        self._data = NULL
        self._lengths = NULL
        self._times = NULL
        self._runs = NULL

    def __dealloc__(self):
        PyMem_Free(self._data)
        PyMem_Free(self._lengths)
        PyMem_Free(self._times)
        PyMem_Free(self._runs)

    def __init__(
        self, *, tuple keys not None, tuple fence not None, mode, tuple opened not None, bytes document=None,
        long long retention_maxlen=10_000, Py_ssize_t max_unacknowledged_bytes=32 << 20, double linger_ms=0.0,
    ):
        if retention_maxlen < 1:
            raise InvalidInput("retention_maxlen must be at least 1.")
        if not 0.0 <= linger_ms <= 1000.0:
            raise InvalidInput("linger_ms must be between 0 and 1000.")
        if max_unacknowledged_bytes < 1:
            raise InvalidInput("max_unacknowledged_bytes must be at least 1.")
        # FCALL ff_append 5 <keys> <fence>: 12 of the parts of every request.
        self._constant = b"".join(
            [bulk(part) for part in (b"FCALL", b"ff_append", b"5", *keys, *fence)]
        )
        self._mode = mode
        self._known = {}
        self._shapes = []
        self._in_flight = deque()
        self._unsent = deque()
        self._marks = deque()
        self._sequence, self._acked_ms, self._visible, estimator, self.summary_version = opened
        self._acked_sequence = self._sequence
        self.first_sequence = self._sequence + 1
        self._acked_at_us = now_us()
        self._max_unacknowledged = max_unacknowledged_bytes
        self._retention_maxlen = retention_maxlen
        # An earlier writer may have left the log due for a trim, and a window whose expiry is unknown.
        self._durable_since_trim = TRIM_EVERY if self._sequence else 0
        self.linger_us = <long long>(linger_ms * 1000.0)
        if estimator:
            try:
                self._restored_rate = float(estimator)
            except ValueError:
                raise Corruption("The rate of the live window is not a number; end the attempt.") from None
        if self._sequence:
            self._newest_mark = (0, self._acked_ms, self._sequence)
            self._marks.append(self._newest_mark)
        self._document = Document(document) if document is not None else None
        self._shape = self._shape_of(mode, "token", None, "utf8", "worker")

    # -- writing ----------------------------------------------------------------------------------------------------

    cdef Shape _shape_of(self, object mode, object frame_type, object correlation_id, object encoding, object source):
        cdef tuple key = (mode, frame_type, correlation_id, encoding, source)
        shape = self._known.get(key)
        if shape is None:
            shape = make_shape(mode, frame_type, correlation_id, encoding, source)
            # Correlation ids may be many; the table is there for the few that alternate.
            if len(self._known) >= 64:
                self._known.clear()
            self._known[key] = shape
        return <Shape>shape

    cdef int _reserve(self, Py_ssize_t size) except -1:
        cdef Py_ssize_t capacity
        cdef void* moved
        if self._size + size > self._data_capacity:
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
            capacity = max(self._run_capacity * 2, 4)
            moved = PyMem_Realloc(self._runs, capacity * sizeof(Run))
            if moved is NULL:
                raise MemoryError()
            self._runs = <Run*>moved
            self._run_capacity = capacity
        return 0

    def write(
        self, payload, frame_type="token", *, mode=None, correlation_id=None, encoding="utf8", source="worker",
    ):
        """Take one frame and return its sequence. Never waits, never does I/O.

        Args:
            payload: 0 to 65,536 bytes. ``str`` is encoded as UTF-8; ``bytearray`` and ``memoryview`` are copied.
                In mode ``summary`` it is a patch, checked here.
            frame_type: Classifier of the frame, 1 to 256 bytes of UTF-8.
            mode: The frame's ``StreamMode``; the writer's where None.
            correlation_id: Text that readers get with the frame, 1 to 256 bytes of UTF-8.
            encoding: ``utf8`` or what else the payload is; readers get it, nothing is converted.
            source: Who wrote the frame.

        Returns:
            The frame's sequence in its attempt. It is stored once `flush` returns.

        Raises:
            InvalidType, InvalidPayload, PayloadTooLarge, InvalidPatch, InvalidInput: This frame was refused; the
                writer goes on.
            Overloaded: More than the writer's limit of bytes is unacknowledged; `drain`, then write again.
            FFError: What stopped the writer earlier; its ``unstored`` has the frames that were not stored.
        """
        cdef Shape shape = self._shape
        cdef Run* run
        cdef bytes data
        cdef Py_ssize_t size
        cdef long long previous
        if self.error is not None:
            raise self.error.with_traceback(None)
        if self._finishing:
            raise InvalidInput("The writer is closing; write before close().")
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
            frame_type is shape.frame_type and mode is shape.mode and correlation_id is shape.correlation_id
            and encoding is shape.encoding and source is shape.source
        ):
            shape = self._shape_of(mode, frame_type, correlation_id, encoding, source)
        if self.unacknowledged_bytes + size > self._max_unacknowledged:
            raise Overloaded(
                f"{self.unacknowledged_bytes} bytes wait for the server; call drain() and write again."
            )
        if self._count >= MAX_FRAMES or self._size >= MAX_BATCH_BYTES:
            self._unsent.append(self._seal())
        self._reserve(size)
        if shape.kind == PATCH:
            self._fold(shape, data)
        if (
            shape is not self._shape or self._run_count == 0
            or (shape.kind != LIVE and self._visible != self._sequence)
        ):
            # Nothing below may fail: the frame is in once its run is.
            previous = -1
            if shape.kind != LIVE and self._visible != self._sequence:
                previous = self._visible
            self._shapes.append(shape)
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
        if not self._notified:
            if self._sendable():
                self._notified = True
                self._on_ready()
            elif self._count == 1 and self.linger_us:
                self._on_linger()
        return self._sequence

    cdef bytes _payload_of(self, object payload):
        if isinstance(payload, str):
            try:
                return payload.encode()
            except UnicodeEncodeError:
                raise InvalidPayload("The payload has a surrogate that UTF-8 cannot encode; pass bytes.") from None
        if isinstance(payload, (bytes, bytearray, memoryview)):
            # Checked before the copy, so that a huge buffer costs nothing.
            if memoryview(payload).nbytes > MAX_PAYLOAD:
                raise PayloadTooLarge(MAX_PAYLOAD, memoryview(payload).nbytes)
            return bytes(payload)
        raise InvalidType(f"The payload must be bytes, str, bytearray or memoryview, not {type(payload).__name__}.")

    cdef int _fold(self, Shape shape, bytes data) except -1:
        """Apply a patch to the document, or refuse it, with the document unchanged."""
        if self._document is None:
            self._document = Document()
        if shape.pointer is None:
            self._document.merge(data)
        else:
            self._document.append(shape.pointer, data)
        self.summary_version += 1
        self._patch_kind = shape.patch_name
        self._pending_bytes += PyBytes_GET_SIZE(data)
        return 0

    # -- sealing ----------------------------------------------------------------------------------------------------

    cdef Py_ssize_t _fields_size(self, Run* run, Shape shape) noexcept:
        """Wire size of a live entry's count, field count and fields, all but the last field's value."""
        cdef Py_ssize_t fields = self._field_count(run, shape)
        cdef Py_ssize_t total = number_size(run.count) + number_size(fields) + PyBytes_GET_SIZE(shape.fields)
        if run.previous >= 0:
            total += bulk_size(4) + number_size(run.previous)
        if shape.kind == PATCH:
            total += bulk_size(15) + number_size(run.base_version + run.count)
        if run.count > 1:
            total += bulk_size(5) + number_size(run.count) + bulk_size(3)
        else:
            total += bulk_size(7)
        return total

    cdef Py_ssize_t _field_count(self, Run* run, Shape shape) noexcept:
        return (
            shape.field_count + (run.previous >= 0) + (shape.kind == PATCH) + (2 if run.count > 1 else 1)
        )

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

    cdef bytes _pending_field(self, Run* run, Shape shape):
        """Name under which the summary keeps the patches of a run: what a reader needs to fold them."""
        cdef bytes form = b"run" if run.count > 1 else b"patch"
        return b"%b:%d:%d:%b" % (form, run.base_version + run.count, run.count, shape.patch_name)

    cdef Batch _seal(self):
        """The open batch as a request, and a new open batch. `_count` may be 0: then only retention work is sent."""
        cdef Batch batch = Batch.__new__(Batch)
        cdef long long now = now_us()
        cdef Py_ssize_t parts = 13
        cdef Py_ssize_t total = PyBytes_GET_SIZE(self._constant)
        cdef Py_ssize_t durable = 0
        cdef Py_ssize_t live = 0
        cdef Py_ssize_t index, i, value_size, extras
        cdef Run* run
        cdef Shape shape
        cdef list names = []
        cdef bytes name, tail
        cdef char* start
        cdef char* out
        cdef const char* data
        batch.first_sequence = self._sequence - self._count + 1
        batch.frame_count = self._count
        batch.payload_bytes = self._size
        total += number_size(batch.first_sequence)
        for index in range(self._run_count):
            run = &self._runs[index]
            shape = <Shape>self._shapes[index]
            if shape.kind == LOG:
                extras = shape.field_count
                durable += run.count
                if run.previous >= 0:
                    # `prev` belongs to the first frame alone, so that one is a block of its own.
                    parts += 4 + 2 * (extras + 1) + 1
                    total += (
                        bulk_size(1) + number_size(1) + bulk_size(PyBytes_GET_SIZE(shape.name))
                        + number_size(extras + 1) + bulk_size(4) + number_size(run.previous)
                        + PyBytes_GET_SIZE(shape.fields)
                    )
                if run.count > (run.previous >= 0):
                    parts += 4 + 2 * extras + run.count - (run.previous >= 0)
                    total += (
                        bulk_size(1) + number_size(run.count - (run.previous >= 0))
                        + bulk_size(PyBytes_GET_SIZE(shape.name)) + number_size(extras) + PyBytes_GET_SIZE(shape.fields)
                    )
                for i in range(run.first, run.first + run.count):
                    total += bulk_size(self._lengths[i])
            else:
                live += run.count
                parts += 3 + 2 * self._field_count(run, shape)
                total += bulk_size(1) + self._fields_size(run, shape) + bulk_size(self._run_bytes(run, now))
                name = None
                if shape.kind == PATCH:
                    name = self._pending_field(run, shape)
                    parts += 2
                    total += bulk_size(PyBytes_GET_SIZE(name)) + number_size(run.base_version)
                names.append(name)
        tail = self._retention(now, durable, live, &parts)
        total += 1 + digits(parts) + 2 + PyBytes_GET_SIZE(tail)
        batch.live_count = live
        batch.message = PyBytes_FromStringAndSize(NULL, total)
        start = PyBytes_AS_STRING(batch.message)
        out = put_length(start, c'*', parts)
        out = put_raw(out, PyBytes_AS_STRING(self._constant), PyBytes_GET_SIZE(self._constant))
        out = put_number(out, batch.first_sequence)
        live = 0
        for index in range(self._run_count):
            run = &self._runs[index]
            shape = <Shape>self._shapes[index]
            if shape.kind == LOG:
                data = self._data + run.offset
                i = run.first
                if run.previous >= 0:
                    out = put_log_block(out, shape, 1, 1)
                    out = put_bulk(out, "prev", 4)
                    out = put_number(out, run.previous)
                    out = put_raw(out, PyBytes_AS_STRING(shape.fields), PyBytes_GET_SIZE(shape.fields))
                    out = put_bulk(out, data, self._lengths[i])
                    data += self._lengths[i]
                    i += 1
                if i < run.first + run.count:
                    out = put_log_block(out, shape, run.first + run.count - i, 0)
                    out = put_raw(out, PyBytes_AS_STRING(shape.fields), PyBytes_GET_SIZE(shape.fields))
                while i < run.first + run.count:
                    out = put_bulk(out, data, self._lengths[i])
                    data += self._lengths[i]
                    i += 1
                continue
            out = put_bulk(out, "S" if shape.kind == PATCH else "V", 1)
            out = put_number(out, run.count)
            out = put_number(out, self._field_count(run, shape))
            out = put_raw(out, PyBytes_AS_STRING(shape.fields), PyBytes_GET_SIZE(shape.fields))
            if run.previous >= 0:
                out = put_bulk(out, "prev", 4)
                out = put_number(out, run.previous)
            if shape.kind == PATCH:
                out = put_bulk(out, "summary_version", 15)
                out = put_number(out, run.base_version + run.count)
            if run.count > 1:
                out = put_bulk(out, "count", 5)
                out = put_number(out, run.count)
                out = put_bulk(out, "run", 3)
            else:
                out = put_bulk(out, "payload", 7)
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
        self._count = 0
        self._size = 0
        self._run_count = 0
        self._shapes.clear()
        self._due = False
        return batch

    cdef bytes _retention(self, long long now, Py_ssize_t durable, Py_ssize_t live, Py_ssize_t* parts):
        """The blocks behind the frames: trims, expiry, estimator state and a fresh document where they are due."""
        cdef list tail = []
        cdef double rate
        cdef long long cut_ms, cut_sequence
        self._durable_since_trim += durable
        if self._durable_since_trim >= TRIM_EVERY:
            self._durable_since_trim = 0
            tail += [b"K", b"%d" % self._retention_maxlen]
        if live:
            for shape in self._shapes:
                config = (<Shape>shape).config
                if (<Shape>shape).kind == PATCH:
                    config = SUMMARY_WINDOW
                if (<Shape>shape).kind != LOG and (self._config is None or config.ttl_ms > self._config.ttl_ms):
                    self._config = config
                    self._estimator = RateEstimator(
                        config.ema_alpha, self._restored_rate if self._estimator is None else self.rate_hz, now
                    )
            rate = self._estimator.rate_at(now)
            self._estimator.add(live, now)
            self.window_frames = window_frames(
                rate, self._config.ttl_ms, self._config.maxlen_floor, self._config.maxlen_ceiling
            )
            self._live_total += live
            cut_ms = -1
            cut_sequence = -1
            while self._marks and self._may_drop(self._marks[0], now):
                _, cut_ms, cut_sequence = self._marks.popleft()
            if cut_ms >= 0:
                tail += [b"T", b"%d-%d" % (cut_ms, cut_sequence + 1)]
            if now >= self._expire_at_us:
                # Renewed four times a ttl: the key then always outlives its newest frame by more than one ttl.
                self._expire_at_us = now + <long long>self._config.ttl_ms * 250
                tail += [b"P", b"%d" % (2 * <long long>self._config.ttl_ms)]
        if self._estimator is not None and (live or self._finishing):
            if now >= self._estimator_at_us or self._finishing:
                self._estimator_at_us = now + ESTIMATOR_EVERY_US
                tail += [b"E", b"%.3f" % self._estimator.rate_at(now)]
        if self._pending_bytes and (
            self._finishing or self._pending_bytes > max(<Py_ssize_t>self._document.size, COMPACT_BYTES)
        ):
            # Every frame written so far is in this batch or before it, so the document is the one after this batch.
            self._pending_bytes = 0
            tail += [b"C", b"%d" % self.summary_version, self._document.dumps(), self._patch_kind]
        parts[0] += len(tail)
        return b"".join([bulk(part) for part in tail])

    cdef bint _may_drop(self, tuple mark, long long now):
        """Whether everything up to a mark may leave the window: it holds K frames without it and all younger than
        ttl, or as many as the ceiling allows. The server's clock has gone on by at least what ours has since its
        last answer."""
        cdef long long behind = self._live_total - <long long>mark[0]
        cdef long long server_ms = self._acked_ms + (now - self._acked_at_us) // 1000
        if behind >= <long long>self._config.maxlen_ceiling:
            return True
        return behind >= self.window_frames and server_ms - <long long>mark[1] >= <long long>self._config.ttl_ms

    # -- sending ----------------------------------------------------------------------------------------------------

    cdef bint _full(self) noexcept:
        return self._count >= EAGER_FRAMES or self._size >= EAGER_BYTES

    cdef bint _sendable(self):
        cdef Py_ssize_t flying = len(self._in_flight)
        if self.error is not None or self._resync or flying >= MAX_IN_FLIGHT:
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
        if self._unsent:
            batch = self._unsent.popleft()
        else:
            batch = self._seal()
        self._in_flight.append(batch)
        self._notify()
        return batch

    def hurry(self):
        """Let the open batch leave as soon as nothing is on its way: its linger is over, or somebody waits for it."""
        self._due = True
        self._notify()

    def finish(self):
        """Queue the last batch, with the state that a later writer or reader continues from; no frame may follow."""
        if self.error is not None or self._finishing:
            return
        self._finishing = True
        if self._count or self._pending_bytes or self._estimator is not None:
            self._unsent.append(self._seal())
            self._notify()

    cdef void _notify(self):
        if not self._notified and self._sendable():
            self._notified = True
            self._on_ready()

    def disconnected(self):
        """Everything on its way has an unknown outcome: it goes again, in order, on the next connection."""
        self._in_flight.reverse()
        self._unsent.extendleft(self._in_flight)
        self._in_flight.clear()
        self._resync = False
        self._notify()

    def acknowledge(self, Batch batch not None, reply):
        """Take the server's answer to *batch*.

        Args:
            batch: The oldest batch on its way.
            reply: Bytes (the position), a list (a refusal of the function) or an exception (an error reply).

        Returns:
            None, or the error after which the batch waits to be sent again: the shell repairs what it says (loads the
            library, backs off) and asks for the next batch.
        """
        cdef long long values[4]
        cdef long long acked
        if self.error is not None or not self._in_flight or self._in_flight[0] is not batch:
            return None
        if PyBytes_CheckExact(reply) and parse_position(<bytes>reply, values):
            if self._resync:
                # Cannot be: a batch before this one was refused, so this one is a gap.
                self.fail(ProtocolError())
                return None
            self._in_flight.popleft()
            acked = batch.first_sequence + batch.frame_count - 1
            self._acked_sequence = max(self._acked_sequence, acked)
            self._acked_ms = max(self._acked_ms, values[0])
            self._acked_at_us = now_us()
            self.lease_left_ms = values[2]
            self.cancel_requested = values[3] != 0
            self.unacknowledged_bytes -= batch.payload_bytes
            if batch.live_count:
                self._mark()
            if self._count == 0 and not self._in_flight and not self._unsent:
                self._shrink()
            self._notify()
            if self.waiting:
                self._on_progress()
            return None
        return self._refused(batch, reply)

    cdef object _refused(self, Batch batch, object reply):
        if isinstance(reply, list) and len(reply) >= 2 and reply[0] == 0:
            error = for_code(reply[1].decode("ascii", "replace"), reply[2:])
        elif isinstance(reply, Exception):
            error = from_server_error(str(reply))
        else:
            error = ProtocolError()
        if self._resync:
            # The answer to a batch behind a refused one says only that it came too early.
            error = None
        elif not (error.retryable and error.outcome is Outcome.NOT_APPLIED):
            self.fail(error)
            return None
        # Keep the order: this batch and all behind it wait until each of them has been answered.
        self._resync = True
        self._in_flight.popleft()
        self._in_flight.append(batch)
        if self._in_flight[0].first_sequence <= batch.first_sequence:
            self._resync = False
            self.disconnected()
        return error

    cdef int _mark(self) except -1:
        """Remember where the window stands after an acknowledged batch, coarsely: 128 marks a window at the most."""
        cdef long long count_step = max(<long long>self._config.maxlen_ceiling // 128, 1)
        cdef long long ms_step = max(<long long>self._config.ttl_ms // 128, 1)
        cdef long long last_count
        cdef long long last_ms
        # What is written but not acknowledged is behind the mark.
        cdef long long count = self._live_total
        for batch in self._in_flight:
            count -= (<Batch>batch).live_count
        for batch in self._unsent:
            count -= (<Batch>batch).live_count
        if self._newest_mark is not None and self._marks:
            last_count, last_ms, _ = self._newest_mark
            if self._acked_ms - last_ms < ms_step and count - last_count < count_step:
                return 0
        self._newest_mark = (count, self._acked_ms, self._acked_sequence)
        self._marks.append(self._newest_mark)
        return 0

    cdef void _shrink(self) noexcept:
        if self._capacity > IDLE_FRAMES or self._data_capacity > IDLE_BYTES:
            PyMem_Free(self._data)
            PyMem_Free(self._lengths)
            PyMem_Free(self._times)
            self._data = NULL
            self._lengths = NULL
            self._times = NULL
            self._data_capacity = 0
            self._capacity = 0

    # -- ends -------------------------------------------------------------------------------------------------------

    def fail(self, error):
        """Stop for good: every later `write` raises *error*, which carries what was not stored."""
        if self.error is not None:
            return
        error.unstored = self.unstored()
        self.error = error
        self._on_progress()

    def unstored(self):
        """Return the frames that the server has not acknowledged, oldest first, as ``StreamFrame``."""
        cdef list frames = []
        if self._count:
            self._unsent.append(self._seal())
        for batch in (*self._in_flight, *self._unsent):
            frames.extend(frames_of(<Batch>batch))
        return tuple(frames)

    def _on_ready(self):
        """Called when there is something to send and was not before; a shell overrides it."""

    def _on_linger(self):
        """Called when a batch begins to linger; a shell calls `hurry` when `linger_us` have passed."""

    def _on_progress(self):
        """Called when `waiting` is set and something was acknowledged, and when the writer fails."""

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
        return f"{self._acked_ms}-{self._acked_sequence}"

    @property
    def rate_hz(self):
        return self._estimator.rate_at(now_us()) if self._estimator is not None else 0.0

    @property
    def idle(self):
        """Whether everything that was written is acknowledged."""
        return self._count == 0 and not self._in_flight and not self._unsent


cdef inline unsigned long long age_ms(long long now, long long then) noexcept nogil:
    return <unsigned long long>((now - then) // 1000) if now > then else 0


cdef char* put_log_block(char* out, Shape shape, Py_ssize_t count, Py_ssize_t more) noexcept:
    out = put_bulk(out, "L", 1)
    out = put_number(out, count)
    out = put_bulk(out, PyBytes_AS_STRING(shape.name), PyBytes_GET_SIZE(shape.name))
    return put_number(out, shape.field_count + more)


cdef bint parse_position(bytes reply, long long* values) noexcept:
    """Four integers with a space between each two."""
    cdef const char* at = PyBytes_AS_STRING(reply)
    cdef const char* end = at + PyBytes_GET_SIZE(reply)
    cdef int i
    cdef Py_ssize_t width
    for i in range(4):
        values[i] = 0
        width = 0
        while at < end and c'0' <= at[0] <= c'9':
            values[i] = values[i] * 10 + (at[0] - c'0')
            at += 1
            width += 1
        if width == 0 or width > 16:
            return False
        if i < 3:
            if at >= end or at[0] != c' ':
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
    at = 5
    while at < len(argv):
        letter = argv[at]
        if letter == b"L":
            count, extras = int(argv[at + 1]), int(argv[at + 3])
            shared = [b"frame_type", argv[at + 2], *argv[at + 4:at + 4 + 2 * extras]]
            at += 4 + 2 * extras
            for payload in argv[at:at + count]:
                sequence += 1
                entry = [b"0-%d" % sequence, [*shared, b"payload", payload]]
                frames.extend(decode_entries([entry], 0).frames)
            at += count
        elif letter in (b"V", b"S"):
            fields = int(argv[at + 2])
            sequence += int(argv[at + 1])
            at += 3
            entry = [b"0-%d" % sequence, list(argv[at:at + 2 * fields])]
            frames.extend(decode_entries([entry], 0).frames)
            at += 2 * fields + (2 if letter == b"S" else 0)
        else:
            at += 4 if letter == b"C" else 2
    return frames

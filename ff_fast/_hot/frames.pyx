"""Decodes entries and pushes to :class:`StreamFrame`, and merges the two streams of an attempt.

An entry id is ``<ms>-<sequence>``: server time, and the sequence of the entry's last frame. Entries
are field lists:

    log entry        payload [frame_type] [prev] [correlation_id] [encoding] [source]
    loss entry       lost prev
    live entry       payload (of one frame) or run (of several)
                     [mode] [frame_type] [prev] [correlation_id] [encoding] [source]
                     [patch_kind [pointer]] [summary_version]
    end entry        end prev

A field with its default value is left out. Defaults: mode ``durable`` in the log and
``best_effort`` in the live window, frame type ``token``, encoding ``utf8``, source ``worker``.
The first visible (not best-effort) frame after best-effort frames has ``prev``: the sequence of the
visible frame before it, 0 for none. ``summary_version`` is that of the entry's last frame. A loss
entry stands in the log, and says how many frames up to its own sequence were lost with a server.

A run holds consecutive frames that share all these fields. It stores what differs:

    count                    varint
    payload lengths          count varints, in bytes
    times                    count zigzag varints: when each was written, in ms from the entry's ms
    payloads                 back to back

A run has at most 1,024 frames and 2 MiB; an entry with a larger value is foreign. A varint is
little-endian base 128; the high bit of a byte says that another byte follows. Frame i
of n, from 0, has the id ``<entry ms>-<entry sequence - n + 1 + i>``, so a cursor may be inside a
run. A zigzag varint is 2 t for a time t from 0 on, and -2 t - 1 for one below: a frame is mostly
written before its entry gets its ms, and behind it where the ms was fixed with the first frame of a
run.

What is published on the channel of an attempt (``keys.attempt_channel``), by its first byte:

    F<ms>-<sequence> [blocks]                    frames that are stored, up to this id
    f<ms>-<sequence> [blocks]                    frames that will be stored under these ids
    E<ms>-<sequence> <previous visible> <reason>[ <error>] the end, under the id of its entry
    L<ms>                                        the lease ends in so many ms
    anything else                                something to read

No blocks behind the space: the frames are too large to be pushed. A block holds consecutive frames
of one stream that share their fields:

    stream                   L for the log, V for the live window
    number of fields         varint
    fields                   those of an entry but payload and run, each: varint length, name,
                             varint length, value
    size of the run          varint
    run                      as above, also for one frame

All frames of a push have the ms of its id. ``prev`` belongs to the first frame of a block.
"""

cimport cython
from cpython.bytes cimport (
    PyBytes_AS_STRING,
    PyBytes_CheckExact,
    PyBytes_FromStringAndSize,
    PyBytes_GET_SIZE,
)
from cpython.dict cimport PyDict_GetItem
from cpython.list cimport PyList_CheckExact, PyList_GET_SIZE
from cpython.object cimport Py_EQ, Py_NE, PyObject
from libc.string cimport memcmp

from typing import get_args

from ff_fast.errors import Corruption
from ff_fast.types import EndReason, Gap, PatchKind

# Texts such as frame types recur, so they are kept: up to this many, of up to this many bytes. A
# full table is cleared.
cdef Py_ssize_t TEXT_LIMIT = 4096
cdef Py_ssize_t TEXT_BYTES = 64
cdef dict texts = {}
cdef dict patch_kinds = {}

cdef enum:
    # The same limits as in lua/prelude.lua.
    MAX_FRAMES = 1024
    MAX_RUN_BYTES = 1 << 21

# Stands for every larger half of an id.
cdef long long LARGEST = <long long>1 << 62

cdef list NO_FRAMES = []
cdef frozenset END_REASONS = frozenset(get_args(EndReason))

# The mode of what stands for lost frames among the frames of `Entries`; no frame has it.
cdef str LOST = "lost"
cdef str DURABLE = "durable"
cdef str BEST_EFFORT = "best_effort"
cdef str TOKEN = "token"
cdef str UTF8 = "utf8"
cdef str WORKER = "worker"


cdef str beginning_of(bytes raw):
    """Return a text that may be cut within its last letter; None for none."""
    return None if raw is None else raw.decode("utf-8", "ignore")


cdef str text_of(bytes raw):
    """Return the text of a field; the same object for a text that recurs."""
    cdef PyObject* known = PyDict_GetItem(texts, raw)
    cdef str text
    if known is not NULL:
        return <str>known
    text = raw.decode("utf-8", "replace")
    if PyBytes_GET_SIZE(raw) <= TEXT_BYTES:
        if len(texts) >= TEXT_LIMIT:
            texts.clear()
        texts[raw] = text
    return text


cdef object patch_kind_of(bytes wire, bytes pointer):
    """Return the kind of a patch; the same object for a kind that recurs."""
    cdef tuple key = (wire, pointer)
    kind = patch_kinds.get(key)
    if kind is None:
        try:
            kind = PatchKind(wire.decode(), None if pointer is None else pointer.decode())
        except ValueError:
            bad_entry()
        if len(patch_kinds) >= TEXT_LIMIT:
            patch_kinds.clear()
        patch_kinds[key] = kind
    return kind


# no_gc: a frame cannot be part of a cycle, and readers hold many, which the collector would walk.
@cython.no_gc
@cython.freelist(256)
cdef class StreamFrame:
    """One frame of a stream, as a reader gets it. Immutable, compared by value, hashable.

    Attributes:
        stream_id: ``<server ms>-<sequence>``, its id in the stream of the attempt.
        cursor: Where a reader goes on behind this frame; opaque, and safe in a URL. ``Gap`` and
            ``End`` have one too.
        attempt_index: The attempt, from 0.
        sequence: Position in the attempt, dense, from 1.
        frame_type: Classifier that the worker chose; ``token`` by default.
        payload: The bytes that were written, 0 to 65,536.
        ts_ms: When the frame was written, in ms since the epoch by the server's clock.
        mode: Wire token of the stream mode: ``durable``, ``summary`` or ``best_effort``.
        encoding: What the worker says of the payload: ``utf8``, ``binary`` or another text; nothing
            is converted.
        source: Who made the frame; ``worker`` by default.
        correlation_id: Text that the worker gave, or None.
        summary_version: Version of the summary after this patch, from 1; None outside mode
            ``summary``.
        patch_kind: How the payload changes the summary; None outside mode ``summary``.

    Raises:
        Corruption: *stream_id* is not an id.
        TypeError: An argument has the wrong type.
    """

    def __init__(
        self, *, str stream_id not None, str frame_type not None, bytes payload not None,
        long long ts_ms, str mode="durable", str encoding="utf8", str source="worker",
        str correlation_id=None,
        summary_version=None, patch_kind=None, unsigned int attempt_index=0,
    ):
        cdef bytes raw = stream_id.encode()
        parse_id(raw, &self._ms, &self.sequence)
        self.frame_type = frame_type
        self.payload = payload
        self.ts_ms = ts_ms
        self.mode = mode
        self.encoding = encoding
        self.source = source
        self.correlation_id = correlation_id
        self._summary_version = 0 if summary_version is None else summary_version
        self.patch_kind = patch_kind
        self._previous = self.sequence - 1
        self.attempt_index = attempt_index

    @property
    def stream_id(self):
        return f"{self._ms}-{self.sequence}"

    @property
    def cursor(self):
        """Where a reader goes on behind this frame; opaque, and safe in a URL."""
        return f"{self.attempt_index}.{self._ms}-{self.sequence}"

    @property
    def summary_version(self):
        return self._summary_version if self._summary_version else None

    def _fields(self):
        return (
            self.stream_id, self.frame_type, self.payload, self.ts_ms, self.mode, self.encoding,
            self.source, self.correlation_id, self.summary_version, self.patch_kind,
            self.attempt_index,
        )

    def __richcmp__(self, other, int op):
        if not isinstance(other, StreamFrame) or op not in (Py_EQ, Py_NE):
            return NotImplemented
        same = (<StreamFrame>self)._fields() == (<StreamFrame>other)._fields()
        return same if op == Py_EQ else not same

    def __hash__(self):
        return hash(self._fields())

    def __reduce__(self):
        return _rebuild, self._fields()

    def __repr__(self):
        return (
            f"StreamFrame(stream_id={self.stream_id!r}, frame_type={self.frame_type!r}, "
            f"mode={self.mode!r}, payload=<{len(self.payload)} bytes>)"
        )


def _rebuild(
    stream_id, frame_type, payload, ts_ms, mode, encoding, source, correlation_id, summary_version,
    patch_kind, attempt_index,
):
    return StreamFrame(
        stream_id=stream_id, frame_type=frame_type, payload=payload, ts_ms=ts_ms, mode=mode,
        encoding=encoding, source=source, correlation_id=correlation_id,
        summary_version=summary_version, patch_kind=patch_kind, attempt_index=attempt_index,
    )


cdef int bad_entry() except -1:
    raise Corruption(
        "A stream entry is not in the form that ff_fast writes; read the stream with a Redis tool."
    )


cdef int parse_number(const char* at, const char* end, long long* value) except -1:
    """Parse the decimal integer that fills [at, end); at most 18 digits."""
    cdef long long number = 0
    if at == end or end - at > 18:
        bad_entry()
    while at < end:
        if not c'0' <= at[0] <= c'9':
            bad_entry()
        number = number * 10 + (at[0] - c'0')
        at += 1
    value[0] = number
    return 0


cdef long long id_part(const char* at, const char* end) except -1:
    """Return half of an entry id; LARGEST for more than 18 digits, which ff_fast never writes."""
    cdef long long number = 0
    if end - at > 18:
        return LARGEST
    parse_number(at, end, &number)
    return number


cdef int parse_entry_id(bytes raw, long long* ms, long long* sequence) except -1:
    cdef const char* at = PyBytes_AS_STRING(raw)
    cdef const char* end = at + PyBytes_GET_SIZE(raw)
    cdef const char* dash = at
    while dash < end and dash[0] != c'-':
        dash += 1
    if dash == end:
        bad_entry()
    ms[0] = id_part(at, dash)
    sequence[0] = id_part(dash + 1, end)
    return 0


cdef int parse_id(bytes raw, long long* ms, long long* sequence) except -1:
    cdef const char* at = PyBytes_AS_STRING(raw)
    cdef const char* end = at + PyBytes_GET_SIZE(raw)
    cdef const char* dash = at
    while dash < end and dash[0] != c'-':
        dash += 1
    if dash == end:
        bad_entry()
    parse_number(at, dash, ms)
    parse_number(dash + 1, end, sequence)
    return 0


cdef int number_of(bytes raw, long long* value) except -1:
    cdef const char* at = PyBytes_AS_STRING(raw)
    return parse_number(at, at + PyBytes_GET_SIZE(raw), value)


cdef const unsigned char* take_varint(
    const unsigned char* at, const unsigned char* end, unsigned long long* value
) except NULL:
    cdef unsigned long long number = 0
    cdef int shift = 0
    cdef unsigned char byte
    while True:
        # 8 bytes hold 56 bits, more than any length or age takes.
        if at >= end or shift > 49:
            bad_entry()
        byte = at[0]
        number |= <unsigned long long>(byte & 127) << shift
        at += 1
        if byte < 128:
            value[0] = number
            return at
        shift += 7


cdef inline long long unzigzag(unsigned long long value) noexcept:
    return <long long>(value >> 1) ^ -<long long>(value & 1)


cdef bint too_large(bytes run) except -1:
    """Whether a run has more bytes, or says that it has more frames, than ff_fast writes."""
    cdef const unsigned char* start = <const unsigned char*>PyBytes_AS_STRING(run)
    cdef unsigned long long count = 0
    if PyBytes_GET_SIZE(run) > MAX_RUN_BYTES:
        return True
    take_varint(start, start + PyBytes_GET_SIZE(run), &count)
    return count > MAX_FRAMES


cdef inline bytes checked_bytes(object part):
    if not PyBytes_CheckExact(part):
        bad_entry()
    return <bytes>part


cdef inline list fields_of(object entry):
    """Return the fields of an entry ``[id, fields]``."""
    if not PyList_CheckExact(entry) or len(<list>entry) != 2:
        bad_entry()
    if not PyList_CheckExact((<list>entry)[1]):
        bad_entry()
    return <list>(<list>entry)[1]


cdef inline bint is_field(bytes raw, const char* name, Py_ssize_t size) noexcept:
    return PyBytes_GET_SIZE(raw) == size and memcmp(PyBytes_AS_STRING(raw), name, <size_t>size) == 0


@cython.final
cdef class Entries:
    """The frames of some entries of one stream.

    Attributes:
        frames: The frames, in order. One of the mode ``lost`` stands for lost frames: they begin
            behind its `_previous`, and the last visible frame before has the sequence
            `_summary_version`. `assemble` makes a gap of it.
        end_reason: Why the attempt ended; None if the end entry is not among the entries.
        end_error: The beginning of the error with which it ended; None without one.
        taken: How many entries were decoded; the next one is beyond the limit.
        foreign: How many of these another program wrote; they are left out.
        rewound: Whether one is later than the cursor and has no later sequence: the stream is not
            the one in which the cursor was taken.
    """

    cdef readonly list frames
    cdef readonly str end_reason
    cdef readonly str end_error
    cdef readonly Py_ssize_t taken
    cdef readonly Py_ssize_t foreign
    cdef readonly bint rewound
    cdef long long _end_ms
    cdef long long _end_sequence
    cdef long long _end_previous


cdef long long add_run(
    list frames, const unsigned char* start, const unsigned char* end, StreamFrame shared,
    long long after,
) except -1:
    """Append the frames of a run after sequence *after* to *frames*; return how many the run holds.

    *shared* has the fields of the entry, and the id of the last frame.
    """
    cdef const unsigned char* lengths
    cdef const unsigned char* times
    cdef const unsigned char* payload
    cdef unsigned long long value = 0
    cdef unsigned long long time = 0
    cdef long long i, _, count, sequence, version
    cdef StreamFrame frame
    lengths = take_varint(start, end, &value)
    count = <long long>value
    sequence = shared.sequence - count
    version = shared._summary_version - count
    if count < 1 or sequence < 0:
        bad_entry()
    if shared._summary_version and version < 0:
        bad_entry()
    times = lengths
    for _ in range(count):
        times = take_varint(times, end, &value)
    payload = times
    for _ in range(count):
        payload = take_varint(payload, end, &value)
    for i in range(count):
        lengths = take_varint(lengths, end, &value)
        times = take_varint(times, end, &time)
        if <unsigned long long>(end - payload) < value:
            bad_entry()
        sequence += 1
        version += 1
        if sequence > after:
            frame = StreamFrame.__new__(StreamFrame)
            frame._ms = shared._ms
            frame.sequence = sequence
            frame.frame_type = shared.frame_type
            frame.payload = PyBytes_FromStringAndSize(<const char*>payload, <Py_ssize_t>value)
            frame.ts_ms = shared._ms + unzigzag(time)
            frame.mode = shared.mode
            frame.encoding = shared.encoding
            frame.source = shared.source
            frame.correlation_id = shared.correlation_id
            frame._summary_version = version if shared._summary_version else 0
            frame.patch_kind = shared.patch_kind
            frame.attempt_index = shared.attempt_index
            frame._previous = shared._previous if i == 0 and shared._previous >= 0 else sequence - 1
            frames.append(frame)
        payload += value
    if payload != end:
        bad_entry()
    return count


def decode_entries(
    list entries not None, long long after, tuple limit=None, bint exclude_best_effort=False, *,
    bint live=False, long long after_ms=0, tuple newest=None, unsigned int attempt_index=0,
):
    """Return the :class:`Entries` of one stream.

    Args:
        entries: ``[[id, [field, value, ...]], ...]``, all bytes, as XRANGE and ff_read_range
            answer.
        after: Sequence of the cursor; frames up to it are left out. A run may begin before it.
        limit: ``(ms, sequence)`` of the last id to decode; None decodes all entries.
        exclude_best_effort: Leave best-effort frames out.
        live: The stream is the live window, not the log.
        after_ms: ms of the cursor; 0 if it is not known.
        newest: ``(ms, sequence)`` of the newest frame of the attempt, if it is known: a payload
            that another program put behind it is no frame.
        attempt_index: The attempt of the stream.

    Raises:
        Corruption: An entry that has ff_fast's fields does not have their form.
    """
    cdef Entries result = Entries.__new__(Entries)
    cdef StreamFrame frame
    cdef list fields
    cdef bytes name, value, payload, run, previous, version, pointer, end_reason, end_error, lost
    cdef long long lost_count = 0
    cdef str usual_mode = BEST_EFFORT if live else DURABLE
    cdef const unsigned char* start
    cdef const unsigned char* stop
    cdef Py_ssize_t at, size
    cdef long long ms = 0
    cdef long long sequence = 0
    cdef long long limit_ms = LARGEST
    cdef long long limit_sequence = LARGEST
    cdef long long newest_ms = LARGEST
    cdef long long newest_sequence = LARGEST
    if newest is not None:
        newest_ms = min(newest[0], LARGEST)
        newest_sequence = min(newest[1], LARGEST)
    if limit is not None:
        limit_ms = min(limit[0], LARGEST)
        limit_sequence = min(limit[1], LARGEST)
    result.frames = []
    if after_ms == 0:
        after_ms = LARGEST
    for item in entries:
        fields = fields_of(item)
        parse_entry_id(checked_bytes((<list>item)[0]), &ms, &sequence)
        if ms > limit_ms or (ms == limit_ms and sequence > limit_sequence):
            break
        result.taken += 1
        frame = StreamFrame.__new__(StreamFrame)
        frame._ms = ms
        frame.sequence = sequence
        frame.attempt_index = attempt_index
        frame.frame_type = TOKEN
        frame.mode = usual_mode
        frame.encoding = UTF8
        frame.source = WORKER
        frame._previous = -1
        payload = run = previous = version = pointer = end_reason = end_error = lost = None
        at = 0
        size = len(fields) - 1
        while at < size:
            name = checked_bytes(fields[at])
            value = checked_bytes(fields[at + 1])
            at += 2
            if is_field(name, "payload", 7):
                payload = value
            elif is_field(name, "frame_type", 10):
                frame.frame_type = text_of(value)
            elif is_field(name, "mode", 4):
                frame.mode = text_of(value)
            elif is_field(name, "run", 3):
                run = value
            elif is_field(name, "prev", 4):
                previous = value
            elif is_field(name, "summary_version", 15):
                version = value
            elif is_field(name, "correlation_id", 14):
                frame.correlation_id = text_of(value)
            elif is_field(name, "patch_kind", 10):
                frame.patch_kind = value
            elif is_field(name, "pointer", 7):
                pointer = value
            elif is_field(name, "encoding", 8):
                frame.encoding = text_of(value)
            elif is_field(name, "source", 6):
                frame.source = text_of(value)
            elif is_field(name, "end", 3):
                end_reason = value
            elif is_field(name, "error", 5):
                end_error = value
            elif is_field(name, "lost", 4):
                lost = value
        if (
            lost is not None and previous is not None
            and payload is None and run is None and end_reason is None
            and not live and ms != LARGEST and 0 < sequence < LARGEST
            and (ms < newest_ms or (ms == newest_ms and sequence <= newest_sequence))
        ):
            number_of(lost, &lost_count)
            if not 0 < lost_count <= sequence:
                bad_entry()
            if sequence > after:
                frame.mode = LOST
                frame._previous = sequence - lost_count
                number_of(previous, &frame._summary_version)
                result.frames.append(frame)
            elif ms > after_ms and sequence < after:
                result.rewound = True
            continue
        if end_reason is not None and previous is not None and payload is None and run is None:
            number_of(previous, &result._end_previous)
            result.end_reason = text_of(end_reason)
            result.end_error = beginning_of(end_error)
            result._end_ms = ms
            result._end_sequence = sequence
            if sequence <= after and ms > after_ms:
                result.rewound = True
            continue
        # Another program wrote this entry. Its values are not read.
        if (
            (run is None) == (payload is None)
            or sequence == 0 or ms == LARGEST or sequence == LARGEST
            or (
                run is None
                and (ms > newest_ms or (ms == newest_ms and sequence > newest_sequence))
            )
        ):
            result.foreign += 1
            continue
        if exclude_best_effort and frame.mode == BEST_EFFORT:
            continue
        # Nothing that large is allocated for an entry that nobody of ours wrote.
        if PyBytes_GET_SIZE(payload) > MAX_RUN_BYTES if run is None else too_large(run):
            result.foreign += 1
            continue
        if previous is not None:
            number_of(previous, &frame._previous)
        if version is not None:
            number_of(version, &frame._summary_version)
        if frame.patch_kind is not None:
            frame.patch_kind = patch_kind_of(frame.patch_kind, pointer)
        if run is not None:
            start = <const unsigned char*>PyBytes_AS_STRING(run)
            stop = start + PyBytes_GET_SIZE(run)
            sequence -= add_run(result.frames, start, stop, frame, after) - 1
        elif sequence > after:
            frame.payload = payload
            frame.ts_ms = ms
            if frame._previous < 0:
                frame._previous = sequence - 1
            result.frames.append(frame)
        if sequence <= after and ms > after_ms:
            result.rewound = True
    return result


def weigh_entries(list entries not None):
    """Return about how many frames *entries* hold, and how many bytes of values.

    Nothing is decoded. A damaged run is counted, and `decode_entries` refuses it.

    Raises:
        Corruption: *entries* is not ``[[id, [field, value, ...]], ...]``.
    """
    cdef list fields
    cdef bytes name, value
    cdef Py_ssize_t at, size
    cdef Py_ssize_t total = 0
    cdef long long frames = 0
    cdef long long count
    cdef const unsigned char* start
    for item in entries:
        fields = fields_of(item)
        count = 1
        at = 0
        size = len(fields) - 1
        while at < size:
            name = checked_bytes(fields[at])
            value = checked_bytes(fields[at + 1])
            at += 2
            total += PyBytes_GET_SIZE(value)
            # At most MAX_FRAMES are in a run, so the count has at most two bytes.
            if is_field(name, "run", 3) and PyBytes_GET_SIZE(value) > 2:
                start = <const unsigned char*>PyBytes_AS_STRING(value)
                count = start[0]
                if count >= 128:
                    count += 128 * <long long>start[1] - 128
        frames += count
    return frames, total


def assemble(
    Entries log not None, Entries live not None, long long ms, long long sequence,
    bint exclude_best_effort, str reason not None, unsigned int attempt_index=0,
):
    """Merge the entries of both streams up to one id, with a gap wherever frames are missing.

    Args:
        log: Entries of the log.
        live: Entries of the live window, without the frames that the reader excludes.
        ms: Id of the last delivered frame: ms
        sequence: and sequence.
        exclude_best_effort: Missing best-effort frames are no gap.
        reason: Reason of all gaps found here.
        attempt_index: The attempt of the stream.

    Returns:
        ``(items, ms, sequence, end_reason)``. *items* are ``StreamFrame`` and ``Gap`` in sequence
        order, *ms* and *sequence* the id of the last one. *end_reason* is None before the end.
    """
    cdef list items = []
    cdef list first = log.frames
    cdef list second = live.frames
    cdef Py_ssize_t i = 0
    cdef Py_ssize_t j = 0
    cdef Py_ssize_t first_count = len(first)
    cdef Py_ssize_t second_count = len(second)
    cdef long long before
    cdef StreamFrame frame
    while i < first_count or j < second_count:
        if j >= second_count or (
            i < first_count
            and (<StreamFrame>first[i]).sequence <= (<StreamFrame>second[j]).sequence
        ):
            frame = <StreamFrame>first[i]
            i += 1
        else:
            frame = <StreamFrame>second[j]
            j += 1
        if frame.sequence <= sequence:
            continue
        if frame.mode is LOST:
            before = frame._summary_version if exclude_best_effort else frame._previous
            if before > sequence:
                items.append(
                    gap_before(attempt_index, frame._ms, sequence, frame._previous + 1, reason)
                )
            sequence = max(sequence, frame._previous)
            ms = frame._ms
            items.append(gap_before(attempt_index, ms, sequence, frame.sequence + 1, LOST))
            sequence = frame.sequence
            continue
        if (frame._previous if exclude_best_effort else frame.sequence - 1) > sequence:
            items.append(gap_before(attempt_index, frame._ms, sequence, frame.sequence, reason))
        ms = frame._ms
        sequence = frame.sequence
        items.append(frame)
    if log.end_reason is None:
        return items, ms, sequence, None
    if (log._end_previous if exclude_best_effort else log._end_sequence - 1) > sequence:
        items.append(gap_before(attempt_index, log._end_ms, sequence, log._end_sequence, reason))
    return items, log._end_ms, log._end_sequence, log.end_reason


cdef object gap_before(
    unsigned int attempt_index, long long ms, long long sequence, long long following, str reason
):
    """Name what is missing behind *sequence* and before the frame *following*, which has *ms*. So
    has the cursor: it stands right before that frame."""
    return Gap(sequence + 1, following, reason, f"{attempt_index}.{ms}-{following - 1}")


def decode_run(bytes run not None, long long count):
    """Return the *count* payloads of a run in the summary hash, where a run has no fields.

    Raises:
        Corruption: *run* is not a run of *count* frames.
    """
    cdef list frames = []
    cdef StreamFrame shared = StreamFrame.__new__(StreamFrame)
    cdef StreamFrame frame
    cdef const unsigned char* start = <const unsigned char*>PyBytes_AS_STRING(run)
    shared.sequence = count
    if too_large(run):
        bad_entry()
    if add_run(frames, start, start + PyBytes_GET_SIZE(run), shared, 0) != count:
        bad_entry()
    return [(<StreamFrame>frame).payload for frame in frames]


@cython.freelist(64)
@cython.no_gc
cdef class Pushed:
    """What a message on the channel of an attempt says. All readers of the attempt share it.

    Attributes:
        kind: ``frames``, ``end``, ``lease``, or ``look`` for everything else.
        deferred: The frames are not stored yet.
        ms, last: Id of the last frame, or of the end.
        first: Sequence of the first frame.
        frames: The frames; None unless the kind is ``frames``.
        visible: Those that a reader gets that excludes best-effort frames.
        size: Bytes of the message.
        previous: Sequence of the last visible frame before the end.
        end_reason: Why the attempt ended.
        end_error: The beginning of the error with which it ended; None without one.
        lease_ms: When the lease ends, in ms from here.
    """

    # A single frame is in `alone`, without a list: at a model's own pace nearly every push has one,
    # and the collector would count thousands of lists that wait for their readers. Readers copy
    # from a list and never change it.

    @property
    def kind(self):
        return ("look", "frames", "end", "lease")[self._kind]

    @property
    def frames(self):
        return self._frames if self.alone is None else [self.alone]

    @property
    def visible(self):
        if self.alone is None:
            return self._visible
        return [self.alone] if self.count(True) else []

    cdef Py_ssize_t count(self, bint exclude) except -1:
        """How many frames a reader gets, of a push of frames."""
        if self.alone is not None:
            return 0 if exclude and self.alone.mode == BEST_EFFORT else 1
        return PyList_GET_SIZE(self._visible if exclude else self._frames)


def decode_push(bytes message not None, unsigned int attempt_index=0):
    """Return the :class:`Pushed` of a message. One that is damaged says: look."""
    return read_push(message, attempt_index)


cdef Pushed read_push(bytes message, unsigned int attempt_index):
    cdef Pushed pushed = Pushed.__new__(Pushed)
    pushed.size = PyBytes_GET_SIZE(message)
    try:
        parse_push(pushed, message, attempt_index)
    except Corruption:
        pushed._kind = PUSHED_LOOK
        pushed.alone = pushed._frames = pushed._visible = None
    return pushed


cdef const char* find_space(const char* at, const char* end) except NULL:
    while at < end and at[0] != c' ':
        at += 1
    if at == end:
        bad_entry()
    return at


cdef int parse_push(Pushed pushed, bytes message, unsigned int attempt_index) except -1:
    cdef const char* at = PyBytes_AS_STRING(message)
    cdef const char* end = at + PyBytes_GET_SIZE(message)
    cdef const char* space
    cdef const char* dash
    cdef char kind
    pushed._kind = PUSHED_LOOK
    if at == end:
        return 0
    kind = at[0]
    at += 1
    if kind == c'L':
        parse_number(at, end, &pushed.lease_ms)
        pushed._kind = PUSHED_LEASE
        return 0
    if kind != c'F' and kind != c'f' and kind != c'E':
        return 0
    space = find_space(at, end)
    dash = at
    while dash < space and dash[0] != c'-':
        dash += 1
    if dash == space:
        bad_entry()
    parse_number(at, dash, &pushed.ms)
    parse_number(dash + 1, space, &pushed.last)
    if pushed.last < 1:
        bad_entry()
    at = space + 1
    if kind == c'E':
        space = find_space(at, end)
        parse_number(at, space, &pushed.previous)
        at = space = space + 1
        while space < end and space[0] != c' ':
            space += 1
        pushed.end_reason = text_of(PyBytes_FromStringAndSize(at, space - at))
        if space < end:
            pushed.end_error = beginning_of(PyBytes_FromStringAndSize(space + 1, end - space - 1))
        if pushed.previous >= pushed.last or pushed.end_reason not in END_REASONS:
            bad_entry()
        pushed._kind = PUSHED_END
        return 0
    pushed.deferred = kind == c'f'
    # Without blocks the frames are to be read.
    if at < end:
        add_blocks(pushed, <const unsigned char*>at, <const unsigned char*>end, attempt_index)
        pushed._kind = PUSHED_FRAMES
    return 0


cdef const unsigned char* take_text(
    const unsigned char* at, const unsigned char* end, const unsigned char** text, Py_ssize_t* size
) except NULL:
    """Read a length and the bytes that it counts."""
    cdef unsigned long long value = 0
    at = take_varint(at, end, &value)
    if <unsigned long long>(end - at) < value:
        bad_entry()
    text[0] = at
    size[0] = <Py_ssize_t>value
    return at + value


cdef int add_blocks(
    Pushed pushed, const unsigned char* start, const unsigned char* end, unsigned int attempt_index
) except -1:
    """Decode the blocks of a push, counted first, since the id is that of the last frame."""
    cdef const unsigned char* at = start
    cdef const unsigned char* text = NULL
    cdef Py_ssize_t size = 0
    cdef unsigned long long value = 0
    cdef long long total = 0
    cdef Py_ssize_t hidden = 0
    cdef Py_ssize_t blocks = 0
    cdef Py_ssize_t known
    cdef int mode
    cdef StreamFrame last
    cdef list frames
    while at < end:
        at = take_varint(at + 1, end, &value)
        while value:
            at = take_text(at, end, &text, &size)
            at = take_text(at, end, &text, &size)
            value -= 1
        at = take_text(at, end, &text, &size)
        take_varint(text, at, &value)
        if value > MAX_FRAMES or size > MAX_RUN_BYTES:
            bad_entry()
        total += <long long>value
    # The most frames of one call.
    if total > MAX_FRAMES or total > pushed.last:
        bad_entry()
    pushed.first = pushed.last - total + 1
    total = pushed.first - 1
    frames = []
    at = start
    while at < end:
        known = len(frames)
        at = add_block(frames, at, end, pushed.ms, &total, attempt_index)
        # All frames of a block share their mode.
        last = <StreamFrame>frames[len(frames) - 1]
        if last.mode == BEST_EFFORT:
            hidden += 1
            mode = LIVE_FRAMES
        else:
            mode = DURABLE_FRAMES if last.mode == DURABLE else SUMMARY_FRAMES
        pushed.counts[mode] += len(frames) - known
        for known in range(known, len(frames)):
            pushed.payload_bytes += PyBytes_GET_SIZE((<StreamFrame>frames[known]).payload)
        blocks += 1
    if len(frames) == 1:
        pushed.alone = <StreamFrame>frames[0]
        return 0
    pushed._frames = frames
    if hidden == 0:
        pushed._visible = frames
    elif hidden == blocks:
        pushed._visible = NO_FRAMES
    else:
        pushed._visible = [frame for frame in frames if (<StreamFrame>frame).mode != BEST_EFFORT]
    return 0


cdef const unsigned char* add_block(
    list frames, const unsigned char* at, const unsigned char* end, long long ms,
    long long* sequence, unsigned int attempt_index,
) except NULL:
    """Decode a block behind *sequence*, which becomes that of its last frame; return its end."""
    cdef StreamFrame shared = StreamFrame.__new__(StreamFrame)
    cdef const unsigned char* name = NULL
    cdef const unsigned char* value = NULL
    cdef const unsigned char* payload
    cdef Py_ssize_t name_size = 0
    cdef Py_ssize_t size = 0
    cdef unsigned long long fields = 0
    cdef unsigned long long count = 0
    cdef bytes kind = None
    cdef bytes pointer = None
    if at[0] != c'L' and at[0] != c'V':
        bad_entry()
    shared._ms = ms
    shared.attempt_index = attempt_index
    shared.frame_type = TOKEN
    shared.mode = BEST_EFFORT if at[0] == c'V' else DURABLE
    shared.encoding = UTF8
    shared.source = WORKER
    shared._previous = -1
    at = take_varint(at + 1, end, &fields)
    while fields:
        fields -= 1
        at = take_text(at, end, &name, &name_size)
        at = take_text(at, end, &value, &size)
        if named(name, name_size, "frame_type", 10):
            shared.frame_type = text_of(PyBytes_FromStringAndSize(<const char*>value, size))
        elif named(name, name_size, "mode", 4):
            shared.mode = text_of(PyBytes_FromStringAndSize(<const char*>value, size))
        elif named(name, name_size, "prev", 4):
            parse_number(<const char*>value, <const char*>value + size, &shared._previous)
        elif named(name, name_size, "summary_version", 15):
            parse_number(<const char*>value, <const char*>value + size, &shared._summary_version)
        elif named(name, name_size, "correlation_id", 14):
            shared.correlation_id = text_of(PyBytes_FromStringAndSize(<const char*>value, size))
        elif named(name, name_size, "patch_kind", 10):
            kind = PyBytes_FromStringAndSize(<const char*>value, size)
        elif named(name, name_size, "pointer", 7):
            pointer = PyBytes_FromStringAndSize(<const char*>value, size)
        elif named(name, name_size, "encoding", 8):
            shared.encoding = text_of(PyBytes_FromStringAndSize(<const char*>value, size))
        elif named(name, name_size, "source", 6):
            shared.source = text_of(PyBytes_FromStringAndSize(<const char*>value, size))
    if kind is not None:
        shared.patch_kind = patch_kind_of(kind, pointer)
    at = take_text(at, end, &value, &size)
    payload = take_varint(value, at, &count)
    sequence[0] += <long long>count
    shared.sequence = sequence[0]
    if count != 1:
        add_run(frames, value, at, shared, 0)
        return at
    # A frame by itself, as at a model's pace, needs no copy of what it would share.
    payload = take_varint(payload, at, &count)
    payload = take_varint(payload, at, &fields)
    if <unsigned long long>(at - payload) != count:
        bad_entry()
    shared.payload = PyBytes_FromStringAndSize(<const char*>payload, <Py_ssize_t>count)
    shared.ts_ms = ms + unzigzag(fields)
    if shared._previous < 0:
        shared._previous = shared.sequence - 1
    frames.append(shared)
    return at


cdef inline bint named(
    const unsigned char* name, Py_ssize_t size, const char* wanted, Py_ssize_t wanted_size
) noexcept:
    return size == wanted_size and memcmp(name, wanted, <size_t>size) == 0

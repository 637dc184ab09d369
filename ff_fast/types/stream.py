"""Frames and their modes; documents, gaps, ends and cursors for readers."""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, ClassVar, Literal

from ff_fast import keys
from ff_fast.errors import (
    MAX_INT,
    CompletionOutcome,
    InvalidCursor,
    InvalidInput,
    InvalidSequence,
    InvalidType,
    check_int,
)

from ._value import (
    MAX_U32,
    Value,
    check_flag,
    check_optional_int,
    check_type,
    milliseconds,
    payload_bytes,
    set_field,
    utf8,
)

if TYPE_CHECKING:
    import builtins
    from dataclasses import KW_ONLY
    from datetime import timedelta

MAX_REPLICAS = 64
"""Most replicas that a level asks for."""

FrameMode = Literal["durable", "summary", "best_effort"]
"""Wire token of a stream mode."""

PatchFormat = Literal["json-merge-patch", "string-append"]
"""Wire token of a patch kind."""

GapReason = Literal["trimmed", "fell_behind", "expired", "cursor_ahead", "rewritten", "lost"]
"""Why frames are missing.

``trimmed``: they left the stream before the reader began. ``fell_behind``: they left it while the reader was too slow
or disconnected. ``expired``: they were the newest ones, and their key expired. ``cursor_ahead``: they do not exist; the
cursor is beyond the end of the stream, for instance after a failover. ``rewritten``: the frame of the cursor is not in
the stream, and other frames stand in its place. The server has lost frames in a failover, and a worker has written
others, or the cursor belongs to another attempt or execution. The reader continues at ``next_sequence`` with the frames
that are later than the cursor, at the beginning if the times of the frames do not tell. A document that was folded from
the earlier frames is void: read the summary again. ``lost``: the server lost them in a failover after it had
acknowledged them, and their writer did not keep them any more. The stream itself says so, to every reader.
"""

EndReason = Literal[
    "attempt_success",
    "attempt_failure",
    "attempt_cancelled",
    "attempt_timeout",
    "suspension_timeout",
    "expired",
    "producer_lost",
]
"""Why the stream of an attempt ended; ``producer_lost``: the lease of its worker expired."""


# -- modes -----------------------------------------------------------------------------------------


SUMMARY_NULL_SENTINEL = "__ff_null__"
"""String value in a merge patch that becomes JSON ``null``; a summary document never contains it."""


class PatchKind(Value):
    """How the payload of a summary frame changes the document.

    ``PatchKind.JSON_MERGE_PATCH`` takes a merge patch (RFC 7396). ``PatchKind.STRING_APPEND(pointer)``
    appends the payload, as text, to the string at a JSON Pointer (RFC 6901).

    Attributes:
        wire: ``json-merge-patch`` or ``string-append``.
        pointer: Pointer of the string to append to; None for merge patches.
    """

    wire: PatchFormat
    pointer: str | None = None

    JSON_MERGE_PATCH: ClassVar[PatchKind]

    def __post_init__(self) -> None:
        if self.wire == "json-merge-patch":
            if self.pointer is not None:
                raise InvalidInput("A JSON merge patch has no pointer.")
            return
        if self.wire != "string-append":
            raise InvalidInput("A patch kind is JSON_MERGE_PATCH or STRING_APPEND(pointer).")
        pointer = check_type("pointer", self.pointer, str)
        encoded = utf8(pointer)
        if encoded is None or len(encoded) > 1024:
            raise InvalidInput("pointer must be at most 1024 bytes of UTF-8.")
        if re.fullmatch(r"(?:/(?:[^~/]|~[01])*)*", pointer, re.DOTALL) is None:
            raise InvalidInput("pointer must be a JSON Pointer such as '/text' (RFC 6901).")

    @classmethod
    def STRING_APPEND(cls, pointer: str) -> PatchKind:  # noqa: N802 - beside JSON_MERGE_PATCH
        """Append text to the string at *pointer*, for instance ``/text``.

        Raises:
            InvalidInput: *pointer* is not a JSON Pointer, or longer than 1024 bytes.
        """
        return cls("string-append", pointer)

    def wire_str(self) -> PatchFormat:
        """Return the stable token of the kind."""
        return self.wire


PatchKind.JSON_MERGE_PATCH = PatchKind("json-merge-patch")


class BestEffortLiveConfig(Value):
    """Size of the live window of best-effort frames.

    The window holds ``clamp(ceil(rate * ttl * 2), maxlen_floor, maxlen_ceiling)`` frames. The rate is
    a moving average of the observed frames per second.

    Attributes:
        ttl_ms: Time that a frame should stay readable, 1 to 2^32-1 ms; 5,000 to 30,000 is usual. Also takes a
            ``timedelta``.
        maxlen_floor: Smallest window in frames, from 1.
        maxlen_ceiling: Largest window in frames, from ``maxlen_floor``.
        ema_alpha: Weight of the latest observation, above 0 and at most 1.
    """

    ttl_ms: int
    maxlen_floor: int = 64
    maxlen_ceiling: int = 16_384
    ema_alpha: float = 0.2

    if TYPE_CHECKING:

        def __init__(
            self,
            ttl_ms: int | timedelta,
            maxlen_floor: int = 64,
            maxlen_ceiling: int = 16_384,
            ema_alpha: float = 0.2,
        ) -> None: ...

    def __post_init__(self) -> None:
        set_field(self, "ttl_ms", milliseconds("ttl_ms", self.ttl_ms, 1, MAX_U32))
        check_int("maxlen_floor", self.maxlen_floor, 1, MAX_U32)
        check_int("maxlen_ceiling", self.maxlen_ceiling, 1, MAX_U32)
        if self.maxlen_ceiling < self.maxlen_floor:
            raise InvalidInput("maxlen_ceiling must not be below maxlen_floor.")
        if type(self.ema_alpha) not in (int, float):
            raise InvalidType(f"ema_alpha must be a float, not {type(self.ema_alpha).__name__}.")
        if not 0 < self.ema_alpha <= 1:  # also refuses NaN
            raise InvalidInput("ema_alpha must be above 0 and at most 1.")
        set_field(self, "ema_alpha", float(self.ema_alpha))

    @classmethod
    def with_ttl(cls, ttl_ms: int | timedelta) -> BestEffortLiveConfig:
        """Return the defaults with this ``ttl_ms``."""
        return cls(ttl_ms)

    def with_maxlen_floor(self, floor: int) -> BestEffortLiveConfig:
        """Return a copy with another ``maxlen_floor``."""
        return BestEffortLiveConfig(self.ttl_ms, floor, self.maxlen_ceiling, self.ema_alpha)

    def with_maxlen_ceiling(self, ceiling: int) -> BestEffortLiveConfig:
        """Return a copy with another ``maxlen_ceiling``."""
        return BestEffortLiveConfig(self.ttl_ms, self.maxlen_floor, ceiling, self.ema_alpha)

    def with_ema_alpha(self, alpha: float) -> BestEffortLiveConfig:
        """Return a copy with another ``ema_alpha``."""
        return BestEffortLiveConfig(self.ttl_ms, self.maxlen_floor, self.maxlen_ceiling, alpha)


class StreamMode(Value):
    """How durable a frame is.  The mode is chosen per frame; a stream may mix them.

    Made by name: :meth:`durable`, :meth:`durable_summary`, :meth:`best_effort_live`,
    :meth:`best_effort_live_with_config`.

    Attributes:
        wire: ``durable``, ``summary`` or ``best_effort``.
        patch_kind: How payloads change the document; None unless the mode is ``summary``.
        config: Size of the live window; None unless the mode is ``best_effort``.
    """

    wire: FrameMode = "durable"
    patch_kind: PatchKind | None = None
    config: BestEffortLiveConfig | None = None

    _DURABLE: ClassVar[StreamMode]

    def __post_init__(self) -> None:
        if self.wire not in ("durable", "summary", "best_effort"):
            raise InvalidInput("A mode is durable, summary or best_effort.")
        if self.wire == "summary":
            check_type("patch_kind", self.patch_kind, PatchKind)
        elif self.patch_kind is not None:
            raise InvalidInput(f"A {self.wire} mode has no patch_kind.")
        if self.wire == "best_effort":
            check_type("config", self.config, BestEffortLiveConfig)
        elif self.config is not None:
            raise InvalidInput(f"A {self.wire} mode has no config.")

    @classmethod
    def durable(cls) -> StreamMode:
        """Return the mode whose frames are entries of the log, kept up to the retention limit."""
        return cls._DURABLE

    @classmethod
    def durable_summary(cls, patch_kind: PatchKind = PatchKind.JSON_MERGE_PATCH) -> StreamMode:
        """Return the mode whose frames are patches of the summary document, which is durable."""
        return cls("summary", patch_kind=patch_kind)

    @classmethod
    def best_effort_live(cls, ttl_ms: int | timedelta) -> StreamMode:
        """Return the mode whose frames stay readable for about *ttl_ms*, in ms or as a ``timedelta``."""
        return cls("best_effort", config=BestEffortLiveConfig(ttl_ms))

    @classmethod
    def best_effort_live_with_config(cls, config: BestEffortLiveConfig) -> StreamMode:
        """Return a best-effort mode with all parameters of the live window."""
        return cls("best_effort", config=config)

    def wire_str(self) -> FrameMode:
        """Return the stable token that entries carry in their ``mode`` field."""
        return self.wire


StreamMode._DURABLE = StreamMode()  # noqa: SLF001 - the class's own constant


class TailVisibility(enum.Enum):
    """Which frames a reader gets.  Summary frames count as durable, since the document is."""

    ALL = ""
    EXCLUDE_BEST_EFFORT = "exclude_best_effort"

    def wire_str(self) -> str:
        """Return the stable token; empty means no filter."""
        return self.value


# -- frames ----------------------------------------------------------------------------------------


class FrameKind(enum.Enum):
    """Coarse class of a frame; its value is the default frame type."""

    STDOUT = "stdout"
    STDERR = "stderr"
    EVENT = "event"
    BLOB = "blob"

    def wire_str(self) -> str:
        """Return the frame type that the kind stands for."""
        return self.value


class Frame(Value):
    """One frame to append.

    Args:
        bytes: The payload: ``bytes``, ``bytearray``, ``memoryview`` or ``str``.  Its size is checked on append.
        kind: Coarse class.
        seq: Required sequence of the frame, 1 to 2^53-1; None takes the next one.  With it, a repeated
            append is recognised and stored once.
        frame_type: One line of text of at most 256 bytes; empty means the kind's own name.
        correlation_id: One line of text of at most 256 bytes; empty and None are the same.
        mode: How durable the frame is.

    Raises:
        InvalidPayload: See :func:`payload_bytes`.
        InvalidSequence: *seq* is anything but an ``int`` in its range.
    """

    bytes: builtins.bytes
    kind: FrameKind
    _: KW_ONLY
    seq: int | None = None
    frame_type: str = ""
    correlation_id: str | None = None
    mode: StreamMode = StreamMode.durable()

    def __post_init__(self) -> None:
        set_field(self, "bytes", payload_bytes(self.bytes))
        check_type("kind", self.kind, FrameKind)
        if self.seq is not None:
            check_int("seq", self.seq, 1, MAX_INT, InvalidSequence)
        keys.free_text("frame_type", self.frame_type, empty=True, error=InvalidInput)
        if self.correlation_id is not None:
            keys.free_text("correlation_id", self.correlation_id, empty=True, error=InvalidInput)
            if not self.correlation_id:
                set_field(self, "correlation_id", None)
        check_type("mode", self.mode, StreamMode)

    @property
    def wire_type(self) -> str:
        """The frame type as stored: ``frame_type``, or the kind's own name."""
        return self.frame_type or self.kind.value


class Durability(Value):
    """Which loss of servers a stored frame survives, as far as the servers have confirmed it.

    Made by name: :meth:`stored`, :meth:`replicated`, :meth:`synced`.

    Attributes:
        replicas: Number of replicas that have it, 0 to 64.
        on_disk: The append-only files have it: that of the primary, and those of the *replicas*.
    """

    replicas: int = 0
    on_disk: bool = False

    _STORED: ClassVar[Durability]

    def __post_init__(self) -> None:
        check_int("replicas", self.replicas, 0, MAX_REPLICAS)
        check_flag("on_disk", self.on_disk)

    @classmethod
    def stored(cls) -> Durability:
        """Return the level of every acknowledged frame: the primary has it in memory."""
        return cls._STORED

    @classmethod
    def replicated(cls, replicas: int = 1) -> Durability:
        """Return the level at which so many replicas, 1 to 64, have it in memory as well, by ``WAIT``."""
        return cls(check_int("replicas", replicas, 1, MAX_REPLICAS))

    @classmethod
    def synced(cls, replicas: int = 0) -> Durability:
        """Return the level at which it is in the append-only files of the primary and of so many replicas, 0 to 64.

        ``WAITAOF`` tells, which Valkey and Redis have since 7.2; a server without such a file is refused with
        ``UnsupportedServer``.
        """
        return cls(replicas, on_disk=True)

    def covers(self, other: Durability) -> bool:
        """Return whether this level is at least *other*."""
        return self.replicas >= other.replicas and self.on_disk >= other.on_disk


Durability._STORED = Durability()  # noqa: SLF001 - the class's own constant


class AppendFrameOutcome(Value):
    """The stored frames of an attempt after an append or a flush.

    Attributes:
        stream_id: Entry id of the last frame, ``<ms>-<sequence>``.
        frame_count: Frames appended in this attempt so far.
        summary_version: Version of the summary; None when no summary frame was appended.
        durability: The level that all frames up to the last one have reached, as far as it was asked for.
    """

    stream_id: str
    frame_count: int
    summary_version: int | None = None
    durability: Durability = Durability._STORED  # noqa: SLF001 - a constant

    def __post_init__(self) -> None:
        check_type("stream_id", self.stream_id, str)
        check_int("frame_count", self.frame_count, 0, MAX_INT)
        check_optional_int("summary_version", self.summary_version, 0, MAX_INT)
        check_type("durability", self.durability, Durability)

    def with_summary_version(self, version: int) -> AppendFrameOutcome:
        """Return a copy with this summary version."""
        return self.replace(summary_version=version)


class SummaryDocument(Value):
    """The rolling summary of an attempt at one moment.

    Attributes:
        document_json: The document, JSON in UTF-8, exact; it never contains the null sentinel.
        version: Number of patches folded in, from 1.
        patch_kind: How the latest patch was applied.
        last_updated_ms: When the latest patch was applied.
        first_applied_ms: When the first patch was applied.
        cursor: ``after`` of a tail that continues the document without hole or repeat.
    """

    document_json: bytes
    version: int
    patch_kind: PatchKind
    last_updated_ms: int
    first_applied_ms: int
    cursor: str = "0-0"

    def __post_init__(self) -> None:
        check_type("document_json", self.document_json, bytes)
        check_int("version", self.version, 1, MAX_INT)
        check_type("patch_kind", self.patch_kind, PatchKind)
        check_int("last_updated_ms", self.last_updated_ms, 0, MAX_INT)
        check_int("first_applied_ms", self.first_applied_ms, 0, MAX_INT)
        parse_cursor(self.cursor)


# -- places in a stream ----------------------------------------------------------------------------


class StreamCursor(tuple[int, int]):
    """A place in a stream: everything up to and including this frame has been read.

    A pair ``(milliseconds, sequence)`` whose ``str`` is the entry id ``<milliseconds>-<sequence>``;
    ``(0, 0)`` is the start.
    """

    __slots__ = ()

    def __new__(cls, ms: int, sequence: int) -> StreamCursor:
        check_int("milliseconds", ms, 0, 2**63 - 1, InvalidCursor)
        check_int("sequence", sequence, 0, MAX_INT, InvalidCursor)
        return super().__new__(cls, (ms, sequence))

    def __getnewargs__(self) -> tuple[int, int]:
        return self[0], self[1]

    @property
    def ms(self) -> int:
        """Milliseconds of the entry id."""
        return self[0]

    @property
    def sequence(self) -> int:
        """Sequence of the last frame read; 0 at the start."""
        return self[1]

    def __str__(self) -> str:
        return f"{self[0]}-{self[1]}"

    def __repr__(self) -> str:
        return f"StreamCursor({self[0]}, {self[1]})"


_START = StreamCursor(0, 0)

_CURSOR = r"(?:([0-9]{1,10})\.)?([0-9]{1,20})-([0-9]{1,16})"


def split_cursor(value: object) -> tuple[int | None, StreamCursor]:
    """Return the attempt that *value* names, None where it names none, and the place in its stream.

    Args:
        value: None, ``"start"`` or ``"0-0"`` for the start, an entry id ``"<milliseconds>-<sequence>"``, a cursor
            ``"<attempt>.<milliseconds>-<sequence>"`` as items of readers carry it, or a :class:`StreamCursor`.

    Raises:
        InvalidCursor: Anything else.  ``-``, ``+``, ``$`` and ``end`` are not accepted: a reader
            starts at a frame it can name.
    """
    if value is None or value == "start":
        return None, _START
    if isinstance(value, StreamCursor):
        return None, value
    found = re.fullmatch(_CURSOR, value) if isinstance(value, str) else None
    if found is None:
        raise InvalidCursor
    ms, sequence = int(found[2]), int(found[3])
    attempt = None if found[1] is None else int(found[1])
    if ms >= 2**63 or sequence > MAX_INT or (attempt or 0) > keys.MAX_ATTEMPT_INDEX:
        raise InvalidCursor
    return attempt, StreamCursor(ms, sequence)


def parse_cursor(value: object, attempt_index: int | None = None) -> StreamCursor:
    """Return the place that *value* names, as a pair ``(milliseconds, sequence)``.

    Args:
        value: See :func:`split_cursor`.
        attempt_index: Attempt that is read; None accepts a cursor of any attempt.

    Raises:
        InvalidCursor: *value* is no cursor, or one of another attempt.
    """
    attempt, place = split_cursor(value)
    if attempt is not None and attempt_index is not None and attempt != attempt_index:
        raise InvalidCursor(
            f"The cursor belongs to attempt {attempt}, not to attempt {attempt_index}; read that attempt, or begin at"
            " the start."
        )
    return place


def make_cursor(attempt_index: int, ms: int, sequence: int) -> str:
    """Return the cursor of a place in the stream of an attempt."""
    return f"{attempt_index}.{ms}-{sequence}"


def cursor_after(sequence: int, attempt_index: int = 0) -> str:
    """Return the cursor of a reader that continues after the frame of a sequence.

    For protocols that count: a reader takes it as the ``cursor`` of an item. The cursor of an item is better where there
    is one, since it also tells whether the server still has that very frame.

    Args:
        sequence: Position of a frame in its attempt, from 1; 0 is the beginning of the attempt.
        attempt_index: The attempt, from 0.

    Raises:
        InvalidInput: An argument is out of range.
    """
    check_int("sequence", sequence, 0, MAX_INT)
    return make_cursor(keys.attempt_index(attempt_index), 0, sequence)


# -- gaps and ends ---------------------------------------------------------------------------------


class Gap(Value):
    """Missing frames, delivered to a reader in their place.

    Attributes:
        first_missing: Sequence of the first frame that is missing.
        next_sequence: Sequence at which the reader continues.
        reason: Why they are missing; see :data:`GapReason`.
        cursor: ``after`` of a reader that continues after the gap. Not compared by ``==``.
    """

    first_missing: int
    next_sequence: int
    reason: GapReason
    cursor: str = "0-0"

    _uncompared: ClassVar[tuple[str, ...]] = ("cursor",)

    def __post_init__(self) -> None:
        check_int("first_missing", self.first_missing, 1, MAX_INT + 1)
        check_int("next_sequence", self.next_sequence, 1, MAX_INT + 1)
        check_type("reason", self.reason, str)
        parse_cursor(check_type("cursor", self.cursor, str))


class End(Value):
    """The stream has ended, or the execution that was followed; nothing follows.

    Attributes:
        reason: Why it ended; see :data:`EndReason`. Of an execution: why its last attempt did.
        cursor: ``after`` of a reader that gets the end again. Not compared by ``==``.
        outcome: How the execution ended, where it was followed; None from a tail, which reads one attempt.
        error: What ended it: the message of its failure, the reason of its cancellation, or which time ran out. Of an
            attempt that a tail reads the first 1,024 bytes; None where its producer was lost and nobody has said more, and
            after its end. None after a success.
    """

    reason: EndReason
    cursor: str = "0-0"
    outcome: CompletionOutcome | None = None
    error: str | None = None

    _uncompared: ClassVar[tuple[str, ...]] = ("cursor",)

    def __post_init__(self) -> None:
        check_type("reason", self.reason, str)
        parse_cursor(check_type("cursor", self.cursor, str))
        if self.outcome is not None:
            check_type("outcome", self.outcome, str)
        if self.error is not None:
            check_type("error", self.error, str)

    def __repr__(self) -> str:
        if self.outcome is None:
            error = "" if self.error is None else f", error={self.error!r}"
            return f"End(reason={self.reason!r}, cursor={self.cursor!r}{error})"
        return super().__repr__()


class AttemptStarted(Value):
    """An attempt of the execution that is followed: a worker has claimed it, and the frames that follow are its own.

    What earlier attempts have streamed does not count any more.

    Attributes:
        attempt_index: The attempt, from 0.
        cursor: ``after`` of a reader that continues with the first frame of the attempt. Not compared by ``==``.
    """

    attempt_index: int
    cursor: str = "0-0"

    _uncompared: ClassVar[tuple[str, ...]] = ("cursor",)

    def __post_init__(self) -> None:
        keys.attempt_index(self.attempt_index)
        parse_cursor(check_type("cursor", self.cursor, str))


class Snapshot(Value):
    """The summary document with which following begins; the frames after it continue it without hole or repeat.

    Pass it to :class:`ff_fast.SummaryView` to keep it current.

    Attributes:
        document_json: The document, JSON in UTF-8, exact; it never contains the null sentinel.
        version: Number of patches folded in, from 1.
        attempt_index: The attempt that the document belongs to, as the frames that follow.
        cursor: ``after`` of a reader that continues here. Not compared by ``==``.
    """

    document_json: bytes
    version: int
    attempt_index: int
    cursor: str = "0-0"

    _uncompared: ClassVar[tuple[str, ...]] = ("cursor",)

    def __post_init__(self) -> None:
        check_type("document_json", self.document_json, bytes)
        check_int("version", self.version, 1, MAX_INT)
        keys.attempt_index(self.attempt_index)
        parse_cursor(check_type("cursor", self.cursor, str))


# -- descriptions ----------------------------------------------------------------------------------


class StreamDescription(Value):
    """The streams of one attempt.

    Attributes:
        last_id: Id of the newest frame, ``0-0`` for none.
        frame_count: Number of frames appended so far.
        log_entries: Number of durable frames kept, plus 1 for the end entry and 1 for each loss.
        live_entries: Number of entries in the live window; a run of frames is one entry.
        summary_version: Number of patches of the summary so far.
        closed_reason: Why the stream ended; None while it has not.
        lease_left: Seconds until the lease expires by the server's clock, 0 after it has; None without a lease.
        worker_id: Worker that has claimed the attempt last; None before it is claimed, and once its keys have expired.
        worker_instance_id: Instance of that worker.
        claimed_at_ms: When it has, Unix milliseconds by the server's clock, as the next ones.
        began_at_ms: When the attempt began.
        ended_at_ms: When its stream ended; None while it has not.
        log_added: Number of entries that the log has been given; those beyond `log_entries` have left it by its
            retention.
        log_first_id: Id of the first durable frame kept; None without one.
        lost_frames: Number of frames that were lost with a server, after they had been acknowledged.
        lost_entries: Number of losses that the log has been given, of one or more frames in sequence.
        live_first_sequence: First frame of the live window; None where it is empty, or its key has expired.
        live_ttl_ms: How long a frame of the live window is kept at least, as its writer has said; None before there is one.
        live_floor: Least number of frames that the window keeps.
        live_ceiling: Greatest number of frames that it keeps, whatever their age.
        live_rate_hz: Frames a second at which they were written lately.
    """

    last_id: str
    frame_count: int
    log_entries: int
    live_entries: int
    summary_version: int
    closed_reason: EndReason | None
    lease_left: float | None
    worker_id: str | None = None
    worker_instance_id: str | None = None
    claimed_at_ms: int | None = None
    began_at_ms: int | None = None
    ended_at_ms: int | None = None
    log_added: int = 0
    log_first_id: str | None = None
    lost_frames: int = 0
    lost_entries: int = 0
    live_first_sequence: int | None = None
    live_ttl_ms: int | None = None
    live_floor: int | None = None
    live_ceiling: int | None = None
    live_rate_hz: float | None = None

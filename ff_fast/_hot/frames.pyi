from typing import Literal, final

from ff_fast.types import EndReason, FrameMode, Gap, GapReason, PatchKind

@final
class StreamFrame:
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
        self,
        *,
        stream_id: str,
        frame_type: str,
        payload: bytes,
        ts_ms: int,
        mode: FrameMode = "durable",
        encoding: str = "utf8",
        source: str = "worker",
        correlation_id: str | None = None,
        summary_version: int | None = None,
        patch_kind: PatchKind | None = None,
        attempt_index: int = 0,
    ) -> None: ...
    @property
    def stream_id(self) -> str:
        """``<server ms>-<sequence>``, its id in the stream of the attempt."""

    @property
    def cursor(self) -> str:
        """Where a reader goes on behind this frame; opaque, and safe in a URL."""

    @property
    def attempt_index(self) -> int:
        """The attempt, from 0."""

    @property
    def sequence(self) -> int:
        """Position in the attempt: dense, from 1, over durable, summary and best-effort frames."""

    @property
    def frame_type(self) -> str:
        """Classifier that the worker chose; ``token`` by default."""

    @property
    def payload(self) -> bytes:
        """The bytes that were written, 0 to 65,536."""

    @property
    def ts_ms(self) -> int:
        """When the frame was written, in ms since the epoch by the server's clock."""

    @property
    def mode(self) -> FrameMode:
        """Wire token of the stream mode: ``durable``, ``summary`` or ``best_effort``."""

    @property
    def encoding(self) -> str:
        """What the worker says of the payload: ``utf8``, ``binary`` or another text."""

    @property
    def source(self) -> str:
        """Who made the frame; ``worker`` by default."""

    @property
    def correlation_id(self) -> str | None:
        """Text that the worker gave, or None."""

    @property
    def summary_version(self) -> int | None:
        """Version of the summary after this patch, from 1; None outside mode ``summary``."""

    @property
    def patch_kind(self) -> PatchKind | None:
        """How the payload changes the summary; None outside mode ``summary``."""

    def __hash__(self) -> int: ...

@final
class Entries:
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

    @property
    def frames(self) -> list[StreamFrame]: ...
    @property
    def end_reason(self) -> EndReason | None: ...
    @property
    def end_error(self) -> str | None: ...
    @property
    def taken(self) -> int: ...
    @property
    def foreign(self) -> int: ...
    @property
    def rewound(self) -> bool: ...

def decode_entries(
    entries: list[list[object]],
    after: int,
    limit: tuple[int, int] | None = None,
    exclude_best_effort: bool = False,
    *,
    live: bool = False,
    after_ms: int = 0,
    newest: tuple[int, int] | None = None,
    attempt_index: int = 0,
) -> Entries:
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

def weigh_entries(entries: list[list[object]]) -> tuple[int, int]:
    """Return about how many frames *entries* hold, and how many bytes of values.

    Nothing is decoded. A damaged run is counted, and `decode_entries` refuses it.

    Raises:
        Corruption: *entries* is not ``[[id, [field, value, ...]], ...]``.
    """

def decode_run(run: bytes, count: int) -> list[bytes]:
    """Return the *count* payloads of a run in the summary hash, where a run has no fields.

    Raises:
        Corruption: *run* is not a run of *count* frames.
    """

def assemble(
    log: Entries,
    live: Entries,
    ms: int,
    sequence: int,
    exclude_best_effort: bool,
    reason: GapReason,
    attempt_index: int = 0,
) -> tuple[list[StreamFrame | Gap], int, int, EndReason | None]:
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

@final
class Pushed:
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

    @property
    def kind(self) -> Literal["look", "frames", "end", "lease"]: ...
    @property
    def deferred(self) -> bool:
        """The frames are not stored yet."""

    @property
    def ms(self) -> int: ...
    @property
    def first(self) -> int: ...
    @property
    def last(self) -> int: ...
    @property
    def frames(self) -> list[StreamFrame]: ...
    @property
    def visible(self) -> list[StreamFrame]:
        """The frames that a reader gets that excludes best-effort frames."""

    @property
    def size(self) -> int: ...
    @property
    def previous(self) -> int:
        """Sequence of the last visible frame before the end."""

    @property
    def end_reason(self) -> EndReason | None: ...
    @property
    def end_error(self) -> str | None: ...
    @property
    def lease_ms(self) -> int: ...

def decode_push(message: bytes, attempt_index: int = 0) -> Pushed:
    """Return the :class:`Pushed` of a message. One that is damaged says: look."""

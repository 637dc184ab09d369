from typing import Literal, final

from ff_fast.types import EndReason, FrameMode, Gap, GapReason, PatchKind

@final
class StreamFrame:
    """One frame of a stream, as a reader gets it. Immutable, compared by value, hashable."""

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
        """Where a reader goes on behind this frame; opaque, and safe in a URL. ``Gap`` and ``End`` have one too."""

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
    @property
    def frames(self) -> list[StreamFrame]: ...
    @property
    def end_reason(self) -> EndReason | None: ...
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
) -> Entries: ...
def weigh_entries(entries: list[list[object]]) -> tuple[int, int]: ...
def decode_run(run: bytes, count: int) -> list[bytes]: ...
def assemble(
    log: Entries,
    live: Entries,
    ms: int,
    sequence: int,
    exclude_best_effort: bool,
    reason: GapReason,
    attempt_index: int = 0,
) -> tuple[list[StreamFrame | Gap], int, int, EndReason | None]: ...

@final
class Pushed:
    """What a message on the channel of an attempt says. All readers of the attempt share it."""

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
    def lease_ms(self) -> int: ...

def decode_push(message: bytes, attempt_index: int = 0) -> Pushed:
    """Return what a message on the channel of an attempt says. A message that is damaged says: look."""

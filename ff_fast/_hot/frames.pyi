from typing import final

from ff_fast.types import EndReason, FrameMode, Gap, GapReason, PatchKind

@final
class StreamFrame:
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
    ) -> None: ...
    @property
    def stream_id(self) -> str: ...
    @property
    def cursor(self) -> str: ...
    @property
    def sequence(self) -> int: ...
    @property
    def frame_type(self) -> str: ...
    @property
    def payload(self) -> bytes: ...
    @property
    def ts_ms(self) -> int: ...
    @property
    def mode(self) -> FrameMode: ...
    @property
    def encoding(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def correlation_id(self) -> str | None: ...
    @property
    def summary_version(self) -> int | None: ...
    @property
    def patch_kind(self) -> PatchKind | None: ...
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

def decode_entries(
    entries: list[list[object]],
    after: int,
    limit: tuple[int, int] | None = None,
    exclude_best_effort: bool = False,
    *,
    live: bool = False,
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
) -> tuple[list[StreamFrame | Gap], int, int, EndReason | None]: ...

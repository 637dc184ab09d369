"""What both shells' writers share, without I/O: opening one, and what a flush answers."""

from __future__ import annotations

from typing import NamedTuple

from ff_fast._core import ops
from ff_fast._core.steps import Flow, Step
from ff_fast._core.summary import fold
from ff_fast._hot.writer import WriterCore
from ff_fast.errors import SequenceGap, SummaryConflict
from ff_fast.types import MAX_PAYLOAD_BYTES, AppendFrameOutcome, Frame, FrameKind, StreamMode

HIGH_WATER_BYTES = 1 << 20
"""`drain` waits while more than this many bytes are unacknowledged, or than leave room for one more frame."""

MAX_UNACKNOWLEDGED_BYTES = 32 << 20
RETENTION_MAXLEN = 10_000

ROUND_BYTES = 4 << 20
"""A shell that has joined this many bytes of batches sends them before it asks more writers."""


class WriterOptions(NamedTuple):
    """Checked options of a writer."""

    mode: StreamMode
    retention_maxlen: int = RETENTION_MAXLEN
    max_unacknowledged_bytes: int = MAX_UNACKNOWLEDGED_BYTES
    linger_ms: float = 0.0


class WriterState(NamedTuple):
    """What a writer core starts from: the attempt, who the writer is, and what was there before it."""

    attempt: ops.Attempt
    writer_id: bytes
    opened: ops.Opened
    document: bytes | None
    options: WriterOptions


def open_writer(attempt: ops.Attempt, options: WriterOptions) -> Flow[WriterState]:
    """Supersede the writer of the attempt; a summary that is there already is read, to be continued.

    Raises:
        ExecutionNotFound, StaleOwner, ExecutionSuspended, StreamClosed, LeaseExpired: The handle may not write.
    """
    writer_id = ops.writer_id(attempt)
    op = ops.open_writer(attempt, writer_id)
    (reply,) = yield Step(op.request())
    opened = op.answer(reply)
    document = None
    if opened.summary_version:
        read = ops.read_summary(attempt.execution_id, attempt.attempt_index)
        (reply,) = yield Step(read.request())
        summary = fold(read.answer(reply))
        version = 0 if summary is None else summary.version
        if summary is None or version != opened.summary_version:
            raise SummaryConflict(opened.summary_version, version)
        document = summary.document_json
    return WriterState(attempt, writer_id, opened, document, options)


class SharedWriter(WriterCore):
    """A writer core made from its state."""

    def __init__(self, state: WriterState) -> None:
        super().__init__(
            keys=state.attempt.stream_keys,
            writer=state.writer_id,
            mode=state.options.mode,
            opened=tuple(state.opened),
            document=state.document,
            retention_maxlen=state.options.retention_maxlen,
            max_unacknowledged_bytes=state.options.max_unacknowledged_bytes,
            linger_ms=state.options.linger_ms,
        )
        self.execution_id = state.attempt.execution_id
        self.attempt_index = state.attempt.attempt_index
        # Behind a drain a frame of any size is taken, whatever the limit.
        self._high_water_bytes = min(
            HIGH_WATER_BYTES, state.options.max_unacknowledged_bytes - MAX_PAYLOAD_BYTES
        )

    def outcome(self) -> AppendFrameOutcome:
        """What is stored by now."""
        return AppendFrameOutcome(
            stream_id=self.last_id,
            frame_count=self.last_sequence,
            summary_version=self.summary_version or None,
        )

    def write_frame(self, frame: Frame) -> int | None:
        """Write a :class:`Frame`; None where its ``seq`` says that this writer has written it already.

        Raises:
            SequenceGap: ``frame.seq`` is beyond the next sequence, or before this writer's first.
        """
        if frame.seq is not None and frame.seq != self.next_sequence:
            if self._first_sequence <= frame.seq < self.next_sequence:
                return None
            raise SequenceGap(self.next_sequence, frame.seq)
        return self.write(
            frame.bytes,
            frame.frame_type or frame.kind.value,
            mode=frame.mode,
            correlation_id=frame.correlation_id,
            encoding="binary" if frame.kind is FrameKind.BLOB else "utf8",
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(execution_id={self.execution_id!r}, attempt_index={self.attempt_index}, "
            f"next_sequence={self.next_sequence}, unacknowledged_bytes={self.unacknowledged_bytes})"
        )

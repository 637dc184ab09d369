"""What a backend has done, in numbers."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from ff_fast.errors import InvalidInput

from ._value import Value


class _Sum:
    """Numbers that can be added, field by field."""

    __slots__ = ()
    __match_args__: ClassVar[tuple[str, ...]] = ()

    def __add__(self, other: Self) -> Self:
        if type(other) is not type(self):
            return NotImplemented
        names: tuple[str, ...] = type(self).__match_args__
        return type(self)(*[_added(getattr(self, name), getattr(other, name)) for name in names])


def _added(one: Any, other: Any) -> Any:  # noqa: ANN401 - a number, numbers, or more of them
    if isinstance(one, tuple):
        return tuple(map(_added, one, other))
    return one + other


class FramesByMode(_Sum, Value):
    """A number of frames, by their mode.

    Attributes:
        durable: Durable frames.
        durable_summary: Patches of a summary.
        best_effort: Best-effort frames.
    """

    durable: int = 0
    durable_summary: int = 0
    best_effort: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.durable + self.durable_summary + self.best_effort


class GapsByReason(_Sum, Value):
    """A number of gaps that readers were told of, by reason; see :data:`ff_fast.GapReason`.

    Attributes:
        trimmed, fell_behind, expired, cursor_ahead, rewritten, lost: Gaps for that reason.
    """

    trimmed: int = 0
    fell_behind: int = 0
    expired: int = 0
    cursor_ahead: int = 0
    rewritten: int = 0
    lost: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, name) for name in self.__match_args__)


class Histogram(_Sum, Value):
    """How many values there were, by size.

    Attributes:
        count: Number of values.
        total: Their sum.
        buckets: 32 numbers. Number *i* counts the values that are at most ``2**i`` and more than the bound before; the last
            one counts all that are larger.
    """

    BUCKETS: ClassVar[int] = 32

    count: int = 0
    total: int = 0
    buckets: tuple[int, ...] = (0,) * 32

    @property
    def bounds(self) -> tuple[float, ...]:
        """The largest value of each bucket; infinite for the last one."""
        return (*(float(2**i) for i in range(self.BUCKETS - 1)), float("inf"))

    def quantile(self, share: float) -> float:
        """Return the bound of the bucket below which that share of the values is, 0 to 1; 0.0 without values.

        Raises:
            InvalidInput: *share* is no number from 0 to 1.
        """
        if type(share) not in (int, float) or not 0 <= share <= 1:
            raise InvalidInput("share must be a number from 0 to 1; 0.99 is the 99th percentile.")
        left = share * self.count
        for bound, number in zip(self.bounds, self.buckets, strict=True):
            left -= number
            if number and left <= 0:
                return bound
        return 0.0


class Stats(_Sum, Value):
    """What one backend has done since it was opened, and what it is doing; see `ValkeyBackend.stats`.

    Other processes and other backends are not in it; ``+`` adds those of two. Counters only grow, and what is closed stays
    counted.

    Attributes:
        frames_written: Frames that were put into batches, by mode.
        frames_acknowledged: Frames whose storage the server has confirmed, by mode; each counts once.
        frames_read: Frames that tails, followers and pages got, by mode. Each reader counts for itself.
        bytes_written: Payload bytes of the written frames.
        bytes_read: Payload bytes of the read frames.
        batches: Batches of the written frames.
        resends: Batches that were sent again, after a lost connection, a failover, or a refusal that passes.
        reconnects: Times that a server was connected to again after a connection to it was lost, while it was used. Of
            several that are lost together one counts.
        unacknowledged_bytes: Bytes in memory that wait for the server. A gauge.
        unacknowledged_frames: Frames that wait for the server. A gauge.
        gaps: Gaps that readers were told of, by reason.
        tails_open: Tails and followers that are listening. A gauge.
        writers_open: Writers that have not been closed and have not failed. A gauge.
        executions_claimed: Executions that were claimed, or taken over.
        executions_completed: Calls that completed an execution.
        executions_failed: Calls that failed an attempt, whether or not a retry follows.
        executions_cancelled: Calls that cancelled an execution.
        leases_lost: Leases that were kept here and were lost.
        batch_frames: Frames of each batch.
        write_to_acknowledged_us: Time from the first frame of a batch to the acknowledgement of the batch, in µs.
        read_lag_us: Time from the server's stamp of a pushed frame to its reader here, in µs: of the newest frame of one in
            16 batches that readers take. It compares the clocks of two hosts, and the stamp is in whole milliseconds.
    """

    frames_written: FramesByMode = FramesByMode()
    frames_acknowledged: FramesByMode = FramesByMode()
    frames_read: FramesByMode = FramesByMode()
    bytes_written: int = 0
    bytes_read: int = 0
    batches: int = 0
    resends: int = 0
    reconnects: int = 0
    unacknowledged_bytes: int = 0
    unacknowledged_frames: int = 0
    gaps: GapsByReason = GapsByReason()
    tails_open: int = 0
    writers_open: int = 0
    executions_claimed: int = 0
    executions_completed: int = 0
    executions_failed: int = 0
    executions_cancelled: int = 0
    leases_lost: int = 0
    batch_frames: Histogram = Histogram()
    write_to_acknowledged_us: Histogram = Histogram()
    read_lag_us: Histogram = Histogram()

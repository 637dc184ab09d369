"""The numbers of a backend, from its tally and its open writers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ff_fast.types import FramesByMode, GapsByReason, Histogram, Stats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ff_fast._core.deployment import Deployment
    from ff_fast._core.writer import SharedWriter


def stats_of(on: Deployment, writers: Sequence[Callable[[], SharedWriter | None]]) -> Stats:
    """Return the numbers of a backend; *writers* refer to those that it has open, and to others that it had."""
    counts: dict[str, Any] = on.tally.snapshot()
    events = counts.pop("events")
    found = [writer() for writer in writers]
    open_writers = [each for each in found if each is not None and not each._stopped]  # noqa: SLF001 - no part of its interface
    for name in ("frames_written", "frames_acknowledged", "frames_read"):
        counts[name] = FramesByMode(*counts[name])
    for name in ("batch_frames", "write_to_acknowledged_us", "read_lag_us"):
        counts[name] = Histogram(*counts[name])
    known = GapsByReason.__match_args__
    gaps = {name: number for name, number in counts.pop("gaps").items() if name in known}
    return Stats(
        **counts,
        **events,
        gaps=GapsByReason(**gaps),
        unacknowledged_bytes=sum(each.unacknowledged_bytes for each in open_writers),
        unacknowledged_frames=sum(
            each.next_sequence - 1 - each.last_sequence for each in open_writers
        ),
        writers_open=len(open_writers),
    )

"""The numbers of a backend, from its tally and its open writers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

from ff_fast.errors import NotReplicated
from ff_fast.types import FramesByMode, GapsByReason, Histogram, Stats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ff_fast._core.deployment import Deployment
    from ff_fast._core.steps import Steps
    from ff_fast._core.writer import SharedWriter
    from ff_fast._hot.tally import Tally

T = TypeVar("T")


def counting(
    tally: Tally,
    event: str,
    steps: Callable[[], Steps[T]],
    counts: Callable[[T], bool] = lambda value: True,
) -> Callable[[], Steps[T]]:
    """Return *steps* with a count of those that give a value which *counts*, or are done and do not reach their level."""

    def counted() -> Steps[T]:
        try:
            value = yield from steps()
        except NotReplicated:
            tally.note(event)
            raise
        if counts(value):
            tally.note(event)
        return value

    return counted


def stats_of(
    on: Deployment, writers: Sequence[Callable[[], SharedWriter | None]], *, closed: bool = False
) -> Stats:
    """Return the numbers of a backend.

    Args:
        on: The deployment.
        writers: Refer to those that it has open, and to others that it had.
        closed: The backend is closed: its readers, which may not know yet, listen no more.
    """
    if on.pid != os.getpid():
        # What a fork has copied was done by the process that opened the backend, which counts it.
        return Stats()
    counts: dict[str, Any] = on.tally.snapshot()
    if closed:
        counts["tails_open"] = 0
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
        # The acknowledged one first: another thread may go on in between.
        unacknowledged_frames=sum(
            -each.last_sequence - 1 + each.next_sequence for each in open_writers
        ),
        writers_open=len(open_writers),
    )

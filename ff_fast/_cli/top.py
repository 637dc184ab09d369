"""``ff-fast top``: lanes, workers and streams, live."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from ff_fast import AttemptNotFound, ExecutionNotFound, FFError, FunctionMissing
from ff_fast._cli.look import age, plain
from ff_fast._cli.shared import (
    DONE,
    add_url,
    complain,
    counted,
    look_at,
    number,
    one_line,
    write_json,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ff_fast import (
        ExecutionSummary,
        LaneSummary,
        StreamDescription,
        ValkeyBackend,
        WorkerSummary,
    )
    from ff_fast._cli.shared import Commands


_SHARE = 0.1
"""Looks take at most this share of the time, of this process and so of the server."""

_HEADS = 5
"""Lines of a look without those of its parts."""


def add_top(commands: Commands) -> None:
    parser = commands.add(
        top,
        help_text="show lanes, workers and streams, live",
        description=(
            "Shows what waits and runs in each lane, which workers hold leases, and what the newest running executions"
            " stream: frames a second, the live window, the time since the last frame. On a terminal it is drawn anew,"
            " until Ctrl-C. While the server does not answer it goes on trying."
        ),
    )
    parser.add_argument(
        "--interval",
        type=number(0.1, 3600),
        default=2.0,
        metavar="S",
        help="seconds between two looks (default: 2)",
    )
    parser.add_argument("--once", action="store_true", help="one look, without rates")
    parser.add_argument(
        "--count", type=counted, default=15, metavar="N", help="lines of each part (default: 15)"
    )
    add_url(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object for each look")


class _Stream(NamedTuple):
    """A running execution, with what its stream was and what it was at the look before."""

    execution: ExecutionSummary
    stream: StreamDescription
    rate_hz: float | None


class _Look(NamedTuple):
    at: float
    lanes: tuple[LaneSummary, ...]
    workers: tuple[WorkerSummary, ...]
    streams: tuple[_Stream, ...]
    failure: str | None = None


def top(arguments: argparse.Namespace) -> int:
    before: _Look | None = None
    with look_at(arguments) as backend, _screen(arguments) as show:
        while True:
            began = time.monotonic()
            try:
                before = _look(backend, arguments.count, before)
            except FFError as error:
                lasting = not (error.retryable or isinstance(error, FunctionMissing))
                if before is None or lasting:
                    raise
                # A failover, or a restart after which a worker loads the library: what was seen last stays.
                before = before._replace(failure=str(error))
            show(before)
            if arguments.once:
                return DONE
            took_s = time.monotonic() - began
            time.sleep(max(arguments.interval, took_s * (1 / _SHARE - 1)))


def _look(backend: ValkeyBackend, count: int, before: _Look | None) -> _Look:
    lanes, workers = backend.list_lanes(), backend.list_workers()
    page = backend.list_executions(state="active", count=min(count, 100))
    at = time.monotonic()
    earlier: Mapping[tuple[str, int | None], int] = (
        {}
        if before is None
        else {
            (each.execution.execution_id, each.execution.attempt_index): each.stream.frame_count
            for each in before.streams
        }
    )
    streams = []
    for each in page.items:
        with contextlib.suppress(ExecutionNotFound, AttemptNotFound):
            stream = backend.describe_stream(each.execution_id, each.attempt_index or 0)
            known = earlier.get((each.execution_id, each.attempt_index))
            rate = None
            if known is not None and before is not None:
                rate = (stream.frame_count - known) / max(at - before.at, 0.001)
            streams.append(_Stream(each, stream, rate))
    return _Look(at, lanes, workers, tuple(streams))


@contextlib.contextmanager
def _screen(arguments: argparse.Namespace) -> Iterator[Callable[[_Look], None]]:
    """Give what shows a look: as JSON, as lines, or drawn anew on a terminal."""
    count = arguments.count

    def show_lines(look: _Look) -> None:
        if look.failure is not None:
            complain(look.failure)
        else:
            print("\n".join(_lines(look, [count] * 3)), flush=True)

    def show_json(look: _Look) -> None:
        if look.failure is not None:
            complain(look.failure)
        else:
            _write_look(look, count)

    if arguments.json:
        yield show_json
        return
    if arguments.once or not sys.stdout.isatty():
        yield show_lines
        return
    try:
        from rich.console import Console  # noqa: PLC0415 - an extra
        from rich.live import Live  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415
    except ImportError:
        yield show_lines
        return
    console = Console()
    if console.is_dumb_terminal:
        yield show_lines
        return

    def draw(look: _Look) -> None:
        room = console.height - _HEADS - (look.failure is not None)
        sizes = [min(len(part), count) for part in (look.lanes, look.workers, look.streams)]
        lines = list(_lines(look, fitted(sizes, room)))
        if look.failure is not None:
            lines.insert(0, one_line(look.failure))
        # Of a narrow terminal the ends of lines are beyond the edge.
        live.update(Text("\n".join(lines), no_wrap=True, overflow="crop"), refresh=True)

    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield draw


def fitted(sizes: Sequence[int], room: int) -> list[int]:
    """Return how many lines each part gets where there is room for so many: all or an equal share, one at least."""
    given, parts = [0] * len(sizes), len(sizes)
    left = max(room, parts)
    for place, size in sorted(enumerate(sizes), key=lambda each: each[1]):
        given[place] = min(size, left // parts)
        left -= given[place]
        parts -= 1
    return given


def _write_look(look: _Look, count: int) -> None:
    streams: list[dict[str, Any]] = [
        {
            "execution_id": each.execution.execution_id,
            "attempt": each.execution.attempt_index,
            "lane": each.execution.lane,
            "worker": each.execution.worker_instance_id,
            "frames": each.stream.frame_count,
            "frames_a_second": each.rate_hz,
            "live_entries": each.stream.live_entries,
            "log_entries": each.stream.log_entries,
            "last_id": each.stream.last_id,
        }
        for each in look.streams
    ]
    write_json(
        {
            "lanes": [plain(each) for each in look.lanes[:count]],
            "workers": [plain(each) for each in look.workers[:count]],
            "streams": streams,
        }
    )


def _head(name: str, shown: int, number: int) -> str:
    return name if shown >= number else f"{name} ({shown} of {number})"


def _lines(look: _Look, sizes: Sequence[int]) -> Iterator[str]:
    lanes, workers, streams = sizes
    head = _head("LANE", lanes, len(look.lanes))
    yield f"{head:<20}{'WAITING':>9}{'OLDEST':>8}{'ACTIVE':>8}{'DELAYED':>9}{'CHILDREN':>10}{'SUSPENDED':>11}{'FAILED 1h':>11}"
    for lane in look.lanes[:lanes]:
        oldest = "-" if lane.oldest_waiting_at_ms is None else age(lane.oldest_waiting_at_ms)
        yield (
            f"{one_line(lane.lane) or '(named)':<20}{lane.waiting:>9}{oldest:>8}{lane.active:>8}{lane.delayed:>9}"
            f"{lane.waiting_children:>10}{lane.suspended:>11}{lane.failed:>11}"
        )
    yield ""
    head = _head("WORKER", workers, len(look.workers))
    yield f"{head:<40}{'LEASES':>8}{'LONGEST':>9}  LANES"
    for worker in look.workers[:workers]:
        name = f"{worker.worker_id} ({worker.worker_instance_id})"
        yield (
            f"{one_line(name):<40}{worker.executions:>8}{age(worker.oldest_claim_at_ms):>9}"
            f"  {one_line(', '.join(worker.lanes))}"
        )
    yield ""
    active = max(sum(lane.active for lane in look.lanes), len(look.streams))
    head = _head("EXECUTION", min(streams, len(look.streams)), active)
    yield f"{head:<46}{'ATTEMPT':>8}{'FRAMES':>9}{'HZ':>8}{'LIVE':>7}{'LOG':>7}{'LAST':>6}  LANE"
    for execution, stream, rate in look.streams[:streams]:
        last_ms = int(stream.last_id.partition("-")[0])
        yield (
            f"{execution.execution_id:<46}{execution.attempt_index:>8}{stream.frame_count:>9}"
            f"{'-' if rate is None else f'{rate:.0f}':>8}{stream.live_entries:>7}{stream.log_entries:>7}"
            f"{age(last_ms) if last_ms else '-':>6}  {one_line(execution.lane)}"
        )

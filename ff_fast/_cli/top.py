"""``ff-fast top``: lanes, workers and streams, live."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from ff_fast import AttemptNotFound, ExecutionNotFound
from ff_fast._cli.look import age, plain
from ff_fast._cli.shared import DONE, add_url, connect, number, one_line, whole, write_json

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping

    from ff_fast import (
        ExecutionSummary,
        LaneSummary,
        StreamDescription,
        ValkeyBackend,
        WorkerSummary,
    )
    from ff_fast._cli.shared import Commands


def add_top(commands: Commands) -> None:
    parser = commands.add(
        top,
        help_text="show lanes, workers and streams, live",
        description=(
            "Shows what waits and runs in each lane, which workers hold leases, and what the newest running executions"
            " stream: frames a second, the live window, the time since the last frame. On a terminal it is drawn anew,"
            " until Ctrl-C."
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
        "--count", type=whole, default=15, metavar="N", help="lines of each part (default: 15)"
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


def top(arguments: argparse.Namespace) -> int:
    before: _Look | None = None
    with connect(arguments) as backend, _screen(arguments) as show:
        while True:
            before = _look(backend, max(arguments.count, 1), before)
            show(before)
            if arguments.once:
                return DONE
            time.sleep(arguments.interval)


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
    return _Look(at, lanes[:count], workers[:count], tuple(streams))


@contextlib.contextmanager
def _screen(arguments: argparse.Namespace) -> Iterator[Callable[[_Look], None]]:
    """Give what shows a look: as JSON, as lines, or drawn anew on a terminal."""
    if arguments.json:
        yield _show_json
    elif arguments.once or not sys.stdout.isatty():
        yield _show_lines
    else:
        try:
            from rich.live import Live  # noqa: PLC0415 - an extra
            from rich.text import Text  # noqa: PLC0415
        except ImportError:
            yield _show_lines
            return
        with Live(screen=True, auto_refresh=False) as live:
            yield lambda look: live.update(
                # Of a narrow terminal the ends of lines are beyond the edge.
                Text("\n".join(_lines(look)), no_wrap=True, overflow="crop"),
                refresh=True,
            )


def _show_lines(look: _Look) -> None:
    print("\n".join(_lines(look)), flush=True)


def _show_json(look: _Look) -> None:
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
            "lanes": [plain(each) for each in look.lanes],
            "workers": [plain(each) for each in look.workers],
            "streams": streams,
        }
    )


def _lines(look: _Look) -> Iterator[str]:
    yield f"{'LANE':<20}{'WAITING':>9}{'OLDEST':>8}{'ACTIVE':>8}{'DELAYED':>9}{'CHILDREN':>10}{'SUSPENDED':>11}{'FAILED 1h':>11}"
    for lane in look.lanes:
        oldest = "-" if lane.oldest_waiting_at_ms is None else age(lane.oldest_waiting_at_ms)
        yield (
            f"{one_line(lane.lane) or '(named)':<20}{lane.waiting:>9}{oldest:>8}{lane.active:>8}{lane.delayed:>9}"
            f"{lane.waiting_children:>10}{lane.suspended:>11}{lane.failed:>11}"
        )
    yield ""
    yield f"{'WORKER':<40}{'LEASES':>8}{'LONGEST':>9}  LANES"
    for worker in look.workers:
        name = f"{worker.worker_id} ({worker.worker_instance_id})"
        yield (
            f"{one_line(name):<40}{worker.executions:>8}{age(worker.oldest_claim_at_ms):>9}"
            f"  {one_line(', '.join(worker.lanes))}"
        )
    yield ""
    yield f"{'EXECUTION':<46}{'ATTEMPT':>8}{'FRAMES':>9}{'HZ':>8}{'LIVE':>7}{'LOG':>7}{'LAST':>6}  LANE"
    for execution, stream, rate in look.streams:
        last_ms = int(stream.last_id.partition("-")[0])
        yield (
            f"{execution.execution_id:<46}{execution.attempt_index:>8}{stream.frame_count:>9}"
            f"{'-' if rate is None else f'{rate:.0f}':>8}{stream.live_entries:>7}{stream.log_entries:>7}"
            f"{age(last_ms) if last_ms else '-':>6}  {one_line(execution.lane)}"
        )

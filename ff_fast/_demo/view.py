"""The progress of a demo, and two views of it: lines, and a picture in the terminal."""

from __future__ import annotations

import os
import sys
import time
from array import array
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from typing import Self, TextIO

    from rich.console import Console, RenderableType

    from ff_fast._demo.check import Check
    from ff_fast._demo.plan import Plan

REDRAWS_PER_SECOND = 8


# -- reports ---------------------------------------------------------------------------------------


class Sent(NamedTuple):
    """A worker's report: the times (ns) of the frames since its last report, K and the rate now."""

    times: bytes
    window_frames: int
    rate_hz: float


class Read(NamedTuple):
    """A reader's report: sequences, times (ns) and text of the frames since its last report."""

    sequences: bytes
    times: bytes
    text: bytes
    events: int
    version: int


class Progress:
    """The reports of both processes so far, and the figures that follow from them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.execution_id = ""
        self.sent_times = array("q")
        self.latencies = array("q")
        self.last_times: deque[int] = deque()
        self.received = 0
        self.events = 0
        self.version = 0
        self.text = ""
        self.sent = Sent(b"", 0, 0.0)
        self._unmatched: list[tuple[array[int], array[int]]] = []

    def take_sent(self, sent: Sent) -> None:
        self.sent = sent
        self.sent_times.frombytes(sent.times)
        self._match()

    def take_read(self, read: Read) -> None:
        sequences, times = array("q", read.sequences), array("q", read.times)
        self.received += len(sequences)
        self.last_times.extend(times)
        while self.last_times and self.last_times[-1] - self.last_times[0] > 1_000_000_000:
            self.last_times.popleft()
        self.events, self.version = read.events, read.version
        self.text = (self.text + read.text.decode("utf-8", "replace"))[-2400:]
        self._unmatched.append((sequences, times))
        self._match()

    def _match(self) -> None:
        """Compute latencies of arrivals whose write the worker has reported; keep the others."""
        written = len(self.sent_times)
        waiting: list[tuple[array[int], array[int]]] = []
        for sequences, times in self._unmatched:
            if sequences and sequences[-1] > written:
                waiting.append((sequences, times))
                continue
            self.latencies.extend(
                at - self.sent_times[sequence - 1]
                for sequence, at in zip(sequences, times, strict=True)
            )
        self._unmatched = waiting

    @property
    def elapsed_s(self) -> float:
        return (self.sent_times[-1] - self.sent_times[0]) / 1e9 if self.sent_times else 0.0

    @property
    def receiving_hz(self) -> float:
        """Frames that arrived in the last second."""
        times = self.last_times
        span = times[-1] - times[0] if len(times) > 1 else 0
        return (len(times) - 1) * 1e9 / span if span else 0.0

    def sent_hz(self) -> float:
        """Tokens written a second, over the whole run."""
        elapsed = self.elapsed_s
        return (self.plan.tokens - 1) / elapsed if elapsed else 0.0

    def latency_ms(self, *shares: float, last: int | None = None) -> list[float]:
        """Percentiles of all latencies, or of the *last* ones."""
        values = sorted(self.latencies if last is None else self.latencies[-last:])
        if not values:
            return [0.0] * len(shares)
        return [values[min(int(len(values) * share), len(values) - 1)] / 1e6 for share in shares]


# -- views -----------------------------------------------------------------------------------------


class View(Protocol):
    """Shows the progress of a run, then its outcome."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def show(self, progress: Progress) -> None: ...
    def finish(self, progress: Progress, checks: list[Check]) -> None: ...


_TITLES = ("check", "sent", "arrived", "")


def _rows(checks: list[Check]) -> list[tuple[str, str, str, str]]:
    return [(c.name, c.sent, c.got, "DIFFERENT" if c.difference else "equal") for c in checks]


def _outcome(progress: Progress, checks: list[Check]) -> list[str]:
    p50, p99, longest = progress.latency_ms(0.5, 0.99, 1.0)
    wrong = sum(check.difference is not None for check in checks)
    return [
        (
            f"{len(progress.sent_times)} frames, {progress.plan.tokens} tokens at"
            f" {progress.sent_hz():.0f}/s (asked for {progress.plan.rate_hz:g}/s)"
        ),
        f"write to reader: p50 {p50:.2f} ms, p99 {p99:.2f} ms, longest {longest:.2f} ms",
        f"{wrong} of {len(checks)} checks found a difference."
        if wrong
        else "Everything that was sent arrived, byte for byte.",
    ]


class PlainView:
    """One line a second, without control codes."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.flush()

    def _line(self, text: str) -> None:
        self._out.write(f"{text}\n")
        self._out.flush()

    def show(self, progress: Progress) -> None:
        if not self._next:
            self._line(f"execution {progress.execution_id}")
            self._next = 1.0
        if progress.elapsed_s < self._next:
            return
        self._next = int(progress.elapsed_s) + 1.0
        p50, p99 = progress.latency_ms(0.5, 0.99, last=2000)
        self._line(
            f"{progress.elapsed_s:5.1f} s  arrived {progress.received}"
            f"  {progress.receiving_hz:.0f} frames/s"
            f"  p50 {p50:.2f} ms  p99 {p99:.2f} ms  estimate {progress.sent.rate_hz:.0f}/s"
            f"  K {progress.sent.window_frames}  summary version {progress.version}"
        )

    def finish(self, progress: Progress, checks: list[Check]) -> None:
        rows = [_TITLES, *_rows(checks)]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        self._line("")
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self._line("  ".join(cells).rstrip())
        self._line("")
        for text in _outcome(progress, checks):
            self._line(text)


class RichView:
    """The text as it arrives, and figures below it, a few times a second."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live  # noqa: PLC0415 - optional

        self._console = console
        self._live = Live(console=console, auto_refresh=False)
        self._next = 0.0

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, progress: Progress) -> None:
        # Redraws are few, since they take processor time from the run that is measured.
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 1 / REDRAWS_PER_SECOND
            self._live.update(self._picture(progress), refresh=True)

    def _picture(self, progress: Progress) -> RenderableType:
        from rich.console import Group  # noqa: PLC0415 - optional
        from rich.panel import Panel  # noqa: PLC0415 - optional
        from rich.text import Text  # noqa: PLC0415 - optional

        width = min(self._console.width, 100)
        height = max(min(self._console.height - 8, 16), 3)
        lines = Text(progress.text).wrap(self._console, width - 4)
        shown = Text("\n").join(lines[-height:])
        plan = progress.plan
        done = f"{min(progress.elapsed_s, plan.tokens / plan.rate_hz):.1f}"
        panel = Panel(
            shown,
            title=f"ff-fast demo, {plan.rate_hz:g} tokens/s",
            subtitle=f"{done} of {plan.tokens / plan.rate_hz:.1f} s",
            height=height + 2,
            width=width,
            border_style="cyan",
        )
        return Group(panel, self._figures(progress))

    def _figures(self, progress: Progress) -> RenderableType:
        from rich.table import Table  # noqa: PLC0415 - optional

        p50, p99 = progress.latency_ms(0.5, 0.99, last=2000)
        sent = progress.sent
        pairs = [
            ("arrived", f"{progress.received} frames"),
            ("latency p50", f"{p50:.2f} ms"),
            ("arriving", f"{progress.receiving_hz:.0f} frames/s"),
            ("latency p99", f"{p99:.2f} ms"),
            ("estimated rate", f"{sent.rate_hz:.0f} frames/s"),
            ("live window K", f"{sent.window_frames} frames"),
            ("tool events", f"{progress.events} frames"),
            ("summary", f"version {progress.version}"),
        ]
        table = Table.grid(padding=(0, 2))
        for style in ("dim", "bold") * 2:
            table.add_column(style=style, no_wrap=True)
        for left, right in zip(pairs[::2], pairs[1::2], strict=True):
            table.add_row(*left, *right)
        return table

    def finish(self, progress: Progress, checks: list[Check]) -> None:
        from rich import box  # noqa: PLC0415 - optional
        from rich.table import Table  # noqa: PLC0415 - optional

        self._next = 0.0
        self.show(progress)
        self._live.stop()
        self._console.print()
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for title in _TITLES:
            table.add_column(title)
        for name, sent, got, verdict in _rows(checks):
            table.add_row(
                name, sent, got, verdict, style="bold red" if verdict == "DIFFERENT" else None
            )
        self._console.print(table)
        self._console.print()
        for text in _outcome(progress, checks):
            self._console.print(text, highlight=False)
        self._console.print(f"execution {progress.execution_id}", style="dim", highlight=False)


def choose_view(*, plain: bool) -> View:
    """Return the rich view if stdout is a terminal and rich is installed, else the plain one."""
    if not plain and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        try:
            from rich.console import Console  # noqa: PLC0415 - optional
        except ImportError:
            sys.stderr.write("ff-fast: plain lines; for more, pip install 'ff_fast[cli]'\n")
        else:
            return RichView(Console())
    return PlainView(sys.stdout)

"""The demo: a worker streams a text in all three modes, and a reader in another process checks it.

Three processes, so that none of them measures another one's work: the worker writes when a frame is
due, the reader tails through its own connection, and the caller's process shows both and compares.
Times are of ``CLOCK_MONOTONIC``, which all processes of a machine share; a frame's latency is from
just before ``write`` to the moment when the tail yields it.

What is written follows from the :class:`Plan` alone, so what must arrive is computed here, and not
taken from the worker's word.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import selectors
import subprocess
import sys
import threading
import time
import uuid
from array import array
from collections import deque
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, NamedTuple, Protocol

import orjson

from ff_fast import (
    BestEffortLiveConfig,
    End,
    ExecutionNotFound,
    FFError,
    Gap,
    PatchKind,
    StreamMode,
    SummaryView,
    ValkeyBackend,
    aio,
    data,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import Any, Self, TextIO

    from rich.console import Console, RenderableType

MODES = ("best-effort", "summary", "durable")
MAX_TOKENS = 2_000_000

_LEASE_MS = 30_000
# Long enough to look at the execution with the other commands on a server of one's own.
_RETENTION_MS = 600_000
_FRAMES_PER_SECOND = 8
_REPORT_S = 0.1
# Later than the reader needs to start its tail.
_HEAD_START_S = 0.2
_GOODBYE_S = 3.0
_ANSWER = PatchKind.STRING_APPEND("/answer")


# -- what is written -------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What the worker writes: so many tokens, so many a second, in these of :data:`MODES`."""

    rate_hz: float
    tokens: int
    modes: tuple[str, ...] = MODES

    @property
    def live_mode(self) -> StreamMode:
        """The mode of tokens; its ceiling is above the K of this rate: only age trims a frame."""
        ttl_ms = 15_000
        return StreamMode.best_effort_live_with_config(
            BestEffortLiveConfig.with_ttl(ttl_ms).with_maxlen_ceiling(
                max(16_384, int(self.rate_hz * ttl_ms / 1000 * 4))
            )
        )


class Write(NamedTuple):
    """One frame of the plan."""

    payload: bytes
    frame_type: str
    mode: StreamMode


def tokens(count: int) -> list[bytes]:
    """Return the first *count* tokens of the demo text, which starts again behind its end."""
    # Pieces of words with the blanks before them, as tokenizers cut; joined they are the text.
    pieces = [piece.encode() for piece in re.findall(r"\s*\S{1,6}|\s+", data.text())]
    whole, rest = divmod(count, len(pieces))
    return pieces * whole + pieces[:rest]


def script(plan: Plan) -> Iterator[list[Write]]:
    """Yield what is due with each token, as an LLM worker writes it.

    The token itself; twenty times a second the text since then for the summary's answer; four times
    a second its count; twice a second a tool event.
    """
    live, durable = plan.live_mode, StreamMode.durable()
    merge, append = StreamMode.durable_summary(), StreamMode.durable_summary(_ANSWER)
    piece_every = max(round(plan.rate_hz / 20), 1)
    count_every = max(round(plan.rate_hz / 4), 1)
    event_every = max(round(plan.rate_hz / 2), 1)
    piece: list[bytes] = []

    def patch(**members: object) -> Write:
        return Write(orjson.dumps(members), "summary", merge)

    for index, token in enumerate(tokens(plan.tokens)):
        number = index + 1
        last = number == plan.tokens
        due: list[Write] = []
        if "best-effort" in plan.modes:
            due.append(Write(token, "token", live))
        if "summary" in plan.modes:
            if number == 1:
                due.append(patch(phase="answering", tokens=0, answer=""))
            piece.append(token)
            if number % piece_every == 0 or last:
                due.append(Write(b"".join(piece), "answer", append))
                piece.clear()
            if last:
                due.append(patch(tokens=number, phase="done"))
            elif number % count_every == 0:
                due.append(patch(tokens=number))
        if "durable" in plan.modes and (number % event_every == 0 or last):
            event = {
                "event": "finished" if last else "tool_call",
                "call": number // event_every,
                "tool": "dictionary",
                "arguments": {"word": token.decode().strip()},
                "tokens": number,
            }
            due.append(Write(orjson.dumps(event), "tool_event", durable))
        yield due


class Transcript(NamedTuple):
    """What a reader got of a stream, or must get.

    Attributes:
        tokens: Payloads of the best-effort frames.
        patches: Of the summary frames, each as how it is applied and its payload.
        events: Payloads of the durable frames.
        sequences: Of every frame, in the order in which they came.
        document: The summary that the patches fold to; empty without patches.
        version: Its version.
        gaps: How many frames each gap leaves out, and why.
        ends: Why the stream ended; one for each end.
    """

    tokens: list[bytes]
    patches: list[tuple[str, bytes]]
    events: list[bytes]
    sequences: list[int]
    document: bytes
    version: int
    gaps: list[str]
    ends: list[str]


def expected(plan: Plan) -> Transcript:
    """Return what a reader of the whole stream must get."""
    sent = [write for due in script(plan) for write in due]
    by_mode: dict[str, list[Write]] = {"best_effort": [], "summary": [], "durable": []}
    for write in sent:
        by_mode[write.mode.wire].append(write)
    patches = [(_how(w.mode.patch_kind), w.payload) for w in by_mode["summary"]]
    answer = b"".join(tokens(plan.tokens)).decode()
    document = {"phase": "done", "tokens": plan.tokens, "answer": answer}
    return Transcript(
        tokens=[write.payload for write in by_mode["best_effort"]],
        patches=patches,
        events=[write.payload for write in by_mode["durable"]],
        sequences=list(range(1, len(sent) + 1)),
        document=orjson.dumps(document) if patches else b"",
        version=len(patches),
        gaps=[],
        ends=["attempt_success"],
    )


def _how(kind: PatchKind | None) -> str:
    return "" if kind is None else f"{kind.wire} {kind.pointer or ''}".strip()


# -- comparing -------------------------------------------------------------------------------------


class Check(NamedTuple):
    """One comparison: what was sent, what was got, and a sentence where they differ."""

    name: str
    sent: str
    got: str
    difference: str | None


def compare(want: Transcript, got: Transcript, stored: tuple[bytes, int]) -> list[Check]:
    """Compare byte for byte what a reader got, and the document of `read_summary`, with the plan.

    Args:
        want: What the plan says.
        got: What the reader got.
        stored: Document and version of `read_summary`; ``(b"", 0)`` where there is none.
    """
    order = None
    if got.sequences != want.sequences:
        at = _first_difference(want.sequences, got.sequences)
        order = (
            f"Sequences must be 1 to {len(want.sequences)}, each once and in order; "
            f"the reader's frame {at + 1} {_place(got.sequences, at, 'has sequence {}')}."
        )
    patches = _frames("summary patches", want.patches, got.patches)
    ends = None
    if got.ends != want.ends:
        ends = f"The stream must end once, with {want.ends[0]}; it ended {_times(got.ends)}."
    gaps = f"The reader got {len(got.gaps)} gap(s), first: {got.gaps[0]}." if got.gaps else None
    return [
        _frames("tokens", want.tokens, got.tokens),
        _frames("tool events", want.events, got.events),
        patches,
        _document("summary, folded", want, (got.document, got.version)),
        _document("summary, stored", want, stored),
        Check("order", _span(want.sequences), _span(got.sequences), order),
        Check("gaps", "0", str(len(got.gaps)), gaps),
        Check("ends", ", ".join(want.ends), ", ".join(got.ends) or "none", ends),
    ]


def _frames(name: str, want: list[Any], got: list[Any]) -> Check:
    difference = None
    if want != got:
        at = _first_difference(want, got)
        if len(want) != len(got):
            difference = f"{len(want)} {name} were sent and {len(got)} arrived"
        else:
            difference = f"The {name} that were sent and that arrived differ"
        difference += f"; the first difference is at number {at + 1}."
    return Check(name, _amount(want), _amount(got), difference)


def _document(name: str, want: Transcript, got: tuple[bytes, int]) -> Check:
    document, version = got
    difference = None
    if version != want.version:
        difference = f"The {name} must be at version {want.version} and is at {version}."
    elif document != want.document:
        at = _first_difference(want.document, document)
        difference = (
            f"The {name} must have {len(want.document)} bytes and has {len(document)};"
            f" the first difference is at byte {at + 1}."
        )
    return Check(name, _version(want.document, want.version), _version(*got), difference)


def _first_difference(want: Sequence[object], got: Sequence[object]) -> int:
    pairs = zip(want, got, strict=False)
    return next(
        (at for at, (one, other) in enumerate(pairs) if one != other), min(len(want), len(got))
    )


def _amount(frames: list[Any]) -> str:
    size = sum(len(frame if isinstance(frame, bytes) else frame[1]) for frame in frames)
    return f"{len(frames)} frames, {size} bytes"


def _version(document: bytes, version: int) -> str:
    return f"version {version}, {len(document)} bytes"


def _span(sequences: list[int]) -> str:
    return f"{sequences[0]} to {sequences[-1]}" if sequences else "none"


def _place(items: list[int], at: int, text: str) -> str:
    return text.format(items[at]) if at < len(items) else "is missing"


def _times(ends: list[str]) -> str:
    return f"{len(ends)} times ({', '.join(ends)})" if ends else "not at all"


# -- the worker's process --------------------------------------------------------------------------


class Sent(NamedTuple):
    """A worker's report: when it wrote the frames since the last one, in ns, and how it stands."""

    times: bytes
    window_frames: int
    rate_hz: float


async def _work(pipe: Connection[Any, Any], url: str, plan: Plan) -> None:
    loop = asyncio.get_running_loop()
    me = asyncio.current_task()
    go = asyncio.Event()

    def heard() -> None:
        try:
            if pipe.recv() == "go":
                go.set()
                return
        except EOFError:
            pass
        loop.remove_reader(pipe.fileno())
        if me is not None:
            me.cancel()

    loop.add_reader(pipe.fileno(), heard)
    async with aio.ValkeyBackend.connect(url) as backend:
        # A lane of its own: two demos on one server must not claim each other's work.
        lane = f"demo-{uuid.uuid4().hex}"
        eid = await backend.create_execution(lane=lane, retention_ms=_RETENTION_MS)
        handle = await backend.claim(
            lane=lane,
            worker_id="ff-fast-demo",
            worker_instance_id=f"ff-fast-demo-{os.getpid()}",
            lease_ttl_ms=_LEASE_MS,
        )
        if handle is None:
            raise ExecutionNotFound
        pipe.send(eid)

        async def keep_lease() -> None:
            while True:
                await asyncio.sleep(_LEASE_MS / 3000)
                await backend.renew(handle)

        renewal = asyncio.create_task(keep_lease())
        try:
            await go.wait()
            async with backend.open_writer(handle) as writer:
                await _stream(pipe, plan, writer)
            await backend.complete(handle)
        except asyncio.CancelledError:
            with contextlib.suppress(FFError, TimeoutError):
                async with asyncio.timeout(_GOODBYE_S / 2):
                    await backend.fail(handle, "The demo was interrupted.")
            raise
        finally:
            renewal.cancel()
    loop.remove_reader(pipe.fileno())


async def _stream(pipe: Connection[Any, Any], plan: Plan, writer: aio.Writer) -> None:
    """Write each frame when it is due, by one schedule from the start, so that no delay adds up."""
    clock, write = time.monotonic, writer.write
    times = array("q")

    def report() -> None:
        pipe.send(Sent(times.tobytes(), writer.window_frames, writer.rate_hz))
        del times[:]

    writes = list(script(plan))
    began = clock() + _HEAD_START_S
    report_at = began + _REPORT_S
    yielded_at = began
    for index, frames in enumerate(writes):
        due = began + index / plan.rate_hz
        while (now := clock()) < due:
            await asyncio.sleep(due - now)
            yielded_at = now
        if now - yielded_at > 0.001:
            # Behind the schedule: what is written still has to leave.
            await asyncio.sleep(0)
            yielded_at = now
        for payload, frame_type, mode in frames:
            times.append(time.monotonic_ns())
            write(payload, frame_type, mode=mode)
        if now >= report_at:
            report_at = now + _REPORT_S
            report()
            await writer.drain()
    await writer.flush()
    report()


# -- the reader's process --------------------------------------------------------------------------


class Read(NamedTuple):
    """A reader's report: sequences, times (ns) and text of the frames since the last one."""

    sequences: bytes
    times: bytes
    text: bytes
    events: int
    version: int


def _read(pipe: Connection[Any, Any], url: str, eid: str) -> None:
    got = Transcript([], [], [], [], b"", 0, [], [])
    view = SummaryView()
    sequences, times = array("q"), array("q")
    text: list[bytes] = []
    report_at = 0

    def report() -> None:
        pipe.send(
            Read(
                sequences.tobytes(), times.tobytes(), b"".join(text), len(got.events), view.version
            )
        )
        del sequences[:], times[:]
        text.clear()

    with ValkeyBackend.connect(url) as backend:
        pipe.send("ready")
        for item in backend.tail(eid):
            now = time.monotonic_ns()
            if isinstance(item, End):
                got.ends.append(item.reason)
                continue
            if isinstance(item, Gap):
                missing = item.next_sequence - item.first_missing
                got.gaps.append(f"{missing} frames from {item.first_missing}, {item.reason}")
                continue
            sequences.append(item.sequence)
            times.append(now)
            got.sequences.append(item.sequence)
            if item.mode == "best_effort":
                got.tokens.append(item.payload)
                text.append(item.payload)
            elif item.mode == "summary":
                view.apply(item)
                got.patches.append((_how(item.patch_kind), item.payload))
            else:
                got.events.append(item.payload)
            if now >= report_at:
                report_at = now + int(_REPORT_S * 1e9)
                report()
    report()
    document = view.document_json if got.patches else b""
    pipe.send(got._replace(document=document, version=view.version))


# -- children --------------------------------------------------------------------------------------


class Failed(NamedTuple):
    """A child's last words."""

    sentence: str


class DemoError(FFError):
    """A process of the demo stopped before its work was done."""

    code = "demo_failed"


def child(role: str, descriptor: str) -> None:
    """Be the worker or the reader: everything else comes through the pipe *descriptor*."""
    pipe: Connection[Any, Any] = Connection(int(descriptor))
    try:
        task = pipe.recv()
        if role == "worker":
            # select() waits to the microsecond, epoll to the millisecond.
            with asyncio.Runner(
                loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())
            ) as runner:
                runner.run(_work(pipe, *task))
        else:
            threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
            _read(pipe, *task)
        pipe.send(None)
    except FFError as error:
        with contextlib.suppress(OSError):
            pipe.send(Failed(str(error)))
    except (EOFError, OSError, asyncio.CancelledError):
        # The parent is gone, or has told this process to stop.
        os._exit(1)


def _end_with_parent(pipe: Connection[Any, Any]) -> None:
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os._exit(1)


class _Child:
    """A process of the demo and the pipe to it.

    It has a session of its own, so that a Ctrl-C reaches this process alone, which then ends it.
    The task goes through the pipe: a command line is public, and a URL may hold a password.
    """

    def __init__(self, role: str, *task: object) -> None:
        self.role = role
        self.pipe, theirs = Pipe()
        code = "import sys; from ff_fast._demo.run import child; child(*sys.argv[1:])"
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter and our own words
            [sys.executable, "-c", code, role, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        if task:
            self.tell(task)

    def tell(self, message: object) -> None:
        """Send a message; a process that is gone is noticed by the next :meth:`receive`."""
        with contextlib.suppress(OSError):
            self.pipe.send(message)

    def receive(self) -> object:
        """Return the next message.

        Raises:
            DemoError: The process said that it failed, or ended without a word.
        """
        try:
            message: object = self.pipe.recv()
        except (EOFError, OSError):
            raise DemoError(f"The {self.role} ended without a word.") from None
        if isinstance(message, Failed):
            raise DemoError(f"The {self.role} stopped: {message.sentence}")
        return message

    def stop(self, *, politely: bool = False) -> None:
        if politely:
            self.tell("stop")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GOODBYE_S)
        self.pipe.close()
        try:
            self._process.wait(_GOODBYE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        # An interrupted worker still hands its execution back.
        self.stop(politely=kind is not None and self.role == "worker")


# -- the caller's process: what is shown -----------------------------------------------------------


class Progress:
    """What both processes reported so far."""

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
        """Turn arrivals into latencies where the worker's report is there too."""
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
        """Frames a second that the reader got in the last second."""
        times = self.last_times
        span = times[-1] - times[0] if len(times) > 1 else 0
        return (len(times) - 1) * 1e9 / span if span else 0.0

    def sent_hz(self) -> float:
        """Tokens a second over the whole run, as they were written."""
        elapsed = self.elapsed_s
        return (self.plan.tokens - 1) / elapsed if elapsed else 0.0

    def latency_ms(self, *shares: float, last: int | None = None) -> list[float]:
        """Percentiles of all latencies, or of the *last* ones."""
        values = sorted(self.latencies if last is None else self.latencies[-last:])
        if not values:
            return [0.0] * len(shares)
        return [values[min(int(len(values) * share), len(values) - 1)] / 1e6 for share in shares]


class View(Protocol):
    """Shows a run while it goes on, and its outcome."""

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
        # Drawing shares the machine with what it shows.
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 1 / _FRAMES_PER_SECOND
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
    """Return the rich view where stdout is a terminal and rich is there, else the plain one."""
    if not plain and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        try:
            from rich.console import Console  # noqa: PLC0415 - optional
        except ImportError:
            sys.stderr.write("ff-fast: plain lines; for more, pip install 'ff_fast[cli]'\n")
        else:
            return RichView(Console())
    return PlainView(sys.stdout)


# -- the caller's process: the run -----------------------------------------------------------------


def run(url: str, plan: Plan, view: View) -> list[str]:
    """Run the demo on the server at *url* and return a sentence for each difference that was found.

    Raises:
        DemoError: The worker or the reader stopped early.
        FFError: The server refused, or cannot be reached.
    """
    progress = Progress(plan)
    with (
        ValkeyBackend.connect(url) as backend,
        # The reader loads while the worker makes what it will read.
        _Child("reader") as reader,
        _Child("worker", url, plan) as worker,
        view,
    ):
        progress.execution_id = str(worker.receive())
        reader.tell((url, progress.execution_id))
        reader.receive()
        view.show(progress)
        worker.tell("go")
        got = _follow(worker, reader, progress, view)
        summary = backend.read_summary(progress.execution_id)
        stored = (b"", 0) if summary is None else (summary.document_json, summary.version)
        checks = compare(expected(plan), got, stored)
        view.finish(progress, checks)
    return [check.difference for check in checks if check.difference]


def _follow(worker: _Child, reader: _Child, progress: Progress, view: View) -> Transcript:
    """Take reports until both have finished; return what the reader got."""
    children = {child.pipe: child for child in (worker, reader)}
    got: Transcript | None = None
    while children:
        for pipe in wait(list(children), timeout=1 / _FRAMES_PER_SECOND):
            assert isinstance(pipe, Connection)
            message = children[pipe].receive()
            if message is None:
                del children[pipe]
            elif isinstance(message, Sent):
                progress.take_sent(message)
            elif isinstance(message, Read):
                progress.take_read(message)
            elif isinstance(message, Transcript):
                got = message
        view.show(progress)
    if got is None:
        raise DemoError("The reader ended without its transcript.")
    return got

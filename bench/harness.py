"""The harness: a private server, a process for each contender, turns, and checks of the stored frames."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
import urllib.parse
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import hiredis

import ff_fast
from bench.figures import Figure
from ff_fast._core import ops
from ff_fast._hot.resp import pack_command
from ff_fast._hot.writer import Batch, Outbox, WriterCore
from ff_fast.embedded import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

T = TypeVar("T")

ROOT = Path(__file__).parent.parent

PAYLOAD_SIZE = 6
LEASE_MS = 600_000
DURABLE = ff_fast.StreamMode.durable()

Metrics = dict[str, float]


def payloads(count: int, size: int = PAYLOAD_SIZE) -> list[bytes]:
    """Return numbered payloads, which show lost and misplaced frames."""
    return [(b"%0*d" % (size, i))[-size:] for i in range(count)]


class WrongResultError(Exception):
    """A contender did not do its job; its figures are void."""


def check(holds: object, what: str) -> None:
    """Raise :class:`WrongResultError` unless *holds*."""
    if not holds:
        raise WrongResultError(what)


class Wire:
    """A blocking connection without a client library: requests are bytes, replies are parsed by hiredis."""

    def __init__(self, path: str = "", *, port: int = 0) -> None:
        """Connect to the Unix socket at *path*, or to *port* of the loopback interface."""
        self._socket = socket.socket(socket.AF_INET if port else socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(("127.0.0.1", port) if port else path)
        if port:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()

    def send(self, request: bytes) -> None:
        self._socket.sendall(request)

    def receive(self) -> object:
        """Return the next reply; an error reply is returned too."""
        while (reply := self._reader.gets()) is False:
            data = self._socket.recv(1 << 18)
            if not data:
                raise ConnectionError("the server closed the connection")
            self._reader.feed(data)
        return reply

    def ask(self, request: bytes) -> object:
        self.send(request)
        reply = self.receive()
        if isinstance(reply, Exception):
            raise reply
        return reply

    def command(self, *parts: bytes | str | int) -> object:
        """Send a command and return its reply; an error reply is raised."""
        encoded = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
        return self.ask(pack_command(*encoded))

    def count(self, *parts: bytes | str | int) -> int:
        """Send a command and return its reply, an integer; None counts as 0."""
        reply = self.command(*parts) or 0
        check(isinstance(reply, int), f"{parts[0]!r} did not answer a number")
        assert isinstance(reply, int)
        return reply

    def info(self, section: str) -> dict[str, str]:
        reply = self.command(b"INFO", section)
        assert isinstance(reply, bytes)
        lines = reply.decode().splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def calls(self, *commands: str) -> int:
        """Return how often clients have sent *commands*."""
        found = self.info("commandstats")
        texts = [found.get(f"cmdstat_{name}", "calls=0,") for name in commands]
        return sum(int(text.split(",")[0].removeprefix("calls=")) for text in texts)

    def connections(self) -> int:
        """Return how many clients are connected, this one not counted."""
        return int(self.info("clients")["connected_clients"]) - 1

    def server_cpu(self) -> float:
        """Return the CPU time of the server's main thread in seconds."""
        cpu = self.info("cpu")
        return float(cpu["used_cpu_user_main_thread"]) + float(cpu["used_cpu_sys_main_thread"])

    def drain_blast(self, requests: Sequence[bytes], lines_each: int, window: int = 4) -> None:
        """Send *requests* with at most *window* unanswered; count the lines of the replies, parse nothing.

        Each request is a pipeline whose replies have *lines_each* lines. The next one is sent before the replies to
        the last are read, so the server always has work.
        """
        seen = 0
        for sent, request in enumerate(requests, start=1):
            self._socket.sendall(request)
            while seen < (sent - window) * lines_each:
                seen += self._lines()
        while seen < len(requests) * lines_each:
            seen += self._lines()

    def _lines(self) -> int:
        data = self._socket.recv(1 << 18)
        if not data:
            raise ConnectionError("the server closed the connection")
        if data[:1] == b"-" or b"\n-" in data:
            raise WrongResultError(f"the server refused: {data[:200]!r}")
        return data.count(b"\n")

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()


class Worker:
    """A process that runs jobs of :mod:`bench.jobs` and :mod:`bench.rivals`, one after the other.

    A job is named ``module:function``; its arguments and its answer are JSON. Asynchronous jobs run on a loop of asyncio, or
    on one of *uvloop*.
    """

    def __init__(self, *, uvloop: bool = False) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.child", *(["uvloop"] if uvloop else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )

    def start(self, job: str, **args: object) -> None:
        assert self._process.stdin is not None
        request = json.dumps({"job": job, "args": args}).encode() + b"\n"
        self._process.stdin.write(request)
        self._process.stdin.flush()

    def result(self, timeout: float = 120.0) -> dict[str, float]:
        """Return the answer to the job that runs.

        Raises:
            WrongResultError: The job failed or took too long; the process has been ended.
        """
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            self.close()
            raise WrongResultError("a contender's process failed or took too long (see stderr)")
        answer: dict[str, float] = json.loads(line)
        return answer

    def run(self, job: str, timeout: float = 120.0, **args: object) -> dict[str, float]:
        self.start(job, **args)
        return self.result(timeout)

    def go_on(self) -> None:
        """Begin the next stage of the job that waits behind an answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def stage(self, timeout: float = 120.0) -> dict[str, object]:
        """Return the answer of the stage that runs."""
        return dict(self.result(timeout))

    def finish(self) -> None:
        """Let the job end behind its last answer."""
        self.go_on()
        check(self.result() is None, "the job has another stage")

    def close(self) -> None:
        """End the process and wait for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Stage:
    """The surroundings of every benchmark: a server, a connection to it, a backend, and worker processes."""

    def __init__(self, *, quick: bool, executable: str | None = None, tcp: bool = False) -> None:
        self.quick = quick
        self.executable = executable
        self.server = EmbeddedServer(executable=executable, tcp=tcp)
        self.url = self.server.url
        address = urllib.parse.urlsplit(self.url)
        self.path = urllib.parse.unquote(address.path)
        self.wire = Wire(self.path, port=address.port or 0)
        self.backend = ff_fast.ValkeyBackend.connect(self.url)
        self._workers: dict[str, Worker] = {}

    def pick(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    @property
    def rounds(self) -> int:
        return self.pick(5, 1)

    def worker(self, name: str) -> Worker:
        """Return the process of the contender *name*."""
        if name not in self._workers:
            self._workers[name] = Worker()
        return self._workers[name]

    def end_workers(self) -> None:
        while self._workers:
            self._workers.popitem()[1].close()

    def fresh(self) -> None:
        """Delete all data, so that contenders do not see each other's; functions stay loaded."""
        self.wire.command("FLUSHALL", "SYNC")

    def handle(self) -> ff_fast.Handle:
        """Create an execution in a lane of its own, claim it and return its handle."""
        lane = uuid.uuid4().hex
        self.backend.create_execution(lane=lane)
        handle = self.backend.claim(
            lane=lane, worker_id="bench", worker_instance_id="bench-1", lease_ttl_ms=LEASE_MS
        )
        assert handle is not None
        return handle

    def core(
        self,
        mode: ff_fast.StreamMode = DURABLE,
        *,
        retention_maxlen: int = 10_000,
        max_unacknowledged_bytes: int = 32 << 20,
    ) -> Core:
        """Return a writer core on a new attempt."""
        return Core(self.handle(), self.wire, mode, retention_maxlen, max_unacknowledged_bytes)

    def close(self) -> None:
        self.end_workers()
        self.backend.close()
        self.wire.close()
        self.server.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()


def position(ms: int, sequence: int) -> bytes:
    """Return the answer of `ff_append` to a part, after it stored the frame *sequence* at *ms*."""
    return b"%d-%d %d 0" % (ms, sequence, ms + LEASE_MS)


class Core(WriterCore):
    """A writer core whose batches have exactly the size that a benchmark chooses."""

    def __init__(
        self,
        handle: ff_fast.Handle,
        wire: Wire,
        mode: ff_fast.StreamMode,
        retention_maxlen: int = 10_000,
        max_unacknowledged_bytes: int = 32 << 20,
        outbox: Outbox | None = None,
    ) -> None:
        attempt = ops.Attempt.of(handle)
        writer_id = ops.writer_id(attempt)
        op = ops.open_writer(attempt, writer_id)
        wire.send(op.command().request)
        opened = op.answer(wire.receive())
        super().__init__(
            keys=attempt.stream_keys,
            writer=writer_id,
            mode=mode,
            opened=tuple(opened),
            retention_maxlen=retention_maxlen,
            max_unacknowledged_bytes=max_unacknowledged_bytes,
            outbox=outbox,
        )
        self.handle = handle
        self.execution_id = attempt.execution_id
        self.head, self.log, self.live, self.summary = attempt.stream_keys
        self._wire = wire
        self.sent_bytes = 0

    def batch(self, frames: Sequence[bytes]) -> Batch:
        """Write *frames* and return them as one batch."""
        write = self.write
        for frame in frames:
            write(frame)
        batch = self._next_batch()
        assert batch is not None
        check(batch.frame_count == len(frames), "the batch is not the one that was written")
        self.sent_bytes += len(batch.message)
        return batch

    def settle(self, batch: Batch, reply: object) -> None:
        """Take the reply to a call of one part: the server's time, and the answer behind it."""
        now_ms, _, answer = (
            reply.partition(b" ") if isinstance(reply, bytes) else (b"0", b"", reply)
        )
        error = self._acknowledge(batch, answer, int(now_ms))
        if error is not None or self.error is not None:
            raise error or self.error or AssertionError

    def send(self, frames: Sequence[bytes]) -> int:
        """Send *frames* as one batch, take the acknowledgement and return the size of the request."""
        batch = self.batch(frames)
        self._wire.send(batch.message)
        self.settle(batch, self._wire.receive())
        return len(batch.message)

    def encode(self, frame: bytes, ms: int) -> bytes:
        """Return the request of a batch of one. It is not sent; its acknowledgement is made up."""
        sequence = self.write(frame)
        batch = self._next_batch()
        assert batch is not None
        error = self._acknowledge(batch, position(ms, sequence), ms)
        check(error is None and self.error is None, "the made-up reply was refused")
        return batch.message


def batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def per_frame_cpu(wire: Wire, count: int, work: Callable[[], object]) -> float:
    """Run *work* and return the microseconds of server CPU for each of its *count* frames."""
    before = wire.server_cpu()
    work()
    return (wire.server_cpu() - before) / count * 1e6


def take_turns(
    contenders: Mapping[str, Callable[[], Metrics]], rounds: int, *, warm: bool = True
) -> dict[str, dict[str, Figure]]:
    """Run every contender once a round, in alternating order; return the figures of each.

    The first of several rounds is discarded: it includes imports, page faults and cold caches. A single round is a
    test that the benchmark runs, and is not preceded by a discarded one.
    """
    values: dict[str, list[Metrics]] = {name: [] for name in contenders}
    for turn in range(-1 if warm and rounds > 1 else 0, rounds):
        names = list(contenders) if turn % 2 == 0 else list(contenders)[::-1]
        for name in names:
            metrics = contenders[name]()
            if turn >= 0:
                values[name].append(metrics)
    return {
        name: {
            quantity: Figure.of([metrics[quantity] for metrics in measured])
            for quantity in measured[0]
        }
        for name, measured in values.items()
    }


def entry_payloads(wire: Wire, key: bytes, count: int) -> list[bytes]:
    """Return the payloads of the newest *count* entries of a stream, oldest first."""
    found: list[bytes] = []
    to: bytes = b"+"
    while len(found) < count:
        page = wire.command("XREVRANGE", key, to, "-", "COUNT", min(count - len(found), 1000))
        assert isinstance(page, list)
        if not page:
            break
        for _, fields in page:
            found.append(fields[fields.index(b"payload") + 1])
        to = b"(" + page[-1][0]
    found.reverse()
    return found


def check_entries(
    wire: Wire, key: bytes, frames: Sequence[bytes], *, trimmed: bool = False
) -> None:
    """Check that a stream holds exactly *frames* or, with *trimmed*, at least the newest 10,000."""
    length = wire.count("XLEN", key)
    if trimmed and len(frames) > 10_000:
        check(10_000 <= length < len(frames), f"{length} of {len(frames)} entries are kept")
    else:
        check(length == len(frames), f"{length} entries, not {len(frames)}")
    newest = min(length, 2_000)
    check(
        entry_payloads(wire, key, newest) == list(frames[len(frames) - newest :]),
        "the entries are not the frames that were sent",
    )


def check_core(stage: Stage, core: Core, frames: Sequence[bytes], kept: int) -> None:
    """Check that the attempt counts every frame and still has its newest *kept*, in order."""
    last = stage.wire.command("GET", core.head)
    check(
        isinstance(last, bytes) and last.endswith(b"-%d" % len(frames)),
        f"the last of {len(frames)} frames is {last!r}",
    )
    after = None if kept >= len(frames) else f"0-{len(frames) - kept}"
    found: list[bytes] = []
    while True:
        page = stage.backend.read_stream(core.execution_id, 0, after=after, count=10_000)
        found += [frame.payload for frame in page]
        if not page:
            break
        after = page.cursor
    check(found[-kept:] == list(frames[-kept:]), "the frames kept are not those that were sent")


@contextlib.contextmanager
def until(seconds: float) -> Iterator[Callable[[], bool]]:
    """Give a function that returns True until *seconds* have passed."""
    end = time.monotonic() + seconds
    yield lambda: time.monotonic() < end


def clean_environment() -> dict[str, str]:
    """Return an environment that lets an interpreter cache its bytecode."""
    return {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

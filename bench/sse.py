"""The jobs of P25 to P27: a worker that writes tokens on schedule, a web server, and its clients.

Each runs in a process of its own and has stages (see :mod:`bench.child`). A payload is the time of its write; the first and
the last frame of a stream are marks, as in :mod:`bench.paced`.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import gc
import os
import re
import select
import socket
import time
import urllib.parse
import uuid
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import uvicorn

from bench import sse_apps
from bench.figures import percentile
from bench.harness import Wire, check
from bench.jobs import claim_many, mode_of, resident_bytes
from bench.paced import FIRST, LAST, flush
from bench.rivals import encoded_xadd
from ff_fast import aio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

# The frames of many streams fall due so often in the period of one stream, at even distances.
SLOTS = 32
# Events that a client has not got by then are lost, in seconds.
PATIENCE_S = 90.0
PAYLOAD = re.compile(rb"data: (-?\d+)\r?\n")
# The id of an event that has a payload; in some libraries it comes first, in others last.
PLACE = re.compile(rb"(?:id: (?=[^\r\n]+\r?\ndata: -?\d)|(?<=\n)data: -?\d+\r?\nid: )([^\r\n]+)")


# -- the worker ---------------------------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """The frames of a worker, whose streams are spread evenly over a period.

    Attributes:
        streams: Number of streams.
        rate: Frames a second of each.
        seconds: How long they are written.
    """

    streams: int
    rate: int
    seconds: float

    async def keep(self, put: Callable[[range, bytes], None]) -> dict[str, object]:
        """Call *put* with the streams whose frame is due and a payload; return how many frames each has got."""
        slots = min(self.streams, SLOTS)
        periods = int(self.seconds * self.rate)
        start, late = time.monotonic(), 0.0
        for i in range(periods * slots):
            due = start + i / slots / self.rate
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            now_ns = time.monotonic_ns()
            late = max(late, now_ns * 1e-9 - due)
            put(range(i % slots, self.streams, slots), b"%d" % now_ns)
        return {"frames": periods, "behind_ms": late * 1e3}


async def write(
    url: str, streams: int, rate: int, seconds: float, mode: str
) -> AsyncIterator[dict[str, object]]:
    """ff_fast: `Writer.write` on schedule."""
    async with aio.ValkeyBackend.connect(url) as backend:
        handles = await claim_many(backend, streams)
        writers = [await backend.open_writer(handle, mode=mode_of(mode)) for handle in handles]

        def put(due: range, payload: bytes) -> None:
            for i in due:
                writers[i].write(payload)

        put(range(streams), FIRST)
        await flush(writers)
        yield {"streams": [handle.fields().execution_id for handle in handles]}
        written = await Schedule(streams, rate, seconds).keep(put)
        put(range(streams), LAST)
        await flush(writers)
        yield written
        for writer in writers:
            await writer.close()


async def xadd(
    url: str, streams: int, rate: int, seconds: float
) -> AsyncIterator[dict[str, object]]:
    """XADD on schedule, those that are due in one pipeline, from a raw socket: no client of a rival takes part."""
    keys = [uuid.uuid4().hex for _ in range(streams)]
    with Wire(port=urllib.parse.urlsplit(url).port or 0) as wire:

        def put(due: range, payload: bytes) -> None:
            wire.send(b"".join(encoded_xadd(keys[i], payload) for i in due))
            for _ in due:
                reply = wire.receive()
                check(isinstance(reply, bytes), f"XADD was answered by {reply!r}")

        put(range(streams), FIRST)
        yield {"streams": keys}
        written = await Schedule(streams, rate, seconds).keep(put)
        put(range(streams), LAST)
        yield written


# -- the web server -----------------------------------------------------------------------------------------------


async def serve(url: str, app: str, http: str, looks: int) -> AsyncIterator[dict[str, object]]:
    """Serve an application of :mod:`bench.sse_apps` by uvicorn; answer its port, and then *looks* times how it is."""
    config = uvicorn.Config(
        getattr(sse_apps, app)(url), port=0, http=http, log_level="error", access_log=False, backlog=4096
    )  # fmt: skip
    server = uvicorn.Server(config)
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        check(not serving.done(), "uvicorn has not started")
        await asyncio.sleep(0.01)
    valkey = urllib.parse.urlsplit(url).port
    yield {"port": server.servers[0].sockets[0].getsockname()[1]}
    for _ in range(looks):
        # What a look costs is neither before nor behind it.
        until = time.process_time()
        gc.collect()
        seen = {"resident": resident_bytes(), "to_valkey": local_addresses(valkey)}
        yield {**seen, "cpu_until": until, "cpu_since": time.process_time()}
    server.should_exit = True
    await serving


def local_addresses(port: int | None) -> list[str]:
    """Return this process's ends of its connections to a *port* of this machine, as CLIENT LIST shows them."""
    found = []
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(each.name))) as one:
            if one.family == socket.AF_INET and one.getpeername()[1] == port:
                host, own = one.getsockname()
                found.append(f"{host}:{own}")
    return found


# -- the clients --------------------------------------------------------------------------------------------------


class Client:
    """A client that keeps what it gets, with the time of each receipt; it is read when the clock has stopped."""

    def __init__(self, port: int, name: str, after: str = "") -> None:
        """Ask for a stream, from behind the event *after*."""
        place = f"Last-Event-ID: {after}\r\n" if after else ""
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self.socket.sendall(f"GET /streams/{name} HTTP/1.1\r\nHost: bench\r\n{place}\r\n".encode())
        self.parts: list[bytes] = []
        self.times_ns: list[int] = []

    def receive(self) -> None:
        data = self.socket.recv(1 << 18)
        check(data, "the server has closed a connection")
        self.parts.append(data)
        self.times_ns.append(time.monotonic_ns())

    def has_event(self, mark: bytes) -> bool:
        """Whether an event with the payload *mark*, which no other payload begins with, came with the last two parts."""
        last = b"".join(self.parts[-2:])
        return b"data: " + mark in last and last.endswith(b"\n")

    def events(self) -> list[tuple[int, int]]:
        """Return each payload with the time at which it was there."""
        ends = list(accumulate(len(part) for part in self.parts))
        return [
            (int(found[1]), self.times_ns[bisect.bisect_left(ends, found.end())])
            for found in PAYLOAD.finditer(b"".join(self.parts))
        ]


def receive(clients: Sequence[Client], mark: bytes) -> None:
    """Receive until each of *clients* has the event with the payload *mark*."""
    end = time.monotonic() + PATIENCE_S
    left = {client.socket.fileno(): client for client in clients}
    with select.epoll() as poll:
        for number in left:
            poll.register(number, select.EPOLLIN)
        while left:
            check(time.monotonic() < end, f"{len(left)} clients wait for an event")
            for number, _ in poll.poll(1.0):
                client = left[number]
                client.receive()
                if client.has_event(mark):
                    poll.unregister(number)
                    del left[number]


async def read(
    port: int, streams: list[str], warm: int, frames: int
) -> AsyncIterator[dict[str, object]]:
    """Open a client for each of *streams*, the first *warm* of them in a stage of their own; then read all to the end.

    Each must get every one of its stream's *frames*, once and in order.
    """
    clients = [Client(port, name) for name in streams[:warm]]
    receive(clients, FIRST)
    yield {}
    more = [Client(port, name) for name in streams[warm:]]
    receive(more, FIRST)
    yield {}
    clients += more
    start = time.perf_counter()
    receive(clients, LAST)
    wall = time.perf_counter() - start
    for client in clients:
        client.socket.close()
    ms: list[float] = []
    for client in clients:
        (first, _), *events, (last, _) = client.events()
        check((b"%d" % first, b"%d" % last) == (FIRST, LAST), "a client has missed a mark")
        check(len(events) == frames, f"a client has got {len(events)} of {frames} frames")
        check(all(a < b for (a, _), (b, _) in pairwise(events)), "frames are not in order")
        ms += [(at - written) / 1e6 for written, at in events]
    yield {
        "events": len(clients) * (frames + 1),
        "metrics": {
            "delivered_per_second": len(ms) / wall,
            "p50_ms": percentile(ms, 0.50),
            "p99_ms": percentile(ms, 0.99),
            "max_ms": max(ms),
            "receipts_per_event": sum(len(client.parts) for client in clients) / len(ms),
        },
    }


# -- an answer that is asked for again ----------------------------------------------------------------------------


async def answer(url: str, tokens: int) -> dict[str, object]:
    """ff_fast: store an answer of *tokens* that is not over."""
    async with aio.ValkeyBackend.connect(url) as backend:
        (handle,) = await claim_many(backend, 1)
        async with await backend.open_writer(handle) as writer:
            for payload in numbered(tokens):
                writer.write(payload)
        return {"stream": handle.fields().execution_id}


def xadd_answer(url: str, tokens: int) -> dict[str, object]:
    """XADD: the same."""
    key = uuid.uuid4().hex
    with Wire(port=urllib.parse.urlsplit(url).port or 0) as wire:
        wire.drain_blast([encoded_xadd(key, payload) for payload in numbered(tokens)], 2)
    return {"stream": key}


def numbered(tokens: int) -> list[bytes]:
    """Return the payloads of an answer; the last is the mark."""
    return [*(b"%d" % i for i in range(1, tokens)), LAST]


def resume(port: int, stream: str, tokens: int, count: int, pause: float) -> dict[str, object]:
    """Ask *count* times for an answer, as a page does that is loaded again, and for its second half, as one that was cut off.

    The first byte is that of the first event; the time includes to connect.
    """
    client = Client(port, stream)
    while not client.has_event(LAST):
        client.receive()
    client.socket.close()
    ids = PLACE.findall(b"".join(client.parts))
    check(len(ids) >= tokens - 1, f"{len(ids)} of {tokens} tokens have an id")
    metrics: dict[str, float] = {}
    for name, after in (("loaded", 0), ("resumed", tokens // 2)):
        first: list[float] = []
        whole: list[float] = []
        for _ in range(count):
            time.sleep(pause)
            start = time.monotonic_ns()
            client = Client(port, stream, ids[after - 1].decode() if after else "")
            while b"data: " not in b"".join(client.parts):
                client.receive()
            first.append((time.monotonic_ns() - start) / 1e6)
            while not client.has_event(LAST):
                client.receive()
            whole.append((time.monotonic_ns() - start) / 1e6)
            client.socket.close()
            got = [payload for payload, _ in client.events()]
            check(
                got == [*range(after + 1, tokens), int(LAST)], "the answer is not what was stored"
            )
        for quantity, ms in (("first", first), ("whole", whole)):
            for share in (0.50, 0.99):
                metrics[f"{name}_{quantity}_p{share * 100:.0f}_ms"] = percentile(ms, share)
    return {"metrics": metrics}

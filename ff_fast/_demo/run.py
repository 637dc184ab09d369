"""The three processes of the demo.

The worker writes each frame when it is due, the reader tails through a connection of its own, and the caller
shows progress and compares. They are separate so that none of them slows down what another one measures.
All times are of ``CLOCK_MONOTONIC``, which the processes of a machine share. The latency of a frame runs
from just before ``write`` until the tail yields it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import threading
import time
import uuid
from array import array
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from ff_fast import End, ExecutionNotFound, FFError, Gap, SummaryView, ValkeyBackend, aio
from ff_fast._demo.check import Transcript, compare, expected, patch_name
from ff_fast._demo.plan import Plan, script
from ff_fast._demo.processes import GOODBYE_S, Child, DemoError
from ff_fast._demo.view import REDRAWS_PER_SECOND, Progress, Read, Sent, View

if TYPE_CHECKING:
    from typing import Any

_LEASE_MS = 30_000
# Long enough to look at the execution with the other commands.
_RETENTION_S = 600.0
_REPORT_S = 0.1
# Longer than the reader needs to start its tail.
_HEAD_START_S = 0.2


# -- the caller ------------------------------------------------------------------------------------


def run(url: str, plan: Plan, view: View) -> list[str]:
    """Run the demo on the server at *url* and return a sentence for each difference.

    Raises:
        DemoError: The worker or the reader stopped early.
        FFError: The server refused, or cannot be reached.
    """
    progress = Progress(plan)
    with (
        ValkeyBackend.connect(url) as backend,
        # Both processes load at the same time.
        Child("reader") as reader,
        Child("worker", url, plan) as worker,
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


def _follow(worker: Child, reader: Child, progress: Progress, view: View) -> Transcript:
    """Take reports until both processes have finished; return the reader's transcript."""
    children = {child.pipe: child for child in (worker, reader)}
    got: Transcript | None = None
    while children:
        for pipe in wait(list(children), timeout=1 / REDRAWS_PER_SECOND):
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


# -- the worker ------------------------------------------------------------------------------------


async def _work(pipe: Connection[Any, Any], url: str, plan: Plan) -> None:
    loop = asyncio.get_running_loop()
    me = asyncio.current_task()
    go = asyncio.Event()

    def on_message() -> None:
        try:
            if pipe.recv() == "go":
                go.set()
                return
        except EOFError:
            pass
        loop.remove_reader(pipe.fileno())
        if me is not None:
            me.cancel()

    loop.add_reader(pipe.fileno(), on_message)
    async with aio.ValkeyBackend.connect(url) as backend:
        # The lane is unique, so that two demos on one server do not claim each other's executions.
        lane = f"demo-{uuid.uuid4().hex}"
        eid = await backend.create_execution(lane=lane, retention=_RETENTION_S)
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
                async with asyncio.timeout(GOODBYE_S / 2):
                    await backend.fail(handle, "The demo was interrupted.")
            raise
        finally:
            renewal.cancel()
    loop.remove_reader(pipe.fileno())


async def _stream(pipe: Connection[Any, Any], plan: Plan, writer: aio.Writer) -> None:
    """Write each frame when it is due. Due times count from the start, so that delays do not add up."""
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
            # Behind schedule this loop never sleeps, so the sender gets its turn here.
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


# -- the reader ------------------------------------------------------------------------------------


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
                got.patches.append((patch_name(item.patch_kind), item.payload))
            else:
                got.events.append(item.payload)
            if now >= report_at:
                report_at = now + int(_REPORT_S * 1e9)
                report()
    report()
    document = view.document_json if got.patches else b""
    pipe.send(got._replace(document=document, version=view.version))


def work(pipe: Connection[Any, Any], url: str, plan: Plan) -> None:
    """Be the worker."""
    # select() has a resolution of a microsecond, epoll() of a millisecond.
    with asyncio.Runner(
        loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())
    ) as runner:
        runner.run(_work(pipe, url, plan))


def read(pipe: Connection[Any, Any], url: str, execution_id: str) -> None:
    """Be the reader."""
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    _read(pipe, url, execution_id)


def _end_with_parent(pipe: Connection[Any, Any]) -> None:
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os._exit(1)

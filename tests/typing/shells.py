"""What type checkers reveal of both shells' methods; read by test_typing.py and never run."""

from datetime import timedelta
from typing import reveal_type

import ff_fast
from ff_fast import (
    CompletionPayload,
    Frame,
    FrameKind,
    Handle,
    OnCancel,
    ResumeCondition,
    WaitpointKind,
    WaitpointSpec,
    aio,
)


def blocking(backend: ff_fast.ValkeyBackend, handle: Handle, spec: WaitpointSpec) -> None:
    reveal_type(backend.create_execution(lane="lane", payload=b"prompt", retention=60))  # -> str
    reveal_type(backend.claim())  # -> Handle | None
    reveal_type(backend.claim(lease_ttl_ms=timedelta(seconds=30)))  # -> Handle | None
    reveal_type(backend.complete(handle, "answer"))  # -> None
    reveal_type(backend.fail(handle, "reason"))  # -> FailOutcome
    reveal_type(backend.renew(handle))  # -> LeaseRenewal
    reveal_type(backend.delay(handle, timedelta(minutes=1)))  # -> int
    reveal_type(backend.suspend(handle, [spec, spec], timeout=5))  # -> SuspendOutcome
    reveal_type(backend.observe_signals(handle))  # -> tuple[ResumeSignal, ...]
    reveal_type(backend.get_tags("id"))  # -> dict[str, str]
    reveal_type(backend.read_stream("id", 0, count=5))  # -> StreamPage
    reveal_type(backend.read_summary("id"))  # -> SummaryDocument | None
    reveal_type(backend.append_frame(handle, Frame(b"x", FrameKind.EVENT)))  # -> AppendFrameOutcome
    with backend.open_writer(handle, linger=0.01) as writer:
        reveal_type(writer)  # -> Writer
        reveal_type(writer.write(b"x", "token"))  # -> int
        reveal_type(writer.flush(timeout=1))  # -> AppendFrameOutcome
        reveal_type(writer.drain())  # -> None
        reveal_type(writer.close())  # -> None
    reveal_type(backend.execution_id_for("chat"))  # -> str
    with backend.open_stream("chat", ttl=timedelta(days=1)) as stream:
        reveal_type(stream.role)  # -> Literal['producer', 'consumer']
        reveal_type(stream.writer)  # -> Writer | None
        reveal_type(stream.handle)  # -> Handle | None
        reveal_type(stream.write(b"x"))  # -> int
        reveal_type(stream.flush())  # -> AppendFrameOutcome
        reveal_type(stream.follow(snapshot=True))  # -> Follow
        reveal_type(stream.wait(1))  # -> bytes
        reveal_type(stream.wait_cancelled(1))  # -> bool
        reveal_type(stream.complete("answer"))  # -> None
        reveal_type(stream.fail("no"))  # -> FailOutcome
    reveal_type(backend.delete_execution("id"))  # -> None
    with backend.tail("id", after=None) as tail:
        reveal_type(tail)  # -> Tail
        reveal_type(next(tail))  # -> StreamFrame | Gap | End
        reveal_type(tail.next_batch(0.5))  # -> list[StreamFrame | Gap | End]
        reveal_type(tail.cursor)  # -> str | None
        reveal_type(tail.last)  # -> StreamFrame | Gap | End | None
    with backend.follow("id", "0.0-0", snapshot=True) as following:
        reveal_type(following)  # -> Follow
        reveal_type(next(following))  # -> StreamFrame | Gap | End | Snapshot | AttemptStarted
        batch = following.next_batch(0.5)
        reveal_type(batch)  # -> list[StreamFrame | Gap | End | Snapshot | AttemptStarted]
        reveal_type(following.cursor)  # -> str | None
    reveal_type(backend.wait("id", timedelta(minutes=1)))  # -> bytes
    for completion in backend.subscribe_completions():
        reveal_type(completion)  # -> CompletionPayload
    with backend.keep_lease(handle) as keeper:
        reveal_type(keeper.held)  # -> bool
        reveal_type(keeper.wait_cancelled(timedelta(seconds=1)))  # -> bool
    reveal_type(backend.supervise(interval=timedelta(seconds=1)))  # -> None
    reveal_type(backend.run_worker(handled, lane="lane", concurrency=4))  # -> None
    reveal_type(backend.run_worker(handled, on_cancel=OnCancel.TELL, cancel_grace=5))  # -> None


def handled(task: ff_fast.Task) -> bytes:
    reveal_type(task.write("x", "token"))  # -> int
    reveal_type(task.drain())  # -> None
    reveal_type(task.flush())  # -> AppendFrameOutcome
    reveal_type(task.writer)  # -> Writer
    reveal_type(task.progress(50))  # -> None
    point = task.create_waitpoint(expires=60)
    reveal_type(point)  # -> PendingWaitpoint
    condition = ResumeCondition.any(
        WaitpointSpec(WaitpointKind.SIGNAL_NAME, b"go", point.hmac_token)
    )
    reveal_type(task.suspend(condition))  # -> tuple[ResumeSignal, ...]
    reveal_type(task.wait_cancelled(0.5))  # -> bool
    reveal_type((task.cancelled, task.lost))  # -> tuple[bool, bool]
    reveal_type(task.payload)  # -> bytes
    return task.payload


async def asynchronous(backend: aio.ValkeyBackend, handle: Handle, spec: WaitpointSpec) -> None:
    reveal_type(await backend.create_execution(lane="lane", payload=b"prompt"))  # -> str
    reveal_type(await backend.claim(lane="lane"))  # -> Handle | None
    reveal_type(await backend.complete(handle))  # -> None
    reveal_type(await backend.suspend(handle, spec))  # -> SuspendOutcome
    reveal_type(await backend.read_stream("id"))  # -> StreamPage
    frame = Frame(b"x", FrameKind.EVENT)
    reveal_type(await backend.append_frame(handle, frame))  # -> AppendFrameOutcome
    async with backend.open_writer(handle) as writer:
        reveal_type(writer)  # -> Writer
        reveal_type(writer.write(b"x"))  # -> int
        reveal_type(await writer.flush())  # -> AppendFrameOutcome
    opened = await backend.open_writer(handle)
    reveal_type(opened)  # -> Writer
    reveal_type(backend.execution_id_for("chat"))  # -> str
    async with backend.open_stream("chat") as stream:
        reveal_type(stream)  # -> OpenedStream
        reveal_type(stream.write(b"x"))  # -> int
        reveal_type(await stream.flush())  # -> AppendFrameOutcome
        reveal_type(stream.follow())  # -> Follow
        reveal_type(await stream.wait(1))  # -> bytes
        reveal_type(await stream.complete())  # -> None
        reveal_type(await stream.fail("no"))  # -> FailOutcome
    reveal_type(await backend.delete_execution("id"))  # -> None
    async with backend.tail("id") as tail:
        reveal_type(await anext(tail))  # -> StreamFrame | Gap | End
        reveal_type(await tail.next_batch())  # -> list[StreamFrame | Gap | End]
        async for item in tail:
            reveal_type(item.cursor)  # -> str
    async with backend.follow("id") as following:
        async for each_item in following:
            reveal_type(each_item)  # -> StreamFrame | Gap | End | Snapshot | AttemptStarted
            reveal_type(each_item.cursor)  # -> str
    reveal_type(await backend.wait("id", 5))  # -> bytes
    found: list[CompletionPayload] = [each async for each in backend.subscribe_completions()]
    reveal_type(found[0].cursor)  # -> str | None
    async with backend.keep_lease(handle) as keeper:
        reveal_type(await keeper.wait_lost(1))  # -> bool
    reveal_type(await backend.run_worker(handled_later))  # -> None
    async with aio.ValkeyBackend.connect("valkey://host") as connected:
        reveal_type(connected)  # -> ValkeyBackend


async def handled_later(task: aio.Task) -> str | None:
    reveal_type(task.write("x"))  # -> int
    reveal_type(await task.drain())  # -> None
    reveal_type(await task.flush())  # -> AppendFrameOutcome
    reveal_type(await task.progress(message="half"))  # -> None
    reveal_type(await task.wait_cancelled())  # -> bool
    await task.delay(5)

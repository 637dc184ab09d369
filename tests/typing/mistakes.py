"""Mistakes that type checkers must find; read by test_typing.py and never run."""

# pyright: reportUnnecessaryComparison=true

import ff_fast
from ff_fast import (
    End,
    ExecutionDescription,
    Frame,
    FrameKind,
    Gap,
    Handle,
    RetryPolicy,
    StreamMode,
    SummaryDocument,
    aio,
)
from ff_fast.errors import NoSuchError  # mistake: attr-defined
from ff_fast.types import NoSuchName  # mistake: attr-defined


def names() -> None:
    ff_fast.ValkeyBackendd  # mistake: attr-defined
    ff_fast.ExecutionNotFonud  # mistake: attr-defined
    ff_fast.aio.ValkeyBackendd  # mistake: attr-defined


def arguments() -> None:
    Frame(b"x", FrameKind.EVENT, frame_typ="token")  # mistake: call-arg
    Frame(b"x", "event")  # mistake: arg-type
    Frame(b"x", FrameKind.EVENT, 5)  # mistake: call-arg
    RetryPolicy(delay_ms=1_000)  # mistake: call-arg
    RetryPolicy(delay="1 s")  # mistake: arg-type
    StreamMode.best_effort_live(1.5)  # mistake: arg-type
    StreamMode("livee")  # mistake: arg-type
    Gap(1, 2, "trimed")  # mistake: arg-type


def fields(execution: ExecutionDescription, document: SummaryDocument) -> None:
    execution.fields  # mistake: attr-defined
    document.version = 2  # mistake: misc


def words(item: Gap | End, execution: ExecutionDescription) -> bool:
    if isinstance(item, End) and item.reason == "success":  # mistake: comparison-overlap
        return True
    return execution.state == "running"  # mistake: comparison-overlap


NoSuchName
NoSuchError


def methods(backend: ff_fast.ValkeyBackend, handle: Handle) -> None:
    backend.create_execution(lan="lane")  # mistake: call-arg
    backend.create_execution(retention="a day")  # mistake: arg-type
    backend.complete()  # mistake: call-arg
    backend.complete(handle, 5)  # mistake: arg-type
    backend.claim("lane")  # mistake: call-arg
    backend.run_worker(5)  # mistake: arg-type
    backend.open_writer(handle, linger_ms=5)  # mistake: call-arg
    backend.tail("id").cursr  # mistake: attr-defined


async def forgotten(backend: aio.ValkeyBackend, task: aio.Task, handle: Handle) -> None:
    backend.complete(handle)  # mistake: unused-coroutine
    task.progress(5)  # mistake: unused-coroutine
    backend.create_execution(lane="lane")  # mistake: unused-coroutine

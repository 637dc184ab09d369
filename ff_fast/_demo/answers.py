"""The worker of the chat. One that is killed leaves what it has written in the summary of its attempt, and its successor goes on there."""

from __future__ import annotations

import asyncio
import os
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

import orjson

from ff_fast import PatchKind, StreamMode, aio
from ff_fast._demo.plan import tokens

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from typing import Any

LANE = "chat"
_LEASE_MS = 2_000
_ANSWER = StreamMode.durable_summary(PatchKind.STRING_APPEND("/text"))
_QUESTION = StreamMode.durable_summary()


class Answering(NamedTuple):
    """How the worker answers: its rate, and the number of tokens."""

    rate_hz: float
    tokens: int


def work(pipe: Connection[Any, Any], url: str, answering: Answering) -> None:
    """Be the worker: answer questions until the other end of the pipe is closed."""
    asyncio.run(_work(pipe, url, answering))


async def _work(pipe: Connection[Any, Any], url: str, answering: Answering) -> None:
    stop = asyncio.Event()

    def on_message() -> None:
        asyncio.get_running_loop().remove_reader(pipe.fileno())
        stop.set()

    asyncio.get_running_loop().add_reader(pipe.fileno(), on_message)
    async with aio.ValkeyBackend.connect(url) as backend:

        async def answer(task: aio.Task) -> bytes:
            text = await _written_before(backend, task)
            task.write(task.payload, "question", mode=_QUESTION)
            if text:
                task.write(text)
            sent = 0
            due = monotonic()
            for token in tokens(answering.tokens):
                sent += len(token)
                if sent <= len(text):
                    continue
                due += 1 / answering.rate_hz
                await asyncio.sleep(due - monotonic())
                task.write(token)
                text += token
            return text

        await backend.run_worker(
            answer,
            lane=LANE,
            worker_id="ff-fast-chat",
            worker_instance_id=f"ff-fast-chat-{os.getpid()}",
            lease_ttl_ms=_LEASE_MS,
            mode=_ANSWER,
            concurrency=100,
            cancel_grace=0.0,
            stop=stop,
        )


async def _written_before(backend: aio.ValkeyBackend, task: aio.Task) -> bytes:
    """Return what workers that were lost have written of the answer."""
    for attempt in range(task.attempt_index - 1, -1, -1):
        summary = await backend.read_summary(task.execution_id, attempt)
        if summary is not None:
            text: str = orjson.loads(summary.document_json).get("text", "")
            return text.encode()
    return b""

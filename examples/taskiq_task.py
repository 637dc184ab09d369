"""A taskiq task that streams: the broker brings the work, ff_fast the tokens.

Run it:   pip install 'ff_fast[embedded]' taskiq
          python taskiq_task.py
"""

import asyncio
import os
from collections.abc import AsyncIterator

from taskiq import Context, InMemoryBroker, TaskiqDepends, TaskiqEvents, TaskiqState

from ff_fast import StreamFrame, aio

# Its worker is this process. In production take one that other processes reach.
broker = InMemoryBroker()


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def connect(state: TaskiqState) -> None:
    url = os.environ.get("FF_FAST_URL")
    opening = aio.ValkeyBackend.connect(url) if url else aio.ValkeyBackend.embedded()
    state.backend = await opening


@broker.on_event(TaskiqEvents.WORKER_SHUTDOWN)
async def disconnect(state: TaskiqState) -> None:
    await state.backend.close()


async def llm(prompt: str) -> AsyncIterator[str]:
    for token in ("It", " is", " forty-two."):
        yield token


@broker.task
async def answer(chat: str, prompt: str, context: Context = TaskiqDepends()) -> None:
    async with context.state.backend.open_stream(chat) as stream:
        if stream.role == "producer":
            async for token in llm(prompt):
                stream.write(token)


async def main(chat: str = "chat 1") -> None:
    await broker.startup()
    await answer.kiq(chat, "6 x 7?")
    backend: aio.ValkeyBackend = broker.state.backend
    async for item in backend.follow(backend.execution_id_for(chat)):
        if isinstance(item, StreamFrame):
            print(item.payload.decode(), end="", flush=True)
    print()
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(main())

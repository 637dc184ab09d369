"""The API that `useChat({ resume: true })` of the AI SDK talks to, with an agent of pydantic-ai.

Run it:   pip install 'ff_fast[embedded,web]' fastapi uvicorn pydantic-ai-slim
          uvicorn pydantic_ai_chat:app
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel
from pydantic_ai.ui.vercel_ai import VercelAIAdapter

from ff_fast import aio
from ff_fast.web import ChunkWriter, StreamResponse, ai_sdk

agent = Agent(TestModel(custom_output_text="What a model would say."))  # Agent("openai:...")
newest: dict[str, str] = {}  # the newest answer of each chat: a table of your database
tasks: set[asyncio.Task[None]] = set()


async def produce(stream: aio.OpenedStream, body: bytes) -> None:
    async with stream:
        run_input = VercelAIAdapter.build_run_input(body)
        adapter = VercelAIAdapter(agent=agent, run_input=run_input, sdk_version=7)
        chunks = ChunkWriter(stream)
        async for text in adapter.encode_stream(adapter.run_stream()):
            chunks.write(text)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    url = os.environ.get("FF_FAST_URL")
    opening = aio.ValkeyBackend.connect(url) if url else aio.ValkeyBackend.embedded()
    async with opening as app.state.backend:
        find = lambda request, chat: newest.get(chat)  # noqa: E731
        app.router.routes.extend(ai_sdk.routes(app.state.backend, find))
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/api/chat")
async def send(request: Request) -> StreamResponse:
    body = await request.body()
    chat = json.loads(body)
    # A message that is sent twice, as by a client that lost the answer, is answered once.
    stream = await app.state.backend.open_stream(f"{chat['id']}/{chat['messages'][-1]['id']}")
    newest[chat["id"]] = stream.execution_id
    if stream.role == "producer":
        task = asyncio.create_task(produce(stream, body))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    return ai_sdk.message_response(app.state.backend, stream.execution_id, request)

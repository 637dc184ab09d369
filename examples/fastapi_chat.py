"""A chat: answers stream into the page, survive a reload, and stop at a button.

Run it:   pip install 'ff_fast[embedded,web]' fastapi uvicorn
          uvicorn fastapi_chat:app          (FF_FAST_URL=valkey://host:6379 takes a server of your own)
"""

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse

from ff_fast import PatchKind, StreamMode, aio, keys
from ff_fast.web import EventFraming, StreamResponse, client_script, stop_response

Framing = partial(EventFraming, snapshot=True, types=True)
TEXT = StreamMode.durable_summary(PatchKind.STRING_APPEND("/text"))  # who joins late gets it whole
tasks: set[asyncio.Task[None]] = set()


async def llm(prompt: str) -> AsyncIterator[str]:
    for word in f"You asked: {prompt} -- here is what a model would say.".split(" "):
        await asyncio.sleep(0.05)
        yield word + " "


async def produce(stream: aio.OpenedStream, prompt: str) -> None:
    async with stream:
        async for token in llm(prompt):
            stream.write(token)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    url = os.environ.get("FF_FAST_URL")
    opening = aio.ValkeyBackend.connect(url) if url else aio.ValkeyBackend.embedded()
    async with opening as app.state.backend:
        yield


app = FastAPI(lifespan=lifespan)
app.add_route("/ff_fast.js", client_script)


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("fastapi_chat.html"))


@app.post("/chats")
async def ask(request: Request) -> dict[str, str]:
    prompt = (await request.body()).decode()
    stream = await app.state.backend.open_stream(str(uuid.uuid4()), mode=TEXT)
    task = asyncio.create_task(produce(stream, prompt))
    tasks.add(task)  # the loop itself keeps no reference
    task.add_done_callback(tasks.discard)
    return {"id": keys.url_id(stream.execution_id)}


@app.get("/chats/{chat}")
async def read(chat: str, request: Request) -> StreamResponse:
    return StreamResponse(app.state.backend, chat, request, framing=Framing)


@app.post("/chats/{chat}/stop")
async def stop(chat: str, request: Request) -> Response:
    return await stop_response(app.state.backend, chat, request)

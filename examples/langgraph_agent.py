"""Runs of a LangGraph graph by workers; LangGraph's own SDK joins them, from any place, through a web application.

Run it:   pip install 'ff_fast[embedded,web]' fastapi uvicorn langgraph
          uvicorn langgraph_agent:app
Read it:  client.runs.join_stream(thread_id, run_id) of langgraph_sdk, with the id that POST /runs has answered
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypedDict

import orjson
from fastapi import FastAPI, Request
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph

from ff_fast import aio, keys
from ff_fast.web import langgraph


class State(TypedDict):
    question: str
    answer: str


async def answer(state: State) -> dict[str, str]:
    write = get_stream_writer()
    for token in ("It", " is", " forty-two."):  # your model
        write({"token": token})
    return {"answer": "It is forty-two."}


builder = StateGraph(State)
builder.add_node("answer", answer)
builder.add_edge(START, "answer")
builder.add_edge("answer", END)
graph = builder.compile()


async def run(task: aio.Task) -> bytes:
    """The handler: each chunk is a frame, and its mode the type. It runs in the web process here, or in any other."""
    state: dict[str, str] = json.loads(task.payload)
    async for mode, chunk in graph.astream(state, stream_mode=["custom", "updates"]):
        task.write(orjson.dumps(chunk), frame_type=mode)
    return orjson.dumps(chunk)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    url = os.environ.get("FF_FAST_URL")
    opening = aio.ValkeyBackend.connect(url) if url else aio.ValkeyBackend.embedded()
    async with opening as app.state.backend:
        app.router.routes.extend(langgraph.routes(app.state.backend))
        stop = asyncio.Event()
        worker = asyncio.create_task(app.state.backend.run_worker(run, lane="agents", stop=stop))
        yield
        stop.set()
        await worker


app = FastAPI(lifespan=lifespan)


@app.post("/runs")
async def start(request: Request) -> str:
    backend, payload = app.state.backend, await request.body()
    return keys.url_id(await backend.create_execution(lane="agents", payload=payload))

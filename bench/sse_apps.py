"""The web applications of P25 to P27: one job in three ways, each as its users write it.

``GET /streams/{name}`` streams an execution, or a stream of XADD, as server-sent events: one event a frame, with its place
as ``id:``, and from the place behind the one that the client names by ``Last-Event-ID``.
"""

# No `from __future__ import annotations`: FastAPI reads those of a nested function.
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Annotated, cast

import redis.asyncio
from fastapi import FastAPI, Header
from fastapi.sse import EventSourceResponse as FastAPIResponse
from fastapi.sse import ServerSentEvent
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from bench.paced import LAST, XREAD_COUNT, XREAD_MS, connected
from bench.rivals import entries_of
from ff_fast import aio
from ff_fast.web import StreamResponse

PATH = "/streams/{name}"
# More than a row has readers, each of which holds a connection.
CONNECTIONS = 1_500

Lifespan = Callable[[ASGIApp], contextlib.AbstractAsyncContextManager[None]]


def ff_fast(url: str) -> ASGIApp:
    """ff_fast: a `StreamResponse`."""
    backends: list[aio.ValkeyBackend] = []

    @contextlib.asynccontextmanager
    async def lifespan(_: ASGIApp) -> AsyncIterator[None]:
        async with aio.ValkeyBackend.connect(url) as backend:
            backends.append(backend)
            yield

    async def stream(request: Request) -> Response:
        return StreamResponse(backends[0], request.path_params["name"], request)

    return Starlette(lifespan=lifespan, routes=[Route(PATH, stream)])


def sse_starlette(url: str) -> ASGIApp:
    """redis-py and sse-starlette: a blocking XREAD for each reader."""
    client = connected(url, CONNECTIONS)

    async def stream(request: Request) -> Response:
        async def events() -> AsyncIterator[dict[str, str]]:
            async for place, payload in entries(
                client, request.path_params["name"], request.headers.get("last-event-id")
            ):
                yield {"id": place, "data": payload}

        response: Response = EventSourceResponse(events())
        return response

    return Starlette(lifespan=closing(client), routes=[Route(PATH, stream)])


def fastapi_sse(url: str) -> ASGIApp:
    """redis-py and the server-sent events of FastAPI: the same XREAD."""
    client = connected(url, CONNECTIONS)

    async def stream(
        name: str, last_event_id: Annotated[str | None, Header()] = None
    ) -> AsyncIterator[ServerSentEvent]:
        async for place, payload in entries(client, name, last_event_id):
            yield ServerSentEvent(raw_data=payload, id=place)

    app: ASGIApp = FastAPI(lifespan=closing(client))
    app.add_api_route(PATH, stream, response_class=FastAPIResponse)  # type: ignore[attr-defined]
    return app


def closing(client: redis.asyncio.Redis) -> Lifespan:
    @contextlib.asynccontextmanager
    async def lifespan(_: ASGIApp) -> AsyncIterator[None]:
        async with client:
            yield

    return lifespan


async def entries(
    client: redis.asyncio.Redis, key: str, after: str | None
) -> AsyncIterator[tuple[str, str]]:
    """Yield place and payload of each entry behind *after* as they come, up to the mark of the end."""
    last: bytes | str = after or "0-0"
    while True:
        answer = cast(
            "dict[bytes, object] | list[object]",
            await client.xread({key: last}, count=XREAD_COUNT, block=XREAD_MS),
        )
        if not answer:
            continue
        found = entries_of(answer)
        last = found[-1][0]
        for place, entry in found:
            yield place.decode(), entry[b"payload"].decode()
        if found[-1][1][b"payload"] == LAST:
            return

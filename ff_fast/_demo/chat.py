"""``ff-fast demo --web``: a chat in a browser. One process serves pages and streams, another one writes the answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from ff_fast import FFError, aio, keys
from ff_fast._demo.answers import LANE, Answering
from ff_fast._demo.processes import Child, DemoError
from ff_fast.errors import MissingDependency

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    from ff_fast.web import (
        EventFraming,
        StreamResponse,
        client_script,
        error_response,
        stop_response,
    )
except ImportError as error:
    raise MissingDependency(
        "The chat needs Starlette and uvicorn; run: pip install 'ff_fast[web]' uvicorn"
    ) from error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

_RETENTION_S = 3_600.0
_MAX_QUESTION = 2_000
_PAGE = Path(__file__).with_name("chat.html")


class Chat:
    """The application, and the worker's process."""

    def __init__(self, url: str, answering: Answering) -> None:
        self._url = url
        self._answering = answering
        self._backend: aio.ValkeyBackend
        self._worker: Child
        # Held while a worker takes the place of another one.
        self._replacing = asyncio.Lock()
        self.app = Starlette(
            lifespan=self._lifespan,
            routes=[
                Route("/", self._page),
                Route("/ff_fast.js", client_script),
                Route("/chats", self._ask, methods=["POST"]),
                Route("/chats/{id}", self._follow),
                Route("/chats/{id}/result", self._result),
                Route("/chats/{id}/stop", self._stop, methods=["POST"]),
                Route("/worker/kill", self._kill, methods=["POST"]),
            ],
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with aio.ValkeyBackend.connect(self._url) as self._backend:
            # It hands the work of a worker that was killed to the next one.
            supervision = asyncio.create_task(self._backend.supervise())
            self._worker = self._start()
            try:
                yield
            finally:
                supervision.cancel()
                async with self._replacing:
                    await asyncio.to_thread(self._worker.stop)

    def _start(self) -> Child:
        return Child("chat", self._url, self._answering)

    async def _page(self, _: Request) -> Response:
        return HTMLResponse(_PAGE.read_bytes())

    async def _ask(self, request: Request) -> Response:
        question = (await request.body()).decode("utf-8", "replace")[:_MAX_QUESTION]
        eid = await self._backend.create_execution(
            lane=LANE, payload=orjson.dumps({"question": question}), retention=_RETENTION_S
        )
        return JSONResponse({"id": keys.url_id(eid)})

    async def _follow(self, request: Request) -> Response:
        return StreamResponse(
            self._backend,
            request.path_params["id"],
            request,
            framing=lambda: EventFraming(snapshot=True, types=True, data="text"),
        )

    async def _result(self, request: Request) -> Response:
        try:
            result = await self._backend.read_result(request.path_params["id"])
        except FFError as error:
            return error_response(error)
        return PlainTextResponse(result)

    async def _stop(self, request: Request) -> Response:
        return await stop_response(self._backend, request.path_params["id"], request)

    async def _kill(self, _: Request) -> Response:
        async with self._replacing:
            await asyncio.to_thread(self._worker.kill)
            self._worker = self._start()
        return JSONResponse({"success": True})


def serve(url: str, port: int, answering: Answering) -> None:
    """Serve the chat on the loopback interface until Ctrl-C.

    Raises:
        DemoError: The port cannot be used.
    """
    try:
        listening = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise DemoError(f"Port {port} cannot be used: {reason}. Try --port 0.") from error
    with listening:
        # uvicorn says so only in its log.
        print(f"Open http://127.0.0.1:{listening.getsockname()[1]}/ (Ctrl-C ends it)", flush=True)  # noqa: T201
        config = uvicorn.Config(Chat(url, answering).app, log_level="warning")
        asyncio.run(uvicorn.Server(config).serve(sockets=[listening]))

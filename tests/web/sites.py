"""A web server under test, on a thread of its own; and a client that reads server-sent events as browsers do."""

import asyncio
import contextlib
import json
import socket
import threading
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette

from ff_fast import aio, web
from tests.waiting import wait_until

WORKER = {"worker_id": "w", "worker_instance_id": "w-1"}


class Site:
    """uvicorn on a thread: `url`, `backend` (of its loop), and `call` for what must run there."""

    def __init__(self, valkey_url, routes, *, middleware=(), **options):
        self.valkey_url = valkey_url
        self._routes = routes
        self._middleware = middleware
        self._options = options
        self.backend = None
        self.loop = None
        self._ready = threading.Event()

    def __enter__(self):
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

        @contextlib.asynccontextmanager
        async def lifespan(app):
            self.loop = asyncio.get_running_loop()
            async with aio.ValkeyBackend.connect(self.valkey_url) as backend:
                self.backend = backend
                app.router.routes.extend(self._routes(backend))
                self._ready.set()
                yield

        app = Starlette(lifespan=lifespan, middleware=list(self._middleware))
        config = uvicorn.Config(app, log_level="error", ws="none", **self._options)
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self.server.serve(sockets=[listening])), daemon=True
        )
        self._thread.start()
        assert self._ready.wait(10)
        wait_until(lambda: self.server.started)
        return self

    def call(self, awaitable):
        return asyncio.run_coroutine_threadsafe(awaitable, self.loop).result(10)

    def __exit__(self, *_):
        # On a thread uvicorn has no handler of signals, by which responses learn that it ends.
        self.loop.call_soon_threadsafe(web.end_responses)
        self.server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


@dataclass
class Event:
    data: str
    event: str = "message"
    id: str = ""

    @property
    def json(self):
        return json.loads(self.data)


@dataclass
class EventSource:
    """Parses server-sent events as the HTML standard says; what no empty line ends is dropped."""

    last_id: str = ""
    retry: int | None = None
    comments: list[str] = field(default_factory=list)

    def parse(self, raw: bytes) -> list[Event]:
        text = raw.decode("utf-8", "replace").removeprefix("\ufeff")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        complete, _, _ = text.rpartition("\n")
        events = []
        data, kind, last_id = [], "", self.last_id
        for line in complete.split("\n") + ([""] if text.endswith("\n\n") else []):
            if not line:
                self.last_id = last_id
                if data:
                    events.append(Event("\n".join(data), kind or "message", last_id))
                data, kind = [], ""
                continue
            if line.startswith(":"):
                self.comments.append(line[1:].strip())
                continue
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                data.append(value)
            elif name == "event":
                kind = value
            elif name == "id" and "\0" not in value:
                last_id = value
            elif name == "retry" and value.isdigit():
                self.retry = int(value)
        return events


def text_of(events):
    return "".join(each.data for each in events if each.event == "message")


async def stream_of(backend, lane, frames=(), *, end=True, **options):
    """An execution whose worker has written *frames*; it ends unless told otherwise. Returns id and handle."""
    eid = await backend.create_execution(lane=lane, payload=b"p")
    handle = await backend.claim(lane=lane, **WORKER, lease_ttl_ms=60_000)
    async with backend.open_writer(handle, **options) as writer:
        for frame in frames:
            payload, kind = frame if isinstance(frame, tuple) else (frame, "token")
            writer.write(payload, frame_type=kind)
        await writer.flush()
    if end:
        await backend.complete(handle)
    return eid, handle

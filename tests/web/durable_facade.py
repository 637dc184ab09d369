"""A write side of the Durable Streams protocol, as far as its conformance suite needs it to have something to read.

Each stream is a named stream of ff_fast that this process produces; what the protocol knows of it besides is kept here.
Out of scope: forks, subscriptions, and producers that number their requests.
"""

import asyncio
import json
import re
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime

from starlette.responses import Response
from starlette.routing import Route

from ff_fast.web import durable_streams

LONG_POLL_S = 1.0
_FRAME_BYTES = 60_000


@dataclass
class Stream:
    produced: object
    content_type: str
    ttl: str | None
    expires_at: str | None
    closed: bool = False
    seq: str | None = None
    deadline: float = float("inf")
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def config(self):
        return media_type(self.content_type), self.ttl, self.expires_at

    @property
    def headers(self):
        found = {"stream-ttl": self.ttl, "stream-expires-at": self.expires_at}
        return {name: value for name, value in found.items() if value is not None}

    def touch(self):
        if self.ttl is not None:
            self.deadline = time.time() + int(self.ttl)


class RefusedError(Exception):
    def __init__(self, status, **headers):
        self.status = status
        self.headers = headers


def media_type(content_type):
    return content_type.partition(";")[0].strip().lower()


def messages_of(content_type, body, *, empty):
    """The frames of a body; an array of JSON is one message for each of its items."""
    if media_type(content_type) == "application/json":
        if not body and empty:
            return []
        try:
            value = json.loads(body)
        except ValueError:
            raise RefusedError(400) from None
        values = value if isinstance(value, list) else [value]
        if not values and not empty:
            raise RefusedError(400)
        return [json.dumps(each, ensure_ascii=False).encode() for each in values]
    if not body and not empty:
        raise RefusedError(400)
    return [body[at : at + _FRAME_BYTES] for at in range(0, len(body), _FRAME_BYTES)]


def lifetime(headers):
    """What a request says of the time that its stream is kept: `Stream-TTL`, `Stream-Expires-At`, and a deadline."""
    ttl, expires_at = headers.get("stream-ttl"), headers.get("stream-expires-at")
    if ttl is not None and (expires_at is not None or not re.fullmatch("0|[1-9][0-9]{0,8}", ttl)):
        raise RefusedError(400)
    if expires_at is None:
        return ttl, expires_at, float("inf") if ttl is None else time.time() + int(ttl)
    try:
        return ttl, expires_at, datetime.fromisoformat(expires_at).timestamp()
    except ValueError:
        raise RefusedError(400) from None


class Facade:
    """Routes over *backend*; streams are known by their path."""

    def __init__(self, backend):
        self._backend = backend
        self._streams = {}
        self._creating = asyncio.Lock()

    def routes(self):
        methods = ["GET", "HEAD", "OPTIONS", "PUT", "POST", "DELETE"]
        return [Route("/v1/stream/{path:path}", self._serve, methods=methods)]

    async def close(self):
        for each in self._streams.values():
            if not each.closed:
                await each.produced.complete()

    async def _serve(self, request):
        path = request.url.path
        try:
            stream = self._streams.get(path)
            if stream is not None and stream.deadline <= time.time():
                await self._delete(path)
                stream = None
            if request.method == "PUT":
                status, headers = await self._create(path, request)
            elif request.method == "OPTIONS":
                return await self._read(uuid.UUID(int=0), request, None)
            elif stream is None:
                raise RefusedError(404)
            elif request.method in ("GET", "HEAD"):
                if request.method == "GET":
                    stream.touch()
                return await self._read(stream.produced.execution_id, request, stream)
            elif request.method == "POST":
                status, headers = await self._append(stream, request)
            else:
                await self._delete(path)
                status, headers = 204, {}
        except RefusedError as refused:
            status = refused.status
            headers = {name.replace("_", "-"): value for name, value in refused.headers.items()}
        headers |= {
            "x-content-type-options": "nosniff",
            "cross-origin-resource-policy": "cross-origin",
            "access-control-allow-origin": "*",
            "access-control-expose-headers": "stream-next-offset, stream-closed, location",
        }
        return Response(status_code=status, headers=headers)

    async def _read(self, execution_id, request, stream):
        return await durable_streams.read_response(
            self._backend,
            str(execution_id),
            request,
            content_type=stream.content_type if stream else "text/plain",
            allow_origin="*",
            long_poll=LONG_POLL_S,
            headers=stream.headers if stream else None,
        )

    async def _delete(self, path):
        stream = self._streams.pop(path)
        async with stream.lock:
            if not stream.closed:
                stream.closed = True
                await stream.produced.complete()
            await self._backend.delete_execution(stream.produced.execution_id)

    async def _position(self, stream):
        eid = stream.produced.execution_id
        found = await self._backend.describe_stream(eid, 0)
        headers = {"stream-next-offset": durable_streams.offset_of(f"0.{found.last_id}")}
        if stream.closed:
            headers["stream-closed"] = "true"
        return headers

    async def _write(self, stream, messages, *, closes):
        for each in messages:
            await stream.produced.drain()
            stream.produced.write(each)
        await stream.produced.flush()
        if closes:
            stream.closed = True
            await stream.produced.complete()

    async def _create(self, path, request):
        content_type = request.headers.get("content-type", "application/octet-stream")
        ttl, expires_at, deadline = lifetime(request.headers)
        closes = request.headers.get("stream-closed", "").lower() == "true"
        messages = messages_of(content_type, await request.body(), empty=True)
        async with self._creating:
            stream = self._streams.get(path)
            if stream is not None:
                same = (media_type(content_type), ttl, expires_at) == stream.config
                if not same or closes != stream.closed:
                    raise RefusedError(409)
                status = 200
            else:
                produced = await self._backend.open_stream(uuid.uuid4().hex)
                stream = Stream(produced, content_type, ttl, expires_at, deadline=deadline)
                self._streams[path] = stream
                await self._write(stream, messages, closes=closes)
                status = 201
        position = await self._position(stream)
        return status, {
            "content-type": stream.content_type,
            "location": str(request.url),
            **position,
        }

    async def _append(self, stream, request):
        body = await request.body()
        closes = request.headers.get("stream-closed", "").lower() == "true"
        async with stream.lock:
            if not (closes and not body):
                content_type = request.headers.get("content-type")
                if not content_type:
                    raise RefusedError(400)
                if stream.closed:
                    raise RefusedError(409, **await self._position(stream))
                if media_type(content_type) != media_type(stream.content_type):
                    raise RefusedError(409)
                seq = request.headers.get("stream-seq")
                if seq is not None and stream.seq is not None and seq <= stream.seq:
                    raise RefusedError(409)
                messages = messages_of(content_type, body, empty=False)
                stream.seq = seq if seq is not None else stream.seq
                await self._write(stream, messages, closes=closes)
            elif not stream.closed:
                await self._write(stream, [], closes=True)
            stream.touch()
            return 204, await self._position(stream)

"""Both shells behind one awaited face: a call of the blocking shell runs on a thread of its own meanwhile."""

import asyncio
import inspect

import ff_fast
from ff_fast import aio
from ff_fast.types import BackendConfig, BackendRetry, BackendTimeouts

PLAIN = {"write", "write_frame", "wrapped"}


class _Wrapped:
    def __init__(self, wrapped):
        self.wrapped = wrapped

    def __getattr__(self, name):
        value = getattr(self.wrapped, name)
        if not callable(value) or name in PLAIN or isinstance(value, Exception):
            return value

        async def call(*args, **options):
            if isinstance(self.wrapped, aio.ValkeyBackend | aio.Writer):
                result = value(*args, **options)
                result = await result if inspect.isawaitable(result) else result
            else:
                result = await asyncio.to_thread(value, *args, **options)
            return _Wrapped(result) if isinstance(result, aio.Writer | ff_fast.Writer) else result

        return call

    async def items(self, *args, **options):
        """Everything that a tail yields."""
        if isinstance(self.wrapped, aio.ValkeyBackend):
            return [item async for item in self.wrapped.tail(*args, **options)]
        return await asyncio.to_thread(lambda: list(self.wrapped.tail(*args, **options)))

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.close()


def config(url, *, timeout=None, retries=None, factor=None, base=None):
    """The configuration of *url* with other limits."""
    given = BackendConfig.from_url(url)
    return BackendConfig(
        given.connection,
        timeouts=BackendTimeouts(request=timeout),
        retry=BackendRetry(number_of_retries=retries, factor=factor, exponent_base=base),
    )


class Shell:
    """One of the two: ``sync`` or ``aio``."""

    def __init__(self, kind):
        self.kind = kind

    async def connect(self, target, **limits):
        if limits:
            target = config(target, **limits)
        if self.kind == "aio":
            return _Wrapped(await aio.ValkeyBackend.connect(target))
        return _Wrapped(await asyncio.to_thread(ff_fast.ValkeyBackend.connect, target))


async def claimed(backend, lane, lease_ttl_ms=600_000):
    """A new execution of *lane*, claimed: its id and the handle."""
    eid = await backend.create_execution(lane=lane)
    handle = await backend.claim(
        lane=lane, worker_id="w", worker_instance_id="w-1", lease_ttl_ms=lease_ttl_ms
    )
    assert handle is not None
    return eid, handle


def frames(url, eid):
    """Every frame that the server holds of an attempt, past any proxy; no gap may be among them."""
    with ff_fast.ValkeyBackend.connect(url) as backend:
        found, after = [], None
        while page := backend.read_stream(eid, 0, after=after, count=10_000):
            assert not page.gaps
            found += page
            after = page.cursor
        return found


def stored_once(url, eid, payloads):
    """Assert that exactly *payloads* are stored, in order, from sequence 1."""
    found = frames(url, eid)
    assert [frame.sequence for frame in found] == list(range(1, len(payloads) + 1))
    assert [frame.payload for frame in found] == payloads

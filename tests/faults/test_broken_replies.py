"""Servers that send what is no answer: typed, bounded, and nothing of the connection is used again."""

import asyncio
import contextlib
import tracemalloc

import pytest

from ff_fast import StreamFrame, keys
from ff_fast.errors import FFError, Outcome, ProtocolError

from ..conftest import connect_raw
from .stored import claimed, stored_once

REPLIES = {
    "a flipped type": lambda reply: bytes([reply[0] ^ 0x40]) + reply[1:],
    "a flipped length": lambda reply: reply[:1] + bytes([reply[1] ^ 0x40]) + reply[2:],
    "a huge list": lambda reply: b"*2147483647\r\n" + reply,
    "a huge list in a list": lambda reply: b"*2\r\n:1\r\n*2147483647\r\n" + reply,
    "a huge map": lambda reply: b"%2147483647\r\n" + reply,
    "a huge set": lambda reply: b"~2147483647\r\n" + reply,
    "a huge push": lambda reply: b">2147483647\r\n" + reply,
    "a huge string": lambda reply: b"$9223372036854775807\r\n" + reply,
    "an endless line": lambda reply: b"+" + b"x" * 70_000,
    "an attribute": lambda reply: b"|1\r\n+a\r\n+b\r\n" + reply,
}
PUSH = b">2\r\n$4\r\nnews\r\n*1\r\n:1\r\n"


@pytest.mark.parametrize("name", REPLIES)
async def test_a_broken_reply_ends_its_connection(shell, name, proxy, lane):
    async with await shell.connect(proxy.url, timeout=2) as backend:
        eid, handle = await claimed(backend, lane)
        connections = proxy.accepted
        tracemalloc.start()
        proxy.rewrite = REPLIES[name]
        with pytest.raises(ProtocolError) as caught:
            await backend.progress(handle, 50)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 16 << 20
        assert caught.value.outcome is Outcome.UNKNOWN
        description = await backend.describe(eid)
        assert (description.execution_id, description.progress_percent) == (eid, 50)
        assert proxy.accepted == connections + 1


@pytest.mark.parametrize(
    "reply", [b"*2147483647\r\n", b"$9223372036854775807\r\n", b"+" + b"x" * 70_000]
)
async def test_a_handshake_with_a_broken_reply_ends_in_time(shell, reply, proxy):
    """redis-py reads the answers to AUTH and SELECT, before the library's own guard is there."""
    url = proxy.url.replace("valkey://", "valkey://somebody:secret@")
    tracemalloc.start()
    proxy.rewrite = lambda _: reply
    with pytest.raises(FFError) as caught:
        await shell.connect(url, timeout=0.2, retries=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20
    assert caught.value.outcome is Outcome.NOT_APPLIED


async def test_calls_behind_a_broken_reply_are_sent_again(proxy, lane):
    from ff_fast import aio

    async with aio.ValkeyBackend.connect(proxy.url) as backend:
        eids = [await backend.create_execution(lane=lane) for _ in range(20)]
        proxy.rewrite = REPLIES["a huge list"]
        first, *others = await asyncio.gather(
            *(backend.describe(eid) for eid in eids), return_exceptions=True
        )
        assert isinstance(first, ProtocolError)
        assert [each.execution_id for each in others] == eids[1:]


async def test_frames_behind_a_broken_reply_are_stored_once(shell, proxy, server, lane):
    async with await shell.connect(proxy.url) as backend:
        eid, handle = await claimed(backend, lane)
        async with await backend.open_writer(handle) as writer:
            writer.write(b"1")
            await writer.flush(5)
            proxy.rewrite = REPLIES["a flipped type"]
            writer.write(b"2")
            await writer.flush(5)
            writer.write(b"3")
    stored_once(server.url, eid, [b"1", b"2", b"3"])


async def test_a_tail_goes_on_behind_a_broken_reply(shell, proxy, server, lane):
    async with (
        await shell.connect(server.url) as beside,
        await shell.connect(proxy.url) as backend,
    ):
        eid, handle = await claimed(beside, lane)
        writer = await beside.open_writer(handle)
        writer.write(b"1")
        await writer.flush(5)
        tail = backend.wrapped.tail(eid)
        items = await _read(tail)
        proxy.rewrite = REPLIES["a huge list in a list"]
        writer.write(b"2")
        # A push is broken, and is read instead; or the reply to a read.
        with contextlib.suppress(ProtocolError):
            items += await _read(tail)
        await writer.close()
        await beside.complete(handle)
        while not tail.ended:
            items += await _read(tail)
        assert [each.payload for each in items if isinstance(each, StreamFrame)] == [b"1", b"2"]


async def _read(tail):
    found = tail.next_batch(5)
    return await found if asyncio.iscoroutine(found) else found


async def test_pushes_between_replies_are_skipped(shell, proxy, server, lane):
    async with await shell.connect(proxy.url) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        writer.write(b"0")
        await writer.flush(5)
        connections = proxy.accepted
        for i in range(1, 11):
            proxy.rewrite = lambda reply: PUSH + reply
            other = keys.new_execution_id()
            assert await backend.create_execution(lane=lane, execution_id=other) == other
            proxy.rewrite = lambda reply: PUSH + PUSH + reply
            assert (await backend.describe(other)).execution_id == other
            proxy.rewrite = lambda reply: PUSH + reply
            writer.write(b"%d" % i)
            await writer.flush(5)
        assert proxy.accepted == connections
        # One that comes with a reply, but after it: the blocking shell takes a new connection.
        proxy.rewrite = lambda reply: reply + PUSH
        assert (await backend.describe(eid)).execution_id == eid
        assert (await backend.describe(other)).execution_id == other
        await writer.close()
    stored_once(server.url, eid, [b"%d" % i for i in range(11)])
    with connect_raw(server.url) as raw:
        assert raw.zcard(keys.eligible(keys.slot_tag_of(other), lane)) >= 1

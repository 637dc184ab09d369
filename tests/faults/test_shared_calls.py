"""Many writers on one connection that breaks: each frame is stored once, under the id that readers were told."""

import asyncio
import contextlib
import dataclasses
import random

import pytest

from ff_fast import BackendConfig, FailureClass, StreamMode, keys
from ff_fast._core import ops
from ff_fast.errors import FFError, PermissionDenied, StreamClosed

from ..conftest import connect_raw
from ..reference_writer import parse_push, split_push
from .stored import claimed, frames, stored_once

LIVE = StreamMode.best_effort_live(60_000)
DURABLE = StreamMode.durable()


class Ears:
    """A connection that subscribes to the channels of attempts, and what was published of each frame."""

    def __init__(self, url, handles):
        self.raw = connect_raw(url)
        self.pubsub = self.raw.pubsub()
        self.channels = {}
        for eid, handle in handles.items():
            channel = keys.attempt_channel(eid, ops.Attempt.of(handle).attempt_index)
            self.channels[channel] = eid
            self.pubsub.ssubscribe(channel)
        # Id and payload by execution and sequence, as often as they were published, and the kinds of messages.
        self.told = {}
        self.kinds = set()

    def listen(self):
        """Take what has come."""
        while (message := self.pubsub.get_message(timeout=0.001)) is not None:
            if message["type"] != "smessage" or message["data"][:1] not in (b"F", b"f"):
                continue
            channel = message["channel"]
            eid = self.channels.get(channel) or self.channels[channel.decode()]
            kind, (ms, last), body = split_push(message["data"])
            self.kinds.add(kind)
            payloads = [payload for block in parse_push(body) for payload in block.payloads]
            for sequence, payload in enumerate(payloads, last - len(payloads) + 1):
                told = self.told.setdefault((eid, sequence), [])
                told.append((f"{ms}-{sequence}", payload))

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.pubsub.close()
        self.raw.close()


async def test_resends_that_are_grouped_otherwise_store_each_frame_once(
    shell, proxy, server, lane, seed
):
    dice = random.Random(seed)
    async with await shell.connect(proxy.url) as backend:
        handles = dict([await claimed(backend, lane) for _ in range(12)])
        with Ears(server.url, handles) as heard:
            writers = {
                eid: await backend.open_writer(handle, mode=LIVE) for eid, handle in handles.items()
            }
            written = {eid: [] for eid in writers}
            for turn in range(150):
                for eid in dice.sample(list(writers), dice.randrange(1, 12)):
                    payload = b"%d" % len(written[eid])
                    mode = dice.choice([LIVE, LIVE, LIVE, DURABLE])
                    writers[eid].write(payload, mode=mode)
                    written[eid].append(payload)
                if turn % 10 == 5:
                    proxy.cut_all()
                await asyncio.sleep(0.002)
            for writer in writers.values():
                await writer.flush(20)
            for eid, payloads in written.items():
                stored_once(server.url, eid, payloads)
            heard.listen()
            for eid in writers:
                stored = {
                    frame.sequence: (frame.stream_id, frame.payload)
                    for frame in frames(server.url, eid)
                }
                for (other, sequence), told in heard.told.items():
                    if other == eid:
                        assert set(told) == {stored[sequence]}
            assert heard.kinds == {b"F", b"f"}
            for writer in writers.values():
                await writer.close()


async def test_readers_are_told_of_a_frame_before_it_is_stored(shell, server, lane):
    async with await shell.connect(server.url) as backend:
        eid, handle = await claimed(backend, lane)
        with Ears(server.url, {eid: handle}) as heard:
            writer = await backend.open_writer(handle, mode=LIVE)
            writer.write(b"first")
            await writer.flush(5)
            for i in range(5):
                writer.write(b"%d" % i)
                for _ in range(400):
                    if (eid, i + 2) in heard.told:
                        break
                    await asyncio.sleep(0.005)
                    heard.listen()
            assert {payload for told in heard.told.values() for _, payload in told} == {
                b"first", *(b"%d" % i for i in range(5)),
            }  # fmt: skip
            # Nobody flushes, and they are stored.
            for _ in range(2000):
                if writer.last_sequence == 6:
                    break
                await asyncio.sleep(0.005)
            page = await backend.read_stream(eid, 0)
            assert [(f.stream_id, f.payload) for f in page] == [
                heard.told[eid, sequence][0] for sequence in range(1, 7)
            ]
            await writer.close()


@pytest.mark.parametrize("end", ["complete", "fail", "delay"])
@pytest.mark.parametrize("mode", [LIVE, DURABLE], ids=["held back", "just written"])
async def test_what_is_written_is_stored_before_the_lease_is_released(
    shell, server, lane, end, mode
):
    async with await shell.connect(server.url) as backend:
        eid, handle = await claimed(backend, lane)
        with Ears(server.url, {eid: handle}) as heard:
            writer = await backend.open_writer(handle, mode=LIVE)
            writer.write(b"first")
            await writer.flush(5)
            writer.write(b"held", mode=mode)
            while mode is LIVE and (eid, 2) not in heard.told:
                heard.listen()
                await asyncio.sleep(0.001)
            if end == "complete":
                await backend.complete(handle)
            elif end == "fail":
                await backend.fail(handle, "no", FailureClass.PERMANENT)
            else:
                await backend.delay(handle, 1)
            stored_once(server.url, eid, [b"first", b"held"])
            assert writer.last_sequence == 2
            with contextlib.suppress(FFError):
                await writer.close()


async def test_one_writer_that_is_refused_harms_no_other(shell, server, lane):
    async with await shell.connect(server.url) as backend:
        handles = dict([await claimed(backend, lane) for _ in range(6)])
        writers = {eid: await backend.open_writer(handle) for eid, handle in handles.items()}
        closed, spoiled, *others = writers
        await backend.complete(handles[closed])
        raw = connect_raw(server.url)
        # Its log is no stream.
        raw.set(ops.Attempt.of(handles[spoiled]).stream_keys[1], b"text")
        for writer in writers.values():
            writer.write(b"x")
        for eid in others:
            assert (await writers[eid].flush(5)).frame_count == 1
        for eid in (closed, spoiled):
            with pytest.raises(FFError) as caught:
                await writers[eid].flush(5)
            assert [frame.payload for frame in caught.value.unstored] == [b"x"]
        assert isinstance(writers[closed].error, StreamClosed)
        raw.delete(ops.Attempt.of(handles[spoiled]).stream_keys[1])
        raw.close()
        for eid in others:
            await writers[eid].close()


async def test_a_call_refused_for_the_rights_of_one_is_sent_part_by_part(shell, own_server, lane):
    async with await shell.connect(own_server.url) as backend:
        handles = dict([await claimed(backend, lane) for _ in range(6)])
        writers = {eid: await backend.open_writer(handle) for eid, handle in handles.items()}
        refused, *others = writers
        raw = connect_raw(own_server.url)
        allowed = [f"~*{eid}*" for eid in others] + ["~ff:config:*"]
        raw.execute_command("ACL", "SETUSER", "default", "resetkeys", *allowed)
        for writer in writers.values():
            writer.write(b"x")
        for eid in others:
            assert (await writers[eid].flush(5)).frame_count == 1
        with pytest.raises(PermissionDenied):
            await writers[refused].flush(5)
        raw.execute_command("ACL", "SETUSER", "default", "allkeys")
        raw.close()
        for eid in others:
            await writers[eid].close()


@pytest.mark.parametrize("linger", [0, 0.5], ids=["held", "lingering"])
async def test_a_backend_that_is_closed_stores_what_was_written(shell, server, lane, linger):
    async with await shell.connect(server.url) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle, mode=LIVE, linger=linger)
        writer.write(b"first")
        await writer.flush(5)
        for i in range(5):
            writer.write(b"%d" % i)
            await asyncio.sleep(0.005)
    stored_once(server.url, eid, [b"first", *(b"%d" % i for i in range(5))])
    assert writer.error.unstored == ()


@pytest.mark.parametrize("way", ["the configuration", "the URL"])
async def test_who_waits_for_a_frame_does_not_wait_for_those_of_others(shell, server, lane, way):
    """A linger of the backend is for frames that nobody waits for."""
    url = f"{server.url}{'&' if '?' in server.url else '?'}linger_ms=1000"
    plain = BackendConfig.from_url(server.url)
    target = url if way == "the URL" else dataclasses.replace(plain, linger_ms=1000)
    async with await shell.connect(target) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle, mode=DURABLE)
        lingering = False
        for i in range(10):
            writer.write(b"%d" % i)
            # The shell begins to wait for others.
            await asyncio.sleep(0.001)
            lingering = lingering or writer.last_sequence == i
            # Shorter than the linger.
            await writer.flush(0.9)
        assert lingering
        await writer.close(0.9)
        stored_once(server.url, eid, [b"%d" % i for i in range(10)])

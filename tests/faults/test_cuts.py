"""Connections that break: what was written is stored exactly once and in order, and every call says what is known."""

import asyncio
import contextlib
import random

import pytest

import ff_fast
from ff_fast import Frame, FrameKind, StreamMode, aio
from ff_fast._aio.connection import LOST
from ff_fast._core.deployment import Deployment
from ff_fast._hot.resp import pack_command
from ff_fast.errors import (
    DeadlineExceeded,
    FFError,
    Outcome,
    OutcomeUnknown,
    Unavailable,
)

from ..conftest import connect_raw
from ..shells import KINDS, Shell, config
from ..waiting import wait_until, wait_until_async
from .chaos import DOWN, UP, ChaosProxy
from .stored import claimed, frames, stored_once

MODES = {
    "durable": StreamMode.durable(),
    "best_effort": StreamMode.best_effort_live(60_000),
    "summary": StreamMode.durable_summary(),
}


def payloads_of(mode, count):
    if mode == "summary":
        return [b'{"n":%d}' % i for i in range(count)]
    return [b"frame %d" % i for i in range(count)]


async def write_slowly(writer, payloads, mode, at=(), most=1 << 14):
    """Write everything in small bursts, with the loop running between them; call what *at* yields on the way."""
    steps = iter(at)
    for i, payload in enumerate(payloads):
        writer.write(payload, mode=mode)
        if i % 50 == 49:
            next(steps, None)
            await asyncio.sleep(0)
            if writer.unacknowledged_bytes > most:
                await writer.flush(30)


@pytest.mark.parametrize("mode", MODES)
async def test_connections_killed_by_the_server(shell, mode, server, lane, seed):
    dice = random.Random(seed)
    payloads = payloads_of(mode, 10_000)
    raw = connect_raw(server.url)

    def killing():
        while True:
            if dice.random() < 0.2:
                with contextlib.suppress(Exception):
                    raw.client_kill_filter(_type="normal", skipme=True)
            yield

    async with await shell.connect(server.url) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle, retention_maxlen=20_000)
        await write_slowly(writer, payloads, MODES[mode], killing())
        outcome = await writer.flush(30)
        assert outcome.frame_count == 10_000
        await writer.close()
        if mode == "summary":
            assert (await backend.read_summary(eid)).version == 10_000
    raw.close()
    stored_once(server.url, eid, payloads)


@pytest.mark.parametrize("chunk", [1 << 16, 7])
@pytest.mark.parametrize("mode", MODES)
async def test_cuts_at_random_bytes_both_ways(shell, mode, chunk, proxy, server, lane, seed):
    dice = random.Random(seed)
    count = 10_000 if chunk > 7 else 1_500
    payloads = payloads_of(mode, count)

    def plan():
        while True:
            if dice.random() < 0.5:
                yield (
                    UP,
                    dice.randrange(1, 8_000 if chunk > 7 else 1_500),
                    dice.choice(["rst", "fin"]),
                )
            else:
                yield DOWN, dice.randrange(1, 250), dice.choice(["rst", "fin"])

    # Often a connection ends before its library is checked; how many in a row is left to the dice.
    async with await shell.connect(proxy.url, retries=10_000, factor=1, base=1) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle, retention_maxlen=20_000)
        proxy.chunk = chunk
        proxy.cut_by(plan())
        await write_slowly(writer, payloads, MODES[mode], most=1 << 14 if chunk > 7 else 400)
        await writer.flush(30)
        proxy.cut_by(())
        await writer.close()
    assert proxy.cuts
    stored_once(server.url, eid, payloads)


async def test_one_byte_at_a_time(shell, proxy, server, lane):
    proxy.chunk = 1
    async with await shell.connect(proxy.url) as backend:
        eid, handle = await claimed(backend, lane)
        async with await backend.open_writer(handle) as writer:
            for i in range(100):
                writer.write(b"%d" % i)
        await backend.complete(handle)
        items = await backend.items(eid)
    assert [item.payload for item in items[:-1]] == [b"%d" % i for i in range(100)]
    assert items[-1].reason == "attempt_success"


def preparation():
    """What a new connection of calls asks."""
    return next(Deployment().prepare("calls"))


async def test_a_reply_that_is_always_lost_ends_in_an_error_with_the_frames(shell, proxy, lane):
    async with await shell.connect(proxy.url, retries=4, factor=1) as backend:
        _, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        writer.write(b"first")
        await writer.flush(10)
        # A connection may be prepared, so every one seems good until a batch is on its way.
        prepared = len(b"".join(each.request for each in preparation().commands))

        def plan():
            yield UP, 1, "rst"
            while True:
                yield UP, prepared + 10, "rst"

        proxy.cut_by(plan())
        writer.write(b"second")
        with pytest.raises(OutcomeUnknown) as caught:
            await writer.flush(10)
        assert [frame.payload for frame in caught.value.unstored] == [b"second"]
        assert writer.error.unstored == caught.value.unstored
        assert caught.value is not writer.error
        proxy.cut_by(())


OPERATIONS = {
    "create": lambda b, ids: b.create_execution(lane=ids["lane"], execution_id=ids["new"]),
    "open_writer": lambda b, ids: b.open_writer(ids["handle"]),
    "renew": lambda b, ids: b.renew(ids["handle"]),
    "read_stream": lambda b, ids: b.read_stream(ids["eid"]),
    "read_summary": lambda b, ids: b.read_summary(ids["eid"]),
    "describe": lambda b, ids: b.describe(ids["eid"]),
    "append_frame": lambda b, ids: b.append_frame(
        ids["handle"], Frame(b"{}", FrameKind.EVENT, frame_type="tool_event")
    ),
    "complete": lambda b, ids: b.complete(ids["handle"], b"answer"),
    "fail": lambda b, ids: b.fail(ids["other"], "broken"),
}


async def test_a_lost_reply_is_asked_for_again(shell, proxy, server, lane):
    async with await shell.connect(proxy.url) as backend:
        eid, handle = await claimed(backend, lane)
        _, other = await claimed(backend, lane)
        ids = {"lane": lane, "handle": handle, "other": other, "eid": eid}
        ids["new"] = ff_fast.keys.new_execution_id()
        for name, operation in OPERATIONS.items():
            before = proxy.cuts
            # The first byte of the reply, and then the connection is gone: the server has done its work.
            proxy.cut_after(DOWN, 1)
            await operation(backend, ids)
            assert proxy.cuts == before + 1, name
        state = await backend.describe(ids["new"])
        assert state.state == "waiting"
        assert (await backend.describe(eid)).state == "completed"
    assert [frame.frame_type for frame in frames(server.url, eid)] == ["tool_event"]
    with connect_raw(server.url) as raw:
        assert raw.zcard(ff_fast.keys.eligible(ff_fast.keys.slot_tag_of(ids["new"]), lane)) == 1


async def test_a_claim_whose_reply_is_lost_gives_its_execution_to_the_caller(shell, proxy, lane):
    """A repeat of the claim call names the same lease."""
    async with await shell.connect(proxy.url) as backend:
        eids = {await backend.create_execution(lane=lane) for _ in range(2)}
        # The hint's reply passes (`*2`, a partition and a score), the claim's does not.
        proxy.cut_after(DOWN, 42)
        handle = await backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")
        assert proxy.cuts == 1
        states = {eid: (await backend.describe(eid)).state for eid in eids}
        assert states.pop(handle.fields().execution_id) == "active"
        assert list(states.values()) == ["waiting"]
        await backend.complete(handle)


@pytest.mark.parametrize("cut", range(1, 400, 23))
async def test_claim_at_every_stage_of_a_cut(shell, cut, proxy, lane):
    async with await shell.connect(proxy.url) as backend:
        eid = await backend.create_execution(lane=lane)
        proxy.cut_after(UP, cut)
        handle = await backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")
        proxy.cut_by(())
        assert handle.fields().execution_id == eid
        assert (await backend.describe(eid)).state == "active"
        await backend.complete(handle)


async def test_no_retries_means_none(shell, proxy, lane):
    async with await shell.connect(proxy.url, retries=0) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        before = proxy.accepted
        proxy.cut_after(DOWN, 1)
        with pytest.raises(OutcomeUnknown):
            await backend.describe(eid)
        assert proxy.accepted == before
        assert (await backend.describe(eid)).state == "active"
        if shell.kind == "asyncio":
            await backend.renew(handle)
        writer.write(b"1")
        await writer.flush(5)
        proxy.cut_after(DOWN, 1)
        writer.write(b"2")
        with pytest.raises(OutcomeUnknown) as caught:
            await writer.flush(5)
        assert [frame.payload for frame in caught.value.unstored] == [b"2"]


async def test_refused_port(shell, proxy):
    proxy.refuse()
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(Unavailable) as caught:
        await shell.connect(proxy.url, retries=3, factor=1)
    assert loop.time() - began < 4
    assert caught.value.outcome is Outcome.NOT_APPLIED
    assert caught.value.__context__ is None
    proxy.listen()


async def test_refused_while_streaming(shell, proxy, server, lane):
    async with await shell.connect(proxy.url) as backend:
        eid, handle = await claimed(backend, lane)
        async with await backend.open_writer(handle) as writer:
            writer.write(b"1")
            await writer.flush(5)
            proxy.refuse()
            proxy.cut_all()
            writer.write(b"2")
            flushing = asyncio.ensure_future(writer.flush(10))
            calling = asyncio.ensure_future(backend.describe(eid))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(flushing), 0.1)
            proxy.listen()
            await flushing
            assert (await calling).state == "active"
    stored_once(server.url, eid, [b"1", b"2"])


async def test_a_port_that_accepts_nobody(shell):
    import socket

    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        port = deaf.getsockname()[1]
        fill = [socket.socket() for _ in range(4)]
        for each in fill:
            each.setblocking(False)
            each.connect_ex(("127.0.0.1", port))
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(DeadlineExceeded) as caught:
            await shell.connect(f"valkey://127.0.0.1:{port}", timeout=0.3)
        assert 0.25 < loop.time() - began < 4
        assert caught.value.outcome is Outcome.NOT_APPLIED
        for each in fill:
            each.close()


async def test_many_callers_of_a_deaf_server_wait_one_deadline_together(proxy):
    backend = await aio.ValkeyBackend.connect(config(proxy.url, timeout=0.3))
    proxy.hold(UP, DOWN)
    proxy.cut_all()
    await wait_until_async(lambda: _true(backend._nodes.first.shared.connection is None))
    loop = asyncio.get_running_loop()
    began = loop.time()
    missing = ff_fast.keys.new_execution_id()
    results = await asyncio.gather(
        *(backend.describe(missing) for _ in range(50)), return_exceptions=True
    )
    assert {type(result) for result in results} == {DeadlineExceeded}
    assert len({id(result) for result in results}) == 50
    assert loop.time() - began < 5
    proxy.release()
    await backend.close()


async def _true(value):
    return value


async def test_an_idle_connection_that_ended_is_noticed_before_it_is_used(shell, proxy, lane):
    """Nothing was on its way, so even a claim is not unknown."""
    async with await shell.connect(proxy.url) as backend:
        await backend.create_execution(lane=lane)
        proxy.cut_all("fin")
        await wait_until_async(lambda: _true(proxy.connections == 0))
        handle = await backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")
        assert handle is not None
        proxy.cut_all("rst")
        await wait_until_async(lambda: _true(proxy.connections == 0))
        await backend.renew(handle)


async def test_what_is_sent_behind_a_write_that_failed_is_lost_with_it(proxy, caplog):
    async with await aio.ValkeyBackend.connect(config(proxy.url)) as backend:
        connection = backend._nodes.first.shared.connection
        # The loop does not run, so it hears of the reset by the first write.
        proxy.cut_all("rst")
        wait_until(lambda: proxy.connections == 0)
        told = []
        for _ in range(20):
            connection.send(pack_command(b"PING"), [told.append])
        await wait_until_async(lambda: _true(connection.closed))
        assert told == [LOST] * 20
    assert [each.message for each in caplog.records if each.name == "asyncio"] == []


async def test_a_black_hole_ends_at_the_deadline(shell, proxy, server, lane):
    async with await shell.connect(proxy.url, timeout=0.4) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        proxy.hold(UP, DOWN)
        writer.write(b"1")
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(DeadlineExceeded) as caught:
            await backend.renew(handle)
        assert caught.value.outcome is Outcome.UNKNOWN
        assert 0.35 < loop.time() - began < 4
        began = loop.time()
        with pytest.raises(DeadlineExceeded):
            await writer.flush(0.2)
        assert loop.time() - began < 4
        assert writer.error is None
        proxy.release()
        await writer.flush(10)
        await writer.close()
    stored_once(server.url, eid, [b"1"])


async def test_a_slow_trickle_does_not_stretch_the_deadline(proxy, lane):
    """Each byte comes within the time limit; the reply does not."""
    for kind in KINDS:
        async with await Shell(kind).connect(proxy.url, timeout=0.3) as backend:
            eid = await backend.create_execution(lane=lane)
            proxy.chunk, proxy.delay = 1, 0.02
            loop = asyncio.get_running_loop()
            began = loop.time()
            with pytest.raises(DeadlineExceeded):
                await backend.describe(eid)
            assert loop.time() - began < 2
            proxy.chunk, proxy.delay = 1 << 16, 0.0


async def test_bytes_that_are_no_reply(shell, lane):
    """A server that answers nonsense: typed, and the connection is not used again."""
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = threading.Event()

        def serve():
            listener.settimeout(0.05)
            while not done.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.settimeout(5)
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with pytest.raises(FFError) as caught:
                await shell.connect(
                    f"valkey://127.0.0.1:{listener.getsockname()[1]}", retries=1, factor=1
                )
            assert "HTTP" not in str(caught.value)
            assert caught.value.outcome is Outcome.NOT_APPLIED
        finally:
            done.set()
            thread.join()


async def test_the_end_reaches_a_tail_through_cuts(shell, proxy, server, lane, seed):
    dice = random.Random(seed)
    async with await shell.connect(server.url) as writing:
        eid, handle = await claimed(writing, lane)
        async with await shell.connect(proxy.url) as reading:
            tailing = asyncio.ensure_future(reading.items(eid))
            writer = await writing.open_writer(handle)
            for i in range(2_000):
                writer.write(b"%d" % i)
                if i % 100 == 99:
                    await writer.flush(10)
                    if dice.random() < 0.5:
                        proxy.cut_all(dice.choice(["rst", "fin"]))
            await writer.close()
            await writing.complete(handle)
            items = await asyncio.wait_for(tailing, 20)
    assert [item.payload for item in items[:-1]] == [b"%d" % i for i in range(2_000)]


@pytest.mark.standalone("a proxy stands before one server")
async def test_a_connection_lost_while_nothing_is_written_costs_nothing(shell, server, lane):
    with ChaosProxy(server.url) as proxy:
        async with await shell.connect(proxy.url) as backend:
            eid, handle = await claimed(backend, lane)
            writer = await backend.open_writer(handle)
            for i in range(5):
                accepted = proxy.accepted
                proxy.cut_all("fin")
                # A writer that keeps frames connects again by itself.
                await wait_until_async(
                    lambda accepted=accepted: _true(
                        proxy.connections == 0 or proxy.accepted > accepted
                    )
                )
                writer.write(b"%d" % i)
                await writer.flush(5)
            await writer.close()
        stored_once(server.url, eid, [b"%d" % i for i in range(5)])

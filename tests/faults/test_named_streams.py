"""Named streams when replies are lost, callers race and go away, processes fork and die, and servers are gone."""

import asyncio
import contextlib
import itertools
import random
import signal
import subprocess
import sys
import threading

import pytest

import ff_fast
from ff_fast import End, aio, errors, keys
from ff_fast._core import leases as leases_core
from ff_fast._core import streams as streams_core
from ff_fast._core.leases import is_lease_lost
from ff_fast.errors import FFError, ForkedClient, InvalidInput, Outcome, Unavailable

from ..conftest import connect_raw
from ..heads import head_of
from ..waiting import wait_until_async
from .chaos import DOWN, UP
from .stored import frames
from .test_outcomes import away, lose_one_reply_and_then_refuse
from .test_process import in_child

SOON = 10


@pytest.fixture
def raw(raw):
    """Connected before the test, which must leave no more connections than it found."""
    raw.ping()
    return raw


@pytest.fixture
def opening(lane):
    """Arguments of ``open_stream``, and the id of the stream."""
    options = {"name": "chat", "namespace": lane, "ttl": 60}
    return options, keys.execution_id_for("chat", namespace=lane)


def state_of(raw, eid):
    return (raw.hget(keys.core(eid), "state") or b"").decode()


async def followed(backend, eid):
    """What a follower gets to the end: payloads, numbers of attempts, and how it ended."""
    reader = backend.wrapped.follow(eid)
    if isinstance(reader, aio.Follow):
        found = [item async for item in reader]
        await reader.aclose()
    else:
        found = await asyncio.to_thread(list, reader)
        reader.close()
    return [
        (item.outcome, item.error)
        if isinstance(item, End)
        else getattr(item, "payload", getattr(item, "attempt_index", item))
        for item in found
    ]


# -- lost replies -----------------------------------------------------------------------------------------------------


async def test_an_opening_whose_reply_is_lost_has_one_producer(shell, proxy, raw, opening):
    options, eid = opening
    async with await shell.connect(proxy.url, retries=5, factor=1) as backend:
        proxy.cut_after(DOWN, 1)
        stream = await backend.open_stream(**options)
        assert proxy.cuts == 1
        async with stream:
            assert stream.role == "producer"
            stream.write(b"a")
        assert raw.hget(keys.meta(eid, 0), "writer_openings") == b"1"
        assert raw.hget(keys.core(eid), "current_lease_epoch") == b"1"
        assert await followed(backend, eid) == [0, b"a", ("success", None)]


async def test_an_opening_that_never_hears_its_reply_is_given_back(
    shell, proxy, raw, server, opening
):
    options, eid = opening
    async with await shell.connect(proxy.url, retries=2, factor=1) as backend:
        with away(proxy):
            lose_one_reply_and_then_refuse(proxy)
            with pytest.raises(Unavailable) as caught:
                await backend.open_stream(**options)
        assert caught.value.outcome is Outcome.UNKNOWN
        assert caught.value.retryable
        # The blocking shell gives back with its next claim or opening.
        await backend.open_stream(**{**options, "name": "another"})
        await wait_until_async(lambda: _now(state_of(raw, eid) == "waiting"))
        async with await backend.open_stream(**options) as stream:
            assert stream.role == "producer"
            assert stream.handle.attempt_index == 0


async def _now(value):
    return value


def server_ms(raw):
    seconds, micros = raw.time()
    return seconds * 1000 + micros // 1000


@pytest.mark.parametrize("how", ["reply lost", "request lost", "server away"])
async def test_leaving_the_block_ends_the_stream_whatever_the_connection_does(
    shell, proxy, raw, opening, how
):
    options, eid = opening
    retries = 1_000 if how == "server away" else 1
    async with await shell.connect(proxy.url, retries=retries, factor=1) as backend:
        stream = await backend.open_stream(**options)
        stream.write(b"a")
        await stream.flush(SOON)
        with away_for_a_while(proxy) if how == "server away" else contextlib.nullcontext():
            if how != "server away":
                proxy.cut_after(DOWN if how == "reply lost" else UP, 1)
            async with stream:
                pass
        assert state_of(raw, eid) == "completed"
        assert await followed(backend, eid) == [0, b"a", ("success", None)]


async def test_a_stream_whose_writer_gives_up_fails_once_the_server_is_back(
    shell, proxy, raw, opening
):
    options, eid = opening
    async with await shell.connect(proxy.url, retries=0) as backend:
        stream = await backend.open_stream(**options)
        await stream.flush(SOON)
        with away_for_a_while(proxy), pytest.raises(FFError) as caught:
            async with stream:
                stream.write(b"lost")
        assert caught.value.retryable
        assert state_of(raw, eid) == "failed"


@contextlib.contextmanager
def away_for_a_while(proxy):
    """Nobody can connect, and then the server is there again."""
    proxy.refuse()
    proxy.cut_after(UP, 1)
    back = threading.Timer(0.4, proxy.listen)
    back.start()
    try:
        yield
    finally:
        proxy.cut_by(())
        back.join()


async def test_an_exception_is_not_replaced_by_a_server_that_is_gone(shell, proxy, raw, opening):
    options, eid = opening
    async with await shell.connect(proxy.url, retries=1, factor=1, timeout=1) as backend:
        stream = await backend.open_stream(**options, lease_ttl_ms=600)
        with away(proxy):
            proxy.refuse()
            # Every connection that is open.
            proxy.cut_by(itertools.repeat((UP, 1, "rst")))
            with pytest.raises(ZeroDivisionError):
                async with stream:
                    1 / 0  # noqa: B018
        assert state_of(raw, eid) == "active"


# -- races ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [False, True], ids=["new", "lost"])
async def test_of_many_that_open_a_name_at_once_one_produces(shell, server, raw, opening, lost):
    options, eid = opening
    backends = [await shell.connect(server.url) for _ in range(4)]
    try:
        if lost:
            first = await backends[0].open_stream(**options, lease_ttl_ms=1)
            await give_up(first)
            ends = head_of(raw, keys.head(eid, 0)).lease_expires_at
            await wait_until_async(lambda: _now(server_ms(raw) > ends))
        streams = await asyncio.gather(
            *(backends[number % 4].open_stream(**options) for number in range(24))
        )
        producers = [stream for stream in streams if stream.role == "producer"]
        assert len(producers) == 1
        assert producers[0].handle.attempt_index == int(lost)
        async with producers[0] as producer:
            producer.write(b"a")
        whole = [0, 1, b"a"] if lost else [0, b"a"]
        assert await followed(backends[0], eid) == [*whole, ("success", None)]
    finally:
        for backend in backends:
            await backend.close()


async def give_up(stream):
    """The producer dies, as far as the server can tell."""
    keeper = stream.wrapped._keeper
    keeper._end()
    if isinstance(stream.wrapped, ff_fast.OpenedStream):
        await asyncio.to_thread(keeper.stop)


RACER = """
import sys
import ff_fast
with ff_fast.ValkeyBackend.connect(sys.argv[1]) as backend:
    print("ready", flush=True)
    sys.stdin.readline()
    with backend.open_stream("chat", namespace=sys.argv[2], ttl=60) as stream:
        print(stream.role, flush=True)
        if stream.role == "producer":
            stream.write("a")
            stream.wait_cancelled(0.3)
"""


def test_of_many_processes_one_produces(server, lane):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, server.url, lane], **pipes) for _ in range(4)
    ]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 4
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    told = sorted(racer.communicate(timeout=30)[0].strip() for racer in racers)
    assert [racer.returncode for racer in racers] == [0] * 4
    assert told == ["consumer"] * 3 + ["producer"]
    eid = keys.execution_id_for("chat", namespace=lane)
    assert [frame.payload for frame in frames(server.url, eid)] == [b"a"]


# -- callers that go away ---------------------------------------------------------------------------------------------


async def test_an_opening_that_is_cancelled_leaves_the_name_to_others(server, raw, lane):
    dice = random.Random(7)
    async with aio.ValkeyBackend.connect(server.url) as backend:
        for number in range(40):
            name = f"chat {number}"
            task = asyncio.ensure_future(_opened(backend, name, lane))
            for _ in range(dice.randrange(12)):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                async with await task:
                    # Too late to be cancelled.
                    continue
            eid = keys.execution_id_for(name, namespace=lane)
            # It was not sent, or it is given back.
            await wait_until_async(lambda eid=eid: _now(state_of(raw, eid) in ("", "waiting")))
            async with backend.open_stream(name, namespace=lane, ttl=60) as stream:
                assert (stream.role, stream.handle.attempt_index) == ("producer", 0)


async def _opened(backend, name, lane):
    return await backend.open_stream(name, namespace=lane, ttl=60)


async def test_what_opens_is_opened_once(server, lane):
    # Two writers with the same lease and writer id would take each other's frames for their own, sent again.
    async with aio.ValkeyBackend.connect(server.url) as backend:
        opening = backend.open_stream("chat", namespace=lane)
        stream = await opening
        with pytest.raises(InvalidInput, match="opened already"):
            await opening
        with pytest.raises(InvalidInput, match="opened already"):
            async with opening:
                pass
        handle = stream.handle
        writing = backend.open_writer(handle)
        async with writing as writer:
            writer.write(b"a")
        with pytest.raises(InvalidInput, match="opened already"):
            await writing
        await backend.complete(handle)
        # What has failed may be tried again.
        writing = backend.open_writer(handle)
        for _ in range(2):
            with pytest.raises(errors.StreamClosed):
                await writing


async def test_a_cancelled_task_cancels_its_stream(server, lane):
    async with aio.ValkeyBackend.connect(server.url) as backend:
        began = asyncio.Event()

        async def produce():
            async with backend.open_stream("chat", namespace=lane, ttl=60) as stream:
                stream.write(b"a")
                began.set()
                await asyncio.sleep(60)

        task = asyncio.ensure_future(produce())
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        eid = keys.execution_id_for("chat", namespace=lane)
        described = await backend.describe(eid)
        assert (described.state, described.cancellation_reason) == (
            "cancelled",
            streams_core.CANCEL_REASON,
        )
        assert [item.payload for item in await backend.read_stream(eid)] == [b"a"]


async def test_a_cancelled_task_ends_soon_where_the_server_is_silent(proxy, lane, raw, monkeypatch):
    monkeypatch.setattr(streams_core, "HAND_BACK_S", 0.2)
    async with aio.ValkeyBackend.connect(proxy.url) as backend:
        stream = await backend.open_stream("chat", namespace=lane, ttl=60)
        proxy.hold(UP, DOWN)

        async def produce():
            async with stream:
                await asyncio.sleep(60)

        task = asyncio.ensure_future(produce())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(task), SOON)
        proxy.release()


def test_an_interrupt_in_the_block_cancels_the_stream(server, lane):
    with ff_fast.ValkeyBackend.connect(server.url) as backend:

        def produce():
            with backend.open_stream("chat", namespace=lane, ttl=60) as stream:
                stream.write(b"a")
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            produce()
        eid = keys.execution_id_for("chat", namespace=lane)
        assert backend.describe(eid).state == "cancelled"


# -- a backend that is closed, processes that fork and die ------------------------------------------------------------


async def test_a_backend_that_is_closed_in_the_block_says_so(shell, server, raw, opening):
    options, eid = opening
    backend = await shell.connect(server.url)
    stream = await backend.open_stream(**options, lease_ttl_ms=2_000)
    stream.write(b"a")

    async def closing():
        async with stream:
            await backend.close()
            assert stream.cancelled

    with pytest.raises(FFError) as caught:
        await closing()
    assert not is_lease_lost(caught.value)
    # What was written is stored, and the next one goes on.
    assert [frame.payload for frame in frames(server.url, eid)] == [b"a"]
    assert state_of(raw, eid) == "active"


async def test_an_exception_passes_a_backend_that_is_closed(shell, server, opening):
    options, _ = opening
    backend = await shell.connect(server.url)
    stream = await backend.open_stream(**options)

    async def closing():
        async with stream:
            await backend.close()
            1 / 0  # noqa: B018

    with pytest.raises(ZeroDivisionError):
        await closing()


def test_a_forked_child_leaves_the_stream_of_its_parent_alone(server, lane):
    with (
        ff_fast.ValkeyBackend.connect(server.url) as backend,
        backend.open_stream("chat", namespace=lane, ttl=60) as stream,
    ):
        stream.write(b"a")
        stream.flush(SOON)

        def leaves():
            with pytest.raises(ForkedClient), stream:
                pass
            with contextlib.suppress(ZeroDivisionError), stream:
                1 / 0  # noqa: B018
            for use in (stream.complete, lambda: stream.write(b"x"), lambda: stream.fail("no")):
                with pytest.raises(ForkedClient):
                    use()

        in_child(leaves)
        stream.write(b"b")
    assert [frame.payload for frame in frames(server.url, stream.execution_id)] == [b"a", b"b"]
    with ff_fast.ValkeyBackend.connect(server.url) as other:
        assert other.describe(stream.execution_id).state == "completed"


async def test_a_forked_child_of_the_asyncio_shell_leaves_it_alone(server, lane):
    async with (
        aio.ValkeyBackend.connect(server.url) as backend,
        backend.open_stream("chat", namespace=lane, ttl=60) as stream,
    ):
        stream.write(b"a")
        await stream.flush(SOON)

        def leaves():
            with pytest.raises(ForkedClient):
                stream.write(b"x")
            # Another loop, or none, drives what was left here.
            with pytest.raises(FFError):
                asyncio.run(stream.__aexit__(None, None, None))

        in_child(leaves)
        stream.write(b"b")
    assert (await backend_state(server, stream.execution_id)) == "completed"


async def backend_state(server, eid):
    async with aio.ValkeyBackend.connect(server.url) as backend:
        return (await backend.describe(eid)).state


KILLED = """
import sys, time
import ff_fast
with ff_fast.ValkeyBackend.connect(sys.argv[1]) as backend:
    stream = backend.open_stream("chat", namespace=sys.argv[2], ttl=60, lease_ttl_ms=1_500)
    for number in range(3):
        stream.write(str(number))
    stream.flush()
    print("written", flush=True)
    time.sleep(60)
"""


async def test_a_producer_that_is_killed_is_lost_and_replaced(shell, server, opening):
    options, eid = opening
    producer = subprocess.Popen(  # noqa: ASYNC220 - it is there before anything waits
        [sys.executable, "-c", KILLED, server.url, options["namespace"]],
        stdout=subprocess.PIPE,
        text=True,
    )
    with producer:
        assert producer.stdout.readline() == "written\n"
        async with await shell.connect(server.url) as backend:
            following = asyncio.ensure_future(followed(backend, eid))
            assert (await backend.open_stream(**options)).role == "consumer"
            producer.send_signal(signal.SIGKILL)
            tailed = await backend.items(eid)
            assert tailed[-1].reason == "producer_lost"
            assert [item.payload for item in tailed[:-1]] == [b"0", b"1", b"2"]
            async with await backend.open_stream(**options) as stream:
                assert (stream.role, stream.handle.attempt_index) == ("producer", 1)
                stream.write(b"again")
            assert await asyncio.wait_for(following, SOON) == [
                0, b"0", b"1", b"2", 1, b"again", ("success", None),
            ]  # fmt: skip


async def test_a_lost_stream_that_nobody_takes_over_ends(shell, server, opening):
    options, eid = opening
    async with await shell.connect(server.url) as backend, await shell.connect(server.url) as other:
        stop = threading.Event()
        supervising = asyncio.ensure_future(other.supervise(interval=0.05, stop=stop))
        stream = await backend.open_stream(**options, lease_ttl_ms=50, takeover=0.1)
        await give_up(stream)
        found = await asyncio.wait_for(followed(backend, eid), SOON)
        stop.set()
        await supervising
        assert found == [0, ("failed", "producer_lost")]


async def test_a_stream_is_renewed_while_its_block_runs(shell, server, raw, opening, monkeypatch):
    # Soon, and the lease does not lapse on a machine that stands still for a while.
    monkeypatch.setattr(leases_core, "RENEW_AT", 0.005)
    options, eid = opening
    async with await shell.connect(server.url) as backend:
        async with await backend.open_stream(**options, lease_ttl_ms=30_000) as stream:
            ends = head_of(raw, keys.head(eid, 0)).lease_expires_at
            await wait_until_async(
                lambda: _now(head_of(raw, keys.head(eid, 0)).lease_expires_at > ends + 400)
            )
            stream.write(b"a")
        assert await followed(backend, eid) == [0, b"a", ("success", None)]


# -- servers that fail ------------------------------------------------------------------------------------------------


async def test_an_opening_that_finds_no_memory_changes_nothing(shell, own_server, opening):
    options, eid = opening
    with connect_raw(own_server.url) as raw:
        async with await shell.connect(own_server.url, retries=0) as backend:
            raw.config_set("maxmemory", 1)
            with pytest.raises(errors.OutOfMemory) as caught:
                await backend.open_stream(**options)
            assert caught.value.outcome is Outcome.NOT_APPLIED
            raw.config_set("maxmemory", 0)
            assert raw.keys(f"*{eid[-36:]}*") == []
            async with await backend.open_stream(**options) as stream:
                assert stream.role == "producer"


async def test_frames_that_a_failover_lost_are_stored_again_before_the_end(shell, pair, opening):
    options, eid = opening
    async with await shell.connect(pair.url) as backend:
        stream = await backend.open_stream(**options)
        stream.write(b"a")
        await stream.flush(SOON)
        await asyncio.to_thread(pair.stall)
        stream.write(b"b")
        await stream.flush(SOON)
        await asyncio.to_thread(pair.promote)
        async with stream:
            stream.write(b"c")
        assert await followed(backend, eid) == [0, b"a", b"b", b"c", ("success", None)]


async def test_a_stream_whose_opening_a_failover_has_lost_is_opened_again(shell, pair, opening):
    options, eid = opening
    async with await shell.connect(pair.url) as backend:
        await asyncio.to_thread(pair.stall)
        stream = await backend.open_stream(**options)
        stream.write(b"a")
        await stream.flush(SOON)
        await asyncio.to_thread(pair.promote)
        async with await backend.open_stream(**options) as again:
            assert again.role == "producer"
            again.write(b"b")
        await stream.wait_cancelled(SOON)
        assert stream.cancelled
        assert await followed(backend, eid) == [0, b"b", ("success", None)]


# -- removal, and the end of a program --------------------------------------------------------------------------------


async def test_a_removal_whose_reply_is_lost_has_removed(shell, proxy, raw, opening):
    options, eid = opening
    async with await shell.connect(proxy.url, retries=5, factor=1) as backend:
        async with await backend.open_stream(**options):
            pass
        proxy.cut_after(DOWN, 1)
        await backend.delete_execution(eid)
        assert proxy.cuts == 1
        assert raw.keys(f"*{eid[-36:]}*") == []
        with pytest.raises(errors.ExecutionNotFound):
            await backend.delete_execution(eid)


DROPPED = {
    "sync": """
import sys
import ff_fast
backend = ff_fast.ValkeyBackend.connect(sys.argv[1])
stream = backend.open_stream("chat", namespace=sys.argv[2], ttl=60)
stream.write("a")
stream.flush()
print(stream.role)
""",
    "asyncio": """
import asyncio, sys
from ff_fast import aio

async def main():
    async with aio.ValkeyBackend.connect(sys.argv[1]) as backend:
        stream = await backend.open_stream("chat", namespace=sys.argv[2], ttl=60)
        stream.write("a")
        await stream.flush()
        print(stream.role)

asyncio.run(main())
""",
    "exit": """
import sys
import ff_fast
with ff_fast.ValkeyBackend.connect(sys.argv[1]) as backend:
    with backend.open_stream("chat", namespace=sys.argv[2], ttl=60) as stream:
        stream.write("a")
        print(stream.role)
        sys.exit(0)
""",
}


@pytest.mark.parametrize("how", DROPPED)
def test_a_program_that_ends_amid_a_stream_ends_in_silence(server, raw, lane, run_python, how):
    assert run_python(DROPPED[how], server.url, lane) == "producer\n"
    eid = keys.execution_id_for("chat", namespace=lane)
    assert state_of(raw, eid) == ("cancelled" if how == "exit" else "active")
    assert [frame.payload for frame in frames(server.url, eid)] == [b"a"]

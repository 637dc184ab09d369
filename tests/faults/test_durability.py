"""A stated level of durability: never claimed unless a server has confirmed it for these very frames."""

import asyncio
import contextlib
import functools
import os
import signal

import pytest

import ff_fast
from ff_fast import Durability, End, Frame, FrameKind, Outcome, keys
from ff_fast.embedded import EmbeddedServer
from ff_fast.errors import (
    DeadlineExceeded,
    FFError,
    NotReplicated,
    UnsupportedServer,
    WriterClosed,
)

from ..conftest import connect_raw
from ..server.workers import Worker
from ..shells import KINDS
from ..waiting import wait_until, wait_until_async
from .chaos import ChaosProxy
from .failover import Failover, Past
from .stored import claimed

REPLICATED = Durability.replicated()
SYNCED = Durability.synced()


@pytest.fixture(scope="module")
def linked():
    """A primary with a replica; a test that stalls the link releases it."""
    with Failover() as running:
        yield running


@contextlib.contextmanager
def stalled(pair):
    pair.stall()
    try:
        yield
    finally:
        pair.link.release()


async def stays(task):
    """*task* does not end while the server answers another one."""
    for _ in range(20):
        await asyncio.sleep(0.005)
        assert not task.done(), task


async def reached(writer):
    """Whether all that was written is on the replica, which may take longer than the writer waits for it."""
    try:
        return (await writer.flush(20)).durability == REPLICATED
    except NotReplicated:
        return False


async def opened(backend, lane, **options):
    eid, handle = await claimed(backend, lane)
    return eid, handle, await backend.open_writer(handle, **options)


async def test_a_flush_tells_the_level_that_the_frames_have_reached(shell, linked, lane):
    async with await shell.connect(linked.url) as backend:
        _, handle, plain = await opened(backend, lane)
        plain.write(b"1")
        assert (await plain.flush(20)).durability == Durability.stored()
        _, handle, writer = await opened(backend, lane, durability=REPLICATED)
        assert (await writer.flush(20)).frame_count == 0
        for n in range(1, 4):
            writer.write(b"%d" % n)
            outcome = await writer.flush(20)
            assert (outcome.frame_count, outcome.durability) == (n, REPLICATED)
            assert outcome.stream_id == writer.last_id
            # What is known is not asked for again, and is told again.
            assert await writer.flush(20) == outcome
        writer.write(b"4")
        await writer.close(20)
        with connect_raw(linked.replica.url) as raw:
            assert raw.xlen(ff_fast.keys.stream(handle.fields().execution_id, 0)) == 4
        # A writer that goes on asks for the frames before it as well.
        again = await backend.open_writer(handle, durability=REPLICATED)
        assert (await again.flush(20)).durability == REPLICATED
        await backend.complete(handle, b"r", durability=REPLICATED)


async def test_a_level_that_is_not_reached_in_time_is_an_error_and_the_frames_are_stored(
    shell, linked, lane
):
    async with await shell.connect(linked.url) as backend:
        eid, handle, writer = await opened(
            backend, lane, durability=REPLICATED, durability_timeout=0.1
        )
        writer.write(b"1")
        await wait_until_async(lambda: reached(writer))
        with stalled(linked):
            writer.write(b"2")
            for _ in range(2):
                with pytest.raises(NotReplicated) as caught:
                    await writer.flush(20)
                error = caught.value
                assert (error.replicas, error.synced, error.retryable) == (0, False, True)
                assert error.outcome is Outcome.APPLIED
            assert writer.last_sequence == 2
            assert len(await backend.read_stream(eid, 0)) == 2
            # The writer goes on.
            writer.write(b"3")
            with pytest.raises(NotReplicated):
                await writer.close(20)
            with pytest.raises(NotReplicated):
                await backend.append_frame(
                    handle,
                    Frame(b"3", FrameKind.EVENT, seq=3),
                    durability=REPLICATED,
                    durability_timeout=0.05,
                )
        await wait_until_async(lambda: reached(writer))
        with contextlib.suppress(NotReplicated):
            await writer.close(20)
        assert isinstance(writer.error, WriterClosed)


async def test_who_asked_for_no_level_waits_for_nobody(shell, linked, lane):
    """While one waits for a replica, others store frames on the same backend, and others get the level in turn."""
    async with await shell.connect(linked.url) as backend:
        durable = [
            (await opened(backend, lane, durability=level, durability_timeout=60))[2]
            for level in (REPLICATED, REPLICATED, Durability.replicated())
        ]
        eid, handle, plain = await opened(backend, lane)
        with stalled(linked):
            for writer in durable:
                writer.write(b"1")
            waits = [asyncio.ensure_future(writer.flush(60)) for writer in durable]
            for n in range(1, 20):
                plain.write(b"%d" % n)
                assert (await plain.flush(20)).frame_count == n
            await backend.complete(handle)
            assert (await backend.describe(eid)).state == "completed"
            assert not any(wait.done() for wait in waits)
        for outcome in await asyncio.gather(*waits):
            assert outcome.durability == REPLICATED


async def test_too_few_replicas_are_told_by_their_number(shell, linked, lane):
    level = {"durability": Durability.replicated(2), "durability_timeout": 0.2}

    async def told(ask):
        """The error that names the one replica, which may take longer than the time of one question."""
        with pytest.raises(NotReplicated) as caught:
            await ask()
        assert caught.value.replicas <= 1
        return caught.value if caught.value.replicas else None

    async with await shell.connect(linked.url) as backend:
        _, handle, writer = await opened(backend, lane, **level)
        writer.write(b"1")
        await wait_until_async(lambda: told(lambda: writer.flush(20)))
        error = await wait_until_async(lambda: told(lambda: backend.complete(handle, **level)))
        assert error.outcome is Outcome.APPLIED


async def test_a_deadline_and_a_cancelled_flush_leave_the_frames_stored(shell, linked, lane):
    async with await shell.connect(linked.url) as backend:
        _, _, writer = await opened(backend, lane, durability=REPLICATED, durability_timeout=60)
        with stalled(linked):
            writer.write(b"1")
            with pytest.raises(DeadlineExceeded):
                await writer.flush(0.1)
            assert writer.last_sequence == 1
            if shell.kind == "asyncio":
                task = asyncio.ensure_future(writer.flush(60))
                await stays(task)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        assert (await writer.flush(20)).durability == REPLICATED


async def waited_for(backend, handle):
    point = await backend.create_waitpoint(handle)
    return ff_fast.WaitpointSpec(ff_fast.WaitpointKind.EXTERNAL, b"", point.hmac_token)


CALLS = {
    "complete": lambda backend, handle, eid, spec, **level: backend.complete(handle, b"r", **level),
    "fail": lambda backend, handle, eid, spec, **level: backend.fail(handle, "no", **level),
    "cancel": lambda backend, handle, eid, spec, **level: backend.cancel(eid, **level),
    "suspend": lambda backend, handle, eid, spec, **level: backend.suspend(handle, spec, **level),
}
STATES = {"complete": "completed", "fail": "failed", "cancel": "cancelled", "suspend": "suspended"}


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_reaches_a_level_or_says_that_it_was_applied(name, shell, linked, lane):
    async with await shell.connect(linked.url) as backend:
        level = {"durability": REPLICATED, "durability_timeout": 0.1}
        for stalls in (False, True):
            eid, handle = await claimed(backend, lane)
            call = functools.partial(
                CALLS[name], backend, handle, eid, await waited_for(backend, handle)
            )
            if stalls:
                with stalled(linked):
                    with pytest.raises(NotReplicated) as caught:
                        await call(**level)
                    assert caught.value.outcome is Outcome.APPLIED
                    assert (await backend.describe(eid)).state == STATES[name]
            await call(durability=REPLICATED)
            assert (await backend.describe(eid)).state == STATES[name]


async def test_a_frame_is_appended_up_to_a_level(shell, linked, lane):
    async with await shell.connect(linked.url) as backend:
        _, handle = await claimed(backend, lane)
        frame = Frame(b"1", FrameKind.EVENT)
        outcome = await backend.append_frame(handle, frame)
        assert outcome.durability == Durability.stored()
        outcome = await backend.append_frame(handle, frame, durability=REPLICATED)
        assert (outcome.frame_count, outcome.durability) == (2, REPLICATED)


async def test_a_question_that_a_broken_connection_has_cut_is_asked_again(shell, linked, lane):
    """What was asked on the old connection says nothing about the new one."""
    with ChaosProxy(linked.primary.url) as front:
        async with await shell.connect(front.url) as backend:
            _, _, writer = await opened(backend, lane, durability=REPLICATED, durability_timeout=60)
            with stalled(linked):
                writer.write(b"1")
                wait = asyncio.ensure_future(writer.flush(60))
                await wait_until_async(lambda: stored(writer, 1))
                for _ in range(3):
                    front.cut_all()
                    await stays(wait)
            assert (await wait).durability == REPLICATED


async def stored(writer, last):
    return writer.last_sequence == last


@pytest.mark.long
async def test_no_level_is_claimed_for_frames_that_a_failover_has_lost(shell, pair, lane):
    async with await shell.connect(pair.url) as backend:
        _, _, writer = await opened(backend, lane, durability=REPLICATED, durability_timeout=2)
        writer.write(b"1")
        await writer.flush(20)
        pair.stall()
        writer.write(b"2")
        wait = asyncio.ensure_future(writer.flush(20))
        await wait_until_async(lambda: stored(writer, 2))
        await asyncio.to_thread(pair.promote)
        with pytest.raises(FFError):
            await wait


async def test_a_primary_that_becomes_a_replica_confirms_nothing(shell, pair, lane):
    async with await shell.connect(pair.url) as backend:
        _, _, writer = await opened(backend, lane, durability=REPLICATED, durability_timeout=2)
        writer.write(b"1")
        await writer.flush(20)
        pair.stall()
        writer.write(b"2")
        wait = asyncio.ensure_future(writer.flush(20))
        await wait_until_async(lambda: stored(writer, 2))
        await stays(wait)
        with connect_raw(pair.primary.url) as raw:
            raw.replicaof("127.0.0.1", 1)
            with pytest.raises(NotReplicated):
                await wait
            raw.replicaof("NO", "ONE")


@pytest.mark.long
async def test_a_server_that_falls_silent_is_waited_for_until_the_time_is_up(shell, lane):
    with EmbeddedServer() as server:
        async with await shell.connect(server.url, timeout=1) as backend:
            _, _, writer = await opened(backend, lane, durability=REPLICATED, durability_timeout=60)
            writer.write(b"1")
            wait = asyncio.ensure_future(writer.flush(0.5))
            await wait_until_async(lambda: stored(writer, 1))
            os.kill(server.pid, signal.SIGSTOP)
            try:
                with pytest.raises(DeadlineExceeded):
                    await wait
            finally:
                os.kill(server.pid, signal.SIGCONT)


async def test_a_server_without_a_file_refuses_to_be_synced_before_anything_is_written(
    shell, server, lane
):
    async with await shell.connect(server.url) as backend:
        _, handle, writer = await opened(backend, lane)
        with pytest.raises(UnsupportedServer, match="appendonly"):
            await backend.open_writer(handle, durability=Durability.synced())
        # The writer before is not superseded.
        writer.write(b"1")
        assert (await writer.flush(20)).frame_count == 1
        with pytest.raises(UnsupportedServer):
            await backend.append_frame(
                handle, Frame(b"1", FrameKind.EVENT), durability=Durability.synced()
            )


async def test_frames_that_are_synced_survive_the_death_of_the_server(shell, lane):
    with EmbeddedServer(appendonly=True, appendfsync="everysec") as server:
        async with await shell.connect(server.url) as backend:
            eid, _, writer = await opened(
                backend, lane, durability=Durability.synced(), durability_timeout=10
            )
            writer.write(b"1")
            outcome = await writer.flush(20)
            assert outcome.durability == Durability.synced()
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.to_thread(server.restart)
            assert len(await backend.read_stream(eid, 0)) == 1
            with connect_raw(server.url) as raw:
                raw.config_set("appendonly", "no")
            writer.write(b"2")
            with pytest.raises(UnsupportedServer):
                await writer.flush(20)
            # It was stored all the same.
            assert writer.last_sequence == 2


# -- what a failover has lost ------------------------------------------------------------------------------------------


async def test_frames_that_are_stored_again_have_to_reach_their_level_again(shell, linked, lane):
    options = {"durability": REPLICATED, "durability_timeout": 0.1}
    async with await shell.connect(linked.url, replay_ms=60_000) as backend:
        eid, _, writer = await opened(backend, lane, **options)
        with connect_raw(linked.primary.url) as raw:
            past = Past(raw, eid)
            for n in range(1, 4):
                writer.write(b"%d" % n)
            await wait_until_async(lambda: reached(writer))
            with stalled(linked):
                past.come(cut=False)
                with pytest.raises(NotReplicated):
                    await writer.flush(20)
                assert writer.last_sequence == 3
                with pytest.raises(NotReplicated):
                    await writer.close(20)
        await wait_until_async(lambda: reached(writer))


@pytest.mark.parametrize("closed", [True, False])
async def test_an_end_that_is_lost_before_it_has_its_level_is_made_again_with_its_frames(
    closed, shell, linked, lane
):
    async with await shell.connect(linked.url, replay_ms=60_000) as backend:
        eid, handle, writer = await opened(backend, lane)
        with connect_raw(linked.primary.url) as raw:
            past = Past(raw, eid)
            for n in range(1, 4):
                writer.write(b"%d" % n)
            await (writer.close(20) if closed else writer.flush(20))
            with stalled(linked):
                ending = asyncio.ensure_future(
                    backend.complete(handle, b"r", durability=REPLICATED, durability_timeout=10)
                )

                async def ended():
                    return (await backend.describe(eid)).state == "completed"

                await wait_until_async(ended)
                past.come()
            await ending
        items = await backend.items(eid)
        assert [item.payload for item in items[:-1]] == [b"1", b"2", b"3"]
        assert items[-1] == End("attempt_success")
        assert await backend.read_result(eid) == b"r"


# -- workers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


ENDS = {
    "completed": lambda: b"result",
    "failed": lambda: (_ for _ in ()).throw(ValueError("no")),
}


@pytest.mark.long
@pytest.mark.parametrize("state", ENDS)
def test_the_end_of_a_task_and_its_frames_have_the_level_of_the_worker(state, kind, linked, lane):
    def work(task):
        task.write(b"1")
        levels.append((yield task.flush(5)).durability)
        with connect_raw(linked.replica.url) as replica:
            found.append(replica.xlen(keys.stream(task.execution_id, 0)))
        task.write(b"2")
        return ENDS[state]()

    levels, found = [], []
    with (
        ff_fast.ValkeyBackend.connect(linked.url) as backend,
        Worker(kind, linked.url, work, lane=lane, durability=REPLICATED),
    ):
        eid = backend.create_execution(lane=lane)
        wait_until(lambda: backend.describe(eid).state == state)
    assert (levels, found) == ([REPLICATED], [1])


def test_an_end_that_does_not_reach_the_level_is_applied_once_and_logged(
    kind, linked, lane, caplog
):
    def work(task):
        task.write(b"1")
        return b"result"

    with ff_fast.ValkeyBackend.connect(linked.url) as backend, stalled(linked):
        options = {"durability": REPLICATED, "durability_timeout": 0.05}
        with Worker(kind, linked.url, work, lane=lane, **options):
            eid = backend.create_execution(lane=lane)
            wait_until(lambda: backend.describe(eid).state == "completed")
            wait_until(lambda: any(eid in each for each in caplog.messages))
        found = backend.describe(eid)
        assert (found.attempt_count, found.retry_count) == (1, 0)
        assert len([each for each in caplog.messages if eid in each]) == 1


def test_a_handler_that_gives_its_lease_up_is_told_that_the_level_is_not_reached(
    kind, linked, lane
):
    def work(task):
        task.write(b"1")
        try:
            yield task.delay(3600)
        except NotReplicated as error:
            told.append(error.outcome)
        return b"result"

    told = []
    with ff_fast.ValkeyBackend.connect(linked.url) as backend, stalled(linked):
        options = {"durability": REPLICATED, "durability_timeout": 0.05}
        with Worker(kind, linked.url, work, lane=lane, **options):
            eid = backend.create_execution(lane=lane)
            wait_until(lambda: backend.describe(eid).state == "completed")
    assert told == [Outcome.APPLIED]


def test_a_worker_whose_level_the_server_cannot_confirm_ends(kind, server, lane):
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        backend.create_execution(lane=lane)
        worker = Worker(kind, server.url, lambda task: b"", lane=lane, durability=SYNCED)
        with pytest.raises(UnsupportedServer), worker:
            wait_until(lambda: worker.error is not None)

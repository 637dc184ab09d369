"""Claims that wait in one line: one connection for all, hints in the order of the line, and callers that go away."""

import asyncio
import contextlib
import os
import random
import signal
import sys
import threading
import uuid

import pytest

import ff_fast
from ff_fast import CapabilitySet, ClaimPolicy, _transport, aio, keys
from ff_fast._core import claiming
from ff_fast.errors import FFError

from ..conftest import connect_raw
from ..server.workers import Worker
from ..waiting import wait_until, wait_until_async
from .test_claims import WORKER, _Interrupt, core_of

LONG = ClaimPolicy.with_max_wait(30)


async def _now(condition):
    return condition()


async def reached(condition):
    await wait_until_async(lambda: _now(condition))


@pytest.fixture
def raw(raw):
    """Connected before the test, which must leave no more connections than it found."""
    raw.ping()
    return raw


# The blocking shell has a thread for each call here, of which there are five at least.
MANY = 4


def line_of(backend, lane, *tokens):
    return backend._deployment.offer(lane, tokens).line.waiting


def blocked(raw):
    return [each for each in raw.client_list() if each["cmd"] == "bzmpop" and "b" in each["flags"]]


@pytest.fixture
def no_looks(monkeypatch):
    """Only hints lead to work."""
    monkeypatch.setattr(claiming, "LOOK_EVERY_S", 60.0)


async def waiting(backend, lane, count, **options):
    """Claims that have joined the line one after the other."""
    claims = []
    for _ in range(count):
        claim = backend.claim(lane=lane, policy=LONG, **WORKER, **options)
        claims.append(asyncio.ensure_future(claim))
        await reached(lambda: len(line_of(backend, lane)) == len(claims))
    return claims


# -- connections -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_an_idle_worker_has_few_connections_whatever_its_concurrency(kind, own_server, lane):
    ran = []
    with connect_raw(own_server.url) as raw, ff_fast.ValkeyBackend.connect(own_server.url) as maker:
        raw.ping()
        maker.create_execution(lane=f"{lane}-other")
        before = len(raw.client_list())
        with Worker(
            kind, own_server.url, lambda task: ran.append(None), lane=lane, concurrency=100
        ):
            wait_until(lambda: blocked(raw))
            for _ in range(3):
                assert len(blocked(raw)) <= 1
                assert len(raw.client_list()) - before <= 3
            for _ in range(150):
                maker.create_execution(lane=lane)
            wait_until(lambda: len(ran) == 150)


async def test_each_kind_of_claim_has_a_wait_of_its_own(shell, own_server, lane, no_looks):
    async with await shell.connect(own_server.url) as backend:
        with connect_raw(own_server.url) as raw:
            plain = await waiting(backend, lane, 2)
            gpu = [
                asyncio.ensure_future(
                    backend.claim(
                        lane=lane, policy=LONG, capabilities=CapabilitySet(["gpu"]), **WORKER
                    )
                )
                for _ in range(2)
            ]
            await reached(lambda: len(line_of(backend, lane, "gpu")) == 2)
            await reached(lambda: len(blocked(raw)) == 2)
            for _ in range(2):
                await backend.create_execution(
                    lane=lane, required_capabilities=CapabilitySet(["gpu"])
                )
            await asyncio.wait_for(asyncio.gather(*gpu), 20)
            for _ in range(2):
                await backend.create_execution(lane=lane)
            await asyncio.wait_for(asyncio.gather(*plain), 20)
            await reached(lambda: not blocked(raw))


async def test_the_connection_of_waits_that_have_ended_is_closed(own_server, lane, monkeypatch):
    monkeypatch.setattr(_transport, "MAX_IDLE_S", 0.1)
    with connect_raw(own_server.url) as raw:
        async with aio.ValkeyBackend.connect(own_server.url) as backend:
            claims = await waiting(backend, lane, MANY)
            await reached(lambda: blocked(raw))
            for each in claims:
                await backend.create_execution(lane=lane)
                await asyncio.wait_for(each, 20)
            await reached(lambda: len(raw.client_list()) == 2)


# -- order -------------------------------------------------------------------------------------------


async def test_who_waits_longest_has_the_next_work(shell, server, lane, no_looks):
    async with await shell.connect(server.url) as backend, await shell.connect(server.url) as maker:
        claims = await waiting(backend, lane, MANY)
        for count in range(1, MANY + 1):
            await maker.create_execution(lane=lane)
            await asyncio.wait_for(claims[count - 1], 20)
            assert [each.done() for each in claims] == [True] * count + [False] * (MANY - count)


async def test_many_hints_at_once_serve_as_many_claims(shell, server, raw, lane, no_looks):
    async with await shell.connect(server.url) as backend, await shell.connect(server.url) as maker:
        claims = await waiting(backend, lane, MANY)
        made = await asyncio.gather(*(maker.create_execution(lane=lane) for _ in range(MANY)))
        handles = await asyncio.wait_for(asyncio.gather(*claims), 20)
        assert sorted(each.fields().execution_id for each in handles) == sorted(made)
        # One call may serve both executions of a partition, and leave a hint that leads to nothing.
        partitions = [keys.partition_index(each) for each in made]
        left = {int(each) for each in raw.zrange(keys.ready(lane), 0, -1)}
        assert left <= {each for each in partitions if partitions.count(each) > 1}


async def test_a_wait_ends_though_the_line_goes_on(shell, server, lane):
    async with await shell.connect(server.url) as backend, await shell.connect(server.url) as maker:
        (long,) = await waiting(backend, lane, 1)
        short = await backend.claim(lane=lane, policy=ClaimPolicy.with_max_wait(0.05), **WORKER)
        assert short is None
        assert not long.done()
        eid = await maker.create_execution(lane=lane)
        handle = await asyncio.wait_for(long, 20)
        assert handle.fields().execution_id == eid


async def test_the_line_goes_on_when_the_first_wait_ends(shell, server, lane, no_looks):
    async with await shell.connect(server.url) as backend, await shell.connect(server.url) as maker:
        brief = ClaimPolicy.with_max_wait(0.3)
        first = asyncio.ensure_future(backend.claim(lane=lane, policy=brief, **WORKER))
        await reached(lambda: line_of(backend, lane))
        others = [
            asyncio.ensure_future(backend.claim(lane=lane, policy=LONG, **WORKER)) for _ in range(3)
        ]
        assert await first is None
        await asyncio.gather(*(maker.create_execution(lane=lane) for _ in range(3)))
        assert all(await asyncio.wait_for(asyncio.gather(*others), 20))


async def test_no_claim_of_many_at_once_says_that_there_is_nothing_while_there_is(
    shell, server, lane
):
    """A partition has one hint, however many executions wait in it."""
    async with await shell.connect(server.url) as backend:
        eids = [f"{{fp:{n % 3}}}:{uuid.uuid4()}" for n in range(24)]
        await asyncio.gather(
            *(backend.create_execution(execution_id=each, lane=lane) for each in eids)
        )
        handles = await asyncio.gather(*(backend.claim(lane=lane, **WORKER) for _ in eids))
        assert sorted(each.fields().execution_id for each in handles) == sorted(eids)
        assert await backend.claim(lane=lane, **WORKER) is None


# -- callers that go away ----------------------------------------------------------------------------


async def test_a_hint_for_a_claim_that_has_gone_goes_to_the_next(server, raw, lane, no_looks):
    dice = random.Random(9)
    async with (
        aio.ValkeyBackend.connect(server.url) as backend,
        aio.ValkeyBackend.connect(server.url) as maker,
    ):
        for turns in [*range(10), *(dice.randrange(40) for _ in range(20))]:
            first, second = await waiting(backend, lane, 2)
            await reached(lambda: blocked(raw))
            creation = asyncio.ensure_future(maker.create_execution(lane=lane))
            for _ in range(turns):
                await asyncio.sleep(0)
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await backend.complete(await first)
                await maker.create_execution(lane=lane)
            await creation
            handle = await asyncio.wait_for(second, 20)
            assert handle.fields().attempt_index == 0
            await backend.complete(handle)


async def test_a_hint_that_nobody_waits_for_any_more_goes_back(server, raw, lane, no_looks):
    async with (
        aio.ValkeyBackend.connect(server.url) as backend,
        aio.ValkeyBackend.connect(server.url) as other,
    ):
        for _ in range(10):
            claims = await waiting(backend, lane, 3)
            await reached(lambda: blocked(raw))
            for each in claims:
                each.cancel()
            await asyncio.wait(claims)
            eid = await other.create_execution(lane=lane)
            handle = await asyncio.wait_for(other.claim(lane=lane, policy=LONG, **WORKER), 20)
            assert handle.fields().execution_id == eid
            await other.complete(handle)


async def test_a_lost_connection_ends_no_wait(shell, server, raw, lane):
    async with await shell.connect(server.url) as backend, await shell.connect(server.url) as maker:
        claims = await waiting(backend, lane, MANY)
        for _ in range(2):
            await reached(lambda: blocked(raw))
            for each in blocked(raw):
                raw.client_kill_filter(_id=each["id"])
        made = await asyncio.gather(*(maker.create_execution(lane=lane) for _ in range(MANY)))
        handles = await asyncio.wait_for(asyncio.gather(*claims), 20)
        assert sorted(each.fields().execution_id for each in handles) == sorted(made)


async def test_a_close_ends_every_wait(shell, server, raw, lane, no_looks):
    backend = await shell.connect(server.url)
    claims = await waiting(backend, lane, MANY)
    await reached(lambda: blocked(raw))
    await backend.close()
    for each in claims:
        with pytest.raises(FFError):
            await each
    assert not line_of(backend, lane)
    await reached(lambda: not blocked(raw))


async def test_claims_that_ask_together_and_are_cancelled_lose_nothing(server, raw, lane):
    dice = random.Random(3)
    async with aio.ValkeyBackend.connect(server.url) as backend:
        made = {await backend.create_execution(lane=lane) for _ in range(60)}
        taken = set()

        async def caller():
            while (handle := await backend.claim(lane=lane, **WORKER)) is not None:
                fields = handle.fields()
                assert fields.attempt_index == 0
                taken.add(fields.execution_id)
                await backend.complete(handle)

        for _ in range(12):
            callers = [asyncio.ensure_future(backend.claim(lane=lane, **WORKER)) for _ in range(12)]
            for _ in range(dice.randrange(30)):
                await asyncio.sleep(0)
            for each in callers[::2]:
                each.cancel()
            for each in callers:
                with contextlib.suppress(asyncio.CancelledError):
                    handle = await each
                    if handle is not None:
                        taken.add(handle.fields().execution_id)
                        await backend.complete(handle)
            if len(taken) > 40:
                break
        await reached(lambda: not backend._giving_back)
        await asyncio.gather(*(caller() for _ in range(12)))
        assert taken == made
        assert all(core_of(raw, eid)["reclaim_count"] == "0" for eid in made)


async def test_each_claim_that_asks_together_hears_of_a_refusal(server, lane):
    async with aio.ValkeyBackend.connect(server.url) as backend:
        await backend.create_execution(lane=lane)
        with connect_raw(server.url) as breaker:
            breaker.execute_command("FUNCTION", "DELETE", "ff_fast")
        claims = [backend.claim(lane=lane, **WORKER) for _ in range(8)]
        # The library is loaded again, and one has the work.
        found = await asyncio.gather(*claims)
        assert len([each for each in found if each is not None]) == 1


def test_who_is_interrupted_while_it_waits_for_all_hands_over(server, raw, lane, no_looks):
    with (
        ff_fast.ValkeyBackend.connect(server.url) as backend,
        ff_fast.ValkeyBackend.connect(server.url) as maker,
    ):
        got = []
        followers = [
            threading.Thread(
                target=lambda: got.append(backend.claim(lane=lane, policy=LONG, **WORKER))
            )
            for _ in range(3)
        ]

        def interrupt():
            wait_until(lambda: blocked(raw))
            for each in followers:
                each.start()
            wait_until(lambda: len(line_of(backend, lane)) == 4)
            os.kill(os.getpid(), signal.SIGINT)

        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            backend.claim(lane=lane, policy=LONG, **WORKER)
        interrupter.join()
        for _ in followers:
            maker.create_execution(lane=lane)
        for each in followers:
            each.join(20)
        assert len({each.fields().execution_id for each in got}) == 3


def test_a_waiting_claim_that_is_interrupted_at_any_line_leaves_its_work_to_others(
    server, raw, lane
):
    tracing = sys.gettrace()
    wait = ClaimPolicy.with_max_wait(5)
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        eid = backend.create_execution(lane=lane)
        for first in range(1, 2_000, 29):
            sys.settrace(_Interrupt(first, first + 60 if first % 2 else 0))
            try:
                handle = backend.claim(lane=lane, policy=wait, **WORKER)
            except KeyboardInterrupt:
                handle = None
            finally:
                sys.settrace(tracing)
            if handle is not None:
                break
            assert not line_of(backend, lane)
            handle = backend.claim(lane=lane, policy=wait, **WORKER)
            assert handle.fields().execution_id == eid
            assert core_of(raw, eid)["reclaim_count"] == "0"
            backend.complete(handle)
            eid = backend.create_execution(lane=lane)
    assert 200 < first < 1_900

"""Leases that are kept, and what happens when one is lost."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

import ff_fast
from ff_fast import (
    ClaimPolicy,
    HandleKind,
    OnCancel,
    aio,
    errors,
    keys,
)
from ff_fast._core import leases
from ff_fast._core.leases import LeaseClock, is_lease_lost

from ...heads import set_head
from ...shells import WORKER
from ...waiting import wait_until
from ..streams import server_ms
from ..workers import opened, until
from .attempts import RETRY, read


def lapse(raw, eid):
    """Let the lease of an execution run out, by the server's clock."""
    fields = raw.hgetall(keys.core(eid))
    head = keys.head(eid, int(fields[b"current_attempt_index"]))
    set_head(raw, head, lease_expires_at=server_ms(raw))
    raw.zadd(keys.timers(keys.slot_tag_of(eid)), {f"lease:{eid}": server_ms(raw)})


def test_a_lease_that_is_lost_in_the_middle(worker, backend, lane, state, supervisor, raw):
    lost, over = threading.Event(), threading.Event()
    found = []

    def handler(task):
        writer = yield opened(task)
        task.write("mine")
        yield task.flush()
        lost.set()
        yield until(task, lambda: task.cancelled)
        with pytest.raises(errors.FFError) as caught:
            task.write("too late")
        found.append((caught.value, writer.error))
        over.set()
        return b"not mine any more"

    running = worker(handler, on_cancel=OnCancel.TELL)
    eid = backend.create_execution(lane=lane, retry=RETRY)
    assert lost.wait(10)
    # It hears of the loss at once, and must not be the successor.
    running.ask()
    lapse(raw, eid)
    other = backend.claim(lane=lane, **WORKER, policy=ClaimPolicy.with_max_wait(10))
    assert (other.kind, other.fields().attempt_index) == (HandleKind.RESUMED, 1)
    assert over.wait(10)
    running.result()
    for error in found[0]:
        assert is_lease_lost(error)
    # What the successor does is all that counts: it was neither completed, failed nor cancelled under it.
    assert backend.describe(eid).state == "active"
    backend.complete(other, b"the successor's")
    assert backend.read_result(eid) == b"the successor's"
    assert read(backend, eid, 0) == ([b"mine"], "producer_lost")


def test_a_short_lease_is_kept_under_load(worker, backend, lane, state, supervisor):
    started = threading.Event()

    def handler(task):
        # Longer than its lease.
        end = time.monotonic() + 1.8
        started.set()
        yield opened(task)

        def step():
            task.write("x" * 100)
            sum(range(2_000))
            return time.monotonic() > end

        yield until(task, step)

    worker(handler, lease_ttl_ms=1_500)
    eid = backend.create_execution(lane=lane)
    assert started.wait(10)
    load = threading.Event()

    def spin():
        while not load.is_set():
            sum(range(1_000))

    spinner = threading.Thread(target=spin, daemon=True)
    spinner.start()
    try:
        assert state(eid) == "completed"
    finally:
        load.set()
        spinner.join()
    assert backend.describe(eid).attempt_count == 1


def test_the_keeper_tells_the_writer_at_once(backend, lane):
    eid = backend.create_execution(lane=lane)
    handle = backend.claim(lane=lane, **WORKER)
    told = []
    with backend.keep_lease(handle, told.append) as keeper:
        writer = backend.open_writer(handle)
        writer.write("stored")
        writer.flush()
        backend.cancel(eid)
        wait_until(lambda: told)
        # Nothing was written since: the keeper alone has told it.
        assert isinstance(writer.error, errors.ExecutionNotActive)
        with pytest.raises(errors.ExecutionNotActive):
            writer.write("late")
    assert keeper.error is told[0]
    assert len(told) == 1
    wait_until(lambda: not keeper._thread.is_alive())


def test_the_keeper_of_asyncio_tells_the_writer_at_once(server, lane):
    async def main():
        async with aio.ValkeyBackend.connect(server.url) as backend:
            eid = await backend.create_execution(lane=lane)
            handle = await backend.claim(lane=lane, **WORKER)
            told = []
            async with backend.keep_lease(handle, told.append) as keeper:
                writer = await backend.open_writer(handle)
                writer.write("stored")
                await writer.flush()
                await backend.cancel(eid)
                assert await keeper.wait_lost(10)
                assert isinstance(writer.error, errors.ExecutionNotActive)
            assert keeper.error is told[0]

    asyncio.run(main())


@pytest.fixture
def often(monkeypatch):
    """Leases are renewed long before they lapse: no machine is so slow that one lapses between two renewals."""
    monkeypatch.setattr(leases, "RENEW_AT", 0.001)


def kept(ttl_ms, renew, on_lost, fail=lambda _: None):
    """A keeper of the blocking shell without a backend."""
    return ff_fast.LeaseKeeper(LeaseClock(ttl_ms), renew, fail, on_lost, lambda _: None)


def kept_later(ttl_ms, renew, on_lost, fail=lambda _: None):
    """One of the asyncio shell."""
    spawn = asyncio.get_running_loop().create_task
    return aio.LeaseKeeper(LeaseClock(ttl_ms), renew, fail, on_lost, spawn, lambda _: None)


def _renewing(outcomes):
    """A renewal that raises or returns what it is told, and counts."""
    calls = []

    def renew(*_):
        calls.append(time.monotonic())
        outcome = outcomes[min(len(calls), len(outcomes)) - 1]
        if isinstance(outcome, BaseException):
            raise outcome
        return ff_fast.LeaseRenewal(1, 1)

    return renew, calls


@pytest.mark.usefixtures("often")
def test_a_renewal_that_fails_is_tried_again_soon_until_the_lease_lapses():
    renew, calls = _renewing([errors.Unavailable()])
    told = []
    began = time.monotonic()
    keeper = kept(1_000, renew, told.append)
    wait_until(lambda: told)
    assert isinstance(told[0], errors.LeaseExpired)
    assert time.monotonic() - began >= 1
    assert len(calls) > 3
    assert not keeper.held
    keeper.stop()


@pytest.mark.usefixtures("often")
def test_a_renewal_that_passes_again_keeps_the_lease():
    renew, calls = _renewing([errors.Unavailable(), errors.OutcomeUnknown(), None])
    told = []
    with kept(20_000, renew, told.append) as keeper:
        wait_until(lambda: len(calls) > 5)
        assert keeper.held
    assert told == []
    assert not keeper._thread.is_alive()


@pytest.mark.usefixtures("often")
def test_who_sees_a_loss_finds_the_writers_failed():
    seen = []
    made, told = threading.Event(), threading.Event()

    def renew(_):
        # Its thread may be ahead of the one that made it.
        assert made.wait(10)
        raise errors.StaleOwner

    def fail(error):
        seen.append((keeper.error, keeper.held))

    keeper = kept(30_000, renew, lambda _: told.set(), fail)
    made.set()
    assert told.wait(10)
    assert seen == [(None, True)]
    assert not keeper.held
    keeper.stop()


def test_a_lease_that_was_seen_to_lapse_stays_lost():
    begun, answered = threading.Event(), threading.Event()
    failed, told = [], []

    def renew(_):
        begun.set()
        assert answered.wait(10)
        return ff_fast.LeaseRenewal(1, 1)

    keeper = kept(60, renew, told.append, lambda error: failed.append(threading.get_ident()))
    assert begun.wait(10)
    wait_until(lambda: not keeper.held)
    assert isinstance(keeper.error, errors.LeaseExpired)
    # By whoever looked, and so before a write that comes behind the look.
    assert failed == [threading.get_ident()]
    answered.set()
    wait_until(lambda: not keeper._thread.is_alive())
    assert told == [keeper.error]
    assert not keeper.held
    keeper.stop()


@pytest.mark.parametrize("waits", ["wait_cancelled", "wait_lost"])
def test_who_waits_hears_of_a_loss_during_a_renewal(waits):
    begun, answered = threading.Event(), threading.Event()

    def renew(_):
        begun.set()
        assert answered.wait(10)
        raise errors.Unavailable

    keeper = kept(600, renew, lambda _: None)
    heard = []
    waiting = threading.Thread(target=lambda: heard.append(getattr(keeper, waits)(10)))
    waiting.start()
    assert begun.wait(10)
    keeper._abandon(errors.StaleOwner())
    assert not keeper.held
    waiting.join(5)
    assert heard == [True]
    answered.set()
    keeper.stop()


def test_a_lease_of_asyncio_that_was_seen_to_lapse_stays_lost():
    async def main():
        failed, told = [], []

        async def renew():
            return ff_fast.LeaseRenewal(1, 1)

        keeper = kept_later(60, renew, told.append, failed.append)
        # The loop stands still until the lease has lapsed; another thread looks, and leaves the loop's writers alone.
        looks = []
        other = threading.Thread(
            target=lambda: wait_until(lambda: looks.append(keeper.held) or not looks[-1])
        )
        other.start()
        other.join(10)
        assert (looks[-1], failed, keeper.error) == (False, [], None)
        assert not keeper.held
        assert failed == [keeper.error]
        # The callback is not called within the look.
        assert told == []
        assert await keeper.wait_lost(5)
        await asyncio.sleep(0)
        assert told == [keeper.error]
        assert not keeper.held
        await keeper.stop()

    asyncio.run(main())


def test_a_late_renewal_of_asyncio_revives_nothing_that_another_thread_has_seen_lapse():
    async def main():
        failed, looks = [], []

        async def renew():
            # The answer is there before the lease lapses; the loop stands still, and comes to it behind that.
            other = threading.Thread(
                target=lambda: wait_until(lambda: looks.append(keeper.held) or not looks[-1])
            )
            other.start()
            other.join(10)
            return ff_fast.LeaseRenewal(1, 1)

        keeper = kept_later(60, renew, lambda _: None, failed.append)
        assert await keeper.wait_lost(10)
        assert not looks[-1]
        assert isinstance(keeper.error, errors.LeaseExpired)
        assert failed == [keeper.error]
        await keeper.stop()

    asyncio.run(main())


def test_a_look_that_a_renewal_overtakes_says_what_the_keeper_says(monkeypatch):
    async def main():
        async def renew():
            return ff_fast.LeaseRenewal(1, 1)

        def time_of_look():
            # The renewal comes between the look at the clock and what follows from it.
            if not overtaken:
                overtaken.append(True)
                keeper._clock.sending()
                assert keeper._renewed()
                return end
            return real()

        overtaken, looks = [], []
        keeper = kept_later(60_000, renew, lambda _: None, lambda _: None)
        end, real = keeper._clock.held_until, time.monotonic
        monkeypatch.setattr(leases, "time", SimpleNamespace(monotonic=time_of_look))
        other = threading.Thread(target=lambda: looks.append(keeper.held))
        other.start()
        other.join(10)
        assert looks == [True]
        assert keeper.error is None
        await keeper.stop()

    asyncio.run(main())


def test_a_task_that_sees_its_lease_lapse_writes_no_more(worker, backend, lane, monkeypatch):
    # No renewal comes in time, no keeper finds out by itself, and nobody tells it.
    monkeypatch.setattr(leases, "RENEW_AT", 1_000)
    over = threading.Event()
    found = []

    def handler(task):
        writer = yield opened(task)

        def lapsed():
            # Not before: the lease must not lapse while the handler is called. Each time, as the subscription renews it.
            task._keeper._clock.held_until = 0.0
            return task.cancelled

        yield until(task, lapsed)
        for write in (writer.write, task.write, lambda _: task.writer):
            try:
                write("too late")
            except errors.FFError as error:
                found.append(error)
        found.append(task.lost)
        over.set()

    worker(handler, on_cancel=OnCancel.TELL)
    backend.create_execution(lane=lane)
    assert over.wait(10)
    *refused, lost = found
    assert lost
    assert [type(error) for error in refused] == [errors.LeaseExpired] * 3


def test_a_lease_as_long_as_it_may_be_is_kept():
    with kept(2**48, lambda _: None, lambda _: None) as keeper:
        assert keeper._thread.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_raises_ends_the_keeper_only():
    renew, _ = _renewing([errors.StaleOwner()])

    def on_lost(error):
        raise ValueError("the caller's")

    keeper = kept(30, renew, on_lost)
    wait_until(lambda: not keeper._thread.is_alive())
    assert isinstance(keeper.error, errors.StaleOwner)
    keeper.stop()


def test_a_callback_of_asyncio_that_raises_is_reported_by_the_loop(server, lane):
    async def main():
        complaints = []
        asyncio.get_running_loop().set_exception_handler(lambda _, c: complaints.append(c))

        def on_lost(error):
            raise ValueError("the caller's")

        async with aio.ValkeyBackend.connect(server.url) as backend:
            eid = await backend.create_execution(lane=lane)
            handle = await backend.claim(lane=lane, **WORKER)
            async with backend.keep_lease(handle, on_lost) as keeper:
                await backend.cancel(eid)
                assert await keeper.wait_lost(10)
            assert isinstance(keeper.error, errors.ExecutionNotActive)
            await keeper.stop()
        (complaint,) = complaints
        assert str(complaint["exception"]) == "the caller's"

    asyncio.run(main())


@pytest.mark.usefixtures("often")
def test_stopping_a_keeper_of_asyncio_in_the_middle_of_a_renewal():
    async def main():
        begun = asyncio.Event()
        told = []

        async def renew():
            begun.set()
            await asyncio.get_running_loop().create_future()

        keeper = kept_later(30_000, renew, told.append)
        await begun.wait()
        await asyncio.wait_for(keeper.stop(), 5)
        await keeper.stop()
        assert told == []
        assert keeper.error is None
        # And one that hangs is over when the lease is.
        keeper = kept_later(100, renew, told.append)
        assert await keeper.wait_lost(5)
        assert isinstance(told[0], errors.LeaseExpired)
        await keeper.stop()

    asyncio.run(main())


def test_closing_the_backend_ends_its_keepers(kind, server, lane, backend):
    backend.create_execution(lane=lane)
    told = []
    if kind == "sync":
        own = ff_fast.ValkeyBackend.connect(server.url)
        keeper = own.keep_lease(own.claim(lane=lane, **WORKER), told.append)
        own.close()
        wait_until(lambda: not keeper._thread.is_alive())
    else:

        async def main():
            own = await aio.ValkeyBackend.connect(server.url)
            keeper = own.keep_lease(await own.claim(lane=lane, **WORKER), told.append)
            await own.close()
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return keeper

        keeper = asyncio.run(main())
    assert isinstance(told[0], errors.Unavailable)
    assert not keeper.held

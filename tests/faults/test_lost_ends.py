"""Calls that release a lease, where a failover loses what they have done: while they ask for a level, or afterwards.

The connections may stay open, so that nobody hears of the loss.
"""

import asyncio
import logging

import pytest

import ff_fast
from ff_fast import Durability, End, Gap, StreamFrame, WaitpointKind, WaitpointSpec
from ff_fast.errors import FramesLost, NotReplicated, SequenceGap, StaleOwner

from ..conftest import connect_raw
from ..server.workers import Worker
from ..shells import KINDS, with_option
from ..waiting import wait_until
from .failover import Failover, Past
from .releases import complete, delay, fail, suspend, wait_children
from .stored import claimed

REPLICATED = Durability.replicated()
SUCCESS = End("attempt_success")


@pytest.fixture
def raw(raw):
    """Connected before the test, which must leave no connection more than there were."""
    raw.ping()
    return raw


@pytest.fixture(scope="module")
def linked():
    """A primary with a replica."""
    with Failover() as running:
        yield running


async def spec_of(backend, handle):
    point = await backend.create_waitpoint(handle)
    return WaitpointSpec(WaitpointKind.EXTERNAL, b"", point.hmac_token)


async def written(backend, raw, eid, handle, *, closed):
    """Write ten frames of which five survive; return the past, what was read of them, and the writer."""
    writer = await backend.open_writer(handle)
    for n in range(1, 11):
        if n == 6:
            past = Past(raw, eid)
        writer.write(b"%d" % n)
        await writer.flush(20)
    seen = list(await backend.read_stream(eid))
    if closed:
        await writer.close(20)
    return past, seen, writer


def frames_of(items):
    return [item for item in items if isinstance(item, StreamFrame)]


# -- while it asks for a level ---------------------------------------------------------------------------------------


class Stalled:
    """A link to the replica that has stalled, and a call that waits for it; the call is lost when it was applied."""

    def __init__(self, linked, eid, past, state):
        self.linked, self.eid, self.past, self.state = linked, eid, past, state

    def lose(self, times=1):
        """Lose what the call has done, so often; then let the replica have everything."""
        try:
            with connect_raw(self.linked.primary.url) as raw:
                for _ in range(times):
                    self.wait_for_end()
                    self.past.come(cut=False)
                    self.ask_again(raw)
                self.wait_for_end()
        finally:
            self.linked.link.release()

    def wait_for_end(self):
        with ff_fast.ValkeyBackend.connect(self.linked.primary.url) as backend:
            wait_until(lambda: backend.describe(self.eid).state == self.state)

    def ask_again(self, raw):
        """Let the question that waits end, so that it is put again."""
        waiting = wait_until(
            lambda: [each["id"] for each in raw.client_list() if each["cmd"] == "wait"]
        )
        for each in waiting:
            raw.client_unblock(each)


CALLS = {
    "complete": lambda backend, handle, spec, **level: backend.complete(handle, b"r", **level),
    "fail": lambda backend, handle, spec, **level: backend.fail(handle, "no", **level),
    "suspend": lambda backend, handle, spec, **level: backend.suspend(handle, spec, **level),
}
STATES = {"complete": "completed", "fail": "failed", "suspend": "suspended"}


@pytest.mark.long
@pytest.mark.parametrize(
    "name, closed, losses",
    [
        ("complete", True, 1), ("complete", False, 1), ("complete", True, 2), ("fail", True, 1), ("fail", False, 1),
        ("suspend", True, 1), ("suspend", False, 1),
    ],
)  # fmt: skip
async def test_a_call_that_is_lost_between_two_questions_is_made_again_with_its_frames(
    name, closed, losses, shell, linked, lane
):
    async with await shell.connect(linked.url, replay_ms=60_000) as backend:
        eid, handle = await claimed(backend, lane)
        spec = await spec_of(backend, handle)
        with connect_raw(linked.primary.url) as raw:
            past, seen, writer = await written(backend, raw, eid, handle, closed=closed)
        await asyncio.to_thread(linked.stall)
        call = CALLS[name](backend, handle, spec, durability=REPLICATED, durability_timeout=30)
        loses = Stalled(linked, eid, past, STATES[name]).lose
        await asyncio.gather(call, asyncio.to_thread(loses, losses))
        page = await backend.read_stream(eid)
        assert (list(page), page.gaps) == (seen, ())
        assert (await backend.describe(eid)).state == STATES[name]
        with connect_raw(linked.replica.url) as replica:
            assert replica.xlen(ff_fast.keys.stream(eid, 0)) >= 10
        del writer


@pytest.mark.long
@pytest.mark.parametrize("limits", [{"replay_bytes": 1}, {"replay_ms": 0}])
async def test_what_is_not_held_is_told_by_the_call_that_asks(limits, shell, linked, lane):
    async with await shell.connect(linked.url, **limits) as backend:
        eid, handle = await claimed(backend, lane)
        with connect_raw(linked.primary.url) as raw:
            past, _, _ = await written(backend, raw, eid, handle, closed=True)
        await asyncio.to_thread(linked.stall)
        lost = Stalled(linked, eid, past, "completed")

        def lose():
            with connect_raw(linked.primary.url) as raw:
                lost.wait_for_end()
                past.come(cut=False)
                lost.ask_again(raw)

        call = backend.complete(handle, b"r", durability=REPLICATED, durability_timeout=30)
        told, _ = await asyncio.gather(call, asyncio.to_thread(lose), return_exceptions=True)
        linked.link.release()
        assert (await backend.describe(eid)).state == "active"
        if "replay_ms" in limits:
            # Nothing can be stored again, nor said to be lost.
            assert isinstance(told, SequenceGap)
            return
        assert isinstance(told, FramesLost)
        assert (told.first, told.last) == (6, 10)
        # The caller was told.
        await backend.complete(handle, b"r", durability=REPLICATED)
        assert (await backend.items(eid))[5:] == [Gap(6, 11, "lost"), SUCCESS]


@pytest.mark.long
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_task_that_is_lost_while_it_asks_is_made_again(
    kind, held, linked, lane, caplog
):
    caplog.set_level(logging.ERROR)
    begun = []

    def work(task):
        yield task.write(b"1")
        yield task.flush(5)
        with connect_raw(linked.primary.url) as raw:
            past = Past(raw, task.execution_id)
        yield task.write(b"2")
        yield task.flush(5)
        linked.stall()
        begun.append(past)
        return b"r"

    url = with_option(linked.url, "replay_ms=60000" if held else "replay_bytes=1")
    with (
        ff_fast.ValkeyBackend.connect(linked.primary.url) as backend,
        Worker(kind, url, work, lane=lane, durability=REPLICATED, durability_timeout=30),
    ):
        eid = backend.create_execution(lane=lane)
        (past,) = wait_until(lambda: begun)
        lost = Stalled(linked, eid, past, "completed")
        try:
            lost.wait_for_end()
            with connect_raw(linked.primary.url) as raw:
                past.come(cut=False)
                lost.ask_again(raw)
            if not held:
                lost.state = "failed"
            lost.wait_for_end()
        finally:
            linked.link.release()
        items = list(backend.tail(eid))
        if held:
            assert [item.payload for item in items[:-1]] == [b"1", b"2"]
            assert items[-1] == SUCCESS
        else:
            reason = backend.describe(eid).failure_reason
            assert reason.startswith("FramesLost: ")
            assert items[1:] == [Gap(2, 3, "lost"), End("attempt_failure", error=reason)]


# -- afterwards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [True, False])
async def test_a_repeat_after_a_level_that_was_not_reached_stores_the_frames_again(
    cut, shell, server, raw, lane
):
    async with await shell.connect(server.url, replay_ms=60_000) as backend:
        eid, handle = await claimed(backend, lane)
        past, seen, _ = await written(backend, raw, eid, handle, closed=True)
        level = {"durability": REPLICATED, "durability_timeout": 0.001}
        for _ in range(2):
            with pytest.raises(NotReplicated):
                await backend.complete(handle, b"r", **level)
            items = await backend.items(eid)
            assert (items[:-1], items[-1]) == (seen, SUCCESS)
            past.come(cut=cut)
        await backend.complete(handle, b"r")
        assert (await backend.items(eid))[:-1] == seen


@pytest.mark.parametrize(
    "release",
    [
        complete,
        *(pytest.param(each, marks=pytest.mark.long) for each in (delay, wait_children, suspend)),
    ],
)
async def test_a_repeat_of_a_release_that_was_lost_with_frames_is_no_success(
    release, shell, server, raw, lane
):
    """The caller has heard of success, so nothing is held; the frames that were stored stay known."""
    async with await shell.connect(server.url) as backend:
        eid, handle = await claimed(backend, lane)
        past, _, _ = await written(backend, raw, eid, handle, closed=True)
        await release(backend, handle)
        past.come(cut=False)
        for _ in range(2):
            with pytest.raises(SequenceGap) as told:
                await release(backend, handle)
            assert (told.value.expected, told.value.got) == (6, 11)
        await fail(backend, handle)
        assert (await backend.describe(eid)).state == "failed"


async def test_a_repeat_of_an_end_that_was_lost_alone_is_made_again(shell, server, raw, lane):
    async with await shell.connect(server.url) as backend:
        eid, handle = await claimed(backend, lane)
        _, seen, _ = await written(backend, raw, eid, handle, closed=True)
        past = Past(raw, eid)
        for _ in range(2):
            await backend.complete(handle, b"r")
            past.come(cut=False)
        await backend.complete(handle, b"r")
        assert (await backend.items(eid))[:-1] == seen


async def test_an_end_of_another_worker_is_not_taken_for_the_own_one(shell, server, raw, lane):
    """The claim was lost, and somebody else has got the execution under the same epoch."""
    async with await shell.connect(server.url) as backend, await shell.connect(server.url) as other:
        eid = await backend.create_execution(lane=lane)
        past = Past(raw, eid)
        queue = ff_fast.keys.eligible(ff_fast.keys.slot_tag_of(eid), lane)
        waits = raw.dump(queue)
        handle = await backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")
        past.come(cut=False)
        raw.restore(queue, 0, waits)
        others = await other.claim(lane=lane, worker_id="v", worker_instance_id="v-1")
        assert others.fields().lease_epoch == handle.fields().lease_epoch
        for ended in (False, True):
            if ended:
                await other.complete(others, b"theirs")
            for release in (complete, fail, delay):
                with pytest.raises(StaleOwner):
                    await release(backend, handle)
            with pytest.raises(StaleOwner):
                await backend.open_writer(handle)
        assert await backend.read_result(eid) == b"theirs"

"""Acknowledged frames that a failover loses: their writer stores them again, or the stream says that they are lost.

Real failovers show the whole; an execution that is taken back to an earlier state shows the rest in less time.
"""

import asyncio
import json

import pytest

import ff_fast
from ff_fast import (
    End,
    FrameKind,
    Gap,
    StreamFrame,
    StreamMode,
    TailVisibility,
    keys,
)
from ff_fast.errors import FramesLost, SequenceGap, StateLost

from ..heads import head_of, set_head
from ..server.readers import Reader
from ..server.workers import Worker
from ..shells import KINDS, with_option
from ..waiting import wait_until, wait_until_async
from .failover import Past
from .releases import complete, delay, fail, suspend, wait_children
from .stored import claimed

ALL, EXCLUDE = TailVisibility.ALL, TailVisibility.EXCLUDE_BEST_EFFORT
MODES = {
    "durable": StreamMode.durable(),
    "summary": StreamMode.durable_summary(),
    "best_effort": StreamMode.best_effort_live(600_000),
}
SUCCESS = End("attempt_success")


@pytest.fixture
def raw(raw):
    """Connected before the test, which must leave no connection more than there were."""
    raw.ping()
    return raw


async def put(writer, first, last, mode=None):
    """Write frames and wait until they are stored, each in a batch of its own."""
    for n in range(first, last + 1):
        assert writer.write(b'{"f%d":%d}' % (n % 7, n), mode=mode) == n
        await writer.flush(20)


def frames_of(items):
    return [item for item in items if isinstance(item, StreamFrame)]


def gaps_of(items):
    return [item for item in items if isinstance(item, Gap)]


def held_of(backend):
    """What the backend holds of its only lease."""
    (place,) = backend.wrapped._deployment.places._places.values()
    return place.held


@pytest.mark.parametrize("mode", MODES)
async def test_a_writer_stores_again_what_a_failover_has_lost(mode, pair, shell, lane):
    async with await shell.connect(pair.url) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle, mode=MODES[mode])
        await put(writer, 1, 5)
        pair.stall()
        await put(writer, 6, 10)
        seen = list(await backend.read_stream(eid))
        pair.promote()
        writer.write(b"{}")
        await writer.flush(20)
        await writer.close(20)
        await backend.complete(handle, b"result")
        items = await backend.items(eid)
        assert frames_of(items)[:10] == seen
        assert items[-1] == End("attempt_success")
        assert len(items) == 12


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
async def test_a_running_tail_gets_every_frame_once_though_the_writer_says_nothing(
    mode, shell, server, raw, lane
):
    """A writer that waits for its model asks the next server by itself."""
    async with await shell.connect(server.url, replay_ms=60_000) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle, mode=MODES[mode])
        await put(writer, 1, 5)
        past = Past(raw, eid)
        await put(writer, 6, 10)
        reader = Reader(shell.kind, server.url, eid)
        await asyncio.to_thread(reader.wait_for, 10)
        past.come()

        async def stored():
            return head_of(raw, keys.head(eid, 0)).last_id.endswith(b"-10")

        await wait_until_async(stored, 10)
        await put(writer, 11, 11)
        await backend.complete(handle)
        items = await asyncio.to_thread(reader.result, 30)
        assert items[-1] == SUCCESS
        assert [item.sequence for item in items[:-1]] == list(range(1, 12))


# -- calls that release the lease ------------------------------------------------------------------------------------


RELEASES = [complete, fail, delay, wait_children, suspend]


async def by_open(backend, handle, raw, eid):
    writer = await backend.open_writer(handle)
    await put(writer, 1, 5)
    past = Past(raw, eid)
    await put(writer, 6, 10)
    return past, writer


async def by_closed(backend, handle, raw, eid):
    past, writer = await by_open(backend, handle, raw, eid)
    await writer.close(20)
    return past, None


async def by_two(backend, handle, raw, eid):
    past, _ = await by_closed(backend, handle, raw, eid)
    return past, await backend.open_writer(handle)


async def by_append_frame(backend, handle, raw, eid):
    for n in range(1, 11):
        if n == 6:
            past = Past(raw, eid)
        await backend.append_frame(handle, ff_fast.Frame(b"%d" % n, FrameKind.EVENT))
    return past, None


WRITTEN = [by_open, by_closed, by_two, by_append_frame]


@pytest.mark.parametrize(
    "written, release",
    [
        *((written, complete) for written in WRITTEN),
        *((by_closed, release) for release in RELEASES[1:]),
        (by_open, fail),
    ],
)
async def test_a_call_that_releases_the_lease_stores_them_before(
    written, release, shell, server, raw, lane
):
    async with await shell.connect(server.url, replay_ms=60_000) as backend:
        eid, handle = await claimed(backend, lane)
        past, writer = await written(backend, handle, raw, eid)
        seen = list(await backend.read_stream(eid))
        past.come(cut=False)
        await release(backend, handle)
        page = await backend.read_stream(eid)
        assert (list(page), page.gaps) == (seen, ())
        assert len(seen) == 10
        del writer


async def test_a_call_of_another_backend_is_refused(shell, server, raw, lane):
    """Who has not written them has nothing to store."""
    async with await shell.connect(server.url) as backend, await shell.connect(server.url) as other:
        eid, handle = await claimed(backend, lane)
        past, _ = await by_closed(backend, handle, raw, eid)
        past.come()
        for _ in range(2):
            with pytest.raises(SequenceGap):
                await other.complete(handle, last_sequence=10)
        # What another backend names is not what this one has lost.
        with pytest.raises(SequenceGap):
            await backend.complete(handle, last_sequence=11)
        await backend.complete(handle)
        assert len(frames_of(await backend.items(eid))) == 10


async def test_append_frame_goes_on_behind_them(shell, server, raw, lane):
    async with await shell.connect(server.url, replay_ms=60_000) as backend:
        eid, handle = await claimed(backend, lane)
        past, _ = await by_closed(backend, handle, raw, eid)
        seen = list(await backend.read_stream(eid))
        past.come()
        outcome = await backend.append_frame(handle, ff_fast.Frame(b"11", FrameKind.EVENT))
        assert outcome.frame_count == 11
        await backend.complete(handle)
        items = await backend.items(eid)
        assert frames_of(items)[:10] == seen
        assert len(items) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_a_handler_does_not_notice(kind, server, raw, lane):
    def work(task):
        yield task.write(b"1")
        yield task.flush(5)
        past = Past(raw, task.execution_id)
        yield task.write(b"2")
        yield task.flush(5)
        past.come()

    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        with Worker(kind, server.url, work, lane=lane):
            eid = backend.create_execution(lane=lane)
            wait_until(lambda: backend.describe(eid).state == "completed")
        page = backend.read_stream(eid)
        assert ([frame.payload for frame in page], page.gaps) == ([b"1", b"2"], ())


# -- openings and claims ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_a_writer_whose_opening_is_lost_opens_again_and_goes_on(
    mode, shell, server, raw, lane
):
    async with await shell.connect(server.url, replay_ms=60_000) as backend:
        eid, handle = await claimed(backend, lane)
        unopened = Past(raw, eid)
        first = await backend.open_writer(handle, mode=MODES[mode])
        await put(first, 1, 3)
        once = Past(raw, eid)
        second = await backend.open_writer(handle, mode=MODES[mode])
        await put(second, 4, 6)
        seen = list(await backend.read_stream(eid))
        # The server knows the first opening alone, and then none.
        for past, last in ((once, 7), (unopened, 8)):
            past.come()
            await put(second, last, last)
            assert list(await backend.read_stream(eid))[:6] == seen
        # What the writer before it has not stored is not taken for frames of this one.
        with pytest.raises(StateLost):
            await put(first, 4, 4)
        await second.close(20)
        await backend.complete(handle)
        items = await backend.items(eid)
        assert [item.sequence for item in items[:-1]] == list(range(1, 9))


async def test_a_lost_opening_of_a_closed_writer_is_made_again(shell, server, raw, lane):
    async with await shell.connect(server.url, replay_ms=60_000) as backend:
        eid, handle = await claimed(backend, lane)
        past = Past(raw, eid)
        await by_closed(backend, handle, raw, eid)
        seen = list(await backend.read_stream(eid))
        past.come()
        await backend.complete(handle)
        assert list(await backend.read_stream(eid)) == seen


async def test_a_lost_claim_is_named(shell, server, raw, lane):
    async with await shell.connect(server.url) as backend:
        eid = await backend.create_execution(lane=lane)
        past = Past(raw, eid)
        handle = await backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")
        writer = await backend.open_writer(handle)
        await put(writer, 1, 3)
        past.come()
        with pytest.raises(StateLost):
            await put(writer, 4, 4)
        with pytest.raises(StateLost):
            await backend.complete(handle)


async def test_who_was_superseded_after_the_failover_stores_nothing(shell, server, raw, lane):
    async with await shell.connect(server.url) as backend, await shell.connect(server.url) as other:
        eid, handle = await claimed(backend, lane)
        past, _ = await by_closed(backend, handle, raw, eid)
        past.come()
        newer = await other.open_writer(handle)
        for n in range(6, 16):
            newer.write(b"new %d" % n)
        await newer.flush(20)
        for _ in range(2):
            with pytest.raises(SequenceGap):
                await backend.complete(handle)
        await other.complete(handle)
        assert frames_of(await backend.items(eid))[-1].payload == b"new 15"


# -- what is not held is lost, and everybody hears of it ---------------------------------------------------------------


# Bytes that hold one batch of one frame, and not two.
BYTES = {"durable": 120, "summary": 250, "best_effort": 120}


async def lost(backend, raw, lane, mode, kept=0):
    """Ten frames of which five survive, and of the others the last *kept* are held."""
    eid, handle = await claimed(backend, lane)
    writer = await backend.open_writer(handle, mode=mode)
    await put(writer, 1, 5)
    past = Past(raw, eid)
    await put(writer, 6, 10)
    assert len(held_of(backend)) == kept
    seen = list(await backend.read_stream(eid))
    return eid, handle, writer, past, seen


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("mode", MODES)
async def test_what_is_not_held_is_lost_for_all(mode, kept, shell, server, raw, lane):
    async with await shell.connect(server.url, replay_bytes=BYTES[mode] if kept else 1) as backend:
        eid, handle, writer, past, seen = await lost(backend, raw, lane, MODES[mode], kept)
        reader = Reader(shell.kind, server.url, eid)
        await asyncio.to_thread(reader.wait_for, 10)
        past.come(cut=False)
        last = 10 - kept
        gap = Gap(6, last + 1, "lost")
        writer.write(b'{"f":11}')
        with pytest.raises(FramesLost) as told:
            await writer.flush(20)
        assert (told.value.first, told.value.last) == (6, last)
        assert not told.value.retryable
        await put(writer, 12, 12)
        await backend.complete(handle)
        after = list(range(last + 1, 13))
        items = await backend.items(eid)
        assert gaps_of(items) == [gap]
        assert [frame.sequence for frame in frames_of(items)] == [1, 2, 3, 4, 5, *after]
        assert frames_of(items)[: 5 + kept] == seen[:5] + seen[last:]
        items = await backend.items(eid, visibility=EXCLUDE)
        assert gaps_of(items) == [gap]
        hidden = mode == "best_effort"
        assert len(frames_of(items)) == (0 if hidden else 5 + len(after))
        # A reader that has seen them gets nothing twice; others begin among them.
        items = await asyncio.to_thread(reader.result, 30)
        assert [frame.sequence for frame in frames_of(items)] == list(range(1, 13))
        assert gaps_of(items) == []
        for n in range(5, last):
            page = await backend.read_stream(eid, after=seen[n - 1].stream_id)
            assert page.gaps == (Gap(n + 1, last + 1, "lost"),)
            assert [frame.sequence for frame in page] == after
        page = await backend.read_stream(eid, after=seen[last - 1].stream_id)
        assert (page.gaps, len(page)) == ((), len(after))
        if mode == "summary":
            summary = await backend.read_summary(eid)
            assert summary.version == 12
            assert json.loads(summary.document_json) == {
                **{f"f{n % 7}": n for n in range(1, 11)}, "f": 11, "f5": 12,
            }  # fmt: skip


@pytest.mark.parametrize("written", WRITTEN)
async def test_an_end_is_told_once_of_what_is_lost(written, shell, server, raw, lane):
    async with await shell.connect(server.url, replay_bytes=1) as backend:
        eid, handle = await claimed(backend, lane)
        past, writer = await written(backend, handle, raw, eid)
        past.come()
        with pytest.raises(FramesLost) as told:
            await backend.complete(handle, b"result")
        assert (told.value.first, told.value.last) == (6, 10)
        assert (await backend.describe(eid)).state == "active"
        await backend.complete(handle, b"result")
        for visibility in (ALL, EXCLUDE):
            items = await backend.items(eid, visibility=visibility)
            assert items[5:] == [Gap(6, 11, "lost"), SUCCESS]
        del writer


async def test_a_failure_is_not_held_up_by_a_loss(shell, server, raw, lane):
    async with await shell.connect(server.url, replay_bytes=1) as backend:
        eid, handle = await claimed(backend, lane)
        past, _ = await by_closed(backend, handle, raw, eid)
        past.come()
        await backend.fail(handle, "reason")
        assert (await backend.items(eid))[5:] == [
            Gap(6, 11, "lost"),
            End("attempt_failure", error="reason"),
        ]


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_an_attempt_that_lost_its_tail_is_no_success(kind, server, raw, lane):
    def work(task):
        past = Past(raw, task.execution_id)
        yield task.write(b"1")
        yield task.flush(5)
        past.come()

    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        with Worker(kind, with_option(server.url, "replay_bytes=1"), work, lane=lane):
            eid = backend.create_execution(lane=lane)
            wait_until(lambda: backend.describe(eid).state == "failed")
        assert backend.describe(eid).failure_reason.startswith("FramesLost: ")


# -- more than one failover ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_a_second_failover_after_a_replay_loses_nothing_either(
    mode, shell, server, raw, lane
):
    async with await shell.connect(server.url, replay_ms=60_000) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle, mode=MODES[mode])
        pasts = []
        for first in (1, 4, 7):
            await put(writer, first, first + 2)
            pasts.append(Past(raw, eid))
        seen = list(await backend.read_stream(eid))
        for n, past in enumerate((pasts[1], pasts[0], pasts[2], pasts[0]), 10):
            past.come(cut=n % 2 == 0)
            await put(writer, n, n)
            assert list(await backend.read_stream(eid))[:9] == seen
        await writer.close(20)
        await backend.complete(handle)
        items = await backend.items(eid)
        assert [item.sequence for item in items[:-1]] == list(range(1, 14))


async def test_a_second_failover_is_told_of_too(shell, server, raw, lane):
    async with await shell.connect(server.url, replay_bytes=1) as backend:
        eid, handle, writer, past, _ = await lost(backend, raw, lane, MODES["summary"])
        for n in (11, 12):
            past.come(cut=False)
            writer.write(b'{"f":%d}' % n)
            with pytest.raises(FramesLost) as told:
                await writer.flush(20)
            assert (told.value.first, told.value.last) == (6, n - 1)
        await backend.complete(handle)
        items = await backend.items(eid)
        assert gaps_of(items) == [Gap(6, 12, "lost")]
        assert [frame.sequence for frame in frames_of(items)][5:] == [12]
        assert json.loads((await backend.read_summary(eid)).document_json)["f"] == 12


@pytest.mark.parametrize("mode", MODES)
async def test_the_clock_of_the_new_primary_may_be_behind(mode, shell, server, raw, lane):
    async with await shell.connect(server.url, replay_ms=60_000) as backend:
        eid, handle = await claimed(backend, lane)
        head = keys.head(eid, 0)
        ms = int(head_of(raw, head).last_id.partition(b"-")[0])
        set_head(raw, head, last_id=b"%d-0" % (ms + 3_600_000))
        writer = await backend.open_writer(handle, mode=MODES[mode])
        await put(writer, 1, 5)
        past = Past(raw, eid)
        await put(writer, 6, 10)
        seen = list(await backend.read_stream(eid))
        past.come()
        await put(writer, 11, 11)
        await backend.complete(handle)
        items = frames_of(await backend.items(eid))
        assert items[:10] == seen
        assert items[10].stream_id == f"{ms + 3_600_000}-11"


# -- what it takes ---------------------------------------------------------------------------------------------------


async def test_what_is_held_has_a_size(shell, server, lane):
    async with await shell.connect(server.url, replay_ms=60_000, replay_bytes=1024) as backend:
        _, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        await put(writer, 1, 30)
        assert 5 <= len(held_of(backend)) <= 15
        writer.write(b"x" * 5000)
        await writer.flush(20)
        assert len(held_of(backend)) == 0


async def test_what_is_held_goes_although_nothing_happens_any_more(shell, server, lane):
    async with await shell.connect(server.url, replay_ms=1) as backend:
        _, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        await put(writer, 1, 3)
        held = held_of(backend)

        async def gone():
            return len(held) == 0

        await wait_until_async(gone)


async def test_a_lease_that_is_released_holds_nothing(shell, server, lane):
    async with await shell.connect(server.url, replay_ms=60_000) as backend:
        _, handle = await claimed(backend, lane)
        await put(await backend.open_writer(handle), 1, 3)
        held = held_of(backend)
        assert len(held) == 3
        await backend.complete(handle)
        assert len(held) == 0

"""A primary that dies before its replica has everything, and a server that comes back older or empty.

Real failovers show the whole; an execution that is taken back to an earlier state shows the rest in less time.
"""

import asyncio
import os
import signal

import pytest

import ff_fast
from ff_fast import (
    CancelFlowWait,
    End,
    FrameKind,
    Gap,
    StreamFrame,
    StreamMode,
    SummaryView,
    TailVisibility,
    keys,
)
from ff_fast._core import ops, places, tail
from ff_fast._core.operations import Call
from ff_fast.embedded import EmbeddedServer
from ff_fast.errors import (
    DeadlineExceeded,
    ExecutionNotFound,
    InvalidCursor,
    SequenceGap,
    StaleOwner,
    StateLost,
    SummaryConflict,
    WriterSuperseded,
)

from ..conftest import connect_raw
from ..heads import head_of, set_head
from ..server.readers import Reader, begin
from ..server.streams import server_ms
from ..server.workers import Worker
from ..shells import KINDS, Shell, with_option
from ..waiting import wait_until, wait_until_async
from .failover import Past
from .releases import complete, delay, suspend, wait_children
from .stored import claimed


class Forgetful(Shell):
    """Its backends keep nothing of what was acknowledged, as after the time for which they do."""

    async def connect(self, target, **limits):
        return await super().connect(target, replay_ms=0, **limits)


@pytest.fixture
def shell(shell):
    return Forgetful(shell.kind)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Readers do not wait for frames that nobody stores again."""
    monkeypatch.setattr(tail, "_AHEAD_S", 0.05)


ALL, EXCLUDE = TailVisibility.ALL, TailVisibility.EXCLUDE_BEST_EFFORT
MODES = {
    "durable": StreamMode.durable(),
    "summary": StreamMode.durable_summary(),
    "best_effort": StreamMode.best_effort_live(600_000),
}


async def put(writer, first, last, text="old", mode=None):
    """Write frames and wait until they are stored."""
    for n in range(first, last + 1):
        assert writer.write(b'{"%b%d":1}' % (text.encode(), n), mode=mode) == n
    await writer.flush(20)


async def next_ms(raw):
    """Wait for another millisecond of the server: ids of the same one and of the same sequence are equal."""
    before = server_ms(raw)

    async def passed():
        return server_ms(raw) > before

    await wait_until_async(passed)


async def ended(backend, eid, handle, outcome="attempt_failure"):
    """The execution can be failed, and its readers get that end."""
    await backend.fail(handle, "frames are lost")
    items = await backend.items(eid)
    assert items[-1].reason == outcome
    return [item for item in items if isinstance(item, StreamFrame)]


# -- what was acknowledged and is lost is never a success ----------------------------------------------------------


@pytest.mark.parametrize("mode", ["durable", "best_effort"])
async def test_a_stream_that_lost_acknowledged_frames_cannot_end_as_a_success(
    mode, pair, shell, lane
):
    async with await shell.connect(pair.url) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle, mode=MODES[mode])
        await put(writer, 1, 5)
        pair.stall()
        await put(writer, 6, 10)
        pair.promote()
        with pytest.raises(SequenceGap) as lost:
            await writer.close(20)
        assert (lost.value.expected, lost.value.got, lost.value.unstored) == (6, 11, ())
        for _ in range(2):
            with pytest.raises(SequenceGap) as lost:
                await backend.complete(handle, b"result")
            assert (lost.value.expected, lost.value.got) == (6, 11)
        assert (await backend.describe(eid)).state == "active"
        assert len(await ended(backend, eid, handle)) == 5


@pytest.fixture
def raw(raw):
    """Connected before the test, which must leave no connection more than there were."""
    raw.ping()
    return raw


async def test_a_flush_without_frames_asks_whether_they_are_still_there(shell, server, raw, lane):
    async with await shell.connect(server.url) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        await put(writer, 1, 5)
        past = Past(raw, eid)
        await put(writer, 6, 10)
        await writer.flush(20)
        past.come()
        # It has asked since the last acknowledgement; the end asks in any case.
        await writer.flush(20)
        with pytest.raises(SequenceGap):
            await backend.complete(handle)
        writer.write(b"11")
        with pytest.raises(SequenceGap):
            await writer.flush(20)
        with pytest.raises(SequenceGap):
            writer.write(b"12")


async def test_an_unused_writer_asks_nothing(shell, server, raw, lane):
    async with await shell.connect(server.url) as backend:
        _, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        await put(writer, 1, 3)
        before = raw.info("commandstats")["cmdstat_fcall"]["calls"]
        await writer.flush(20)
        asked = raw.info("commandstats")["cmdstat_fcall"]["calls"]
        await writer.flush(20)
        assert raw.info("commandstats")["cmdstat_fcall"]["calls"] == asked <= before + 1
        await writer.close(20)
        assert raw.info("commandstats")["cmdstat_fcall"]["calls"] == asked + 1
        other = await backend.open_writer(handle)
        await other.flush(20)
        await other.close(20)
        assert raw.info("commandstats")["cmdstat_fcall"]["calls"] == asked + 2


async def written_by_open(backend, handle, raw, eid):
    writer = await backend.open_writer(handle)
    await put(writer, 1, 5)
    past = Past(raw, eid)
    await put(writer, 6, 10)
    return past, writer


async def written_by_closed(backend, handle, raw, eid):
    writer = await backend.open_writer(handle)
    await put(writer, 1, 5)
    past = Past(raw, eid)
    await put(writer, 6, 10)
    await writer.close(20)
    return past, None


async def written_by_two(backend, handle, raw, eid):
    past, _ = await written_by_closed(backend, handle, raw, eid)
    return past, await backend.open_writer(handle)


async def written_by_append_frame(backend, handle, raw, eid):
    for n in range(1, 11):
        if n == 6:
            past = Past(raw, eid)
        await backend.append_frame(handle, ff_fast.Frame(b"%d" % n, FrameKind.EVENT))
    return past, None


WRITTEN = [written_by_open, written_by_closed, written_by_two, written_by_append_frame]


RELEASES = [complete, delay, wait_children, suspend]


@pytest.mark.parametrize(
    "written, release",
    [
        *((written, complete) for written in WRITTEN),
        *((written_by_closed, release) for release in RELEASES[1:]),
    ],
)
async def test_whoever_wrote_them_a_release_of_the_lease_tells_of_the_loss(
    written, release, shell, server, raw, lane
):
    async with await shell.connect(server.url) as backend:
        eid, handle = await claimed(backend, lane)
        past, writer = await written(backend, handle, raw, eid)
        past.come()
        with pytest.raises(SequenceGap) as lost:
            await release(backend, handle)
        assert (lost.value.expected, lost.value.got) == (6, 11)
        del writer
        assert len(await ended(backend, eid, handle)) == 5


async def test_append_frame_does_not_go_on_behind_a_loss(shell, server, raw, lane):
    async with await shell.connect(server.url) as backend:
        eid, handle = await claimed(backend, lane)
        past, _ = await written_by_closed(backend, handle, raw, eid)
        past.come()
        for _ in range(2):
            with pytest.raises(SequenceGap):
                await backend.append_frame(handle, ff_fast.Frame(b"11", FrameKind.EVENT))
        # Who opens a writer sees where it begins.
        writer = await backend.open_writer(handle)
        assert writer.next_sequence == 6
        await put(writer, 6, 9, "new")
        # It was told of the loss, and has gone on all the same.
        await backend.complete(handle)


@pytest.mark.parametrize("stored", [10, 15])
async def test_other_frames_under_the_same_sequences_are_a_loss_too(
    shell, server, raw, lane, stored
):
    async with await shell.connect(server.url) as backend, await shell.connect(server.url) as other:
        eid, handle = await claimed(backend, lane)
        past, writer = await written_by_open(backend, handle, raw, eid)
        past.come()
        newer = await other.open_writer(handle)
        await next_ms(raw)
        await put(newer, 6, stored, "new")
        with pytest.raises(SequenceGap) as lost:
            await backend.complete(handle)
        assert (lost.value.expected, lost.value.got) == (10, 11)
        with pytest.raises(WriterSuperseded):
            await writer.close(20)
        # For the backend that wrote them nothing is lost.
        await other.complete(handle)


async def test_a_caller_in_another_process_can_name_the_last_sequence(shell, server, raw, lane):
    async with await shell.connect(server.url) as backend, await shell.connect(server.url) as other:
        eid, handle = await claimed(backend, lane)
        past, _ = await written_by_closed(backend, handle, raw, eid)
        past.come()
        with pytest.raises(SequenceGap):
            await other.complete(handle, last_sequence=10)
        with pytest.raises(SequenceGap):
            await other.complete(handle, last_sequence=6)
        await other.complete(handle, last_sequence=5)
        # The repeat of a done call is not asked again.
        await other.complete(handle, last_sequence=10)
        assert (await other.items(eid))[-1] == End("attempt_success")


async def test_what_a_backend_knows_ends_with_the_lease(shell, server, lane, monkeypatch):
    monkeypatch.setattr(places, "MAX_PLACES", 3)
    async with await shell.connect(server.url) as backend:
        known = backend.wrapped._deployment.places
        handles = []
        for release in RELEASES:
            eid, handle = await claimed(backend, lane)
            await put(await backend.open_writer(handle), 1, 1)
            assert len(known) == 1
            await release(backend, handle)
            assert len(known) == 0
            if release is not complete:
                await backend.cancel(eid)
        for _ in range(5):
            eid, handle = await claimed(backend, lane)
            handles.append((eid, handle, await backend.open_writer(handle)))
        assert len(known) == 3
        # The lease is lost: to a call, and to a writer.
        await backend.cancel(handles[4][0])
        with pytest.raises(ff_fast.FFError):
            await backend.complete(handles[4][1])
        assert len(known) == 2
        await backend.cancel(handles[3][0])
        with pytest.raises(ff_fast.FFError):
            await put(handles[3][2], 1, 1)
        assert len(known) == 1
        await backend.fail(handles[2][1], "done")
        assert len(known) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_attempt_of_a_worker_fails_where_its_frames_are_lost(kind, server, raw, lane):
    """The worker closes its writer, which asks; the attempt ends as a failure, and the worker goes on."""

    def lose(task):
        past = Past(raw, task.execution_id)
        yield task.write(b"1")
        yield task.flush(5)
        past.come()

    with ff_fast.ValkeyBackend.connect(with_option(server.url, "replay_ms=0")) as backend:
        with Worker(kind, with_option(server.url, "replay_ms=0"), lose, lane=lane):
            eid = backend.create_execution(lane=lane)
            wait_until(lambda: backend.describe(eid).state == "failed")
        assert backend.describe(eid).failure_reason.startswith("SequenceGap: ")


# -- a reader whose frames were replaced is told, and gets the others ----------------------------------------------


async def rewrite(pair, backend, lane, mode, between=None):
    """Ten frames, of which five survive the failover, and then ten others; returns what all readers must agree on."""
    eid, handle = await claimed(backend, lane)
    writer = await backend.open_writer(handle, mode=mode)
    await put(writer, 1, 5)
    pair.stall()
    await put(writer, 6, 10)
    old = await backend.read_stream(eid)
    assert [frame.sequence for frame in old] == list(range(1, 11))
    if between is not None:
        await between(eid)
    pair.promote()
    newer = await backend.open_writer(handle, mode=mode)
    await put(newer, 6, 15, "new")
    await backend.complete(handle)
    return eid, old


def replaced(items, first_missing, first, last):
    """Items of a reader that was told of a rewrite, and got what came after."""
    gap, *frames, end = items
    assert gap == Gap(first_missing, first, "rewritten")
    assert [frame.sequence for frame in frames] == list(range(first, last + 1))
    assert all(b"new" in frame.payload for frame in frames if frame.sequence > 5)
    assert end == End("attempt_success")


@pytest.mark.parametrize("mode", MODES)
async def test_a_reader_that_comes_back_after_a_rewrite_gets_a_gap_and_the_new_frames(
    mode, pair, shell, lane
):
    async with await shell.connect(pair.url) as backend:
        eid, old = await rewrite(pair, backend, lane, MODES[mode])
        for visibility in (ALL,) if mode == "best_effort" else (ALL, EXCLUDE):
            for n in (6, 8, 10):
                items = await backend.items(eid, after=old[n - 1].stream_id, visibility=visibility)
                replaced(items, n + 1, 6, 15)
                page = await backend.read_stream(
                    eid, after=old[n - 1].stream_id, count=3, visibility=visibility
                )
                assert page.gaps == (Gap(n + 1, 6, "rewritten"),)
                assert [frame.sequence for frame in page] == [6, 7, 8]
                # From the gap itself, and from the page.
                assert await backend.items(eid, after=items[0].cursor) == items[1:]
                assert (await backend.items(eid, after=page.cursor))[0].sequence == 9
            # What it had is there: nothing to tell.
            items = await backend.items(eid, after=old[4].stream_id, visibility=visibility)
            assert [item.sequence for item in items[:-1]] == list(range(6, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_a_running_tail_is_told_of_a_rewrite(kind, pair, lane):
    with ff_fast.ValkeyBackend.connect(f"{pair.url}?replay_ms=0") as backend:
        attempt = begin(backend, lane, 600_000)
        writer = backend.open_writer(attempt.handle)
        for n in range(1, 11):
            if n == 6:
                writer.flush(20)
                pair.stall()
            writer.write(b"old%d" % n)
        writer.flush(20)
        reader = Reader(kind, pair.url, attempt.eid)
        reader.wait_for(10)
        pair.promote()
        newer = backend.open_writer(attempt.handle)
        for n in range(6, 16):
            newer.write(b"new%d" % n)
        newer.flush(20)
        backend.complete(attempt.handle)
        items = reader.result(30)
    gap, *frames, end = items[10:]
    # It may have come back before the new frames.
    assert gap in (Gap(11, 6, "rewritten"), Gap(11, 6, "cursor_ahead"))
    assert [frame.payload for frame in frames] == [b"new%d" % n for n in range(6, 16)]
    assert end == End("attempt_success")


async def changed(raw, backend, lane, mode, ahead_ms=0):
    """As `rewrite`, on one server; the lost frames are *ahead_ms* later, as on a primary whose clock is ahead."""
    eid, handle = await claimed(backend, lane)
    writer = await backend.open_writer(handle, mode=mode)
    await put(writer, 1, 5)
    past = Past(raw, eid)
    if ahead_ms:
        ms, _, sequence = head_of(raw, keys.head(eid, 0)).last_id.partition(b"-")
        set_head(raw, keys.head(eid, 0), last_id=b"%d-%b" % (int(ms) + ahead_ms, sequence))
    await put(writer, 6, 10)
    old = await backend.read_stream(eid)
    past.come()
    return eid, handle, old


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ahead_ms", [0, 60_000])
async def test_no_frame_is_skipped_in_silence_whatever_the_clocks_say(
    mode, ahead_ms, shell, server, raw, lane
):
    """A new primary whose clock is behind gives ids before those of the frames that it has lost."""
    async with await shell.connect(server.url) as backend:
        eid, handle, old = await changed(raw, backend, lane, MODES[mode], ahead_ms)
        newer = await backend.open_writer(handle, mode=MODES[mode])
        for last in (8, 10, 15):
            await next_ms(raw)
            await put(newer, newer.next_sequence, last, "new")
            for n in (6, 8, 10):
                page = await backend.read_stream(eid, after=old[n - 1].stream_id)
                (gap,) = page.gaps
                assert gap.first_missing == n + 1
                if ahead_ms and n <= last:
                    # Ids do not tell which are new, so all are read again.
                    assert (gap.next_sequence, gap.reason) == (1, "rewritten")
                elif ahead_ms:
                    assert (gap.next_sequence, gap.reason) == (last + 1, "cursor_ahead")
                else:
                    assert (gap.next_sequence, gap.reason) == (6, "rewritten")
                assert [frame.sequence for frame in page] == list(
                    range(gap.next_sequence, last + 1)
                )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_whose_server_is_replaced_under_its_connection(kind, mode, server, raw, lane):
    with ff_fast.ValkeyBackend.connect(with_option(server.url, "replay_ms=0")) as backend:
        attempt = begin(backend, lane, 600_000)
        writer = backend.open_writer(attempt.handle, mode=MODES[mode])
        for n in range(1, 11):
            if n == 6:
                writer.flush(20)
                past = Past(raw, attempt.eid)
            writer.write(b'{"old%d":1}' % n)
        writer.flush(20)
        reader = Reader(kind, server.url, attempt.eid)
        reader.wait_for(10)
        past.come(cut=False)
        newer = backend.open_writer(attempt.handle, mode=MODES[mode])
        for n in range(6, 16):
            newer.write(b'{"new%d":1}' % n)
        newer.flush(20)
        backend.complete(attempt.handle)
        gap, *frames, _ = reader.result(30)[10:]
    # The reader may look before the newer frames stand in the place of the older ones, or after.
    assert gap in (Gap(11, 6, "rewritten"), Gap(11, 6, "cursor_ahead"))
    assert [frame.payload for frame in frames] == [b'{"new%d":1}' % n for n in range(6, 16)]


async def test_entries_of_another_program_hide_no_rewrite(shell, server, raw, lane):
    async with await shell.connect(server.url) as backend:
        eid, handle, old = await changed(raw, backend, lane, MODES["durable"])
        for _ in range(9):
            raw.xadd(keys.stream(eid, 0), {"other": "x"})
        newer = await backend.open_writer(handle)
        await next_ms(raw)
        await put(newer, 6, 12, "new")
        page = await backend.read_stream(eid, after=old[-1].cursor)
        assert page.gaps == (Gap(11, 1, "rewritten"),)
        assert [frame.sequence for frame in page] == list(range(1, 13))


# -- a place in another attempt, or in another execution -----------------------------------------------------------


async def two_attempts(backend, lane, mode, old=10, new=4):
    eid = await backend.create_execution(lane=lane)
    found = []
    for text, count in (("old", old), ("new", new)):
        handle = await backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")
        assert handle is not None
        await put(await backend.open_writer(handle, mode=mode), 1, count, text)
        found.append(await backend.read_stream(eid, len(found)))
        if text == "old":
            # A lost worker: the execution waits again at once.
            await backend.fail(handle, "again", ff_fast.FailureClass.INFRA_CRASH)
    await backend.complete(handle)
    return eid, *found


def id_of(cursor):
    """The place of a cursor, without its attempt."""
    return cursor.partition(".")[2]


def numbers(items):
    return [item.sequence for item in items if isinstance(item, StreamFrame)]


@pytest.mark.parametrize(
    "mode, old, new",
    [("durable", 10, 4), ("durable", 4, 10), ("summary", 7, 7), ("best_effort", 10, 4)],
)
async def test_a_place_of_another_attempt_skips_nothing(mode, old, new, shell, server, lane):
    """A cursor names its attempt, and is refused; the id of a frame does not, and is a place where others stand."""
    async with await shell.connect(server.url) as backend:
        eid, first, second = await two_attempts(backend, lane, MODES[mode], old, new)
        end = (await backend.items(eid))[-1].cursor
        for cursor in (first[-1].cursor, end):
            with pytest.raises(InvalidCursor):
                await backend.items(eid, 1, after=cursor)
            with pytest.raises(InvalidCursor):
                await backend.read_stream(eid, 1, after=cursor)
        for visibility in (ALL,) if mode == "best_effort" else (ALL, EXCLUDE):
            for place in (first[0].stream_id, first[-1].stream_id, id_of(end)):
                sequence = int(place.partition("-")[2])
                gap = Gap(sequence + 1, 1, "rewritten")
                items = await backend.items(eid, 1, after=place, visibility=visibility)
                assert items == [gap, *second, End("attempt_success")]
                page = await backend.read_stream(eid, 1, after=place, visibility=visibility)
                assert (page.gaps, tuple(page)) == ((gap,), tuple(second))
            # The other way round the ids are later than all.
            place = second[0].stream_id
            page = await backend.read_stream(eid, 0, after=place, visibility=visibility)
            assert (page.gaps, tuple(page)) == ((Gap(2, 1, "rewritten"),), tuple(first))


async def test_a_place_in_another_execution_skips_nothing(shell, server, lane):
    async with await shell.connect(server.url) as backend:
        eid, frames, _ = await two_attempts(backend, lane, MODES["durable"])
        other, _, others = await two_attempts(backend, lane, MODES["durable"])
        for target, attempt, frame in ((other, 1, frames[2]), (eid, 0, others[2])):
            items = await backend.items(target, attempt, after=frame.stream_id)
            assert items[0] == Gap(4, 1, "rewritten")
            assert numbers(items) == list(range(1, 11 if attempt == 0 else 5))


@pytest.mark.parametrize("how", ["another attempt", "a new primary"])
async def test_a_view_is_told_that_its_document_is_another_one(how, shell, server, raw, lane):
    """The patches of another attempt, or of a new primary, are not folded into the document of the old one."""
    async with await shell.connect(server.url) as backend:
        if how == "a new primary":
            eid, handle, old = await changed(raw, backend, lane, MODES["summary"])
            view = SummaryView()
            for frame in old:
                view.apply(frame)
            newer = await backend.open_writer(handle, mode=MODES["summary"])
            await next_ms(raw)
            await put(newer, 6, 15, "new")
            await backend.complete(handle)
            attempt, after = 0, old[-1].cursor
        else:
            eid, _, _ = await two_attempts(backend, lane, MODES["summary"], 4, 10)
            document = await backend.read_summary(eid, 0)
            view, attempt, after = SummaryView(document), 1, id_of(document.cursor)
        stored = await backend.read_summary(eid, attempt)
        frames = [
            i for i in await backend.items(eid, attempt, after=after) if not isinstance(i, Gap)
        ]
        with pytest.raises(SummaryConflict):
            view.apply(frames[0])
        # Read again, as the error says, it is the stored one.
        view = SummaryView(stored)
        for frame in frames[:-1]:
            assert not view.apply(frame)
        assert view.document_json == stored.document_json


# -- who has lost the claim is told so ----------------------------------------------------------------------------


async def test_a_lost_claim_is_no_other_worker(shell, server, raw, lane):
    async with await shell.connect(server.url) as backend:
        eid = await backend.create_execution(lane=lane)
        past = Past(raw, eid)
        handle = await backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")
        writer = await backend.open_writer(handle)
        await put(writer, 1, 3)
        past.come()
        for call in (
            lambda: backend.renew(handle),
            lambda: backend.complete(handle),
            lambda: backend.fail(handle, "x"),
            lambda: backend.delay(handle, 1),
            lambda: backend.wait_children(handle),
            lambda: backend.progress(handle, 1),
            lambda: backend.create_waitpoint(handle),
            lambda: backend.observe_signals(handle),
            lambda: backend.report_usage(handle, ff_fast.UsageDimensions(input_tokens=1)),
            lambda: backend.open_writer(handle),
            lambda: put(writer, 4, 4),
            lambda: writer.close(20),
        ):
            with pytest.raises(StateLost) as lost:
                await call()
            assert not lost.value.retryable
        assert [frame.sequence for frame in writer.error.unstored] == [4]
        # The claim that follows has the same epoch. Then somebody else is the owner indeed.
        raw.zadd(keys.eligible(keys.slot_tag_of(eid), lane), {eid: 1})
        raw.zadd(keys.ready(lane), {keys.partition_index(eid): 1})
        other = await backend.claim(lane=lane, worker_id="v", worker_instance_id="v-1")
        with pytest.raises(StaleOwner):
            await backend.renew(handle)
        await backend.complete(other)


async def test_a_lost_opening_is_no_newer_writer(shell, server, raw, lane):
    async with await shell.connect(server.url) as backend:
        eid, handle = await claimed(backend, lane)
        unopened = Past(raw, eid)
        first = await backend.open_writer(handle)
        await put(first, 1, 3)
        opened = Past(raw, eid)
        second = await backend.open_writer(handle)
        with pytest.raises(WriterSuperseded):
            await put(first, 4, 4)
        opened.come()
        for _ in range(2):
            with pytest.raises(StateLost):
                await put(second, 4, 4)
        # Opened again, it goes on behind what is stored.
        third = await backend.open_writer(handle)
        await put(third, 4, 6)
        unopened.come()
        with pytest.raises(StateLost):
            await third.close(20)
        fourth = await backend.open_writer(handle)
        assert fourth.next_sequence == 1
        await put(fourth, 1, 1)
        with pytest.raises(SequenceGap):
            await backend.complete(handle)


# -- a server that comes back empty, or older --------------------------------------------------------------------------


async def test_a_server_that_comes_back_older_or_empty_says_what_it_has_lost(shell, lane):
    with EmbeddedServer(dbfilename="dump.rdb") as server:
        async with await shell.connect(server.url) as backend:
            eid, handle = await claimed(backend, lane)
            unclaimed = await backend.create_execution(lane=f"{lane[:40]}-b")
            writer = await backend.open_writer(handle)
            await put(writer, 1, 5)
            with connect_raw(server.url) as raw:
                raw.save()
            await put(writer, 6, 10)
            reached = (await backend.read_stream(eid)).cursor
            lost = await backend.claim(
                lane=f"{lane[:40]}-b", worker_id="w", worker_instance_id="w-1"
            )
            gone = await backend.create_execution(lane=lane)
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.to_thread(server.restart)
            # The functions are in the snapshot; frames, claims and executions after it are not.
            with pytest.raises(SequenceGap):
                await writer.close(20)
            with pytest.raises(SequenceGap):
                await backend.complete(handle)
            with pytest.raises(StateLost):
                await backend.complete(lost)
            assert (await backend.describe(unclaimed)).state == "waiting"
            with pytest.raises(ExecutionNotFound):
                await backend.describe(gone)
            assert (await backend.read_stream(eid, after=reached)).gaps == (
                Gap(11, 6, "cursor_ahead"),
            )
            (server.directory / "dump.rdb").unlink()
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.to_thread(server.restart)
            for call in (
                lambda: backend.renew(handle),
                lambda: backend.complete(handle),
                lambda: backend.open_writer(handle),
                lambda: backend.read_stream(eid, after=reached),
                lambda: backend.items(eid, after=reached),
            ):
                with pytest.raises(ExecutionNotFound, match="the server has lost it"):
                    await call()


# -- what several calls do together --------------------------------------------------------------------------------------


def test_members_of_a_flow_are_cancelled_whichever_server_goes_on_with_it(pair):
    """The members are more than one packed list holds, so their order in memory is of one process."""
    with ff_fast.ValkeyBackend.connect(f"{pair.url}?replay_ms=0") as backend:
        flow = backend.create_flow()
        first = backend.create_execution(flow_id=flow)
        for _ in range(199):
            backend.create_execution(flow_id=flow)
        with pytest.raises(DeadlineExceeded):
            backend.cancel_flow(flow, wait=CancelFlowWait.wait_timeout(0))
        for _ in range(5):
            op = ops.cancel_members(flow, keys.slot_tag_of(first), 16)
            backend._run(Call(lambda op=op: ops.call(op)))
        pair.replicate()
        pair.promote()
        outcome = backend.cancel_flow(flow)
        assert (outcome.cancelled_members, outcome.open_members) == (200 - 6 * 16, 0)

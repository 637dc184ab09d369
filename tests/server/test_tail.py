"""Tails on a real server: ends, gaps, and what happens to connections, in both shells."""

import asyncio
import gc
import time

import pytest

import ff_fast
from ff_fast import (
    BestEffortLiveConfig,
    End,
    ExecutionNotFound,
    Gap,
    InvalidCursor,
    StreamFrame,
    StreamMode,
    TailVisibility,
    aio,
    keys,
)
from ff_fast._core import hub as hub_core
from ff_fast._core import tail as tail_core
from ff_fast.embedded import EmbeddedServer
from ff_fast.errors import AttemptNotFound, Corruption, FFError, InvalidInput
from ff_fast.types import cursor_after

from ..conftest import connect_raw
from ..heads import head_of
from ..shells import Opener
from ..waiting import wait_until
from .readers import (
    BEST_EFFORT,
    DURABLE,
    KINDS,
    SUMMARY,
    Reader,
    Stepper,
    begin,
    collect,
    counted,
    listening,
    sequences,
    wait_listening,
)

EXCLUDE = TailVisibility.EXCLUDE_BEST_EFFORT
DONE = End("attempt_success")
LOST = End("producer_lost")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def backend(server):
    with ff_fast.ValkeyBackend.connect(server.url) as connected:
        yield connected


@pytest.fixture
def attempt(backend, lane):
    return begin(backend, lane)


def write(backend, attempt, count, mode=DURABLE, *, batch=1_000_000, **options):
    """Write *count* frames, flushed every *batch*, and close the writer."""
    with backend.open_writer(attempt.handle, mode=mode, **options) as writer:
        for i in range(count):
            writer.write(b'{"n":%d}' % i)
            if (i + 1) % batch == 0:
                writer.flush()


def stored(raw, key):
    return [int(raw_id.split(b"-")[1]) for raw_id, _ in raw.xrange(key)]


def server_ms(raw):
    seconds, micros = raw.time()
    return seconds * 1000 + micros // 1000


# -- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["not claimed", "no frame", "some frames"])
@pytest.mark.parametrize("how", ["complete", "fail"])
@pytest.mark.cluster
def test_an_idle_reader_sees_the_end_at_once(kind, how, state, backend, server, raw, lane):
    def measure():
        eid = backend.create_execution(lane=lane)
        if state == "not claimed":
            reader = Reader(kind, server.url, eid)
            wait_listening(raw)
        handle = backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")
        if state == "some frames":
            with backend.open_writer(handle) as writer:
                writer.write(b"x")
        if state != "not claimed":
            reader = Reader(kind, server.url, eid)
            wait_listening(raw)
        began = time.monotonic()
        if how == "complete":
            backend.complete(handle)
        else:
            backend.fail(handle, "it broke")
        want = DONE if how == "complete" else End("attempt_failure", error="it broke")
        assert reader.result()[-1] == want
        return reader.items[-1][0] - began

    # The best of some, because the other core's load is not under test.
    assert min(measure() for _ in range(5)) < 0.05


def test_late_and_repeated_readers_get_the_same_end(kind, backend, server, attempt):
    write(backend, attempt, 3)
    backend.complete(attempt.handle)
    first = collect(kind, server.url, attempt.eid)
    assert sequences(first) == [1, 2, 3]
    assert first[-1] == DONE
    assert collect(kind, server.url, attempt.eid) == first
    # From the last frame, and from behind the end entry itself.
    assert collect(kind, server.url, attempt.eid, after=first[2].stream_id) == [DONE]
    assert collect(kind, server.url, attempt.eid, after=first[-1].cursor) == [DONE]


def test_an_end_entry_that_was_trimmed_is_known_from_the_state(kind, backend, server, raw, attempt):
    write(backend, attempt, 2)
    backend.complete(attempt.handle)
    raw.delete(attempt.log)
    assert collect(kind, server.url, attempt.eid) == [Gap(1, 3, "expired"), DONE]


# -- a lost producer --------------------------------------------------------------------------------


def expiry(raw, attempt):
    return head_of(raw, attempt.head).lease_expires_at


@pytest.mark.cluster
def test_a_blocked_reader_hears_of_a_dead_producer(kind, backend, server, raw, lane):
    attempt = begin(backend, lane, lease_ttl_ms=30_000)
    write(backend, attempt, 2)
    reader = Reader(kind, server.url, attempt.eid)
    wait_listening(raw)
    backend.renew(attempt.handle, 300)
    items = reader.result()
    assert server_ms(raw) >= expiry(raw, attempt)
    assert sequences(items) == [1, 2]
    assert items[-1] == LOST
    for _ in range(2):
        assert collect(kind, server.url, attempt.eid) == items
    assert backend.read_stream(attempt.eid).end_reason == "producer_lost"


def test_a_producer_that_dies_without_a_frame(kind, backend, server, raw, lane):
    eid = backend.create_execution(lane=lane)
    reader = Reader(kind, server.url, eid)
    wait_listening(raw)
    backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1", lease_ttl_ms=200)
    assert reader.result() == [LOST]


def test_a_renewed_lease_does_not_end_a_tail(kind, backend, server, raw, lane):
    attempt = begin(backend, lane, lease_ttl_ms=1500)
    first_expiry = expiry(raw, attempt)
    reader = Reader(kind, server.url, attempt.eid)
    wait_listening(raw)
    backend.renew(attempt.handle, 30_000)
    wait_until(lambda: server_ms(raw) > first_expiry + 20 and listening(raw))
    assert reader.items == []
    backend.complete(attempt.handle)
    assert reader.result() == [DONE]


def test_a_lease_that_is_renewed_and_lapses_later(kind, backend, server, raw, lane):
    attempt = begin(backend, lane, lease_ttl_ms=1500)
    reader = Reader(kind, server.url, attempt.eid)
    wait_listening(raw)
    backend.renew(attempt.handle, 1_700)
    assert reader.result() == [LOST]
    assert server_ms(raw) >= expiry(raw, attempt)


def test_a_reader_of_an_attempt_that_will_never_come_hears_so(kind, backend, server, raw, attempt):
    reader = Reader(kind, server.url, attempt.eid, attempt_index=1)
    wait_listening(raw)
    backend.complete(attempt.handle)
    with pytest.raises(AttemptNotFound):
        reader.result()


def test_an_end_that_came_before_the_lapse_stays(kind, backend, server, raw, lane):
    attempt = begin(backend, lane, lease_ttl_ms=1_500)
    backend.complete(attempt.handle)
    wait_until(lambda: server_ms(raw) > expiry(raw, attempt))
    assert collect(kind, server.url, attempt.eid) == [DONE]


# -- gaps -------------------------------------------------------------------------------------------


def test_joining_after_a_trim_by_hand(kind, backend, server, raw, attempt):
    write(backend, attempt, 10)
    raw.xtrim(attempt.log, maxlen=4, approximate=False)
    backend.complete(attempt.handle)
    items = collect(kind, server.url, attempt.eid)
    assert items[0] == Gap(1, 7, "trimmed")
    assert sequences(items) == [7, 8, 9, 10]
    assert items[-1] == DONE
    middle = collect(kind, server.url, attempt.eid, after="0-3")
    assert middle[0] == Gap(4, 7, "trimmed")
    assert collect(kind, server.url, attempt.eid, after=items[2].stream_id) == items[3:]


def test_joining_after_the_log_reached_its_limit(kind, backend, server, raw, attempt):
    write(backend, attempt, 3_000, retention_maxlen=100)
    kept = stored(raw, attempt.log)
    assert 100 <= len(kept) < 1_000
    backend.complete(attempt.handle)
    items = collect(kind, server.url, attempt.eid)
    assert items[0] == Gap(1, kept[0], "trimmed")
    assert sequences(items) == kept


def test_joining_after_the_live_window_reached_its_ceiling(kind, backend, server, raw, attempt):
    config = BestEffortLiveConfig.with_ttl(600_000).with_maxlen_floor(10).with_maxlen_ceiling(200)
    mode = StreamMode.best_effort_live_with_config(config)
    write(backend, attempt, 3_000, mode, batch=3)
    backend.complete(attempt.handle)
    items = collect(kind, server.url, attempt.eid)
    first = items[1].sequence
    assert 1 < first <= 3_000 - 200 + 1
    assert items[0] == Gap(1, first, "trimmed")
    assert sequences(items) == list(range(first, 3_001))
    assert items[-1] == DONE


def test_joining_after_the_live_window_expired(kind, backend, server, raw, attempt):
    write(backend, attempt, 5, StreamMode.best_effort_live(20))
    wait_until(lambda: not raw.exists(attempt.live))
    reader = Reader(kind, server.url, attempt.eid)
    reader.wait_for(1)
    assert reader.got == [Gap(1, 6, "expired")]
    write(backend, attempt, 1)
    backend.complete(attempt.handle)
    items = reader.result()
    assert sequences(items) == [6]
    assert items[-1] == DONE
    assert collect(kind, server.url, attempt.eid)[0] == Gap(1, 6, "trimmed")
    # Best-effort frames that are not wanted are not missed either.
    assert sequences(collect(kind, server.url, attempt.eid, visibility=EXCLUDE)) == [6]
    assert len(collect(kind, server.url, attempt.eid, visibility=EXCLUDE)) == 2


def test_a_reader_that_falls_behind_while_it_reads(backend, raw, attempt):
    write(backend, attempt, 2)
    tail = backend.tail(attempt.eid)
    assert [next(tail).sequence, next(tail).sequence] == [1, 2]
    write(backend, attempt, 3)
    assert [next(tail).sequence for _ in range(3)] == [3, 4, 5]
    # More than the tail queues; then they are lost before it comes back.
    write(backend, attempt, 5_000)
    raw.xtrim(attempt.log, maxlen=1, approximate=False)
    backend.complete(attempt.handle)
    items = list(tail)
    assert [item for item in items if isinstance(item, Gap)] == [Gap(6, 5_005, "fell_behind")]
    assert sequences(items) == [5_005]


def test_frames_lost_before_the_end(kind, backend, server, raw, attempt):
    write(backend, attempt, 5)
    raw.xdel(attempt.log, *[raw_id for raw_id, _ in raw.xrange(attempt.log)[3:]])
    running = Reader(kind, server.url, attempt.eid)
    running.wait_for(4)
    assert running.got[3:] == [Gap(4, 6, "expired")]
    backend.complete(attempt.handle)
    assert running.result()[4:] == [DONE]
    late = collect(kind, server.url, attempt.eid)
    assert late[3:] == [Gap(4, 6, "trimmed"), DONE]


@pytest.mark.parametrize("ms", ["0", "9999999999999"])
def test_a_cursor_ahead_of_the_log(kind, ms, backend, server, attempt, monkeypatch):
    monkeypatch.setattr(tail_core, "_AHEAD_S", 0.3)
    write(backend, attempt, 3)
    reader = Reader(kind, server.url, attempt.eid, after=f"{ms}-50")
    reader.wait_for(1)
    assert reader.got == [Gap(51, 4, "cursor_ahead")]
    write(backend, attempt, 2)
    reader.wait_for(3)
    backend.complete(attempt.handle)
    items = reader.result()
    assert sequences(items) == [4, 5]
    assert items[-1] == DONE
    assert collect(kind, server.url, attempt.eid, after=f"{ms}-50") == [
        Gap(51, 6, "cursor_ahead"),
        DONE,
    ]


def test_an_excluded_frame_does_not_hide_a_visible_one_that_is_missing(
    backend, server, raw, attempt
):
    with backend.open_writer(attempt.handle) as writer:
        for mode in (DURABLE, DURABLE, BEST_EFFORT, DURABLE):
            writer.write(b"x", mode=mode)
            writer.flush()
    tail = backend.tail(attempt.eid, visibility=EXCLUDE, after=None)
    raw.xdel(attempt.log, raw.xrange(attempt.log)[1][0])
    backend.complete(attempt.handle)
    items = list(tail)
    assert sequences(items) == [1, 4]
    assert items[1] == Gap(2, 4, "trimmed")


# -- what is not there -----------------------------------------------------------------------------


def test_an_unknown_execution_and_an_unknown_attempt(kind, backend, server, attempt):
    with pytest.raises(ExecutionNotFound):
        collect(kind, server.url, keys.new_execution_id(256))
    with pytest.raises(AttemptNotFound):
        collect(kind, server.url, attempt.eid, attempt_index=2)


@pytest.mark.parametrize(
    "after", ["", "-1", "$", "+", "end", "1", "1-", "1-1 ", 5, b"1-1", "1-9999999999999999999"]
)
def test_a_bad_cursor_is_refused_before_anything_is_sent(after, backend, raw, attempt):
    with counted(raw, "fcall_ro", "xread") as calls, pytest.raises(InvalidCursor):
        backend.tail(attempt.eid, after=after)
    assert calls == {"fcall_ro": 0, "xread": 0}


# -- the server and its keys change underneath -----------------------------------------------------


def test_a_stream_deleted_while_a_reader_is_blocked(
    kind, backend, server, raw, attempt, monkeypatch
):
    monkeypatch.setattr(tail_core, "LONGEST_S", 0.1)
    write(backend, attempt, 3)
    reader = Reader(kind, server.url, attempt.eid)
    reader.wait_for(3)
    wait_listening(raw)
    raw.delete(attempt.log, attempt.live)
    write(backend, attempt, 2)
    reader.wait_for(5)
    backend.complete(attempt.handle)
    items = reader.result()
    assert sequences(items) == [1, 2, 3, 4, 5]
    assert len(items) == 6


def test_an_execution_deleted_while_a_reader_is_blocked(
    kind, backend, server, raw, attempt, monkeypatch
):
    monkeypatch.setattr(tail_core, "LONGEST_S", 0.1)
    reader = Reader(kind, server.url, attempt.eid)
    wait_listening(raw)
    raw.delete(*raw.keys(f"*{attempt.eid}*"))
    with pytest.raises(ExecutionNotFound):
        reader.result()


def test_a_key_that_became_something_else(kind, backend, server, raw, attempt, monkeypatch):
    monkeypatch.setattr(tail_core, "LONGEST_S", 0.1)
    reader = Reader(kind, server.url, attempt.eid)
    wait_listening(raw)
    raw.set(attempt.log, "no stream")
    with pytest.raises(Corruption):
        reader.result()


def test_a_server_that_comes_back_without_its_data(kind, lane):
    with EmbeddedServer() as own, ff_fast.ValkeyBackend.connect(own.url) as backend:
        attempt = begin(backend, lane)
        write(backend, attempt, 2)
        reader = Reader(kind, own.url, attempt.eid)
        reader.wait_for(2)
        with connect_raw(own.url) as raw:
            wait_listening(raw)
        own.restart()
        with pytest.raises(ExecutionNotFound, match="No execution"):
            reader.result()


@pytest.mark.cluster
def test_a_tail_goes_on_after_its_connection_was_killed(kind, backend, server, raw, attempt):
    write(backend, attempt, 2)
    reader = Reader(kind, server.url, attempt.eid)
    reader.wait_for(2)
    for round_ in range(3):
        for client in wait_listening(raw):
            raw.client_kill_filter(_id=client["id"])
        write(backend, attempt, 2)
        reader.wait_for(4 + 2 * round_)
    backend.complete(attempt.handle)
    items = reader.result()
    assert sequences(items) == list(range(1, 9))
    assert items[8:] == [DONE]


def test_functions_that_are_gone_are_loaded_again(kind, lane):
    with (
        EmbeddedServer() as own,
        connect_raw(own.url) as raw,
        ff_fast.ValkeyBackend.connect(own.url) as backend,
    ):
        attempt = begin(backend, lane, lease_ttl_ms=1500)
        reader = Reader(kind, own.url, attempt.eid)
        wait_listening(raw)
        raw.function_flush()
        assert reader.result() == [LOST]


# -- other people's entries -----------------------------------------------------------------------


# None has a payload or a run of its own, whatever else of ours it has.
FOREIGN = (
    {"note": "x", "count": "many", "prev": "x"},
    {"end": "of a story"},
    {"frame_type": "token", "mode": "summary", "correlation_id": "c", "summary_version": "7"},
    {"mode": "best_effort", "count": "1000", "patch_kind": "x"},
    {"payload": "p", "run": b"\xff\x7f"},
)


def test_foreign_entries_neither_stall_nor_stop_a_reader(kind, backend, server, raw, attempt):
    reader = Reader(kind, server.url, attempt.eid)
    excluding = Reader(kind, server.url, attempt.eid, visibility=EXCLUDE)
    wait_listening(raw, 2)
    written = 0
    for _ in range(3):
        with raw.pipeline(transaction=True) as pipe:
            for i in range(1_500):
                pipe.xadd(attempt.log, FOREIGN[i % len(FOREIGN)])
                pipe.xadd(attempt.live, FOREIGN[(i + 1) % len(FOREIGN)])
            pipe.execute()
        for mode in (DURABLE, SUMMARY, BEST_EFFORT):
            write(backend, attempt, 2, mode)
            written += 2
        reader.wait_for(written)
    backend.complete(attempt.handle)
    assert sequences(reader.result()) == list(range(1, written + 1))
    assert len(reader.got) == written + 1
    visible = [n for n in range(1, written + 1) if n % 6 not in (5, 0)]
    assert sequences(excluding.result()) == visible
    assert len(excluding.got) == len(visible) + 1
    for visibility, want in ((TailVisibility.ALL, list(range(1, written + 1))), (EXCLUDE, visible)):
        late = collect(kind, server.url, attempt.eid, visibility=visibility)
        assert sequences(late) == want
        assert len(late) == len(want) + 1


def test_a_lost_producer_behind_foreign_entries(kind, backend, server, raw, lane):
    attempt = begin(backend, lane)
    with raw.pipeline() as pipe:
        for i in range(3_000):
            pipe.xadd(attempt.log, {"note": i})
        pipe.execute()
    backend.renew(attempt.handle, 100)
    assert collect(kind, server.url, attempt.eid) == [LOST]


@pytest.mark.parametrize("live", [False, True])
def test_corrupt_entries_are_an_error(kind, live, backend, server, raw, attempt):
    reader = Reader(kind, server.url, attempt.eid)
    wait_listening(raw)
    raw.xadd(
        attempt.live if live else attempt.log,
        {"run": b"\x02\xff"},
        id="9000000000000-2",
    )
    with pytest.raises(ff_fast.Corruption):
        reader.result()
    with pytest.raises(ff_fast.Corruption):
        collect(kind, server.url, attempt.eid)
    with pytest.raises(ff_fast.Corruption):
        backend.read_stream(attempt.eid)


# -- connections ----------------------------------------------------------------------------------


def clients(raw):
    return len(raw.client_list())


def listeners(raw, attempt):
    """How many connections have subscribed to an attempt."""
    return raw.execute_command("PUBSUB", "SHARDNUMSUB", attempt.channel)[1]


def test_a_tail_that_is_left_listens_no_more(backend, raw, attempt, monkeypatch):
    monkeypatch.setattr(hub_core, "LINGER_S", 0.1)
    write(backend, attempt, 5)
    for stop in ("close", "break", "collect"):
        tail = backend.tail(attempt.eid)
        assert next(tail).sequence == 1
        wait_until(lambda: listeners(raw, attempt) == 1)
        if stop == "close":
            tail.close()
        elif stop == "break":
            for item in tail:
                if item.sequence == 3:
                    break
        del tail
        gc.collect()
        wait_until(lambda: listeners(raw, attempt) == 0)


@pytest.mark.standalone("each node has connections of its own")
def test_many_tails_of_a_backend_share_two_connections(
    kind, server, raw, backend, attempt, monkeypatch
):
    monkeypatch.setattr(hub_core, "LINGER_S", 0.1)
    write(backend, attempt, 2)
    before = clients(raw)
    opener = Opener(kind)
    own = opener(server.url)
    tails = [own.tail(attempt.eid) for _ in range(100)]
    for tail in tails:
        assert sequences(tail.next_batch()) == [1, 2]
    assert clients(raw) <= before + 2
    write(backend, attempt, 1)
    for tail in tails:
        assert sequences(tail.next_batch()) == [3]
        tail.close()
    own.wait_until(lambda: listeners(raw, attempt) == 0)
    opener.close()
    wait_until(lambda: clients(raw) == before)


@pytest.mark.standalone("it looks inside the hub of one server")
def test_asyncio_tails_closed_or_cancelled_leave_nothing(
    server, raw, backend, attempt, monkeypatch
):
    monkeypatch.setattr(hub_core, "LINGER_S", 0.1)
    write(backend, attempt, 3)
    before = clients(raw)

    async def read(own, seen):
        async for item in own.tail(attempt.eid):
            seen.append(item)

    async def run():
        async with aio.ValkeyBackend.connect(server.url) as own:
            for _ in range(100):
                tail = own.tail(attempt.eid)
                assert (await anext(tail)).sequence == 1
                await tail.aclose()
            async for item in own.tail(attempt.eid):
                if item.sequence == 2:
                    break
            tasks = [asyncio.create_task(read(own, [])) for _ in range(100)]
            await asyncio.to_thread(wait_listening, raw)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            del tasks, task
            gc.collect()
            assert clients(raw) <= before + 2
            await asyncio.to_thread(wait_until, lambda: listeners(raw, attempt) == 0)
            assert not own._hub._core._channels
        assert not any(node.connections for node in own._nodes.all())

    asyncio.run(run())
    wait_until(lambda: clients(raw) == before)


def test_a_cancelled_tail_can_be_taken_up_where_it_stopped(server, raw, backend, attempt):
    write(backend, attempt, 3)

    async def run():
        seen = []

        async def read():
            after = seen[-1].cursor if seen else None
            async for item in own.tail(attempt.eid, after=after):
                seen.append(item)  # noqa: PERF401 - what came before a cancellation counts

        async with aio.ValkeyBackend.connect(server.url) as own:
            for _ in range(3):
                task = asyncio.create_task(read())
                await asyncio.to_thread(wait_listening, raw)
                await asyncio.to_thread(write, backend, attempt, 3)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await asyncio.to_thread(backend.complete, attempt.handle)
            await read()
        return seen

    seen = asyncio.run(run())
    assert sequences(seen) == list(range(1, 13))
    assert seen[-1] == DONE


def test_a_tail_of_a_closed_backend_is_refused(server, attempt):
    own = ff_fast.ValkeyBackend.connect(server.url)
    own.close()
    with pytest.raises(FFError):
        next(own.tail(attempt.eid))


# -- answers stay small ---------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"x", b"y" * 20_000])
def test_one_step_brings_a_bounded_answer(payload, backend, raw, attempt):
    frames = 60_000 if len(payload) < 100 else 1_500
    with backend.open_writer(attempt.handle, retention_maxlen=100_000) as writer:
        for i in range(frames):
            mode = DURABLE if i % 10 == 0 else BEST_EFFORT
            writer.write(payload, mode=mode if i < frames // 2 else BEST_EFFORT)
            if i % 500 == 0:
                writer.drain()
    backend.complete(attempt.handle)
    stepper = Stepper(raw, tail_core.TailCore(attempt.eid, 0, None, TailVisibility.ALL))
    stepper.core.doubt(True)
    sizes = []
    while not stepper.core.ended:
        items = [item for item in stepper.step() if isinstance(item, StreamFrame)]
        sizes.append((len(items), sum(len(item.payload) for item in items)))
    got = stepper.items
    assert sequences(got) == list(range(1, frames + 1))
    assert got[-1] == DONE
    # About 4096 frames or 1 MiB, going by the entries before; where those were of another size it misses. The first half
    # and the second have runs of sizes of their own, which are larger where the writer is slower.
    assert sorted(count for count, _ in sizes)[-3] <= 10_000
    assert sorted(size for _, size in sizes)[-2] <= 4 << 20
    assert max(count for count, _ in sizes) <= 64 * 1024 + 512
    assert max(size for _, size in sizes) <= 32 << 20


KEPT = StreamMode.best_effort_live(60_000)


@pytest.mark.parametrize("mode", [DURABLE, KEPT, None])
def test_a_cursor_of_a_sequence_continues_behind_its_frame(kind, server, backend, attempt, mode):
    for _ in range(6):
        if mode is None:
            for each in (DURABLE, KEPT, SUMMARY):
                write(backend, attempt, 40, each)
        else:
            write(backend, attempt, 120, mode)
        # So that the frames have several times.
        time.sleep(0.002)
    opener = Opener(kind)
    connected = opener(server.url)
    for sequence in (0, 1, 119, 120, 121, 333, 719, 720):
        cursor = cursor_after(sequence)
        expected = list(range(sequence + 1, 721))
        page = connected.read_stream(attempt.eid, after=cursor, count=10_000)
        assert ([frame.sequence for frame in page], page.gaps) == (expected, ())
        followed = connected.follow(attempt.eid, after=cursor)
        some = []
        while len(some) < len(expected) and (batch := followed.next_batch(10)):
            some += batch
        assert [item.sequence for item in some] == expected
        followed.close()
    opener.close()


def test_a_sequence_is_found_without_reading_what_is_before_it(raw, backend, attempt):
    write(backend, attempt, 4_000, batch=100)

    def commands(sequence):
        before = raw.info("commandstats")["cmdstat_xrange"]["calls"]
        page = backend.read_stream(attempt.eid, after=cursor_after(sequence), count=10)
        assert [frame.sequence for frame in page] == list(range(sequence + 1, sequence + 11))
        return raw.info("commandstats")["cmdstat_xrange"]["calls"] - before

    assert commands(3_900) < 40


@pytest.mark.parametrize("arguments", [(-1,), (2**53,), (1, -1), (1, 2**32), ("1",), (True,)])
def test_a_cursor_of_no_sequence_is_refused(arguments):
    with pytest.raises(InvalidInput):
        cursor_after(*arguments)


def test_a_reader_at_the_end_with_a_cursor_of_a_sequence_is_at_rest(server, lane):
    # Where payloads may be large, the place is not looked for: the stream is read from its beginning, once.
    config = ff_fast.BackendConfig.from_url(server.url).replace(max_payload_bytes=1 << 20)
    with ff_fast.ValkeyBackend.connect(config) as backend:
        attempt = begin(backend, lane)
        write(backend, attempt, 700)
        page = backend.read_stream(attempt.eid, after=cursor_after(700), count=10_000)
        assert (len(page), page.end_reason) == (0, None)
        assert page.cursor == f"0.{backend.describe_stream(attempt.eid).last_id}"

"""Pages of a stream, what excluding best-effort frames costs, FlowFabric's defects T1-T7, and the property that no
frame is ever skipped in silence."""

import contextlib
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ff_fast
from ff_fast import (
    End,
    ExecutionNotFound,
    Gap,
    StreamCursor,
    StreamFrame,
    TailVisibility,
    keys,
)
from ff_fast._core import ops
from ff_fast._core import tail as tail_core
from ff_fast._hot.frames import decode_entries, weigh_entries
from ff_fast.embedded import EmbeddedServer
from ff_fast.errors import AttemptNotFound, LeaseExpired
from ff_fast.types import parse_cursor

from ..conftest import connect_raw
from ..reference_frames import check_told, wanted_of
from ..shells import KINDS, Opener
from ..waiting import wait_until
from .readers import (
    BEST_EFFORT,
    DURABLE,
    MODES,
    Reader,
    Stepper,
    begin,
    blocked,
    collect,
    counted,
    listening,
    sequences,
    wait_listening,
)
from .streams import Stream, live

ALL = TailVisibility.ALL
EXCLUDE = TailVisibility.EXCLUDE_BEST_EFFORT
DONE = End("attempt_success")


@pytest.fixture
def backend(server):
    with ff_fast.ValkeyBackend.connect(server.url) as connected:
        yield connected


@pytest.fixture(params=KINDS)
def shell(request, server):
    """A backend of each shell."""
    opener = Opener(request.param)
    yield opener(server.url)
    opener.close()


@pytest.fixture
def attempt(backend, lane):
    return begin(backend, lane)


def write(backend, attempt, frames):
    """Write ``(mode name, frame type)``; None flushes."""
    with backend.open_writer(attempt.handle) as writer:
        for n, frame in enumerate(frames):
            if frame is None:
                writer.flush()
            else:
                mode, frame_type = frame
                writer.write(b'{"k%d":%d}' % (n % 7, n), frame_type, mode=MODES[mode])


def pages(backend, attempt, **options):
    """Every page to the end of an attempt."""
    found, cursor = [], None
    while True:
        page = backend.read_stream(attempt.eid, after=cursor, **options)
        found.append(page)
        assert page.cursor != cursor or page.end_reason is not None, "the cursor does not move"
        cursor = page.cursor
        if page.end_reason is not None:
            return found


# -- pages ----------------------------------------------------------------------------------------


def test_a_page_has_frames_cursor_and_end(shell, backend, attempt):
    page = shell.read_stream(attempt.eid)
    assert (page, page.cursor, page.gaps, page.end_reason) == ((), "0.0-0", (), None)
    write(backend, attempt, [("durable", "a"), ("best_effort", "b"), ("summary", "c")])
    page = shell.read_stream(attempt.eid)
    assert [frame.frame_type for frame in page] == ["a", "b", "c"]
    assert [frame.mode for frame in page] == ["durable", "best_effort", "summary"]
    assert page.cursor == page[-1].cursor
    assert page.end_reason is None
    again = shell.read_stream(attempt.eid, after=page.cursor)
    assert (again, again.cursor) == ((), page.cursor)
    backend.complete(attempt.handle)
    last = shell.read_stream(attempt.eid, after=page.cursor)
    assert (last, last.gaps, last.end_reason) == ((), (), "attempt_success")
    # Behind the end stands nothing, and it is no gap.
    behind = shell.read_stream(attempt.eid, after=last.cursor)
    assert (behind, behind.gaps, behind.end_reason) == ((), (), "attempt_success")
    assert repr(page) == f"StreamPage(<3 frames>, cursor={page.cursor!r}, end_reason=None)"


MIXED = [
    *[("best_effort", "token")] * 40, None,
    *[("durable", "token"), ("summary", "token"), ("best_effort", "token")] * 10, None,
    *[("summary", "token")] * 25, None,
    *[("durable", "token")] * 25,
]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3, 7, 39, 40, 41, 119, 120, 10_000])
@pytest.mark.parametrize("visibility", [ALL, EXCLUDE])
def test_pages_by_count_chain_without_hole_or_repeat(count, visibility, backend, attempt):
    write(backend, attempt, MIXED)
    backend.complete(attempt.handle)
    found = pages(backend, attempt, count=count, visibility=visibility)
    frames = [frame for page in found for frame in page]
    modes = [frame[0] for frame in MIXED if frame is not None]
    want = [n for n, mode in enumerate(modes, 1) if visibility is ALL or mode != "best_effort"]
    assert sequences(frames) == want
    assert not any(page.gaps for page in found)
    assert all(len(page) == count for page in found[:-2])
    assert all(len(page) <= count for page in found)


@pytest.mark.parametrize("max_bytes", [1, 5_000, 70_000, 8 << 20, 64 << 20])
def test_pages_by_bytes_chain_without_hole_or_repeat(max_bytes, backend, attempt):
    with backend.open_writer(attempt.handle) as writer:
        for n in range(120):
            mode = DURABLE if n % 5 == 0 else BEST_EFFORT
            writer.write(bytes([n]) * 30_000, mode=mode)
            writer.drain()
    backend.complete(attempt.handle)
    found = pages(backend, attempt, count=10_000, max_bytes=max_bytes)
    assert sequences(frame for page in found for frame in page) == list(range(1, 121))
    if max_bytes < 1 << 20:
        assert len(found) > 1
        # One entry is the least there is: a run holds at most one batch.
        assert all(sum(len(f.payload) for f in page) <= max_bytes + (2 << 20) for page in found)


def test_a_cursor_may_stand_inside_a_run(shell, backend, raw, attempt):
    write(backend, attempt, [("best_effort", "token")] * 50)
    assert raw.xlen(attempt.live) < 10
    everything = shell.read_stream(attempt.eid)
    for at, frame in enumerate(everything):
        rest = shell.read_stream(attempt.eid, after=frame.stream_id)
        assert rest == everything[at + 1 :]
        assert rest.gaps == ()
        short = shell.read_stream(attempt.eid, after=frame.stream_id, count=2)
        assert short == everything[at + 1 : at + 3]


def test_a_large_page_is_read_in_small_calls(backend, raw, attempt):
    with backend.open_writer(attempt.handle) as writer:
        for _ in range(6_000):
            writer.write(b"x")
    with counted(raw, "fcall_ro", "xrange") as calls:
        page = backend.read_stream(attempt.eid, count=5_000)
    assert sequences(page) == list(range(1, 5_001))
    # One look at the state, and no XRANGE of more than 1,024 entries.
    assert calls["fcall_ro"] == 1
    assert calls["xrange"] >= (5_000 - 64) // 1_024


@pytest.mark.parametrize(
    "after", [None, "start", "0-0", "0-1", StreamCursor(0, 1), "0-9007199254740991"]
)
def test_a_good_cursor_is_taken(after, shell, backend, attempt):
    write(backend, attempt, [("durable", "a"), ("durable", "b")])
    page = shell.read_stream(attempt.eid, after=after)
    ahead = after == "0-9007199254740991"
    assert sequences(page) == ([] if ahead else [1, 2] if after in (None, "start", "0-0") else [2])
    assert [gap.reason for gap in page.gaps] == (["cursor_ahead"] if ahead else [])


def test_what_is_not_there(shell, backend, lane, attempt):
    nowhere = keys.new_execution_id(256)
    for read in (shell.read_stream, shell.read_summary):
        with pytest.raises(ExecutionNotFound):
            read(nowhere)
    with pytest.raises(AttemptNotFound):
        shell.read_stream(attempt.eid, 2)
    # The next attempt may be waited for; an execution that nobody has claimed is waiting for its first.
    assert shell.read_stream(attempt.eid, 1) == ()
    backend.complete(attempt.handle)
    with pytest.raises(AttemptNotFound):
        shell.read_stream(attempt.eid, 1)
    waiting = backend.create_execution(lane=f"{lane}-other")
    page = shell.read_stream(waiting)
    assert (page, page.end_reason) == ((), None)
    assert shell.read_summary(waiting) is None


def test_gaps_of_a_page(shell, backend, raw, attempt):
    write(backend, attempt, [("durable", "a")] * 10)
    raw.xdel(
        attempt.log,
        *[
            raw_id
            for raw_id, _ in raw.xrange(attempt.log)
            if raw_id.split(b"-")[1] in b"1 2 5".split()
        ],
    )
    page = shell.read_stream(attempt.eid)
    assert page.gaps == (Gap(1, 3, "trimmed"), Gap(5, 6, "trimmed"))
    assert sequences(page) == [3, 4, 6, 7, 8, 9, 10]
    # A page that is full stops at its last frame; what is missing behind it is told by the next.
    first = shell.read_stream(attempt.eid, count=2)
    assert (sequences(first), first.gaps) == ([3, 4], (Gap(1, 3, "trimmed"),))
    second = shell.read_stream(attempt.eid, after=first.cursor, count=2)
    assert (sequences(second), second.gaps) == ([6, 7], (Gap(5, 6, "trimmed"),))


@pytest.mark.parametrize(
    "fields",
    [
        {"note": "n", "count": "-5"},
        {"frame_type": "token", "mode": "durable", "encoding": "utf8", "count": "9"},
        {"payload": "p", "run": b"\xff\x07", "mode": "summary"},
        {"end": "of a story"},
    ],
    ids=["note", "no payload", "both", "no end"],
)
def test_a_page_of_foreign_entries_alone_is_empty(fields, shell, backend, raw, attempt):
    for key in (attempt.log, attempt.live):
        with raw.pipeline() as pipe:
            for _ in range(2_500):
                pipe.xadd(key, fields)
            pipe.execute()
    for visibility in (ALL, EXCLUDE):
        page = shell.read_stream(attempt.eid, count=1, visibility=visibility)
        assert (page, page.gaps, page.cursor) == ((), (), "0.0-0")
    write(backend, attempt, [("durable", "a"), ("best_effort", "b"), ("summary", "c")])
    assert sequences(shell.read_stream(attempt.eid, count=1)) == [1]
    assert sequences(shell.read_stream(attempt.eid)) == [1, 2, 3]
    assert sequences(shell.read_stream(attempt.eid, visibility=EXCLUDE)) == [1, 3]


def test_an_entry_without_a_sequence_is_nobodys_frame(shell, backend, raw, attempt):
    """XADD numbers the entries of a millisecond from 0; frames are numbered from 1."""
    for key in (attempt.log, attempt.live):
        raw.xadd(key, {"payload": "p", "mode": "summary"}, id="1-0")
        raw.xadd(key, {"run": b"\x02\x01\x01\x00\x00ab", "mode": "summary"}, id="2-0")
    for visibility in (ALL, EXCLUDE):
        page = shell.read_stream(attempt.eid, count=1, visibility=visibility)
        assert (page, page.gaps) == ((), ())
    write(backend, attempt, [("durable", "a"), ("best_effort", "b"), ("summary", "c")])
    assert sequences(shell.read_stream(attempt.eid, count=1)) == [1]
    page = shell.read_stream(attempt.eid)
    assert (sequences(page), page.gaps) == ([1, 2, 3], ())
    assert sequences(shell.read_stream(attempt.eid, visibility=EXCLUDE)) == [1, 3]


@pytest.mark.parametrize("frames", [1, 2, 127, 128, 129, 255, 256, 1000, 1023, 1024])
def test_a_call_brings_runs_up_to_its_count(frames, engine, raw, lane):
    with ff_fast.ValkeyBackend.connect(engine.url) as backend:
        stream = Stream(raw, backend, lane)
        stream.open()
        for n in range(3):
            stream.append(live(*[b"x"] * frames), first=1 + n * frames, names="head live")

        def look(count):
            op = ops.read_range(
                stream.eid, 0, log_after=b"0-0", live_after=b"0-0", count=count,
                max_bytes=1 << 20, visibility="",
            )  # fmt: skip
            page = op.answer(raw.fcall_ro(op.function, len(op.keys), *op.keys, *op.argv))
            assert weigh_entries(page.live)[0] == len(page.live) * frames
            decoded = decode_entries(page.live, 0, live=True).frames
            assert sequences(decoded) == list(range(1, len(page.live) * frames + 1))
            assert (page.log, page.last_sequence) == ([], 3 * frames)
            return len(page.live), page.live_more

        assert look(1) == look(frames) == (1, True)
        assert look(frames + 1) == look(2 * frames) == (2, True)
        assert look(2 * frames + 1) == look(3 * frames) == (3, True)
        assert look(3 * frames + 1) == (3, False)


def test_an_attempt_without_a_frame_has_no_last_id(shell, backend, attempt):
    before = shell.describe_stream(attempt.eid)
    assert (before.last_id, before.frame_count) == ("0-0", 0)
    page = shell.read_stream(attempt.eid, after="0-5")
    assert (page, page.gaps) == ((), (Gap(6, 1, "cursor_ahead"),))
    again = shell.read_stream(attempt.eid, after=page.cursor)
    assert (again, again.gaps) == ((), ())
    backend.open_writer(attempt.handle).close()
    opened = shell.describe_stream(attempt.eid)
    assert opened == before.replace(lease_left=opened.lease_left)
    backend.complete(attempt.handle)
    ended = shell.describe_stream(attempt.eid)
    assert (ended.last_id, ended.frame_count, ended.log_entries) == ("0-0", 0, 1)
    assert shell.read_stream(attempt.eid, after=page.cursor).end_reason == "attempt_success"


def test_a_description_names_the_last_frame(shell, backend, attempt):
    write(backend, attempt, [("durable", "a"), ("best_effort", "b")])
    (*_, last) = shell.read_stream(attempt.eid)
    described = shell.describe_stream(attempt.eid)
    assert (described.last_id, described.frame_count) == (last.stream_id, 2)
    assert (described.log_entries, described.live_entries) == (1, 1)


def test_either_engine_reads_the_same(engine, raw, lane):
    with ff_fast.ValkeyBackend.connect(engine.url) as backend:
        attempt = begin(backend, lane)
        write(backend, attempt, MIXED)
        reader = Reader("sync", engine.url, attempt.eid)
        reader.wait_for(120)
        wait_listening(raw)
        page = backend.read_stream(attempt.eid, count=1_000)
        assert sequences(page) == list(range(1, 121))
        assert backend.read_summary(attempt.eid).version == 35
        raw.xdel(attempt.log, raw.xrange(attempt.log)[0][0])
        backend.complete(attempt.handle)
        assert [*page, DONE] == reader.result()
        assert collect("sync", engine.url, attempt.eid)[40] == Gap(41, 42, "trimmed")


# -- FlowFabric's defects -------------------------------------------------------------------------


def best_effort_frames(how):
    kinds = (
        [("best_effort", "token")] * 2
        if how == "runs"
        else [("best_effort", "a"), ("best_effort", "b")]
    )
    return [frame for _ in range(5_000) for frame in kinds]


@pytest.mark.parametrize("how", ["single entries", "runs"])
def test_excluding_does_not_stall_behind_ten_thousand_best_effort_frames(
    how, backend, server, raw, attempt
):
    write(
        backend,
        attempt,
        [("durable", "token"), *best_effort_frames(how), ("durable", "token"), ("summary", "s")],
    )
    if how == "single entries":
        assert raw.xlen(attempt.live) >= 10_000
    page = backend.read_stream(attempt.eid, count=10, visibility=EXCLUDE)
    assert sequences(page) == [1, 10_002, 10_003]
    assert page.gaps == ()
    one = backend.read_stream(attempt.eid, after=page[0].stream_id, count=1, visibility=EXCLUDE)
    assert sequences(one) == [10_002]
    running = Reader("sync", server.url, attempt.eid, visibility=EXCLUDE)
    running.wait_for(3)
    backend.complete(attempt.handle)
    assert sequences(running.result()) == [1, 10_002, 10_003]
    assert len(running.got) == 4


def test_a_page_of_excluded_frames_alone_moves_its_cursor(backend, raw, attempt):
    write(backend, attempt, best_effort_frames("single entries"))
    page = backend.read_stream(attempt.eid, count=10, visibility=EXCLUDE)
    assert (page, page.gaps) == ((), ())
    assert parse_cursor(page.cursor).sequence == 10_000
    with counted(raw, "fcall_ro") as calls:
        assert backend.read_stream(attempt.eid, after=page.cursor, visibility=EXCLUDE) == ()
    assert calls["fcall_ro"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_best_effort_traffic_makes_an_excluding_tail_ask_for_nothing(
    kind, backend, server, raw, attempt
):
    reader = Reader(kind, server.url, attempt.eid, visibility=EXCLUDE)
    wait_listening(raw)
    with counted(raw, "fcall_ro") as calls, backend.open_writer(attempt.handle) as writer:
        for _ in range(300):
            writer.write(b"x", mode=BEST_EFFORT)
            writer.flush()
        # A visible frame comes through at once.
        writer.write(b"seen")
        writer.flush()
        reader.wait_for(1)
    backend.complete(attempt.handle)
    items = reader.result()
    assert sequences(items) == [301]
    assert items[1:] == [DONE]
    # The look for what was held back when the tail began.
    assert calls["fcall_ro"] <= 2


def test_closing_wakes_a_blocked_reader(backend, server, raw, attempt):
    """XREAD itself is woken: the end is an entry."""
    replies = []

    def read():
        with connect_raw(server.url) as own:
            replies.append(own.xread({attempt.log: "0-0", attempt.live: "0-0"}, block=30_000))

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: blocked(raw))
    backend.complete(attempt.handle)
    reader.join(5)
    assert not reader.is_alive()
    ((key, ((_, fields),)),) = replies[0]
    assert (key, fields) == (attempt.log, {b"end": b"attempt_success", b"prev": b"0"})


@pytest.mark.parametrize("kind", KINDS)
def test_an_attempt_without_a_frame_ends(kind, backend, server, raw, attempt):
    reader = Reader(kind, server.url, attempt.eid)
    wait_listening(raw)
    backend.complete(attempt.handle)
    assert reader.result() == [DONE]
    assert collect(kind, server.url, attempt.eid) == [DONE]
    assert backend.read_stream(attempt.eid).end_reason == "attempt_success"


@pytest.mark.parametrize("how", ["complete", "fail"])
def test_every_key_gets_the_retention_ttl_when_the_attempt_ends(how, backend, raw, lane):
    eid = backend.create_execution(lane=lane, payload=b"p", tags={"a.b": "c"}, retention=60)
    handle = backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")
    with backend.open_writer(handle) as writer:
        for mode in MODES.values():
            writer.write(b"{}", mode=mode)
    assert any(raw.pttl(key) < 0 for key in raw.keys(f"*{eid}*"))
    if how == "complete":
        backend.complete(handle, b"result")
    else:
        backend.fail(handle, "it broke")
    found = {key: raw.pttl(key) for key in raw.keys(f"*{eid}*")}
    of_attempt = (keys.stream, keys.live, keys.head, keys.meta, keys.summary)
    assert {key(eid, 0) for key in of_attempt} <= set(found)
    assert len(found) == (11 if how == "complete" else 10)
    assert all(50_000 < ttl <= 60_000 for ttl in found.values()), found
    for key in found:
        raw.pexpire(key, 1)
    wait_until(lambda: not raw.keys(f"*{eid}*"))
    with pytest.raises(ExecutionNotFound):
        backend.read_stream(eid)


def test_a_tail_dials_once(backend, raw, attempt):
    with backend.open_writer(attempt.handle) as writer:
        writer.write(b"x")
        writer.flush()
        tail = backend.tail(attempt.eid)
        next(tail)
        before = raw.info("stats")["total_connections_received"]
        for _ in range(50):
            writer.write(b"x")
            writer.flush()
            next(tail)
        assert raw.info("stats")["total_connections_received"] == before
        tail.close()
    with contextlib.closing(backend.tail(attempt.eid)) as again:
        next(again)
    assert raw.info("stats")["total_connections_received"] == before


@pytest.mark.standalone("one server watches its commands")
def test_reads_are_fcall_ro_and_the_functions_carry_no_writes(backend, raw, attempt):
    write(backend, attempt, [("durable", "a"), ("summary", "b")])
    with counted(raw, "fcall_ro", "fcall") as calls:
        backend.read_stream(attempt.eid)
        backend.read_summary(attempt.eid)
        backend.describe(attempt.eid)
    assert calls == {"fcall_ro": 3, "fcall": 0}
    (library,) = raw.function_list(library="ff_fast")
    described = [_pairs(function) for function in _pairs(library)[b"functions"]]
    flags = {function[b"name"]: function[b"flags"] for function in described}
    read_only = "read_range", "read_state", "read_summary", "describe_execution", "version"
    for name in read_only:
        assert b"no-writes" in flags[f"ff_{name}".encode()]
    assert b"no-writes" not in flags[b"ff_append"]


def _pairs(flat):
    return dict(zip(flat[::2], flat[1::2], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_replica_serves_readers(kind, lane):
    with (
        EmbeddedServer(tcp=True, repl_diskless_sync_delay=0) as primary,
        ff_fast.ValkeyBackend.connect(primary.url) as backend,
    ):
        port = int(primary.url.rsplit(":", 1)[1])
        attempt = begin(backend, lane)
        write(backend, attempt, [("durable", "a"), ("summary", "b"), ("best_effort", "c")])
        with (
            EmbeddedServer(replicaof=("127.0.0.1", port)) as replica,
            connect_raw(replica.url) as raw,
        ):
            wait_until(lambda: raw.info("replication")["master_link_status"] == "up", 20)
            reader = Reader(kind, replica.url, attempt.eid)
            reader.wait_for(3)
            wait_listening(raw)
            with ff_fast.ValkeyBackend.connect(replica.url) as reading:
                assert sequences(reading.read_stream(attempt.eid)) == [1, 2, 3]
                assert reading.read_summary(attempt.eid).version == 1
            write(backend, attempt, [("durable", "d")])
            backend.complete(attempt.handle)
            assert sequences(reader.result()) == [1, 2, 3, 4]
            assert reader.got[-1] == DONE


@pytest.mark.parametrize(
    "argv",
    [
        [b"0", b"0-0", b"0-0", b"0", b"1", b""],
        [b"0", b"0-0", b"0-0", b"x", b"1", b""],
        [b"0", b"0-0", b"0-0", b"1", b"-1", b""],
        [b"x", b"0-0", b"0-0", b"1", b"1", b""],
        [b"1e1", b"0-0", b"0-0", b"1", b"1", b""],
    ],
)
def test_the_function_checks_its_numbers(argv, raw, attempt):
    op = ops.read_range(
        attempt.eid, 0, log_after=b"0-0", live_after=b"0-0", count=1, max_bytes=1, visibility=""
    )
    reply = raw.fcall_ro("ff_read_range", len(op.keys), *op.keys, *argv)
    assert reply[:2] == [0, b"invalid_input"]


# -- never a silent skip ---------------------------------------------------------------------------

frames = st.tuples(st.sampled_from(sorted(MODES)), st.sampled_from(["token", "event"]))
alike = st.tuples(frames, st.integers(2, 12)).map(lambda pair: [pair[0]] * pair[1])
batches = st.lists(
    st.one_of(st.lists(frames, min_size=1, max_size=6), alike.map(list)), min_size=1, max_size=4
)
damage = st.lists(
    st.tuples(st.sampled_from(["trim log", "trim live", "del log", "del live", "drop log", "drop live"]), st.integers(0, 30)),
    max_size=3,
)  # fmt: skip
rounds = st.lists(st.tuples(batches, damage, st.integers(0, 6)), min_size=1, max_size=4)


def hurt(raw, attempt, what, amount):
    """Lose entries; return the sequences of their frames."""
    before = kept(raw, attempt)
    verb, _, which = what.partition(" ")
    key = attempt.log if which == "log" else attempt.live
    if verb == "drop":
        raw.delete(key)
    elif verb == "trim":
        raw.xtrim(key, maxlen=amount, approximate=False)
    else:
        ids = [raw_id for raw_id, _ in raw.xrange(key)]
        if ids:
            raw.xdel(key, ids[amount % len(ids)])
    return before - kept(raw, attempt)


def kept(raw, attempt):
    """Sequences that are stored, in order."""
    found = set()
    for key in (attempt.log, attempt.live):
        entries = [[i, [part for pair in f.items() for part in pair]] for i, f in raw.xrange(key)]
        frames = decode_entries(entries, 0, live=key == attempt.live).frames
        found.update(frame.sequence for frame in frames)
    return found


@pytest.fixture(scope="module")
def shared(server):
    with ff_fast.ValkeyBackend.connect(server.url) as connected, connect_raw(server.url) as raw:
        yield connected, raw


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    plan=rounds,
    visibility=st.sampled_from([ALL, EXCLUDE]),
    cursor=st.integers(0, 60),
    count=st.sampled_from([1, 3, 10, 10_000]),
    small=st.booleans(),
)
def test_nothing_is_ever_skipped_in_silence(shared, plan, visibility, cursor, count, small):
    backend, raw = shared
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(tail_core, "_FIRST_FRAMES", 2)
            patch.setattr(tail_core, "_FIRST_COUNTS", (2, 1))
            patch.setattr(tail_core, "_LARGEST_COUNTS", (3, 2))
        attempt = begin(backend, keys.new_execution_id(256)[-36:])
        running = Stepper(raw, tail_core.TailCore(attempt.eid, 0, None, visibility))
        modes, lost = [], set()
        for batches_, wounds, steps in plan:
            for batch in batches_:
                write(backend, attempt, batch)
                modes += [mode for mode, _ in batch]
            for what, amount in wounds:
                lost |= hurt(raw, attempt, what, amount)
            for _ in range(steps):
                running.step()
        backend.complete(attempt.handle)
        stored_at_read = kept(raw, attempt)
        items = running.run()
        assert items.pop() == DONE
        never_lost = set(range(1, len(modes) + 1)) - lost
        check_told(items, 0, modes, visibility is EXCLUDE, never_lost)
        assert wanted_of(modes, visibility is EXCLUDE) & stored_at_read <= set(sequences(items))

        after = f"0-{cursor}"
        late = Stepper(raw, tail_core.TailCore(attempt.eid, 0, after, visibility)).run()
        assert late.pop() == DONE
        # A cursor right behind the last frame is that of the end entry.
        if cursor != len(modes) + 1:
            check_told(late, cursor, modes, visibility is EXCLUDE, stored_at_read)

        read, here = [], after
        while True:
            page = backend.read_stream(attempt.eid, after=here, count=count, visibility=visibility)
            read += sorted([*page, *page.gaps], key=place)
            assert here != page.cursor or page.end_reason
            here = page.cursor
            if page.end_reason:
                break
        if cursor <= len(modes):
            assert [plain(item) for item in read] == [plain(item) for item in late]


def place(item):
    return item.sequence if isinstance(item, StreamFrame) else item.first_missing


def plain(item):
    return item if isinstance(item, StreamFrame) else (item.first_missing, item.next_sequence)


def test_an_append_under_a_lapsed_lease_is_refused_so_the_end_stands(backend, server, raw, lane):
    attempt = begin(backend, lane)
    writer = backend.open_writer(attempt.handle)
    writer.write(b"x")
    writer.flush()
    backend.renew(attempt.handle, 50)
    items = collect("sync", server.url, attempt.eid)
    assert items[-1] == End("producer_lost")
    writer.write(b"too late")
    with pytest.raises(LeaseExpired):
        writer.flush()
    assert collect("sync", server.url, attempt.eid) == items
    assert not listening(raw)

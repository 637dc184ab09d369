"""Writers of both shells on a real server: what is accepted, stored, told and refused."""

import asyncio
import contextlib
import json
import threading
import time
import traceback

import pytest

import ff_fast
from ff_fast import (
    BestEffortLiveConfig,
    Frame,
    FrameKind,
    PatchKind,
    StreamMode,
    TailVisibility,
    aio,
    errors,
    keys,
)
from ff_fast._core import ops
from ff_fast._core.writer import Wait
from ff_fast._hot.writer import WriterCore
from ff_fast.errors import MAX_INT, Outcome

from ..heads import set_head
from ..shells import KINDS, Opener
from .streams import CODES, REFUSALS, Stream, server_ms, spoil

MAX_PAYLOAD = 65_536
LIVE = StreamMode.best_effort_live(60_000)
DURABLE = StreamMode.durable()
MERGE = StreamMode.durable_summary()
TEXT = StreamMode.durable_summary(PatchKind.STRING_APPEND("/text"))
WORKER = {"worker_id": "w", "worker_instance_id": "w-1"}


@pytest.fixture(params=KINDS)
def opener(request):
    opener = Opener(request.param)
    yield opener
    opener.close()


@pytest.fixture
def backend(opener, server):
    return opener(server.url)


@pytest.fixture
def stream(raw, backend, lane):
    """An attempt of this backend's worker (tests/server/test_append.py)."""
    return Stream(raw, backend, lane)


@pytest.fixture
def another(raw, backend, lane):
    """``another()``: one more attempt."""
    made = iter(range(1000))
    return lambda: Stream(raw, backend, f"{lane}-{next(made)}")


@pytest.fixture
def pause(raw):
    """``with pause():`` the server takes writes and executes none."""

    @contextlib.contextmanager
    def paused():
        raw.execute_command("CLIENT", "PAUSE", 20_000, "WRITE")
        try:
            yield
        finally:
            raw.execute_command("CLIENT", "UNPAUSE")

    yield paused
    raw.execute_command("CLIENT", "UNPAUSE")


def read_all(stream, visibility=TailVisibility.ALL):
    """Every frame that can be read, and every gap."""
    frames, gaps, after = [], [], None
    while True:
        page = stream.backend.read_stream(
            stream.eid, 0, after=after, count=5_000, visibility=visibility
        )
        frames += page
        gaps += page.gaps
        if not page and page.cursor == (after or "0-0"):
            return frames, gaps
        if page.cursor == after:
            return frames, gaps
        after = page.cursor


def payloads(stream):
    frames, gaps = read_all(stream)
    assert gaps == []
    assert [frame.sequence for frame in frames] == list(range(1, len(frames) + 1))
    return [frame.payload for frame in frames]


# -- what is stored ----------------------------------------------------------------------------------


def test_frames_of_every_mode_are_read_back_as_they_were_written(opener, lane, engine):
    backend = opener(engine.url)
    stream = Stream(None, backend, lane)
    written = []
    modes = [DURABLE, DURABLE, LIVE, LIVE, LIVE, MERGE, MERGE, DURABLE, LIVE, MERGE, LIVE]
    with backend.open_writer(stream.handle, mode=LIVE) as writer:
        for i, mode in enumerate(modes * 20, start=1):
            fields = {
                "frame_type": ("token", "tool_event")[i % 3 == 0],
                "correlation_id": (None, "call-1", "zażółć")[i % 7 % 3],
                "encoding": ("utf8", "binary")[i % 5 == 0],
                "source": ("worker", "tool")[i % 11 == 0],
            }
            payload = b'{"n":%d}' % i
            given = {} if mode is LIVE else {"mode": mode}
            assert writer.write(payload, **fields, **given) == i
            written.append((i, payload, mode.wire, *fields.values()))
        outcome = writer.flush()
    frames, gaps = read_all(stream)
    assert gaps == []
    assert [
        (f.sequence, f.payload, f.mode, f.frame_type, f.correlation_id, f.encoding, f.source)
        for f in frames
    ] == written
    assert outcome.frame_count == len(written)
    assert outcome.stream_id == frames[-1].stream_id
    assert outcome.summary_version == 60
    versions = [f.summary_version for f in frames if f.mode == "summary"]
    assert versions == list(range(1, 61))
    visible, gaps = read_all(stream, TailVisibility.EXCLUDE_BEST_EFFORT)
    assert gaps == []
    assert visible == [frame for frame in frames if frame.mode != "best_effort"]
    assert json.loads(backend.read_summary(stream.eid).document_json)["n"] == frames[-2].sequence


EXACT = {
    "empty": b"",
    "nul": b"\x00",
    "crlf": b"\r\n\r\n$5\r\n*1\r\n",
    "ff": b"\xff" * 10,
    "all": bytes(range(256)),
    "64 KiB": bytes(range(256)) * 256,
}


@pytest.mark.parametrize("mode", [DURABLE, LIVE], ids=lambda mode: mode.wire)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "in a run"])
def test_binary_payloads_are_exact(stream, backend, mode, alone):
    sent = []
    with backend.open_writer(stream.handle, mode=mode) as writer:
        for data in EXACT.values():
            for payload in [data] * (1 if alone else 3):
                writer.write(payload)
                sent.append(payload)
            if alone:
                writer.flush()
    assert payloads(stream) == sent


def test_text_of_a_summary_is_exact(stream, backend):
    parts = ["", "\x00", "\r\n", "zażółć \U0001f600", '"\\', "x" * MAX_PAYLOAD, "__ff_null__ in it"]
    with backend.open_writer(stream.handle, mode=TEXT) as writer:
        for part in parts:
            writer.write(part)
    assert payloads(stream) == [part.encode() for part in parts]
    document = backend.read_summary(stream.eid)
    assert json.loads(document.document_json) == {"text": "".join(parts)}
    assert document.version == len(parts)


def test_the_largest_patch_is_exact(stream, backend):
    patch = b'{"a":"%b"}' % (b"x" * (MAX_PAYLOAD - 8))
    assert len(patch) == MAX_PAYLOAD
    with backend.open_writer(stream.handle, mode=MERGE) as writer:
        writer.write(patch)
        with pytest.raises(errors.PayloadTooLarge):
            writer.write(patch + b" ")
    assert payloads(stream) == [patch]
    assert backend.read_summary(stream.eid).document_json == patch


class Text(str):
    """A str of another class."""

    __slots__ = ()


ACCEPTED = {
    "bytes": (b"x\x00", b"x\x00"),
    "str": ("zażółć", "zażółć".encode()),
    "str subclass": (Text("t"), b"t"),
    "bytearray": (bytearray(b"ba"), b"ba"),
    "memoryview": (memoryview(b"0123")[1:3], b"12"),
    "non-contiguous": (memoryview(b"abcdef")[::2], b"ace"),
    "wide items": (memoryview(bytearray(b"12345678")).cast("I"), b"12345678"),
}
REFUSED = {
    "surrogate": ("\ud800", errors.InvalidPayload),
    "None": (None, errors.InvalidType),
    "bool": (True, errors.InvalidType),
    "int": (7, errors.InvalidType),
    "float": (1.5, errors.InvalidType),
    "list": ([b"x"], errors.InvalidType),
    "dict": ({}, errors.InvalidType),
    "too large": (bytes(MAX_PAYLOAD + 1), errors.PayloadTooLarge),
    "too large text": ("ż" * (MAX_PAYLOAD // 2 + 1), errors.PayloadTooLarge),
    "too large view": (memoryview(bytes(MAX_PAYLOAD * 2 + 2))[::2], errors.PayloadTooLarge),
    "huge": (bytearray(64 << 20), errors.PayloadTooLarge),
}


@pytest.mark.parametrize("mode", [DURABLE, LIVE], ids=lambda mode: mode.wire)
def test_types_of_payloads(stream, backend, mode):
    wanted = []
    with backend.open_writer(stream.handle, mode=mode) as writer:
        for given, stored in ACCEPTED.values():
            writer.write(given)
            wanted.append(stored)
        for given, error in REFUSED.values():
            with pytest.raises(error) as caught:
                writer.write(given)
            assert type(caught.value) is error
            assert caught.value.outcome is Outcome.NOT_APPLIED
            # That frame alone is refused; the writer goes on, and no sequence is lost.
            assert writer.write(b"next") == len(wanted) + 1
            wanted.append(b"next")
    assert payloads(stream) == wanted


def test_a_buffer_may_change_once_it_was_written(stream, backend):
    data = bytearray(b"before")
    with backend.open_writer(stream.handle, mode=LIVE) as writer:
        writer.write(data)
        writer.write(memoryview(data)[:3])
        data[:] = b"AFTER!"
        data.extend(b"and more")
    assert payloads(stream) == [b"before", b"bef"]


BAD_FIELDS = [
    ({"frame_type": ""}, errors.InvalidInput),
    ({"frame_type": "x" * 257}, errors.InvalidInput),
    ({"frame_type": "\ud800"}, errors.InvalidInput),
    ({"frame_type": b"token"}, errors.InvalidType),
    ({"frame_type": None}, errors.InvalidType),
    ({"frame_type": ["token"]}, errors.InvalidType),
    ({"mode": "durable"}, errors.InvalidType),
    ({"mode": MERGE.patch_kind}, errors.InvalidType),
    ({"correlation_id": ""}, errors.InvalidInput),
    ({"correlation_id": 7}, errors.InvalidType),
    ({"correlation_id": ["a"]}, errors.InvalidType),
    ({"encoding": ""}, errors.InvalidInput),
    ({"encoding": None}, errors.InvalidType),
    ({"source": "x" * 257}, errors.InvalidInput),
    ({"source": 1}, errors.InvalidType),
]


@pytest.mark.parametrize("fields, error", BAD_FIELDS)
def test_bad_fields_refuse_that_frame_alone(stream, backend, fields, error):
    with backend.open_writer(stream.handle) as writer:
        writer.write(b"1")
        with pytest.raises(error) as caught:
            writer.write(b"x", **fields)
        assert isinstance(caught.value, errors.FFError)
        assert writer.write(b"2") == 2
    assert payloads(stream) == [b"1", b"2"]


@pytest.mark.parametrize("patch", [b"", b"[]", b"{", b'{"a":NaN}', b"\xff", b"1"])
def test_a_bad_patch_refuses_that_frame_alone(stream, backend, patch):
    with backend.open_writer(stream.handle, mode=MERGE) as writer:
        writer.write(b'{"a":[]}')
        with pytest.raises(errors.InvalidPatch):
            writer.write(patch)
        assert writer.write(b'{"b":{}}') == 2
        assert writer.flush().summary_version == 2
    assert backend.read_summary(stream.eid).document_json == b'{"a":[],"b":{}}'


# -- flush, drain, limits ----------------------------------------------------------------------------


def test_a_flush_tells_what_is_stored(stream, backend, raw):
    writer = backend.open_writer(stream.handle)
    outcome = writer.flush()
    assert (outcome.stream_id, outcome.frame_count, outcome.summary_version) == ("0-0", 0, None)
    writer.write(b"1")
    writer.write(b"2", mode=LIVE)
    outcome = writer.flush()
    assert outcome.stream_id == raw.xrevrange(keys.live(stream.eid, 0), count=1)[0][0].decode()
    assert (outcome.frame_count, outcome.summary_version) == (2, None)
    writer.write(b"{}", mode=MERGE)
    assert writer.flush().summary_version == 1
    assert writer.flush() == writer.flush()
    assert writer.last_id == writer.flush().stream_id
    assert (writer.last_sequence, writer.next_sequence, writer.unacknowledged_bytes) == (3, 4, 0)
    assert 0 < writer.lease_left <= 30
    writer.close()


def test_frames_leave_without_a_flush(stream, backend, raw):
    writer = backend.open_writer(stream.handle)
    writer.write(b"1")
    backend.wait_until(lambda: raw.xlen(stream.log) == 1)
    writer.close()


def test_a_flush_that_takes_too_long_loses_nothing(stream, backend, pause):
    writer = backend.open_writer(stream.handle)
    with pause():
        writer.write(b"1")
        writer.write(b"2")
        with pytest.raises(errors.DeadlineExceeded) as caught:
            writer.flush(timeout=0.05)
        assert caught.value.outcome is Outcome.UNKNOWN
        assert caught.value.unstored == ()
        with pytest.raises(errors.DeadlineExceeded):
            writer.close(timeout=0.05)
    assert writer.flush().frame_count == 2
    writer.close()
    assert payloads(stream) == [b"1", b"2"]


def test_past_the_limit_a_frame_is_refused_until_the_writer_was_drained(stream, backend, pause):
    writer = backend.open_writer(stream.handle, max_unacknowledged_bytes=MAX_PAYLOAD)
    chunk = bytes(4096)
    sent = []

    def fill():
        while len(sent) < 100:
            writer.write(chunk)
            sent.append(chunk)

    with pause():
        with pytest.raises(errors.Overloaded):
            fill()
        assert 8 <= len(sent) <= 16
        for _ in range(3):
            with pytest.raises(errors.Overloaded) as caught:
                writer.write(chunk)
            assert (caught.value.retryable, caught.value.outcome) == (True, Outcome.NOT_APPLIED)
        assert writer.next_sequence == len(sent) + 1
        # What the error says to do must help: drain() waits until a frame of any size is taken.
        with pytest.raises(errors.DeadlineExceeded):
            writer.drain(timeout=0.05)
    writer.drain()
    assert writer.write(b"x" * MAX_PAYLOAD) == len(sent) + 1
    writer.close()
    assert payloads(stream) == [*sent, b"x" * MAX_PAYLOAD]


def test_frames_without_a_payload_count_as_well(stream, backend, pause):
    writer = backend.open_writer(stream.handle, max_unacknowledged_bytes=MAX_PAYLOAD)

    def fill():
        for _ in range(100_000):
            writer.write(b"")

    with pause(), pytest.raises(errors.Overloaded):
        fill()
    writer.close()


def test_drain_waits_while_too_much_is_on_its_way(stream, backend, pause):
    writer = backend.open_writer(stream.handle)
    chunk = bytes(MAX_PAYLOAD)
    with pause():
        writer.drain(timeout=0)
        for _ in range(40):
            writer.write(chunk)
        with pytest.raises(errors.DeadlineExceeded):
            writer.drain(timeout=0.05)
        assert writer.unacknowledged_bytes >= 40 * MAX_PAYLOAD
    writer.drain()
    assert writer.unacknowledged_bytes <= 1 << 20
    writer.close()
    assert payloads(stream) == [chunk] * 40


# -- what an entry names -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 200])
@pytest.mark.parametrize("mode", [DURABLE, LIVE, MERGE], ids=lambda mode: mode.wire)
def test_an_entry_names_only_what_is_unusual(stream, backend, raw, mode, count):
    def fields_of(**options):
        raw.delete(stream.log, stream.live)
        with backend.open_writer(stream.handle, mode=mode, linger=1) as writer:
            for _ in range(count):
                writer.write(b"{}", **options)
        key = stream.log if mode is DURABLE else stream.live
        assert raw.exists(stream.log, stream.live) == 1
        entries = raw.xrange(key)
        assert len(entries) == (count if mode is DURABLE else 1)
        (names,) = {tuple(entry) for _, entry in entries}
        return names

    value = (b"payload",) if mode is DURABLE or count == 1 else (b"run",)
    usual = {MERGE: (b"mode", b"patch_kind", b"summary_version")}.get(mode, ())
    assert fields_of() == value + usual
    assert fields_of(frame_type="token", encoding="utf8", source="worker") == value + usual
    names = fields_of(frame_type="t", encoding="e", source="s", correlation_id="c")
    unusual = {b"frame_type", b"encoding", b"source", b"correlation_id"}
    assert names[:1] == value
    assert set(names[1:]) == {*usual, *unusual}
    assert len(names) == 1 + len(usual) + len(unusual)


# -- linger ------------------------------------------------------------------------------------------


def test_frames_that_linger_leave_together(stream, backend, raw):
    writer = backend.open_writer(stream.handle, mode=LIVE, linger=1)
    for payload in (b"1", b"2", b"3"):
        writer.write(payload)
    # A flush does not wait for the linger's end.
    writer.flush()
    ((_, entry),) = raw.xrange(stream.live)
    assert (entry.keys(), entry[b"run"][0]) == ({b"run"}, 3)
    assert payloads(stream) == [b"1", b"2", b"3"]
    writer.close()


def test_a_linger_ends_by_itself(stream, backend, raw):
    writer = backend.open_writer(stream.handle, mode=LIVE, linger=0.02)
    for first in (1, 4):
        for i in range(3):
            writer.write(b"%d" % (first + i))
        backend.wait_until(lambda last=first + 2: writer.last_sequence == last)
    assert payloads(stream) == [b"1", b"2", b"3", b"4", b"5", b"6"]
    writer.close()


def test_a_full_batch_does_not_linger(stream, backend, raw):
    writer = backend.open_writer(stream.handle, mode=LIVE, linger=1)
    for _ in range(256):
        writer.write(b"x")
    assert writer.last_sequence <= 256
    backend.wait_until(lambda: writer.last_sequence == 256)
    writer.close()


# -- a caller's sequences ----------------------------------------------------------------------------


def event(data, **fields):
    return Frame(data, FrameKind.EVENT, **fields)


def test_a_sequence_makes_appending_a_frame_idempotent(stream, backend):
    first = backend.append_frame(stream.handle, event(b"1", seq=1))
    assert backend.append_frame(stream.handle, event(b"1", seq=1)) == first
    assert backend.append_frame(stream.handle, event(b"2")).frame_count == 2
    third = backend.append_frame(stream.handle, event(b"3", seq=3, mode=LIVE))
    for seq in (1, 2, 3):
        assert backend.append_frame(stream.handle, event(b"again", seq=seq)) == third
    for seq in (5, MAX_INT):
        before = stream.everything()
        with pytest.raises(errors.SequenceGap) as caught:
            backend.append_frame(stream.handle, event(b"gap", seq=seq))
        assert (caught.value.expected, caught.value.got) == (4, seq)
        assert stream.everything() == before
    assert backend.append_frame(stream.handle, event(b"4", seq=4)).frame_count == 4
    assert payloads(stream) == [b"1", b"2", b"3", b"4"]


def test_a_new_writer_takes_no_sequence_of_the_old_one(stream, backend):
    backend.append_frame(stream.handle, event(b"1", seq=1))
    backend.open_writer(stream.handle)
    with pytest.raises(errors.SequenceGap) as caught:
        backend.append_frame(stream.handle, event(b"mine", seq=1))
    assert (caught.value.expected, caught.value.got) == (2, 1)
    assert backend.append_frame(stream.handle, event(b"2", seq=2)).frame_count == 2
    assert payloads(stream) == [b"1", b"2"]


def test_a_frame_is_appended_as_it_says(stream, backend):
    frame = Frame(b"\xff", FrameKind.BLOB, frame_type="png", correlation_id="c", mode=LIVE)
    backend.append_frame(stream.handle, frame)
    outcome = backend.append_frame(stream.handle, Frame("{}", FrameKind.STDOUT, mode=MERGE))
    assert outcome.summary_version == 1
    one, two = read_all(stream)[0]
    assert (one.payload, one.frame_type, one.encoding) == (b"\xff", "png", "binary")
    assert (one.correlation_id, one.mode) == ("c", "best_effort")
    assert (two.payload, two.frame_type, two.encoding) == (b"{}", "stdout", "utf8")
    assert outcome.stream_id == two.stream_id


def test_a_frame_goes_through_the_writer_that_is_open(stream, backend):
    with backend.open_writer(stream.handle) as writer:
        writer.write(b"1")
        assert backend.append_frame(stream.handle, event(b"2")).frame_count == 2
        assert writer.write(b"3") == 3
    assert backend.append_frame(stream.handle, event(b"4")).frame_count == 4
    assert payloads(stream) == [b"1", b"2", b"3", b"4"]


def test_frames_that_threads_append_at_once_are_all_stored(raw, server, lane):
    opener = Opener("sync")
    backend = opener(server.url)
    stream = Stream(raw, backend, lane)
    start = threading.Barrier(8)
    failed = []

    def work(name):
        start.wait()
        try:
            for i in range(10):
                backend.append_frame(stream.handle, event(f"{name}-{i}"))
        except errors.FFError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    stored = payloads(stream)
    assert sorted(stored) == sorted(f"{name}-{i}".encode() for name in range(8) for i in range(10))
    opener.close()


def test_frames_that_tasks_append_at_once_are_all_stored(raw, server, lane):
    async def main():
        async with aio.ValkeyBackend.connect(server.url) as backend:
            eid = await backend.create_execution(lane=lane)
            handle = await backend.claim(lane=lane, **WORKER)
            await asyncio.gather(*(backend.append_frame(handle, event(f"{i}")) for i in range(20)))
            return sorted(frame.payload for frame in await backend.read_stream(eid, 0))

    assert asyncio.run(main()) == sorted(f"{i}".encode() for i in range(20))


def test_threads_may_write_into_one_writer(raw, server, lane):
    opener = Opener("sync")
    backend = opener(server.url)
    stream = Stream(raw, backend, lane)
    taken = []
    with backend.open_writer(stream.handle, mode=LIVE) as writer:

        def work(name):
            taken.extend((writer.write(f"{name}-{i}"), f"{name}-{i}".encode()) for i in range(500))

        threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert payloads(stream) == [payload for _, payload in sorted(taken)]
    opener.close()


# -- the end of a writer -----------------------------------------------------------------------------

FATAL = REFUSALS[:6]


@pytest.mark.parametrize("refusal", FATAL, ids=CODES[:6])
def test_a_fatal_answer_stops_the_writer_and_hands_back_the_rest(stream, backend, refusal):
    writer = backend.open_writer(stream.handle)
    for i in (1, 2):
        writer.write(b"stored %d" % i)
    writer.flush()
    if refusal[0] == "stale_owner":
        stream.raw.hset(stream.core, "current_lease_digest", "another")
        set_head(stream.raw, stream.head, writer=None)
    else:
        spoil(stream, [refusal])
    before = stream.everything()
    lost = [
        (b"secret log", "token", DURABLE),
        (b"secret live 1", "token", LIVE),
        (b"secret live 2", "token", LIVE),
        (b'{"secret":1}', "patch", MERGE),
        (b"", "token", DURABLE),
    ]
    accepted = []
    told = []
    # The answer may come amid these writes: what was accepted until then is handed back, the rest was refused.
    for payload, frame_type, mode in lost:
        try:
            writer.write(payload, frame_type, mode=mode)
        except errors.FFError as error:
            told.append(error)
        else:
            accepted.append((len(accepted) + 3, payload, frame_type, mode.wire))
    assert accepted
    for call in (writer.flush, writer.drain, writer.close, lambda: writer.write(b"late secret")):
        with pytest.raises(refusal[3]) as caught:
            call()
        told.append(caught.value)
    for error in told:
        assert type(error) is refusal[3]
        assert (error.code, error.outcome) == (refusal[0], Outcome.NOT_APPLIED)
        rest = [(f.sequence, f.payload, f.frame_type, f.mode) for f in error.unstored]
        assert rest == accepted
        shown = repr(error) + str(error) + "".join(traceback.format_exception(error))
        assert "b'secret" not in shown
        assert "secret l" not in shown.replace("late secret", "")
        assert "secret" not in repr(error) + str(error) + repr(error.unstored) + repr(writer)
        assert stream.fence[1].decode() not in shown + repr(writer)
    assert writer.error.unstored
    assert stream.everything() == before


def test_frames_that_the_server_lost_are_stored_again(stream, backend):
    writer = backend.open_writer(stream.handle)
    writer.write(b"1")
    writer.flush()
    stream.set_last(sequence=0)
    stream.raw.delete(stream.log)
    writer.write(b"2")
    writer.flush()
    assert stream.payloads() == [b"1", b"2"]


@pytest.mark.parametrize("found", ["gone", "ahead"])
def test_a_summary_that_somebody_else_changed_stops_the_writer(stream, backend, raw, found):
    writer = backend.open_writer(stream.handle, mode=MERGE)
    writer.write(b'{"a":1}')
    writer.flush()
    if found == "gone":
        raw.delete(stream.summary)
    else:
        raw.hset(stream.summary, "version", 7)
    writer.write(b'{"a":2}')
    with pytest.raises(errors.SummaryConflict) as caught:
        writer.flush(timeout=3)
    assert (caught.value.expected, caught.value.got) == (0 if found == "gone" else 7, 1)
    assert [frame.payload for frame in caught.value.unstored] == [b'{"a":2}']


def test_a_second_writer_supersedes_the_first(stream, backend, opener, server):
    first = backend.open_writer(stream.handle)
    first.write(b"1")
    first.flush()
    with opener(server.url).open_writer(stream.handle) as second:
        assert second.next_sequence == 2
        first.write(b"lost")
        with pytest.raises(errors.WriterSuperseded) as caught:
            first.flush()
        assert [frame.payload for frame in caught.value.unstored] == [b"lost"]
        second.write(b"2")
    assert payloads(stream) == [b"1", b"2"]


@pytest.mark.parametrize("at", range(5), ids=CODES[:5])
def test_a_writer_that_may_not_write_is_not_opened(stream, backend, at):
    code, _, _, error = REFUSALS[at]
    if code == "stale_owner":
        stream.raw.hset(stream.core, "current_lease_epoch", "2")
    else:
        spoil(stream, [REFUSALS[at]])
    before = stream.everything()
    with pytest.raises(error):
        backend.open_writer(stream.handle)
    with pytest.raises(error):
        backend.append_frame(stream.handle, event(b"x"))
    assert stream.everything() == before


def test_closing_stores_the_rest_and_ends_writing(stream, backend):
    writer = backend.open_writer(stream.handle, linger=1)
    writer.write(b"1")
    writer.close()
    writer.close()
    assert payloads(stream) == [b"1"]
    with pytest.raises(errors.WriterClosed) as caught:
        writer.write(b"2")
    assert caught.value.outcome is Outcome.NOT_APPLIED
    assert writer.flush().frame_count == 1
    # Another one may be opened.
    with backend.open_writer(stream.handle) as second:
        assert second.write(b"2") == 2
    assert payloads(stream) == [b"1", b"2"]


@pytest.fixture
def threads(stream, server):
    """A writer of the blocking shell, with one frame, for tests of what another thread does amid a call."""
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        writer = backend.open_writer(stream.handle)
        writer.write(b"1")
        yield writer


def test_a_wait_that_is_over_is_no_error_where_another_thread_closes_then(threads):
    looks = [False, False]

    def done():
        if len(looks) == 1:
            # The frame is stored, and the writer is closed, behind this look.
            threads.close()
        return looks.pop() if looks else threads.last_sequence == 1

    assert threads._wait(Wait(done, threads.outcome, 10)).frame_count == 1


def test_two_threads_may_close_at_once(threads, monkeypatch):
    def found_open(writer):
        monkeypatch.undo()
        assert writer._failure is None
        writer.close()

    monkeypatch.setattr(ff_fast.Writer, "_failure", property(found_open), raising=False)
    threads.close()
    assert threads.last_sequence == 1


@pytest.mark.parametrize("mode", [DURABLE, LIVE, MERGE], ids=lambda mode: mode.wire)
def test_an_unused_writer_closes(stream, backend, mode):
    with backend.open_writer(stream.handle, mode=mode) as writer:
        pass
    assert writer.last_sequence == 0
    assert payloads(stream) == []


def test_a_block_that_fails_keeps_its_error_and_its_frames(stream, backend):
    def block():
        with backend.open_writer(stream.handle) as writer:
            writer.write(b"1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert payloads(stream) == [b"1"]


def test_a_block_whose_writer_failed_tells_so(stream, backend, raw):
    opened = []

    def block(error=None):
        raw.hdel(stream.meta, "closed_at")
        with backend.open_writer(stream.handle) as writer:
            opened.append(writer)
            raw.hset(stream.meta, "closed_at", "1")
            # As every end does: the writer is what an append asks for first.
            set_head(raw, stream.head, writer=None)
            writer.write(b"1")
            if error is not None:
                raise error

    with pytest.raises(errors.StreamClosed):
        block()
    # The block's own error says what went wrong first.
    with pytest.raises(ZeroDivisionError):
        block(ZeroDivisionError())
    for writer in opened:
        assert [frame.payload for frame in writer.error.unstored] == [b"1"]


@pytest.mark.parametrize("mode", [DURABLE, LIVE, MERGE], ids=lambda mode: mode.wire)
def test_a_writer_whose_attempt_was_ended_meanwhile_closes(stream, backend, raw, mode):
    with backend.open_writer(stream.handle, mode=mode) as writer:
        writer.write(b"{}")
        writer.flush()
        backend.cancel(stream.eid)
        before = stream.everything()
    assert stream.everything() == before
    assert payloads(stream) == [b"{}"]
    # Closed like any other, and nothing is left over.
    with pytest.raises(errors.WriterClosed) as caught:
        writer.write(b"{}")
    assert caught.value.unstored == ()


def test_a_frame_for_an_attempt_that_was_ended_meanwhile_is_told(stream, backend):
    def block():
        with backend.open_writer(stream.handle, linger=1) as writer:
            writer.write(b"lost")
            backend.cancel(stream.eid)

    with pytest.raises(errors.StreamClosed) as caught:
        block()
    assert [frame.payload for frame in caught.value.unstored] == [b"lost"]


def test_closing_the_backend_hands_back_what_is_not_stored(stream, backend, pause):
    writer = backend.open_writer(stream.handle)
    writer.write(b"1")
    writer.flush()
    with pause():
        writer.write(b"2")
        writer.write(b"3")
        backend.close()
    with pytest.raises(errors.WriterClosed) as caught:
        writer.write(b"4")
    assert [frame.payload for frame in caught.value.unstored] == [b"2", b"3"]


def test_a_lost_library_is_loaded_again_amid_a_stream(stream, backend, raw):
    with backend.open_writer(stream.handle) as writer:
        for i in range(2000):
            writer.write(b"%d" % i)
            if i in (5, 700, 1500):
                raw.function_flush()
        writer.flush()
    assert payloads(stream) == [b"%d" % i for i in range(2000)]


# -- many streams ------------------------------------------------------------------------------------


def test_writers_of_two_attempts_do_not_mix(another, backend):
    streams = [another(), another()]
    sent = [[], []]
    with (
        backend.open_writer(streams[0].handle) as first,
        backend.open_writer(streams[1].handle, mode=LIVE) as second,
    ):
        for i in range(1500):
            for at, writer in enumerate((first, second)):
                data = b"%d-%d" % (at, i)
                assert writer.write(data) == i + 1
                sent[at].append(data)
    assert [payloads(stream) for stream in streams] == sent


@pytest.mark.standalone("each node has connections of its own")
def test_fifty_streams_share_a_connection(another, backend, raw):
    streams = [another() for _ in range(50)]
    before = len(raw.client_list())
    writers = [
        backend.open_writer(stream.handle, mode=(DURABLE, LIVE)[i % 2])
        for i, stream in enumerate(streams)
    ]
    for i in range(40):
        for at, writer in enumerate(writers):
            writer.write(b"%d-%d" % (at, i))
    for writer in writers:
        assert writer.flush().frame_count == 40
    # The blocking shell opens one for its writers; calls have one already.
    assert len(raw.client_list()) <= before + 1
    for at, stream in enumerate(streams):
        assert payloads(stream) == [b"%d-%d" % (at, i) for i in range(40)]
    for writer in writers:
        writer.close()


# -- continuing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "crashed"])
def test_a_later_writer_continues_where_the_first_one_was(
    stream, backend, opener, server, raw, closed
):
    writer = backend.open_writer(stream.handle, mode=LIVE)
    for i in range(300):
        writer.write(b"x")
        if i % 30 == 0:
            writer.write(b'{"n":%d,"k%d":[]}' % (i, i), mode=MERGE)
            writer.flush()
    writer.flush()
    if closed:
        writer.close()
    rate, *_ = raw.hget(stream.meta, "estimator").split()
    assert float(rate) >= 0
    with opener(server.url).open_writer(stream.handle, mode=LIVE) as second:
        assert (second._first_sequence, second.summary_version) == (311, 10)
        if closed:
            # The estimate goes on; it does not start anew.
            second.write(b"y")
            second.flush()
            assert second.window_frames >= 64
            assert second.rate_hz > 0
        second.write(b'{"n":null,"last":1}', mode=MERGE)
        assert second.flush().summary_version == 11
    wanted = {f"k{i}": [] for i in range(0, 300, 30)} | {"last": 1}
    summary = backend.read_summary(stream.eid)
    assert (json.loads(summary.document_json), summary.version) == (wanted, 11)
    assert read_all(stream)[1] == []


# -- retention ---------------------------------------------------------------------------------------


def test_a_live_window_always_expires(stream, backend, raw):
    with backend.open_writer(stream.handle, mode=StreamMode.best_effort_live(1)) as writer:
        writer.write(b"x")
        writer.flush()
    backend.wait_until(lambda: not raw.exists(stream.live))


def test_a_blob_is_exact_and_says_that_it_is_binary(stream, backend):
    backend.append_frame(stream.handle, Frame(bytes(range(256)), FrameKind.BLOB))
    (frame,) = read_all(stream)[0]
    assert (frame.payload, frame.encoding) == (bytes(range(256)), "binary")


def test_each_writer_has_its_own_retention(stream, backend):
    with backend.open_writer(stream.handle, retention_maxlen=100) as writer:
        for i in range(1000):
            writer.write(b"%d" % i)
    kept = len(read_all(stream)[0])
    assert 100 <= kept < 1000
    with backend.open_writer(stream.handle, retention_maxlen=5000) as writer:
        for i in range(1000):
            writer.write(b"%d" % i)
    assert len(read_all(stream)[0]) == kept + 1000
    with backend.open_writer(stream.handle, retention_maxlen=200) as writer:
        for i in range(1000):
            writer.write(b"%d" % i)
    assert 200 <= len(read_all(stream)[0]) < 1200


def test_durable_frames_outlive_what_comes_after_them(stream, backend, raw):
    brief = StreamMode.best_effort_live(1)
    with backend.open_writer(stream.handle) as writer:
        for i in range(1000):
            writer.write(b"%d" % i)
        for _ in range(200):
            writer.write(b'{"a":1}', mode=MERGE)
            writer.write(b"gone soon", mode=brief)
        writer.flush()
        for _ in range(5000):
            writer.write(b"gone soon", mode=brief)
        writer.flush()
        writer.write(b'{"b":2}', mode=MERGE)
    assert raw.xlen(stream.log) == 1000
    assert raw.pttl(stream.log) == -1
    frames, _ = read_all(stream, TailVisibility.EXCLUDE_BEST_EFFORT)
    assert [f.payload for f in frames[:1000]] == [b"%d" % i for i in range(1000)]
    assert backend.read_summary(stream.eid).version == 201


@pytest.mark.parametrize("maxlen", [1, 300, 1500])
def test_the_log_keeps_at_least_its_retention(stream, backend, raw, maxlen):
    with backend.open_writer(stream.handle, retention_maxlen=maxlen) as writer:
        for i in range(2000):
            writer.write(b"%d" % i)
            if i % 100 == 0:
                writer.write(b"live", mode=LIVE)
                # Whatever the writer's batches: at no time less is kept.
                written = writer.flush().frame_count - i // 100 - 1
                assert raw.xlen(stream.log) >= min(maxlen, written)
    kept = [f for f in read_all(stream)[0] if f.mode == "durable"]
    assert maxlen <= len(kept) < 2000
    assert [f.payload for f in kept] == [b"%d" % i for i in range(2000 - len(kept), 2000)]


def test_no_best_effort_frame_younger_than_its_ttl_is_missing(another, backend, raw):
    """4000 frames a second for longer than their ttl, a pause, a trickle: what the server's ids say."""
    rate, seconds = 4000, 1.5
    configs = {
        "below the ceiling": BestEffortLiveConfig(1_000),
        "trimmed": BestEffortLiveConfig(250),
        "ceiling": BestEffortLiveConfig(1_000, maxlen_ceiling=500),
    }
    streams = {name: another() for name in configs}
    writers = {
        name: backend.open_writer(
            streams[name].handle, mode=StreamMode.best_effort_live_with_config(config)
        )
        for name, config in configs.items()
    }
    written_at = {name: [] for name in configs}

    def step(i):
        now = int(time.time() * 1000)
        for name, writer in writers.items():
            assert writer.write(b"token!") == len(written_at[name]) + 1
            written_at[name].append(now)

    def check(name):
        """Frames in the window; none is missing that was written within the ttl before the latest append."""
        writers[name].flush()
        stored_ms = server_ms(raw)
        stream, config = streams[name], configs[name]
        frames, _ = read_all(stream)
        kept = {frame.sequence for frame in frames}
        newest = int(raw.xrevrange(stream.live, count=1)[0][0].split(b"-")[0])
        if name != "ceiling":
            # Written by the clock that the server has as well: it was stored then, or later.
            young = {
                sequence
                for sequence, ms in enumerate(written_at[name], start=1)
                if ms > newest - config.ttl_ms + 1
            }
            assert young
            assert young <= kept
        first = min(kept)
        assert kept == set(range(first, len(written_at[name]) + 1))
        expires_at = raw.pexpiretime(stream.live)
        assert config.ttl_ms < expires_at - newest
        # A frame may be stored some time after the ms of its id.
        assert expires_at <= stored_ms + 2 * config.ttl_ms
        return len(kept)

    backend.paced(rate, seconds, step)
    sizes = {name: check(name) for name in configs}
    assert sizes["trimmed"] < rate * seconds
    # At least as many as the ceiling says, and not without limit (whole nodes of runs leave at once).
    assert 500 <= sizes["ceiling"] < rate * seconds // 2
    reported = {name: writer.window_frames for name, writer in writers.items()}
    assert 64 < reported["below the ceiling"] <= 16_384
    assert 64 < reported["trimmed"] <= 16_384
    assert reported["ceiling"] == 500

    # The rate is forgotten in a pause; what is still young stays all the same.
    resume_at = server_ms(raw) + 250
    backend.wait_until(lambda: server_ms(raw) >= resume_at)
    for _ in range(20):
        step(0)
        for writer in writers.values():
            writer.flush()
    sizes = {name: check(name) for name in configs}
    assert sizes["ceiling"] >= 500
    for writer in writers.values():
        writer.close()


# -- the core alone ----------------------------------------------------------------------------------


def core(**options):
    keys_ = (b"head", b"log", b"live", b"summary")
    writer = b"0:lease:1:writer"
    opened = ops.Opened(0, 0, 0, b"", 0)
    return WriterCore(keys=keys_, writer=writer, mode=DURABLE, opened=tuple(opened), **options)


def three_in_flight(writer):
    batches = []
    for _ in range(3):
        for _ in range(256):
            writer.write(b"x")
        batches.append(writer._next_batch())
    assert [batch.first_sequence for batch in batches] == [1, 257, 513]
    return batches


def refusal():
    return Exception("OOM command not allowed when used memory > 'maxmemory'.")


@pytest.mark.parametrize("answered", [1, 2])
def test_a_connection_lost_amid_a_retry_keeps_the_order(answered):
    writer = core()
    batches = three_in_flight(writer)
    for batch in batches[:answered]:
        writer._acknowledge(batch, refusal())
    writer._requeue()
    assert [writer._next_batch().first_sequence for _ in range(3)] == [1, 257, 513]


def test_what_is_not_stored_is_in_order_amid_a_retry():
    writer = core()
    batches = three_in_flight(writer)
    writer._acknowledge(batches[0], refusal())
    writer._fail(errors.WriterClosed())
    sequences = [frame.sequence for frame in writer.error.unstored]
    assert sequences == list(range(1, 769))


def test_a_refused_batch_and_those_behind_it_go_again_in_order():
    writer = core()
    batches = three_in_flight(writer)
    told = [writer._acknowledge(batch, refusal()) for batch in batches]
    assert isinstance(told[0], errors.OutOfMemory)
    again = [writer._next_batch() for _ in range(3)]
    assert again == batches

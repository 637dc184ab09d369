"""The writer without I/O: what it sends, what it makes of answers, and that no frame is lost."""

import ast
import contextlib
import gc
import inspect
import itertools
import json
import random
import re
import sys
import threading
import time
from pathlib import Path

import hiredis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import ff_fast
import ff_fast.aio
from ff_fast._core.ops import Attempt, Opened
from ff_fast._core.summary import fold
from ff_fast._core.writer import SharedWriter, WriterOptions, WriterState
from ff_fast._hot.frames import StreamFrame
from ff_fast._hot.writer import WriterCore, arguments_of
from ff_fast.errors import (
    Corruption,
    FFError,
    FunctionMissing,
    InvalidInput,
    InvalidPatch,
    InvalidPayload,
    InvalidType,
    LeaseExpired,
    OutOfMemory,
    Overloaded,
    PayloadTooLarge,
    PermissionDenied,
    ProtocolError,
    SequenceGap,
    StreamClosed,
    SummaryConflict,
    Unavailable,
    WriterClosed,
    WriterSuperseded,
)
from ff_fast.types import BestEffortLiveConfig, Handle, PatchKind, StreamMode

from ..reference_writer import Server, Written, blocks, parse

ROOT = Path(__file__).parent.parent.parent
KEYS = {name: b"{p}%b" % name.encode() for name in ("meta", "log", "live", "summary")}
WRITER = b"0:lease:7:writer"
NOW_MS = 1_700_000_000_000
NEW = (NOW_MS, 0, 0, b"", 0)

DURABLE = StreamMode.durable()
LIVE = StreamMode.best_effort_live(15_000)
MERGE = StreamMode.durable_summary()
TEXT = StreamMode.durable_summary(PatchKind.STRING_APPEND("/text"))
NOTES = StreamMode.durable_summary(PatchKind.STRING_APPEND("/notes/a:b"))
MODES = [DURABLE, LIVE, MERGE, TEXT, NOTES]

OOM = hiredis.ReplyError("OOM command not allowed when used memory > 'maxmemory'.")
GAP = [0, b"sequence_gap", b"1", b"2"]


class Shell(WriterCore):
    """A shell that notes what the core tells it."""

    def __init__(self, mode=DURABLE, opened=NEW, **options):
        self.queued = False
        self.lingers = 0
        self.progress = 0
        super().__init__(
            keys=tuple(KEYS.values()), writer=WRITER, mode=mode, opened=opened, **options
        )

    def _on_ready(self):
        self.queued = True

    def _on_linger(self):
        self.lingers += 1

    def _on_progress(self):
        self.progress += 1

    def take(self):
        """The next batch, as a shell that was told to ask for it."""
        assert self.queued, "the shell was not told"
        self.queued = False
        return self._next_batch()


def position(batch, ms=NOW_MS):
    last = batch.first_sequence + batch.frame_count - 1
    return b"%d-%d %d %d 0" % (ms, last, NOW_MS, NOW_MS + 30_000)


def stored(writer, ms=NOW_MS):
    """Acknowledge everything; return what was sent."""
    requests = []
    while not writer._idle:
        writer._seal_soon()
        batch = writer.take()
        requests.append(parse(arguments_of(batch.message)))
        writer._acknowledge(batch, position(batch, ms))
    return requests


def payloads_of(batch):
    return [frame.payload for frame in parse(arguments_of(batch.message)).frames]


# -- requests --------------------------------------------------------------------------------------


def test_exact_request():
    writer = Shell()
    assert writer.write(b"hi", "token") == 1
    assert writer.take().message == (
        b"*10\r\n$5\r\nFCALL\r\n$9\r\nff_append\r\n$1\r\n2\r\n"
        b"$7\r\n{p}meta\r\n$6\r\n{p}log\r\n"
        b"$16\r\n0:lease:7:writer\r\n"
        b"$1\r\n0\r\n"
        b"$1\r\nL\r\n$1\r\n1\r\n$2\r\nhi\r\n"
    )


def keys_of(batch):
    """The keys that a request names."""
    reader = hiredis.Reader()
    reader.feed(batch.message)
    name, function, count, *rest = reader.gets()
    assert (name, function) == (b"FCALL", b"ff_append")
    return tuple(rest[: int(count)])


def keys_named(names):
    return tuple(KEYS[name] for name in names.split())


def test_arguments_of_leaves_out_the_keys():
    writer = Shell()
    for mode in [DURABLE, LIVE, DURABLE, TEXT, DURABLE]:
        writer.write(b"hi", mode=mode)
        batch = writer.take()
        argv = arguments_of(batch.message)
        assert argv[:2] == [WRITER, b"%d" % (batch.first_sequence - 1)]
        assert len(argv[2]) == 1
        writer._acknowledge(batch, position(batch))


@pytest.mark.parametrize(
    "modes, names",
    [
        ([DURABLE], "meta log"),
        ([LIVE], "meta live"),
        ([DURABLE, LIVE], "meta log live"),
        ([LIVE, DURABLE], "meta log live"),
        ([TEXT], "meta log live summary"),
        ([MERGE, LIVE, DURABLE], "meta log live summary"),
    ],
)
def test_a_request_names_the_keys_that_it_needs(modes, names):
    # Each key costs the server time.
    writer = Shell()
    for first in (1, len(modes) + 1):
        for mode in modes:
            writer.write(b"{}", mode=mode)
        batch = writer.take()
        assert keys_of(batch) == keys_named(names)
        assert parse(arguments_of(batch.message)).first_sequence == first
        writer._acknowledge(batch, position(batch))


def test_what_no_frame_asks_for_names_its_key_too():
    # The log is due for a trim, whatever this writer's frames are.
    writer = Shell(LIVE, (NOW_MS, 5, 5, b"", 0))
    writer.write(b"x")
    batch = writer.take()
    assert b"K" in tail_of(batch)
    assert keys_of(batch) == keys_named("meta log live")
    writer._acknowledge(batch, position(batch))
    # Neither stream has to do with the estimate.
    writer._seal_last()
    batch = writer.take()
    assert set(tail_of(batch)) == {b"E"}
    assert keys_of(batch) == keys_named("meta log")


def patch_for(mode, number):
    return b'{"k%d":%d}' % (number % 3, number) if mode == MERGE else b"t%d" % number


@st.composite
def written(draw):
    mode = draw(st.sampled_from(MODES))
    if mode.patch_kind is None:
        payload = draw(st.binary(max_size=6) | st.sampled_from([127, 128, 16_384]).map(bytes))
    else:
        payload = patch_for(mode, draw(st.integers(0, 99)))
    return Written(
        payload,
        mode,
        draw(st.sampled_from(["token", "log", "a\0b\r\n"])),
        draw(st.sampled_from([None, None, "c1", "c2"])),
        draw(st.sampled_from(["utf8", "utf8", "binary"])),
        draw(st.sampled_from(["worker", "worker", "tool"])),
    )


def write(writer, frame):
    return writer.write(
        frame.payload,
        frame.frame_type,
        mode=frame.mode,
        correlation_id=frame.correlation_id,
        encoding=frame.encoding,
        source=frame.source,
    )


# Runs of equal frames are what streams are made of.
batches = st.lists(
    st.lists(st.tuples(written(), st.integers(1, 4)), min_size=1, max_size=8).map(
        lambda runs: [frame for frame, count in runs for _ in range(count)]
    ),
    min_size=1,
    max_size=4,
)


@given(batches, st.sampled_from([(0, 0, 0), (5, 5, 2), (5, 3, 0), (9_007_199_254, 0, 9)]))
def test_arguments_agree_with_the_oracle(sent, opened):
    last, visible, version = opened
    document = json.dumps({"text": "t" * version}).encode() if version else None
    writer = Shell(LIVE, (NOW_MS, last, visible, b"", version), document=document)
    for frames in sent:
        for number, frame in enumerate(frames, last + 1):
            assert write(writer, frame) == number
        batch = writer.take()
        request = parse(arguments_of(batch.message))
        assert (batch.first_sequence, batch.frame_count) == (last + 1, len(frames))
        assert request.first_sequence == last + 1
        assert request.frame_arguments == blocks(frames, last + 1, visible, version)
        assert keys_of(batch) == keys_named(" ".join(request.key_names))
        assert request.ages == sorted(request.ages, reverse=True)
        assert all(age < 10_000 for age in request.ages)
        writer._acknowledge(batch, position(batch))
        told = None if visible == last else visible
        for number, frame in enumerate(frames, last + 1):
            visible = number if frame.visible else visible
            version += frame.mode.patch_kind is not None
        last += len(frames)
        if told == (None if visible == last else visible):
            assert b"H" not in request.tail
        else:
            assert request.tail[b"H"] == [b"" if visible == last else b"%d" % visible]
        assert writer.summary_version == version
        assert writer.last_sequence == last
        assert writer.unacknowledged_bytes == 0


@given(batches)
def test_server_has_what_was_written(sent):
    writer, server = Shell(), Server()
    for frames in sent:
        for frame in frames:
            write(writer, frame)
        batch = writer.take()
        writer._acknowledge(batch, server.append(arguments_of(batch.message)))
    everything = [frame for frames in sent for frame in frames]
    assert [frame.payload for frame in server.frames] == [frame.payload for frame in everything]
    assert [frame.mode.decode() for frame in server.frames] == [f.mode.wire for f in everything]
    server.check_visible_chain()
    writer._seal_last()
    for request in stored(writer):
        assert request.frames == []


def test_lines_of_a_run_follow_the_frames_of_each_other_shape():
    writer = Shell(LIVE)
    writer.write(b"", mode=DURABLE)
    first = writer.take()
    for i in range(1500):
        writer.write(b"%d" % i, f"type{i % 700}", correlation_id=str(i % 90))
    second = writer.take()
    writer._acknowledge(first, position(first))
    assert [second.frame_count, len(payloads_of(second))] == [1024, 1024]
    third = writer.take()
    assert payloads_of(second) + payloads_of(third) == [b"%d" % i for i in range(1500)]


LIMITS = {
    name: int(value)
    for name, value in re.findall(
        r"^ff\.(MAX_\w+) = (\d+)", (ROOT / "lua/prelude.lua").read_text(), re.MULTILINE
    )
}


class TestBounds:
    """What the server accepts, read from the Lua library itself."""

    @pytest.mark.parametrize("size", [0, 1, 127, 128, 1023, 1024, 1025, 65_535, 65_536])
    @pytest.mark.parametrize("mode", [LIVE, DURABLE])
    def test_fullest_batches(self, mode, size):
        writer = Shell(mode)
        writer.write(b"")
        first = writer.take()
        for _ in range(1300 if size < 2000 else 40):
            writer.write(bytes(size))
        writer._acknowledge(first, position(first))
        while not writer._idle:
            batch = writer.take()
            argv = arguments_of(batch.message)
            assert batch.frame_count <= LIMITS["MAX_FRAMES"]
            assert max(map(len, argv)) <= LIMITS["MAX_RUN_BYTES"]
            assert max(len(p) for p in payloads_of(batch)) <= LIMITS["MAX_PAYLOAD"]
            assert len(batch.message) < (1 << 20) + 65_536 + 1024 * 16
            writer._acknowledge(batch, position(batch))

    def test_worst_run_has_room_for_any_age(self):
        # A length takes 3 bytes, an age at most 8, the count 2.
        worst = (1 << 20) - 1 + 65_536 + 1024 * (3 + 8) + 2
        assert worst < LIMITS["MAX_RUN_BYTES"]

    def test_most_fields(self):
        writer = Shell(NOTES)
        writer.write(b"", mode=LIVE)
        for _ in range(2):
            writer.write(b"x", "t", correlation_id="c", encoding="binary", source="s")
        argv = arguments_of(writer.take().message)
        at = argv.index(b"S")
        assert int(argv[at + 2]) == 9 <= LIMITS["MAX_FIELDS"]


# -- arguments of write ----------------------------------------------------------------------------


class Text(str):
    __slots__ = ()

    def encode(self, *_):
        return b"something else"


class Data(bytes):
    def __bytes__(self):
        return bytes(70_000)


class TestArguments:
    @pytest.mark.parametrize(
        "payload, data",
        [
            (b"", b""),
            ("", b""),
            ("ü\0\r\n", b"\xc3\xbc\0\r\n"),
            (bytearray(b"ab"), b"ab"),
            (memoryview(b"abcdef")[::2], b"ace"),
            (memoryview(b"abcd").cast("H"), b"abcd"),
            (Text("text"), b"text"),
            (Data(b"data"), b"data"),
        ],
    )
    @pytest.mark.parametrize("mode", [DURABLE, LIVE])
    def test_payloads(self, payload, data, mode):
        writer = Shell(mode)
        assert writer.write(payload) == 1
        assert payloads_of(writer.take()) == [data]

    @pytest.mark.parametrize("payload", [None, True, 0, 1.5, [b"x"], ("x",), {}, object()])
    def test_other_types(self, payload):
        self.refused(InvalidType, payload)

    def test_a_buffer_is_copied(self):
        writer = Shell()
        buffer = bytearray(b"before")
        writer.write(buffer)
        buffer[:] = b"after"
        buffer.extend(bytes(1000))
        assert payloads_of(writer.take()) == [b"before"]

    @pytest.mark.parametrize("kind", [bytes, bytearray, lambda n: "x" * n, Data])
    def test_size_limit(self, kind):
        writer = Shell()
        assert writer.write(kind(65_536)) == 1
        error = self.refused(PayloadTooLarge, kind(65_537))
        assert (error.limit, error.size) == (65_536, 65_537)

    def test_huge_view_is_not_copied(self):
        view = memoryview(bytearray(1 << 20)).cast("B", (1024, 1024))
        self.refused(PayloadTooLarge, view)

    def test_released_view(self):
        view = memoryview(b"x")
        view.release()
        self.refused(InvalidPayload, view)

    def test_surrogate(self):
        error = self.refused(InvalidPayload, "\ud800secret")
        assert error.__cause__ is None
        assert "secret" not in str(error)

    @pytest.mark.parametrize("name", ["frame_type", "correlation_id", "encoding", "source"])
    class TestTexts:
        @pytest.mark.parametrize("text", ["a", "\0", "a\r\nb", "x" * 256, "ü" * 128])
        def test_accepted(self, name, text):
            writer = Shell(LIVE)
            writer.write(b"x", **{name: text})
            (frame,) = parse(arguments_of(writer.take().message)).frames
            assert frame.fields[name.encode()] == text.encode()

        @pytest.mark.parametrize("text", ["", "x" * 257, "ü" * 129, "\ud800"])
        def test_wrong_values(self, name, text):
            TestArguments.refused(InvalidInput, b"x", **{name: text})

        @pytest.mark.parametrize(
            "text", [b"a", 1, True, ["a"], object(), Text("a"), Text("token"), Text("utf8")]
        )
        def test_wrong_types(self, name, text):
            TestArguments.refused(InvalidType, b"x", **{name: text})

        def test_none(self, name):
            if name != "correlation_id":
                TestArguments.refused(InvalidType, b"x", **{name: None})

    @pytest.mark.parametrize("mode", ["durable", 1, [], {}, StreamMode, LIVE.config])
    def test_wrong_modes(self, mode):
        self.refused(InvalidType, b"x", mode=mode)
        with pytest.raises(InvalidType, match="mode"):
            Shell(mode)

    def test_an_equal_text_of_another_type_is_refused_however_often(self):
        writer = Shell()
        writer.write(b"x", "other")
        with pytest.raises(InvalidType, match="frame_type"):
            writer.write(b"x", Text("other"))

    def test_equal_modes_are_one_run(self):
        writer = Shell()
        for i in range(3):
            writer.write(b"x", "to" + "ken"[: 3 + i], mode=StreamMode.best_effort_live(15_000))
        batch = writer.take()
        assert arguments_of(batch.message)[2:4] == [b"V", b"3"]

    @staticmethod
    def refused(error, *args, **options):
        """One refusal, after which the writer goes on as if nothing had been."""
        writer = Shell()
        with pytest.raises(error) as caught:
            writer.write(*args, **options)
        assert writer.next_sequence == 1
        assert writer._idle
        assert not writer.queued
        assert writer.write(b"next") == 1
        assert payloads_of(writer.take()) == [b"next"]
        return caught.value


class TestConstruction:
    @pytest.mark.parametrize("linger_ms", [-0.1, 1000.1, 1e300, float("inf"), float("nan")])
    def test_linger(self, linger_ms):
        with pytest.raises(InvalidInput, match="linger_ms"):
            Shell(linger_ms=linger_ms)

    @pytest.mark.parametrize("name", ["retention_maxlen", "max_unacknowledged_bytes"])
    @pytest.mark.parametrize("value", [0, -1])
    def test_positive(self, name, value):
        with pytest.raises(InvalidInput, match=name):
            Shell(**{name: value})

    @pytest.mark.parametrize("estimator", [b"x", b"nan", b"inf", b"-1", b"1e400", b"1e13"])
    def test_estimator_that_is_no_rate(self, estimator):
        with pytest.raises(Corruption):
            Shell(LIVE, (NOW_MS, 1, 0, estimator, 0))

    def test_without_init_nothing_is_accepted(self):
        writer = WriterCore.__new__(WriterCore)
        with pytest.raises(FFError):
            writer.write(b"x")
        writer._seal_last()
        assert writer._next_batch() is None
        assert writer._unstored_frames() == ()

    def test_later_writer_goes_on(self):
        writer = Shell(LIVE, (NOW_MS, 41, 40, b"123.4", 0))
        assert (writer._first_sequence, writer.next_sequence) == (42, 42)
        assert (writer.last_sequence, writer.last_id) == (41, f"{NOW_MS}-41")
        assert writer.write(b"x") == 42


# -- patches ---------------------------------------------------------------------------------------


class TestPatches:
    def test_refused_then_good(self):
        writer = Shell(MERGE)
        for bad in (b"", b"[]", b"{", b'{"a":NaN}', b"\xff"):
            with pytest.raises(InvalidPatch):
                writer.write(bad)
        assert writer.summary_version == 0
        assert writer._idle
        assert writer.write(b'{"a":1}') == 1
        request = parse(arguments_of(writer.take().message))
        assert request.patches == [(b"patch:1:1:json-merge-patch:", b'{"a":1}', 1, 0)]

    def test_refused_inside_a_run(self):
        writer, server = Shell(MERGE), Server()
        writer.write(b'{"a":1}')
        with pytest.raises(InvalidPatch):
            writer.write(b"no")
        writer.write(b'{"a":{"b":2}}')
        with pytest.raises(InvalidPatch):
            writer.write(b"x", mode=StreamMode.durable_summary(PatchKind.STRING_APPEND("/a/b")))
        writer.write(b'{"c":3}')
        batch = writer.take()
        writer._acknowledge(batch, server.append(arguments_of(batch.message)))
        assert writer.summary_version == server.version == 3
        assert json.loads(fold(server.summary).document_json) == {"a": {"b": 2}, "c": 3}

    def test_base_versions_of_several_runs(self):
        writer = Shell(MERGE, (NOW_MS, 7, 7, b"", 4), document=b"{}")
        for mode, patch in [(MERGE, b"{}"), (MERGE, b"{}"), (LIVE, b"x"), (TEXT, b"t")]:
            writer.write(patch, mode=mode)
        writer.write(b"x", mode=DURABLE)
        writer.write(b"{}")
        request = parse(arguments_of(writer.take().message))
        assert [(name, base) for name, _, _, base in request.patches] == [
            (b"run:6:2:json-merge-patch:", 4),
            (b"patch:7:1:string-append:/text", 6),
            (b"patch:8:1:json-merge-patch:", 7),
        ]
        assert [frame.previous for frame in request.frames] == [None, None, None, 9, None, None]

    def test_document_is_stored_when_the_patches_outgrow_it(self):
        writer, server = Shell(TEXT), Server()
        compactions = 0
        for i in range(6000):
            writer.write(b"some text ")
            if i % 100 == 99:
                batch = writer.take()
                argv = arguments_of(batch.message)
                compactions += b"C" in parse(argv).tail
                writer._acknowledge(batch, server.append(argv))
        writer._seal_last()
        (request,) = stored_on(writer, server)
        assert request.tail[b"C"][0] == b"6000"
        # Each time they are twice as long as it is: 4 KiB, 12, 36.
        assert compactions == 3
        assert json.loads(fold(server.summary).document_json) == {"text": "some text " * 6000}

    def test_document_of_a_later_writer(self):
        writer = Shell(TEXT, (NOW_MS, 3, 3, b"", 2), document=b'{"text":"ab"}')
        writer.write(b"c")
        writer._seal_last()
        (request,) = stored(writer)
        assert request.tail[b"C"] == [b"3", b'{"text":"abc"}', b"string-append:/text"]


def stored_on(writer, server):
    requests = []
    while not writer._idle:
        batch = writer.take()
        argv = arguments_of(batch.message)
        requests.append(parse(argv))
        assert writer._acknowledge(batch, server.append(argv)) is None
        assert writer.error is None
    return requests


# -- when batches leave ----------------------------------------------------------------------------


class TestSending:
    def test_first_frame_at_once_then_what_has_gathered(self):
        writer = Shell()
        writer.write(b"1")
        first = writer.take()
        for i in (2, 3, 4):
            writer.write(b"%d" % i)
        assert not writer.queued
        assert writer._next_batch() is None
        writer._acknowledge(first, position(first))
        assert payloads_of(writer.take()) == [b"2", b"3", b"4"]

    @pytest.mark.parametrize("size, count", [(1, 256), (1024, 64), (65_536, 1)])
    def test_a_big_batch_does_not_wait(self, size, count):
        writer = Shell()
        writer.write(b"")
        writer.take()
        for _ in range(count - 1):
            writer.write(bytes(size))
        assert not writer.queued
        writer.write(bytes(size))
        assert writer.take().frame_count == count

    def test_four_on_their_way(self):
        writer = Shell(max_unacknowledged_bytes=1 << 30)
        for _ in range(6000):
            writer.write(b"x")
        sent = []
        while writer.queued:
            sent.append(writer.take())
        assert [batch.frame_count for batch in sent] == [1024] * 4
        assert writer._next_batch() is None
        writer._acknowledge(sent[0], position(sent[0]))
        assert writer.take().first_sequence == 4 * 1024 + 1

    def test_told_once_until_asked(self):
        told = []

        class Counting(Shell):
            def _on_ready(self):
                told.append(self.next_sequence)
                super()._on_ready()

        writer = Counting()
        for _ in range(1000):
            writer.write(b"x")
        assert told == [2]

    def test_linger(self):
        writer = Shell(linger_ms=5)
        writer.write(b"1")
        writer.write(b"2")
        assert (writer.queued, writer.lingers, writer._linger_us) == (False, 1, 5000)
        writer._seal_soon()
        batch = writer.take()
        assert batch.frame_count == 2
        writer.write(b"3")
        assert writer.lingers == 2
        writer._acknowledge(batch, position(batch))
        assert not writer.queued
        writer._seal_soon()
        assert payloads_of(writer.take()) == [b"3"]

    def test_linger_that_ends_while_a_batch_is_on_its_way(self):
        writer = Shell(linger_ms=5)
        writer.write(b"1")
        writer._seal_soon()
        batch = writer.take()
        writer.write(b"2")
        writer._seal_soon()
        assert not writer.queued
        writer._acknowledge(batch, position(batch))
        assert payloads_of(writer.take()) == [b"2"]

    def test_batch_behind_a_full_one_lingers_too(self):
        writer = Shell(linger_ms=5)
        for _ in range(1025):
            writer.write(b"x")
        assert writer.lingers == 2
        first = writer.take()
        assert writer._next_batch() is None
        writer._acknowledge(first, position(first))
        writer._seal_soon()
        assert writer.take().frame_count == 1

    def test_batch_opened_while_another_waits_to_go_again_lingers_too(self):
        writer = Shell(linger_ms=5)
        writer.write(b"1")
        writer._seal_soon()
        writer.take()
        writer._requeue()
        writer.write(b"2")
        assert (writer.queued, writer.lingers) == (True, 2)

    def test_linger_of_a_batch_that_has_left_says_nothing_of_the_next_one(self):
        writer = Shell(linger_ms=5)
        for _ in range(300):
            writer.write(b"x")
        batch = writer.take()
        writer._acknowledge(batch, position(batch))
        writer._seal_soon()
        writer.write(b"y")
        assert not writer.queued

    def test_overload(self):
        writer = Shell(LIVE, max_unacknowledged_bytes=2000)
        for _ in range(20):
            writer.write(bytes(100))
        with pytest.raises(Overloaded) as caught:
            writer.write(b"x")
        assert caught.value.retryable
        assert writer.next_sequence == 21
        batch = writer.take()
        assert writer.unacknowledged_bytes == len(batch.message)
        with pytest.raises(Overloaded):
            writer.write(b"")
        writer._acknowledge(batch, position(batch))
        assert writer.unacknowledged_bytes == 0
        assert writer.write(b"x") == 21

    def test_empty_frames_are_not_free(self):
        writer = Shell(LIVE, max_unacknowledged_bytes=1 << 20)
        for i in range(5000):
            writer.write(b"", correlation_id="ab"[i % 2])
        with pytest.raises(Overloaded):  # noqa: PT012 - somewhere on the way
            for i in range(20_000):
                writer.write(b"", correlation_id="ab"[i % 2])


# -- answers ---------------------------------------------------------------------------------------


def in_flight(count, mode=DURABLE, **options):
    """A writer with *count* batches on their way."""
    writer = Shell(mode, **options)
    sent = []
    for _ in range(count):
        for _ in range(256):
            writer.write(b"%d" % writer.next_sequence)
        sent.append(writer.take())
    return writer, sent


class TestAnswers:
    def test_position(self):
        writer = Shell()
        writer.write(b"x")
        assert (writer.last_id, writer.last_sequence) == ("0-0", 0)
        writer._acknowledge(writer.take(), b"1700000000123-1 1700000000200 1700000004200 1")
        assert writer.last_id == "1700000000123-1"
        assert (writer.lease_left, writer.cancel_requested) == (4.0, True)
        assert writer._idle

    @pytest.mark.parametrize(
        "reply, left",
        [
            (b"0-1 1700000000200 1700000000200 0", 0),
            (b"0-1 1700000000200 1700000000199 0", 0),
            (b"0-1 1700000000200 99 0", 0),
            (b"0-1 1700000000200 999999999999999 0", 998_299_999_999_799),
            (b"0-1 0 9007199254740991 0", 9_007_199_254_740_991),
        ],
    )
    def test_what_the_lease_has_left(self, reply, left):
        writer = Shell()
        writer.write(b"x")
        writer._acknowledge(writer.take(), reply)
        assert (writer.error, writer.lease_left) == (None, left / 1000)
        # The frame was trimmed meanwhile; the last known time stands for its own.
        assert writer.last_id == f"{NOW_MS}-1"

    def test_id_of_the_last_frame_outlives_the_closing_batch(self):
        writer = Shell(LIVE)
        writer.write(b"x")
        writer._acknowledge(writer.take(), b"1700000000123-1 1700000000123 1700000004123 0")
        writer._seal_last()
        writer._acknowledge(writer.take(), b"1700000009999-1 1700000009999 1700000013999 0")
        assert writer.last_id == "1700000000123-1"

    @pytest.mark.parametrize("repeats", [1, 3])
    def test_repeat_after_a_lost_answer(self, repeats):
        writer, server = Shell(), Server()
        writer.write(b"x")
        batch = writer.take()
        for _ in range(repeats):
            server.append(arguments_of(batch.message))
            writer._requeue()
            again = writer.take()
            assert again.message is batch.message
        writer._acknowledge(batch, server.append(arguments_of(batch.message)))
        assert [frame.payload for frame in server.frames] == [b"x"]
        assert writer.unacknowledged_bytes == 0
        assert writer._idle

    def test_answers_to_an_earlier_connection_are_not_for_it(self):
        writer, (first, second) = in_flight(2)
        writer._requeue()
        assert writer._acknowledge(first, position(first)) is None
        assert writer.last_sequence == 0
        assert writer.take() is first
        assert writer._acknowledge(second, position(second)) is None
        assert writer.last_sequence == 0

    @pytest.mark.parametrize(
        "reply, error",
        [
            (OOM, OutOfMemory),
            (hiredis.ReplyError("ERR Function not found"), FunctionMissing),
            (hiredis.ReplyError("LOADING Valkey is loading the dataset in memory"), Unavailable),
        ],
    )
    def test_refused_by_the_server_for_now(self, reply, error):
        writer, sent = in_flight(4)
        assert isinstance(writer._acknowledge(sent[0], reply), error)
        for batch in sent[1:]:
            assert writer._next_batch() is None
            assert writer._acknowledge(batch, GAP) is None
        again = [writer.take() for _ in sent]
        assert again == sent
        for batch in again:
            writer._acknowledge(batch, position(batch))
        assert writer._idle
        assert writer.error is None

    @pytest.mark.parametrize("answered", [1, 2, 3])
    def test_connection_lost_amid_a_refusal(self, answered):
        writer, sent = in_flight(4)
        for batch in sent[:answered]:
            writer._acknowledge(batch, OOM)
        writer._requeue()
        assert [writer.take() for _ in sent] == sent

    def test_accepted_behind_a_refused_one(self):
        # Both were stored before the connection broke; the server says OOM before it looks.
        writer, sent = in_flight(4)
        server = Server()
        for batch in sent[:3]:
            server.append(arguments_of(batch.message))
        writer._requeue()
        again = [writer.take() for _ in sent]
        assert isinstance(writer._acknowledge(again[0], OOM), OutOfMemory)
        assert writer._acknowledge(again[1], OOM) is None
        for batch in again[2:]:
            assert writer._acknowledge(batch, server.append(arguments_of(batch.message))) is None
        assert writer.error is None
        assert writer._idle
        assert writer.last_sequence == 4 * 256
        assert writer.unacknowledged_bytes == 0

    def test_refused_again_behind_an_accepted_one(self):
        writer, sent = in_flight(4)
        writer._acknowledge(sent[0], OOM)
        writer._acknowledge(sent[1], position(sent[1]))
        assert isinstance(writer._acknowledge(sent[2], OOM), OutOfMemory)
        writer._acknowledge(sent[3], GAP)
        assert [writer.take(), writer.take()] == sent[2:]

    @pytest.mark.parametrize(
        "reply, error",
        [
            (GAP, SequenceGap),
            ([0, b"lease_expired"], LeaseExpired),
            ([0, b"writer_superseded"], WriterSuperseded),
            # Marked as retryable, but the same bytes will not do.
            ([0, b"summary_conflict", b"3", b"2"], SummaryConflict),
            ([0, b"overloaded"], Overloaded),
            ([0, b"brand_new_code"], ProtocolError),
            ([0, b"sequence_gap"], ProtocolError),
            (hiredis.ReplyError("NOPERM no permissions"), PermissionDenied),
            (hiredis.ReplyError("OOM @user_function: half way"), OutOfMemory),
            (b"1700000000000-257 1700000000000 1700000030000 0", ProtocolError),
            (b"1700000000000-255 1700000000000 1700000030000 0", ProtocolError),
            (b"1-256 1 1", ProtocolError),
            (b"1-256 1 1 ", ProtocolError),
            (b"1-256 1 1 0 ", ProtocolError),
            (b"1-256 1 1 0 0", ProtocolError),
            (b"1-256  1 1 0", ProtocolError),
            (b"1 256 1 1 0", ProtocolError),
            (b"1-256-1 1 0", ProtocolError),
            (b"1-256 1-1 0", ProtocolError),
            (b"-256 1 1 0", ProtocolError),
            (b"-1-256 1 1 0", ProtocolError),
            (b"1-256 1 -1 0", ProtocolError),
            (b"1-256 1 1.5 0", ProtocolError),
            (b"", ProtocolError),
            (b"9" * 400, ProtocolError),
            (b"1-256 1 " + b"9" * 17 + b" 0", ProtocolError),
            (b"1-256 1 1 " + b"9" * 17, ProtocolError),
            (b"+OK", ProtocolError),
            (None, ProtocolError),
            (256, ProtocolError),
            (True, ProtocolError),
            ([], ProtocolError),
            ([0], ProtocolError),
            ([0, 7], ProtocolError),
            ([0, None, b"x"], ProtocolError),
            ([0, b"sequence_gap", 1, None], ProtocolError),
            ([1, b"OK"], ProtocolError),
            ({}, ProtocolError),
        ],
    )
    def test_fatal(self, reply, error):
        writer, sent = in_flight(2)
        assert writer._acknowledge(sent[0], reply) is None
        assert type(writer.error) is error
        assert [frame.sequence for frame in writer.error.unstored] == list(range(1, 513))
        assert writer._acknowledge(sent[1], position(sent[1])) is None
        assert writer._next_batch() is None
        with pytest.raises(error) as caught:
            writer.write(b"x")
        assert caught.value.unstored == writer.error.unstored
        assert not writer._idle

    def test_refusal_of_the_function_behind_a_refused_batch_is_asked_again(self):
        writer, sent = in_flight(2)
        writer._acknowledge(sent[0], OOM)
        assert writer._acknowledge(sent[1], [0, b"stale_owner"]) is None
        assert writer.error is None
        assert writer.take() is sent[0]

    def test_progress_is_told_to_those_who_wait(self):
        writer, sent = in_flight(2)
        writer._acknowledge(sent[0], position(sent[0]))
        assert writer.progress == 0
        writer._has_waiters = True
        writer._acknowledge(sent[1], position(sent[1]))
        assert writer.progress == 1


# -- ends ------------------------------------------------------------------------------------------


class TestEnds:
    def test_seal_last_with_nothing_to_do(self):
        writer = Shell()
        writer._seal_last()
        assert writer._idle
        assert not writer.queued
        with pytest.raises(InvalidInput, match="closing"):
            writer.write(b"x")

    @pytest.mark.parametrize("mode, letters", [(LIVE, {b"E"}), (TEXT, {b"E", b"C"})])
    def test_seal_last_after_everything_was_stored(self, mode, letters):
        writer, server = Shell(mode), Server()
        writer.write(b"x")
        stored_on(writer, server)
        writer._seal_last()
        writer._seal_last()
        batch = writer.take()
        argv = arguments_of(batch.message)
        assert (batch.first_sequence, batch.frame_count) == (2, 0)
        assert set(parse(argv).tail) == letters
        # Its answer is lost, and it goes again.
        server.append(argv)
        writer._requeue()
        batch = writer.take()
        writer._acknowledge(batch, server.append(arguments_of(batch.message)))
        assert writer._idle
        assert writer.error is None
        assert float(server.estimator) >= 0.0

    def test_seal_last_with_frames_left(self):
        writer, server = Shell(TEXT, linger_ms=100), Server()
        writer.write(b"x")
        writer._seal_last()
        (request,) = stored_on(writer, server)
        assert [frame.payload for frame in request.frames] == [b"x"]
        assert fold(server.summary).document_json == b'{"text":"x"}'

    def test_unstored(self):
        writer, sent = in_flight(3, linger_ms=50)
        writer._acknowledge(sent[0], position(sent[0]))
        writer.write(b"run", mode=LIVE, correlation_id="c")
        writer.write(b"run", mode=LIVE, correlation_id="c")
        writer.write(b"", "log", encoding="binary", source="tool")
        writer.write(b"", "log", encoding="binary", source="tool")
        writer.write(b"text", mode=TEXT)
        first = writer._unstored_frames()
        assert writer._unstored_frames() == first
        assert [frame.sequence for frame in first] == list(range(257, 774))
        tail = [
            (f.mode, f.frame_type, f.payload, f.correlation_id, f.encoding, f.source)
            for f in first[512:]
        ]
        assert tail == [
            ("best_effort", "token", b"run", "c", "utf8", "worker"),
            ("best_effort", "token", b"run", "c", "utf8", "worker"),
            ("durable", "log", b"", None, "binary", "tool"),
            ("durable", "log", b"", None, "binary", "tool"),
            ("summary", "token", b"text", None, "utf8", "worker"),
        ]
        assert first[516].summary_version == 1
        assert first[516].patch_kind == TEXT.patch_kind
        # It only looked: everything still goes out.
        for batch in sent[1:]:
            writer._acknowledge(batch, position(batch))
        assert sum(len(request.frames) for request in stored(writer)) == 5

    def test_unstored_amid_a_refusal_is_in_order(self):
        writer, sent = in_flight(4)
        writer._acknowledge(sent[0], OOM)
        writer._acknowledge(sent[1], OOM)
        writer.write(b"open")
        assert [frame.sequence for frame in writer._unstored_frames()] == list(range(1, 1026))

    @pytest.mark.parametrize("mode, names", [(LIVE, "meta log"), (TEXT, "meta log live summary")])
    def test_closing_an_attempt_that_has_ended_meanwhile(self, mode, names):
        writer, server = Shell(mode), Server()
        writer.write(b"x")
        stored_on(writer, server)
        writer._seal_last()
        writer._has_waiters = True
        batch = writer.take()
        assert keys_of(batch) == keys_named(names)
        assert batch.frame_count == 0
        # Nothing of the caller's is lost: what was refused is care for an attempt that needs none.
        assert writer._acknowledge(batch, [0, b"stream_closed"]) is None
        assert writer.error is None
        assert writer._idle
        assert writer.unacknowledged_bytes == 0
        assert writer.progress == 1
        assert writer.last_sequence == 1
        assert writer._next_batch() is None

    def test_an_ended_attempt_still_refuses_frames(self):
        writer = Shell(live(200))
        writer.write(b"x")
        batch = writer.take()
        writer._acknowledge(batch, position(batch))
        writer.write(b"y")
        late = writer.take()
        time.sleep(0.21)
        writer._acknowledge(late, position(late))
        renewal = writer.take()
        assert renewal.frame_count == 0
        for _ in range(256):
            writer.write(b"z", mode=DURABLE)
        frames = writer.take()
        assert writer._acknowledge(renewal, [0, b"stream_closed"]) is None
        assert writer.error is None
        assert writer._acknowledge(frames, [0, b"stream_closed"]) is None
        assert type(writer.error) is StreamClosed
        assert len(writer.error.unstored) == 256

    @pytest.mark.parametrize("code", [b"stale_owner", b"lease_expired", b"writer_superseded"])
    def test_closing_without_the_lease_is_told(self, code):
        writer, server = Shell(LIVE), Server()
        writer.write(b"x")
        stored_on(writer, server)
        writer._seal_last()
        assert writer._acknowledge(writer.take(), [0, code]) is None
        assert writer.error is not None
        assert writer.error.unstored == ()

    def test_fails_once(self):
        writer, sent = in_flight(1)
        writer._fail(WriterClosed())
        writer._fail(LeaseExpired())
        assert type(writer.error) is WriterClosed
        assert len(writer.error.unstored) == 256
        assert writer.progress == 1
        assert writer._acknowledge(sent[0], position(sent[0])) is None
        writer._requeue()
        writer._seal_soon()
        writer._seal_last()
        assert writer._next_batch() is None
        assert len(writer._unstored_frames()) == 256
        assert all(isinstance(frame, StreamFrame) for frame in writer.error.unstored)


# -- the live window -------------------------------------------------------------------------------


def live(ttl_ms, floor=64, ceiling=16_384, alpha=0.2):
    return StreamMode.best_effort_live_with_config(
        BestEffortLiveConfig(ttl_ms, floor, ceiling, alpha)
    )


def tail_of(batch):
    return parse(arguments_of(batch.message)).tail


class TestRetention:
    def test_first_live_batch_sets_the_expiry(self):
        writer = Shell(live(4000))
        writer.write(b"x", mode=DURABLE)
        batch = writer.take()
        assert tail_of(batch) == {}
        writer._acknowledge(batch, position(batch))
        writer.write(b"x")
        assert tail_of(writer.take()) == {b"P": [b"8000"], b"H": [b"1"], b"E": [b"0.000"]}

    def test_patches_alone_have_a_window_too(self):
        writer = Shell(TEXT)
        writer.write(b"x")
        assert tail_of(writer.take())[b"P"] == [b"60000"]
        assert writer.window_frames == 64

    def test_first_best_effort_frame_replaces_the_window_of_patches(self):
        writer = Shell(live(5000, 10, 20))
        writer.write(b"x", mode=TEXT)
        batch = writer.take()
        writer._acknowledge(batch, position(batch))
        writer.write(b"x")
        assert tail_of(writer.take())[b"P"] == [b"10000"]
        assert writer.window_frames <= 20

    def test_patches_do_not_narrow_a_window(self):
        writer = Shell(live(5000, 100_000, 200_000))
        writer.write(b"x")
        batch = writer.take()
        writer._acknowledge(batch, position(batch))
        writer.write(b"x", mode=TEXT)
        batch = writer.take()
        assert b"P" not in tail_of(batch)
        assert writer.window_frames == 100_000

    def test_expiry_is_renewed_four_times_a_ttl(self):
        writer = Shell(live(400))
        renewed = []
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            writer.write(b"x")
            sealed = time.monotonic()
            batch = writer.take()
            if b"P" in tail_of(batch):
                renewed.append(sealed)
            writer._acknowledge(batch, position(batch))
            time.sleep(0.001)
        pauses = [b - a for a, b in itertools.pairwise(renewed)]
        assert len(pauses) >= 4
        assert min(pauses) > 0.09

    def test_longer_ttl_renews_at_once(self):
        writer = Shell(live(1000))
        for ttl_ms, due in [(1000, True), (900, False), (60_000, True), (1000, False)]:
            writer.write(b"x", mode=live(ttl_ms))
            batch = writer.take()
            assert (b"P" in tail_of(batch)) is due
            writer._acknowledge(batch, position(batch))

    def test_expiry_is_renewed_after_a_batch_that_took_longer_than_the_ttl(self):
        # The key died meanwhile, and the batch makes a new one, without an end.
        writer = Shell(live(200))
        writer.write(b"x")
        batch = writer.take()
        assert b"P" in tail_of(batch)
        writer._acknowledge(batch, position(batch))
        writer.write(b"y")
        batch = writer.take()
        assert b"P" not in tail_of(batch)
        writer._requeue()
        time.sleep(0.21)
        assert writer.take() is batch
        writer._acknowledge(batch, position(batch))
        assert not writer._idle
        batch = writer.take()
        assert (batch.first_sequence, batch.frame_count) == (3, 0)
        assert tail_of(batch) == {b"P": [b"400"]}
        assert keys_of(batch) == keys_named("meta live")
        writer._acknowledge(batch, position(batch))
        assert writer._idle

    def test_batch_behind_a_late_one_renews_whatever_it_holds(self):
        writer = Shell(live(200))
        writer.write(b"x")
        batch = writer.take()
        writer._acknowledge(batch, position(batch))
        writer.write(b"y")
        batch = writer.take()
        writer.write(b"log", mode=DURABLE)
        time.sleep(0.21)
        writer._acknowledge(batch, position(batch))
        batch = writer.take()
        assert tail_of(batch) == {b"P": [b"400"], b"H": [b""]}
        assert batch.frame_count == 1
        # The window's key is not one that a durable frame asks for.
        assert keys_of(batch) == keys_named("meta log live")
        writer._acknowledge(batch, position(batch))
        assert writer._idle

    def test_log_is_trimmed_now_and_then(self):
        writer = Shell(retention_maxlen=777)
        trims = []
        for i in range(1000):
            writer.write(b"x")
            writer.write(b"x", mode=LIVE)
            batch = writer.take()
            if b"K" in tail_of(batch):
                assert tail_of(batch)[b"K"] == [b"777"]
                trims.append(i)
            writer._acknowledge(batch, position(batch))
        assert trims == list(range(255, 1000, 256))

    def test_log_of_an_earlier_writer_is_trimmed_at_once(self):
        writer = Shell(DURABLE, (NOW_MS, 5, 5, b"", 0))
        writer.write(b"x")
        assert tail_of(writer.take()) == {b"K": [b"10000"]}

    def test_estimate_is_stored_once_a_second(self):
        writer = Shell(LIVE)
        with_estimate = 0
        for _ in range(200):
            writer.write(b"x")
            batch = writer.take()
            with_estimate += b"E" in tail_of(batch)
            writer._acknowledge(batch, position(batch))
        assert with_estimate == 1

    def test_estimate_is_handed_over(self):
        writer = Shell(live(1000, 64, 100_000), (NOW_MS, 3, 0, b"1000.000", 0))
        writer.write(b"x")
        writer.take()
        assert writer.window_frames == pytest.approx(2000, rel=0.01)
        assert writer.rate_hz == pytest.approx(1000, rel=0.1)

    @pytest.mark.parametrize("alpha", [5e-324, 1e-12, 1.0])
    def test_any_alpha_gives_a_rate(self, alpha):
        writer = Shell(live(1000, alpha=alpha))
        for _ in range(3):
            writer.write(b"x")
            batch = writer.take()
            assert float(tail_of(batch).get(b"E", [b"0"])[0]) >= 0
            writer._acknowledge(batch, position(batch))
            assert 0 <= writer.rate_hz < float("inf")


class Window:
    """The live stream of a server whose clock the test sets: what trims may and may not do."""

    def __init__(self, ttl_ms, floor, ceiling):
        self.ttl_ms, self.floor, self.ceiling = ttl_ms, floor, ceiling
        self.kept: list[tuple[int, int]] = []
        self.longest = 0

    def apply(self, batch, now_ms, wanted):
        request = parse(arguments_of(batch.message))
        for frame in request.frames:
            if frame.mode == b"best_effort":
                self.kept.append((now_ms, frame.sequence))
        if b"T" in request.tail:
            ms, sequence = map(int, request.tail[b"T"][0].split(b"-"))
            cut = [frame for frame in self.kept if frame < (ms, sequence)]
            self.kept = self.kept[len(cut) :]
            if cut and now_ms - cut[-1][0] < self.ttl_ms:
                assert len(self.kept) >= self.ceiling, "a frame younger than ttl was trimmed"
            assert len(self.kept) >= min(wanted, self.ceiling), "fewer frames than K are left"
        self.longest = max(self.longest, len(self.kept))


class TestTrims:
    @pytest.mark.parametrize("seed", range(6))
    def test_window(self, seed):
        rng = random.Random(seed)
        ttl_ms, floor = rng.choice([(1000, 64), (5000, 200), (200, 1), (15_000, 64)])
        ceiling = max(floor, rng.choice([64, 300, 2000]))
        writer, window = Shell(live(ttl_ms, floor, ceiling)), Window(ttl_ms, floor, ceiling)
        now_ms = NOW_MS
        for _ in range(1500):
            for _ in range(rng.choice([1, 1, 5, 40])):
                writer.write(b"x", mode=rng.choice([None, None, None, DURABLE]))
            # The server's clock runs ahead of ours here, as after a pause.
            now_ms += rng.choice([0, 1, ttl_ms // 200, ttl_ms // 20, ttl_ms // 2])
            batch = writer.take()
            window.apply(batch, now_ms, writer.window_frames)
            writer._acknowledge(batch, position(batch, now_ms))
        # A sixteenth of the window, and the batches that are being sent.
        assert window.longest <= ceiling + ceiling // 16 + 2 * 40

    def test_slow_stream_keeps_k_frames(self):
        # K counts: everything is older than ttl, and the rate has faded.
        writer, window = Shell(live(1000, 64, 16_384, 1.0)), Window(1000, 64, 16_384)
        now_ms = NOW_MS
        for _ in range(300):
            writer.write(b"x")
            now_ms += 500
            batch = writer.take()
            window.apply(batch, now_ms, 64)
            writer._acknowledge(batch, position(batch, now_ms))
        time.sleep(0.2)
        for _ in range(2):
            for _ in range(40):
                writer.write(b"x")
            now_ms += 5000
            batch = writer.take()
            window.apply(batch, now_ms, 64)
            writer._acknowledge(batch, position(batch, now_ms))
            time.sleep(0.2)
        writer.write(b"x")
        batch = writer.take()
        assert writer.window_frames == 64
        window.apply(batch, now_ms, 64)
        assert 64 <= len(window.kept) <= 64 + 41

    def test_frames_of_an_earlier_writer_leave_too(self):
        writer = Shell(live(100, 5, 50), (NOW_MS, 1000, 0, b"", 0))
        cuts = []
        for i in range(60):
            writer.write(b"x")
            batch = writer.take()
            cuts += tail_of(batch).get(b"T", [])
            writer._acknowledge(batch, position(batch, NOW_MS + i))
        assert cuts[0] == b"%d-1001" % NOW_MS

    @pytest.mark.parametrize("ms", [0, NOW_MS - 5])
    def test_answer_to_a_repeat_makes_nothing_look_older(self, ms):
        # A frame that was trimmed meanwhile has no id: the server says 0.
        writer = Shell(live(1000, 1, 1000))
        for i in range(20):
            writer.write(b"x")
            batch = writer.take()
            assert b"T" not in tail_of(batch)
            writer._acknowledge(batch, position(batch, ms if i % 2 else NOW_MS))
        assert writer.last_id == f"{NOW_MS}-20"


# -- what users see --------------------------------------------------------------------------------

OFFERED = {
    *("write", "write_frame", "drain", "flush", "close", "outcome"),
    *("execution_id", "attempt_index", "mode"),
    *("next_sequence", "last_sequence", "last_id", "summary_version"),
    *("error", "cancel_requested", "lease_left"),
    *("unacknowledged_bytes", "window_frames", "rate_hz"),
}


def public(names):
    return {name for name in names if not name.startswith("_")}


class TestOffered:
    """A writer offers what its users call; what its shell calls has an underscore."""

    @pytest.mark.parametrize("writer", [ff_fast.Writer, ff_fast.aio.Writer])
    def test_exactly(self, writer):
        # Values of the instance, in whichever way the class keeps them.
        assert public(dir(writer)) | {"execution_id", "attempt_index"} == OFFERED

    def test_a_made_one_has_no_more(self):
        handle = Handle.encode(
            execution_id="{fp:0}:8c2f2f0e-0000-4000-8000-000000000000",
            attempt_index=2,
            attempt_id="attempt",
            lease_id="8c2f2f0e-0000-4000-8000-000000000001",
            lease_epoch=1,
            lease_ttl_ms=30_000,
            lane_id="lane",
            worker_instance_id="worker",
        )
        state = WriterState(
            Attempt.of(handle), WRITER, Opened(*NEW), None, WriterOptions(mode=DURABLE)
        )
        writer = SharedWriter(state)
        assert public(dir(writer)) == OFFERED - {"drain", "flush", "close"}
        assert (writer.execution_id[:6], writer.attempt_index) == ("{fp:0}", 2)
        assert writer.mode is DURABLE

    @pytest.mark.parametrize("name", sorted(OFFERED - {"execution_id", "attempt_index"}))
    def test_documented(self, name):
        for writer in (ff_fast.Writer, ff_fast.aio.Writer):
            assert getattr(writer, name).__doc__

    def test_the_stub_says_the_same(self):
        # An editor shows the stub's text, help() the compiled one.
        stub = ast.parse((ROOT / "ff_fast/_hot/writer.pyi").read_text())
        (core,) = (node for node in stub.body if getattr(node, "name", "") == "WriterCore")
        told = {node.name: ast.get_docstring(node) for node in core.body[1:]}
        for name in public(told):
            assert told[name] == inspect.getdoc(getattr(WriterCore, name)), name


# -- memory ----------------------------------------------------------------------------------------

IDLE = """
import gc, sys
from ff_fast._hot.writer import WriterCore
from ff_fast.types import StreamMode

def held():
    gc.collect()
    with open("/proc/self/smaps_rollup") as rollup:
        return next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) * 1024

def writer(i):
    base = b"ff:stream:{fp:%d}:8c2f2f0e-0000-4000-8000-%012d:0" % (i % 256, i)
    keys = tuple(base + name for name in (b":meta", b"", b":live", b":summary"))
    writer = b"0:8c2f2f0e-0000-4000-8000-%012d:1:8c2f2f0e-0000" % i
    return WriterCore(keys=keys, writer=writer, mode=mode, opened=(1_700_000_000_000, 0, 0, b"", 0))

def acknowledge(writer):
    while (batch := writer._next_batch()) is not None:
        last = batch.first_sequence + batch.frame_count - 1
        ms = 1_700_000_000_000 + 10 * last
        writer._acknowledge(batch, b"%d-%d %d %d 0" % (ms, last, ms, ms + 30_000))

mode, log = StreamMode.best_effort_live(15_000), StreamMode.durable()
count, burst = int(sys.argv[1]), int(sys.argv[2])
payload = b" token"
acknowledge(writer(0))
before = held()
writers = []
for i in range(count):
    one = writer(i)
    for j in range(burst):
        one.write(payload)
        if j % 7 == 0 and burst > 1:
            one.write(payload, mode=log, correlation_id="c%d" % (j % 30))
    acknowledge(one)
    assert one._idle
    writers.append(one)
print((held() - before) / count)
"""


@pytest.mark.parametrize("burst", [0, 1, 500])
def test_idle_writer_takes_less_than_4_kib(run_python, burst):
    if "libasan" in Path("/proc/self/maps").read_text():
        pytest.skip("a sanitizer keeps what is freed")
    assert float(run_python(IDLE, "2000", str(burst))) < 4096


def test_nothing_leaks():
    def life():
        writer, server = Shell(LIVE), Server()
        for i in range(50):
            writer.write(b"x", mode=MODES[i % 5] if i % 5 != 2 else TEXT, correlation_id=str(i))
        with pytest.raises(InvalidPatch):
            writer.write(b"[]", mode=MERGE)
        batch = writer.take()
        writer._acknowledge(batch, OOM)
        batch = writer.take()
        writer._acknowledge(batch, server.append(arguments_of(batch.message)))
        writer.write(b"x")
        writer._fail(WriterClosed())

    for _ in range(5):
        life()
    gc.collect()
    before = len(gc.get_objects()), sys.getallocatedblocks()
    for _ in range(30):
        life()
    gc.collect()
    assert len(gc.get_objects()) - before[0] < 30
    assert sys.getallocatedblocks() - before[1] < 300


# -- threads, collections, hooks -------------------------------------------------------------------


class TestReentrance:
    def test_write_returns_its_own_sequence(self):
        # The hook lets another thread in, or writes itself.
        class Chatty(Shell):
            def _on_ready(self):
                super()._on_ready()
                if self.next_sequence < 3:
                    self.write(b"inner")

        writer = Chatty()
        assert writer.write(b"outer") == 1
        assert payloads_of(writer.take()) == [b"outer", b"inner"]

    @pytest.mark.parametrize("call", ["write", "seal_soon", "acknowledge", "seal_last", "requeue"])
    def test_hook_that_raises_is_called_again(self, call):
        class Interrupted(Shell):
            interrupt = False

            def _on_ready(self):
                if self.interrupt:
                    self.interrupt = False
                    raise KeyboardInterrupt
                super()._on_ready()

        writer = Interrupted(linger_ms=0 if call in ("write", "acknowledge") else 10)
        batch = None
        if call != "write":
            writer.write(b"1")
            if call in ("acknowledge", "requeue"):
                writer._seal_soon()
                batch = writer.take()
                writer.write(b"2")
        writer.interrupt = True
        with pytest.raises(KeyboardInterrupt):
            {
                "write": lambda: writer.write(b"1"),
                "seal_soon": writer._seal_soon,
                "acknowledge": lambda: writer._acknowledge(batch, position(batch)),
                "seal_last": writer._seal_last,
                "requeue": writer._requeue,
            }[call]()
        assert not writer.queued
        writer._seal_soon()
        assert payloads_of(writer.take())[0] == (b"2" if call == "acknowledge" else b"1")

    def test_waiters_are_told_although_the_other_hook_raises(self):
        class Broken(Shell):
            broken = False

            def _on_ready(self):
                super()._on_ready()
                if self.broken:
                    raise RuntimeError

        writer = Broken()
        writer.write(b"1")
        batch = writer.take()
        writer.write(b"2")
        writer.broken = writer._has_waiters = True
        with pytest.raises(RuntimeError):
            writer._acknowledge(batch, position(batch))
        assert writer.last_sequence == 1
        assert writer.progress == 1

    @pytest.mark.parametrize(
        "call", ["next_batch", "write", "patch", "unstored_frames", "seal_last"]
    )
    def test_collection_amid_a_call(self, call):
        """A finalizer, which may run wherever a container is made, writes to the same writer."""
        writer, server = Shell(LIVE), Server()
        taken: dict[int, bytes] = {}

        def put(payload, frame_type="token", mode=None):
            taken[writer.write(payload, frame_type, mode=mode)] = payload

        class Dying:
            def __init__(self):
                self.me = self

            def __del__(self):
                with contextlib.suppress(InvalidInput):  # it may come after _seal_last()
                    for i in range(300):
                        put(b"late%d" % i, f"type{i}", [LIVE, DURABLE, TEXT][i % 3])

        def patch():
            # Its parts are new containers, made while it is folded.
            put(b'{"a":{"b":{"c":{}}},"d":[[[]]]}', mode=MERGE)

        calls = {
            "next_batch": writer._next_batch,
            "write": lambda: put(b"x"),
            "patch": patch,
            "unstored_frames": writer._unstored_frames,
            "seal_last": writer._seal_last,
        }
        put(b"first", mode=TEXT)
        for i in range(1024 if call == "write" else 100):
            put(b"%d" % i, "ab"[i % 2])
        in_flight = []
        gc.collect()
        gc.disable()
        threshold = gc.get_threshold()
        try:
            Dying()
            # Containers that Python keeps for reuse would put the collection off.
            spare = [kind() for _ in range(200) for kind in (list, dict)]
            spare += [tuple(range(i % 20)) for i in range(20 * 2001)]
            gc.set_threshold(1)
            gc.enable()
            outcome = calls[call]()
        finally:
            gc.set_threshold(*threshold)
            gc.enable()
            del spare
        if call == "next_batch":
            in_flight.append(outcome)
        gc.collect()
        writer._seal_last()
        while not writer._idle:
            if not in_flight:
                in_flight.append(writer._next_batch())
            batch = in_flight.pop(0)
            writer._acknowledge(batch, server.append(arguments_of(batch.message)))
            assert writer.error is None
        assert [frame.payload for frame in server.frames] == [
            taken[i] for i in range(1, len(taken) + 1)
        ]
        server.check_visible_chain()
        assert fold(server.summary).version == writer.summary_version

    def test_threads(self):
        writer, server = Shell(LIVE, max_unacknowledged_bytes=1 << 30), Server()
        per_thread = 3000
        sequences: list[list[int]] = [[] for _ in range(3)]

        def produce(number):
            for i in range(per_thread):
                mode = TEXT if i % 50 == 0 else None
                payload = b"%d.%d " % (number, i)
                sequences[number].append(writer.write(payload, "ab"[i % 2], mode=mode))

        threads = [threading.Thread(target=produce, args=(n,)) for n in range(3)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) or not writer._idle:
                if not writer.queued:
                    time.sleep(0)
                    continue
                writer.queued = False
                batch = writer._next_batch()
                if batch is not None:
                    writer._acknowledge(batch, server.append(arguments_of(batch.message)))
        finally:
            sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
        by_sequence = {
            sequence: b"%d.%d " % (number, i)
            for number, taken in enumerate(sequences)
            for i, sequence in enumerate(taken)
        }
        assert [frame.payload for frame in server.frames] == [
            by_sequence[i] for i in range(1, 3 * per_thread + 1)
        ]
        server.check_visible_chain()


# -- every order of events -------------------------------------------------------------------------


class Streams(RuleBasedStateMachine):
    """One writer, one server, a connection that breaks: every frame is stored once, in order."""

    def __init__(self):
        super().__init__()
        self.server = Server()
        self.written: list[Written] = []
        self.text = ""
        self.connection: list = []
        self.failed = False

    @initialize(linger_ms=st.sampled_from([0, 10]), mode=st.sampled_from([DURABLE, LIVE]))
    def open(self, linger_ms, mode):
        self.writer = Shell(mode, linger_ms=linger_ms, max_unacknowledged_bytes=1 << 40)

    @precondition(lambda self: not self.failed)
    @rule(
        mode=st.sampled_from([DURABLE, LIVE, LIVE, TEXT]),
        frame_type=st.sampled_from(["token", "log"]),
        count=st.sampled_from([1, 1, 2, 3, 255, 300, 1100]),
    )
    def write(self, mode, frame_type, count):
        for _ in range(count):
            frame = Written(b"%d;" % (len(self.written) + 1), mode, frame_type)
            self.written.append(frame)
            assert write(self.writer, frame) == len(self.written)
            if mode is TEXT:
                self.text += frame.payload.decode()

    @precondition(lambda self: not self.failed)
    @rule()
    def fill_the_connection(self):
        for _ in range(3):
            self.write(LIVE, "token", 256)
            self.send()

    @rule(payload=st.sampled_from([b"[", b"[]", b"\xff"]))
    def refused_patch(self, payload):
        with pytest.raises(FFError):
            self.writer.write(payload, mode=MERGE)

    @rule()
    def send(self):
        while self.writer.queued:
            self.writer.queued = False
            batch = self.writer._next_batch()
            if batch is not None:
                self.connection.append(batch)

    @rule()
    def asked_without_need(self):
        self.writer.queued = False
        batch = self.writer._next_batch()
        if batch is not None:
            self.connection.append(batch)

    @rule(
        refusals=st.lists(
            st.sampled_from([None, None, OOM, hiredis.ReplyError("BUSY running a script")]),
            min_size=1,
            max_size=5,
        )
    )
    def answer(self, refusals):
        for refusal in refusals:
            if self.connection:
                batch = self.connection.pop(0)
                reply = refusal or self.server.append(arguments_of(batch.message))
                error = self.writer._acknowledge(batch, reply)
                assert error is None or refusal is not None
                assert self.failed or self.writer.error is None

    @precondition(lambda self: self.connection)
    @rule(data=st.data())
    def lose_connection(self, data):
        reached = data.draw(st.integers(0, len(self.connection)))
        for batch in self.connection[:reached]:
            if data.draw(st.booleans()):
                continue  # the server refused it
            self.server.append(arguments_of(batch.message))
        self.connection.clear()
        self.writer._requeue()

    @rule()
    def seal_soon(self):
        self.writer._seal_soon()

    @precondition(lambda self: not self.failed)
    @rule(look=st.booleans())
    def look(self, look):
        if look:
            assert (
                len(self.writer._unstored_frames()) == len(self.written) - self.writer.last_sequence
            )

    @precondition(lambda self: not self.failed and self.written)
    @rule(reply=st.sampled_from([[0, b"lease_expired"], None]))
    def fail(self, reply):
        self.failed = True
        acknowledged = self.writer.last_sequence
        self.writer._fail(LeaseExpired())
        unstored = self.writer.error.unstored
        assert [(f.sequence, f.payload, f.frame_type, f.mode) for f in unstored] == [
            (number, frame.payload, frame.frame_type, frame.mode.wire)
            for number, frame in enumerate(self.written, 1)
            if number > acknowledged
        ]

    @invariant()
    def nothing_is_lost_or_invented(self):
        payloads = [frame.payload for frame in self.server.frames[-20:]]
        stored_count = len(self.server.frames)
        first = max(stored_count - 20, 0)
        assert payloads == [frame.payload for frame in self.written[first:stored_count]]
        if hasattr(self, "writer"):
            assert self.writer.last_sequence <= stored_count

    def teardown(self):
        if not hasattr(self, "writer") or self.failed:
            return
        # From here on everything works, and the shell does nothing but what it is told.
        for _ in range(10_000):
            self.send()
            if self.connection:
                self.answer([None])
            elif not self.writer.queued and self.writer.lingers:
                self.writer.lingers = 0
                self.writer._seal_soon()
            elif not self.writer.queued:
                break
        assert self.writer._idle, "the writer is stuck"
        assert self.writer.unacknowledged_bytes == 0
        assert len(self.server.frames) == len(self.written)
        self.writer._seal_last()
        self.send()
        self.answer([None])
        assert self.writer._idle
        assert [frame.payload for frame in self.server.frames] == [f.payload for f in self.written]
        self.server.check_visible_chain()
        if self.text:
            document = fold(self.server.summary)
            assert json.loads(document.document_json) == {"text": self.text}
            assert document.version == self.writer.summary_version


Streams.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestStreams = Streams.TestCase

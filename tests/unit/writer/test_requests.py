"""What a writer takes, and what it sends of it."""

import ast
import inspect
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ff_fast
import ff_fast.aio
from ff_fast._core.ops import Attempt, Opened
from ff_fast._core.places import Places
from ff_fast._core.summary import fold
from ff_fast._core.writer import SharedWriter, WriterOptions, WriterState
from ff_fast._hot.writer import WriterCore, arguments_of
from ff_fast.errors import (
    Corruption,
    FFError,
    InvalidInput,
    InvalidPatch,
    InvalidPayload,
    InvalidType,
    PayloadTooLarge,
)
from ff_fast.types import LARGEST_PAYLOAD_LIMIT, Handle, PatchKind, StreamMode

from ...reference_writer import Server, Written, blocks, parse
from .core import (
    DURABLE,
    LIVE,
    MERGE,
    MODES,
    NEW,
    NOTES,
    NOW_MS,
    TEXT,
    WRITER,
    Shell,
    keys_named,
    keys_of,
    payloads_of,
    position,
    stored,
    stored_on,
    tail_of,
    write,
)

ROOT = Path(__file__).parent.parent.parent.parent
MIB = 1 << 20

# -- requests --------------------------------------------------------------------------------------


def test_exact_request():
    writer = Shell()
    assert writer.write(b"hi", "token") == 1
    assert writer.take().message == (
        b"*12\r\n$5\r\nFCALL\r\n$9\r\nff_append\r\n$1\r\n2\r\n"
        b"$7\r\n{p}head\r\n$6\r\n{p}log\r\n"
        b"$2\r\n62\r\n"
        b"$16\r\n0:lease:7:writer\r\n"
        b"$1\r\n0\r\n"
        b"$5\r\n+\x05\x01\x02\x00\r\n"
        b"$1\r\nL\r\n$1\r\n1\r\n$2\r\nhi\r\n"
    )


def test_arguments_of_leaves_out_the_keys():
    writer = Shell()
    for mode in [DURABLE, LIVE, DURABLE, TEXT, DURABLE]:
        writer.write(b"hi", mode=mode)
        batch = writer.take()
        argv = arguments_of(batch.message)
        assert argv[1:3] == [WRITER, b"%d" % (batch.first_sequence - 1)]
        assert len(argv[4]) == 1
        writer._acknowledge(batch, position(batch))


@pytest.mark.parametrize(
    "modes, names",
    [
        ([DURABLE], "head log"),
        ([LIVE], "head live"),
        ([DURABLE, LIVE], "head log live"),
        ([LIVE, DURABLE], "head log live"),
        ([TEXT], "head log live summary"),
        ([MERGE, LIVE, DURABLE], "head log live summary"),
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
    assert keys_of(batch) == keys_named("head log live")
    writer._acknowledge(batch, position(batch))
    # Neither stream has to do with the estimate.
    writer._seal_last()
    batch = writer.take()
    assert set(tail_of(batch)) == {b"E"}
    assert keys_of(batch) == keys_named("head log")


def patch_for(mode, number):
    return b'{"k%d":%d}' % (number % 3, number) if mode == MERGE else b"t%d" % number


@st.composite
def written(draw):
    mode = draw(st.sampled_from(MODES))
    if mode.patch_kind is None:
        payload = draw(
            st.binary(max_size=6) | st.sampled_from([127, 128, 16_384, 40_000]).map(bytes)
        )
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
        assert request.times == sorted(request.times)
        assert all(-10_000 < time <= 0 for time in request.times)
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

    @pytest.mark.parametrize(
        "size", [0, 1, 127, 128, 1023, 1024, 1025, 65_535, 65_536, 700_000, MIB]
    )
    @pytest.mark.parametrize("mode", [LIVE, DURABLE])
    def test_fullest_batches(self, mode, size):
        writer = Shell(mode, max_payload_bytes=MIB)
        writer.write(b"")
        first = writer.take()
        for _ in range(1300 if size < 2000 else 40 if size < 70_000 else 3):
            writer.write(bytes(size))
        writer._acknowledge(first, position(first))
        while not writer._idle:
            batch = writer.take()
            argv = arguments_of(batch.message)
            assert batch.frame_count <= LIMITS["MAX_FRAMES"]
            assert max(map(len, argv)) <= LIMITS["MAX_RUN_BYTES"]
            assert max(len(p) for p in payloads_of(batch)) <= LIMITS["MAX_PAYLOAD"]
            assert len(batch.message) < MIB + 1024 * 16
            writer._acknowledge(batch, position(batch))

    def test_worst_run_has_room_for_any_age(self):
        # A length takes 3 bytes, an age at most 8, the count 2.
        worst = MIB + 1024 * (3 + 8) + 2
        assert worst < LIMITS["MAX_RUN_BYTES"]

    def test_the_payloads_of_a_batch_have_at_most_a_mib_whatever_their_sizes(self):
        writer = Shell(max_payload_bytes=MIB)
        writer.write(b"")
        first = writer.take()
        sizes = [1, MIB, 1, MIB - 1, 1, 600_000, 600_000, 0, MIB, 0]
        for size in sizes:
            writer.write(bytes(size))
        writer._acknowledge(first, position(first))
        batches = []
        while not writer._idle:
            batch = writer.take()
            batches.append([len(payload) for payload in payloads_of(batch)])
            writer._acknowledge(batch, position(batch))
        assert batches == [[1], [MIB], [1, MIB - 1], [1, 600_000], [600_000, 0], [MIB, 0]]

    def test_the_largest_limit_is_that_of_the_server(self):
        assert LIMITS["MAX_PAYLOAD"] == LARGEST_PAYLOAD_LIMIT == MIB
        for bad in (0, -1, MIB + 1):
            with pytest.raises(InvalidInput):
                Shell(max_payload_bytes=bad)

    def test_most_fields(self):
        writer = Shell(NOTES)
        writer.write(b"", mode=LIVE)
        for _ in range(2):
            writer.write(b"x", "t", correlation_id="c", encoding="binary", source="s")
        argv = arguments_of(writer.take().message)
        at = argv.index(b"S", 4)
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

    def test_other_types(self, subtests):
        for payload in (
            None,
            True,
            0,
            1.5,
            [b"x"],
            ("x",),
            {},
            object(),
        ):
            with subtests.test(f"{payload!r:.60}"):
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

    @pytest.mark.parametrize("limit", [1, 100, MIB])
    def test_a_limit_of_its_own(self, limit):
        writer = Shell(max_payload_bytes=limit)
        assert writer.write(bytes(limit)) == 1
        for payload in (bytes(limit + 1), bytearray(limit + 1), "x" * (limit + 1)):
            with pytest.raises(PayloadTooLarge) as caught:
                writer.write(payload)
            assert (caught.value.limit, caught.value.size) == (limit, limit + 1)
        assert writer.next_sequence == 2

    def test_the_error_names_what_is_too_large_and_what_helps(self):
        writer = Shell(max_payload_bytes=100)
        for mode, what in ((DURABLE, "frame"), (LIVE, "frame"), (NOTES, "patch")):
            for payload in (bytes(101), bytearray(101)):
                with pytest.raises(PayloadTooLarge) as caught:
                    writer.write(payload, mode=mode)
                assert caught.value.what == what
                assert str(caught.value) == (
                    f"The {what} has 101 bytes and the limit is 100; "
                    "split it, or raise max_payload_bytes of the backend's configuration."
                )
        with pytest.raises(PayloadTooLarge, match="split it, or store it elsewhere and pass a ref"):
            writer.write(bytearray(MIB + 1))
        with pytest.raises(InvalidType):
            writer.write(bytes(100), mode="durable")

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
        assert arguments_of(batch.message)[4:6] == [b"V", b"3"]

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
            Attempt.of(handle), WRITER, Opened(*NEW), None, WriterOptions(mode=DURABLE), Places()
        )
        writer = SharedWriter(state)
        assert public(dir(writer)) == OFFERED - {"drain", "flush", "close"}
        assert (writer.execution_id[:6], writer.attempt_index) == ("{fp:0}", 2)
        assert writer.mode is DURABLE

    def test_documented(self, subtests):
        for name in sorted(OFFERED - {"execution_id", "attempt_index"}):
            with subtests.test(f"{name!r:.60}"):
                for writer in (ff_fast.Writer, ff_fast.aio.Writer):
                    assert getattr(writer, name).__doc__

    def test_the_stub_says_the_same(self):
        # An editor shows the stub's text, help() the compiled one.
        stub = ast.parse((ROOT / "ff_fast/_hot/writer.pyi").read_text())
        (core,) = (node for node in stub.body if getattr(node, "name", "") == "WriterCore")
        told = {node.name: ast.get_docstring(node) for node in core.body[1:]}
        for name in public(told):
            assert told[name] == inspect.getdoc(getattr(WriterCore, name)), name

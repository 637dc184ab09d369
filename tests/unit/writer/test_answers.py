"""What a writer makes of answers and of the lack of one, and how it ends: no frame is lost."""

import time

import hiredis
import pytest

from ff_fast._core.places import Place
from ff_fast._core.summary import fold
from ff_fast._hot.frames import StreamFrame
from ff_fast._hot.writer import arguments_of
from ff_fast.errors import (
    FunctionMissing,
    InvalidInput,
    LeaseExpired,
    OutOfMemory,
    Overloaded,
    PermissionDenied,
    ProtocolError,
    SequenceGap,
    StateLost,
    StreamClosed,
    SummaryConflict,
    Unavailable,
    WriterClosed,
    WriterSuperseded,
)

from ...reference_writer import Server, parse
from .core import (
    DURABLE,
    LIVE,
    NOW_MS,
    OOM,
    TEXT,
    Shell,
    in_flight,
    keys_named,
    keys_of,
    live,
    position,
    stored,
    stored_on,
)

GAP = [0, b"sequence_gap", b"1", b"2"]

# -- answers ---------------------------------------------------------------------------------------


class TestAnswers:
    def test_position(self):
        writer = Shell()
        writer.write(b"x")
        assert (writer.last_id, writer.last_sequence) == ("0-0", 0)
        writer._acknowledge(writer.take(), b"1700000000123-1 1700000004200 1", 1_700_000_000_200)
        assert writer.last_id == "1700000000123-1"
        assert (writer.lease_left, writer.cancel_requested) == (4.0, True)
        assert writer._idle

    @pytest.mark.parametrize(
        "reply, left",
        [
            (b"0-1 1700000000000 0", 0),
            (b"0-1 1699999999999 0", 0),
            (b"0-1 99 0", 0),
            (b"0-1 999999999999999 0", 998_299_999_999_999),
            (b"0-1 9007199254740991 0", 9_005_499_254_740_991),
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
        writer._acknowledge(writer.take(), b"1700000000123-1 1700000004123 0")
        writer._seal_last()
        writer._acknowledge(writer.take(), b"1700000009999-1 1700000013999 0")
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
            assert again is batch
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

    def test_fatal(self, subtests):
        for reply, error in (
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
            (b"1700000000000-257 1700000030000 0", ProtocolError),
            (b"1700000000000-255 1700000030000 0", ProtocolError),
            (b"1-256 1", ProtocolError),
            (b"1-256 1 ", ProtocolError),
            (b"1-256 1 0 ", ProtocolError),
            (b"1-256 1 0 0", ProtocolError),
            (b"1-256  1 0", ProtocolError),
            (b"1 256 1 0", ProtocolError),
            (b"1-256-1 0", ProtocolError),
            (b"-256 1 0", ProtocolError),
            (b"-1-256 1 0", ProtocolError),
            (b"1-256 -1 0", ProtocolError),
            (b"1-256 1.5 0", ProtocolError),
            (b"", ProtocolError),
            (b"9" * 400, ProtocolError),
            (b"1-256 " + b"9" * 17 + b" 0", ProtocolError),
            (b"1-256 1 " + b"9" * 17, ProtocolError),
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
        ):
            with subtests.test(f"{reply!r:.60}"):
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
        assert float(server.estimator.split()[0]) >= 0.0

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

    @pytest.mark.parametrize("mode, names", [(LIVE, "head log"), (TEXT, "head log live summary")])
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


class TestChecks:
    """A batch without frames asks whether the server still has those that it has acknowledged."""

    def test_asked_once_after_acknowledgements(self):
        writer = Shell()
        assert not writer._check_soon()
        writer.write(b"x")
        # The acknowledgement shows the same.
        assert not writer._check_soon()
        batch = writer.take()
        assert not writer._check_soon()
        writer._acknowledge(batch, position(batch))
        assert writer._checked_sequence == 0
        assert writer._check_soon()
        check = writer.take()
        assert (check.frame_count, keys_of(check)) == (0, keys_named("head log"))
        # Who asks meanwhile waits for the same answer.
        assert writer._check_soon()
        assert writer._next_batch() is None
        assert writer._acknowledge(check, position(check)) is None
        assert writer._checked_sequence == 1
        assert not writer._check_soon()

    def test_a_writer_that_wrote_nothing_does_not_ask(self):
        writer = Shell(opened=(NOW_MS, 7, 7, b"", 0))
        assert not writer._check_soon()
        writer._seal_last()
        assert writer._idle

    @pytest.mark.parametrize("flushed", [False, True])
    def test_the_last_batch_asks_in_any_case(self, flushed):
        writer = Shell()
        writer.write(b"x")
        stored(writer)
        if flushed:
            assert writer._check_soon()
            stored(writer)
        writer._seal_last()
        check = writer.take()
        writer._acknowledge(check, [0, b"sequence_gap", b"1", b"2"])
        assert type(writer.error) is SequenceGap
        assert (writer.error.expected, writer.error.got, writer.error.unstored) == (1, 2, ())

    def test_another_frame_under_the_sequence_of_the_last_one(self):
        writer = Shell()
        writer.write(b"x")
        stored(writer)
        assert writer._check_soon()
        check = writer.take()
        writer._acknowledge(check, position(check, NOW_MS + 1))
        assert (writer.error.expected, writer.error.got) == (1, 2)

    def test_an_ended_attempt_has_compared_it(self):
        writer = Shell()
        writer.write(b"x")
        stored(writer)
        assert writer._check_soon()
        assert writer._acknowledge(writer.take(), [0, b"stream_closed"]) is None
        assert (writer.error, writer._checked_sequence) == (None, 1)

    def test_what_a_release_has_confirmed_is_not_asked_for(self):
        place = Place()
        writer = Shell(place=place)
        writer.write(b"x")
        stored(writer)
        assert (place.ms, place.sequence) == (NOW_MS, 1)
        place.checked = 1
        assert not writer._check_soon()

    def test_a_place_never_goes_back(self):
        place = Place()
        place.opened(NOW_MS, 7)
        writer = Shell(place=place)
        for _ in range(7):
            assert place.sequence == 7
            writer.write(b"x")
            stored(writer, NOW_MS + 1)
        assert (place.ms, place.sequence) == (NOW_MS + 1, 7)

    @pytest.mark.parametrize(
        "opening, known, error",
        [
            (1, b"2", WriterSuperseded),
            (2, b"2", StateLost),
            (2, b"1", StateLost),
            (2, b"0", StateLost),
            (2, b"x", WriterSuperseded),
            (0, b"0", WriterSuperseded),
        ],
    )
    def test_a_writer_that_was_opened_later_than_the_server_knows_is_lost(
        self, opening, known, error
    ):
        writer = Shell(opened=(NOW_MS, 0, 0, b"", 0, opening))
        writer.write(b"x")
        writer._acknowledge(writer.take(), [0, b"writer_superseded", known])
        assert type(writer.error) is error
        assert len(writer.error.unstored) == 1

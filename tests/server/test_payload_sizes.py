"""Payloads of up to 1 MiB, where a backend allows them, through every mode and every reader of both shells."""

import json

import pytest

from ff_fast import Frame, FrameKind, PatchKind, StreamMode, TextDecoder, errors
from ff_fast._core import operations

from ..shells import KINDS, Opener, with_option
from .streams import Stream, live, log, patches

MIB = 1 << 20
DURABLE = StreamMode.durable()
LIVE = StreamMode.best_effort_live(60_000)
MERGE = StreamMode.durable_summary()
TEXT = StreamMode.durable_summary(PatchKind.STRING_APPEND("/text"))
# A payload of some size for each mode.
MAKERS = {
    "durable": (DURABLE, lambda size, i: bytes([i % 256]) * size),
    "best effort": (LIVE, lambda size, i: bytes([i % 256]) * size),
    "merge patch": (MERGE, lambda size, i: b'{"%02d":"%b"}' % (i, b"p" * (size - 9))),
    "text": (TEXT, lambda size, i: b"%02d" % i + b"t" * (size - 2)),
}


@pytest.fixture(params=KINDS)
def opener(request):
    opener = Opener(request.param)
    yield opener
    opener.close()


@pytest.fixture
def generous(opener, server):
    """A backend whose payloads may have 1 MiB."""
    return opener(with_option(server.url, f"max_payload_bytes={MIB}"))


def same(found, wanted):
    """A comparison whose failure does not print megabytes."""
    assert [len(one) for one in found] == [len(one) for one in wanted]
    assert all(one == other for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("mode", MAKERS)
def test_payloads_of_a_mib_are_read_whole_by_every_reader(
    opener, generous, server, raw, lane, mode
):
    stream = Stream(raw, generous, lane)
    mode, make = MAKERS[mode]
    sizes = [MIB, 65_537, 100, MIB - 1, 600_000, 600_000, MIB]
    sent = [make(size, i) for i, size in enumerate(sizes)]
    with generous.open_writer(stream.handle, mode=mode) as writer:
        for payload in sent:
            writer.write(payload)
            writer.drain()
    generous.complete(stream.handle)
    # Readers need no such configuration.
    plain = opener(server.url)
    page, frames = plain.read_stream(stream.eid), []
    while page:
        assert page.gaps == ()
        frames += page
        page = plain.read_stream(stream.eid, after=page.cursor)
    assert [frame.sequence for frame in frames] == list(range(1, len(sent) + 1))
    same([frame.payload for frame in frames], sent)
    tail, items = plain.tail(stream.eid), []
    while not tail.ended:
        items += tail.next_batch(timeout=10)
    *tailed, end = items
    assert end.reason == "attempt_success"
    assert [frame.sequence for frame in tailed] == list(range(1, len(sent) + 1))
    same([frame.payload for frame in tailed], sent)
    if mode in (MERGE, TEXT):
        document = json.loads(plain.read_summary(stream.eid).document_json)
        wanted = {}
        for payload in sent:
            if mode is TEXT:
                wanted["text"] = wanted.get("text", "") + payload.decode()
            else:
                wanted |= json.loads(payload)
        assert document.keys() == wanted.keys()
        assert all(document[name] == wanted[name] for name in wanted)


def test_the_limit_of_a_backend_holds_for_every_way_to_write(opener, server, raw, lane):
    for limit in (1_000, 65_536, MIB):
        backend = opener(with_option(server.url, f"max_payload_bytes={limit}"))
        stream = Stream(raw, backend, lane)
        writer = backend.open_writer(stream.handle)
        commands = raw.info("commandstats").get("cmdstat_fcall", {}).get("calls", 0)
        for mode, make in MAKERS.values():
            with pytest.raises(errors.PayloadTooLarge) as caught:
                writer.write(make(limit + 1, 1), mode=mode)
            assert (caught.value.limit, caught.value.size) == (limit, limit + 1)
        with pytest.raises(errors.PayloadTooLarge):
            backend.append_frame(stream.handle, Frame(bytes(limit + 1), FrameKind.BLOB))
        # Nothing was sent, and the writer goes on.
        assert raw.info("commandstats").get("cmdstat_fcall", {}).get("calls", 0) == commands
        for mode, make in MAKERS.values():
            writer.write(make(limit, 1), mode=mode)
        assert writer.flush().frame_count == len(MAKERS)
        frame = Frame(bytes(limit), FrameKind.BLOB)
        assert backend.append_frame(stream.handle, frame).frame_count == len(MAKERS) + 1
        writer.close()


def test_a_writer_with_room_for_one_payload_takes_one_after_the_other(generous, raw, lane):
    stream = Stream(raw, generous, lane)
    sent = [bytes([i]) * MIB for i in range(6)]
    with generous.open_writer(stream.handle, max_unacknowledged_bytes=MIB) as writer:
        for payload in sent:
            writer.write(payload)
            with pytest.raises(errors.Overloaded):
                writer.write(payload)
            writer.drain()
    same(stream.payloads(), sent)


def test_a_repeat_of_payloads_of_a_mib_answers_as_the_first_call(generous, raw, lane, subtests):
    for name, make in {
        "log": log,
        "live": live,
        "patches": lambda payload: patches(payload, base=0),
    }.items():
        with subtests.test(name):
            stream = Stream(raw, generous, lane)
            stream.open()
            large = b'{"a":"%b"}' % bytes(MIB - 8)
            position = stream.append(make(large))
            for sequence in range(2, 6):
                stream.append(log(b"x" * MIB), first=sequence)
            before = _calls(raw, "xrevrange")
            assert stream.repeated(make(large)) == position
            # The walk from the end reads few entries at a time, since each may be as large.
            assert _calls(raw, "xrevrange") - before >= 3


def test_text_that_was_cut_into_bytes_is_appended_and_read_whole(generous, raw, lane):
    stream = Stream(raw, generous, lane)
    said = "zażółć gęślą jaźń \U0001f600 " * 20
    pieces = [said.encode()[at : at + 3] for at in range(0, len(said.encode()), 3)]
    cut = TextDecoder()
    with generous.open_writer(stream.handle, mode=TEXT) as writer:
        with pytest.raises(errors.InvalidPatch, match="TextDecoder"):
            writer.write("ż".encode()[:1])
        for piece in pieces:
            writer.write(cut.decode(piece))
            writer.write(piece, mode=DURABLE)
        writer.write(cut.decode(b"", final=True))
    document = generous.read_summary(stream.eid).document_json
    assert json.loads(document) == {"text": said}
    joined = TextDecoder()
    durable = [frame for frame in stream.frames() if frame.mode == "durable"]
    assert "".join(joined.decode(frame.payload) for frame in durable) == said
    assert joined.pending == b""


def test_the_server_holds_signals_to_their_limit_whatever_a_client_sends(
    generous, raw, lane, monkeypatch
):
    stream = Stream(raw, generous, lane)
    point = generous.create_waitpoint(stream.handle)

    def deliver(size):
        generous.deliver_signal(stream.eid, point, "go", payload=bytes(size))

    monkeypatch.setattr(operations, "MAX_SIGNAL", MIB)
    before = stream.everything()
    with pytest.raises(errors.PayloadTooLarge, match="payload of a signal has 65537") as caught:
        deliver(65_537)
    assert (caught.value.limit, caught.value.what) == (65_536, "payload of a signal")
    assert stream.everything() == before
    deliver(65_536)


def _calls(raw, command):
    return raw.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0)

"""Stream entries to frames: the compiled decoder against its oracle, and damage of every kind."""

import copy
import pickle
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ff_fast import Corruption, Gap, PatchKind, StreamFrame
from ff_fast._hot.frames import (
    assemble,
    decode_entries,
    decode_push,
    decode_run,
    weigh_entries,
)

from .. import reference_frames as reference
from ..reference_frames import Written, lay_out, run_of

frames = st.builds(
    Written,
    mode=st.sampled_from(["durable", "summary", "best_effort"]),
    payload=st.binary(max_size=200),
    frame_type=st.sampled_from(["token", "tool_event", "é"]),
    correlation_id=st.sampled_from([None, "c-1", "ü" * 40]),
    encoding=st.sampled_from(["utf8", "binary"]),
)
alike = st.tuples(frames, st.integers(1, 9)).map(lambda pair: [pair[0]] * pair[1])
batches = st.lists(st.one_of(st.lists(frames, max_size=6), alike), max_size=8)
ends = st.sampled_from([None, "attempt_success"])
foreign = st.sampled_from(
    [[b"a", b"b"], [b"end", b"x"], [b"count", b"-1", b"prev", b"x"], [b"payload", b"x", b"run", b"y"], [b"frame_type", b"x"], [b"payload"], [b"odd"]]
)  # fmt: skip
# What XADD numbers by itself begins each millisecond at 0, where no frame of ours stands.
numbered_by_the_server = st.sampled_from([[b"payload", b"x"], [b"run", b"x", b"mode", b"y"]])


@st.composite
def streams(draw):
    """Log and live window with holes and other people's entries."""
    both = lay_out(draw(batches), draw(ends))
    for entries in both:
        for _ in range(draw(st.integers(0, 3))):
            if entries:
                del entries[draw(st.integers(0, len(entries) - 1))]
        for _ in range(draw(st.integers(0, 2))):
            at = draw(st.integers(0, len(entries)))
            before = reference.entry_id(entries[at - 1][0]) if at else (1, 0)
            fields = draw(foreign if before[1] else st.one_of(foreign, numbered_by_the_server))
            entries.insert(at, [b"%d-%d" % before, fields])
    return both


def plain_decoded(entries):
    return [reference.plain(frame) for frame in entries.frames]


def plain_reference(decoded):
    return [tuple(frame)[:-1] for frame in decoded.frames]


@given(streams(), st.integers(0, 40), st.integers(0, 1_020), st.booleans(), st.integers(0, 60))
def test_decodes_and_merges_as_the_reference_does(both, after, after_ms, exclude, cut):
    log, live = both
    ids = sorted(reference.entry_id(raw) for raw, _ in log + live)
    limit = ids[cut] if cut < len(ids) else None
    real = [
        decode_entries(entries, after, limit, exclude, live=entries is live, after_ms=after_ms)
        for entries in both
    ]
    want = [
        reference.decode(entries, after, limit, exclude, live=entries is live, after_ms=after_ms)
        for entries in both
    ]
    for got, expected in zip(real, want, strict=True):
        assert plain_decoded(got) == plain_reference(expected)
        assert (got.taken, got.foreign) == (expected.taken, expected.foreign)
        assert got.rewound == expected.rewound
        assert got.end_reason == (expected.end[3] if expected.end else None)
    got_items, *got_rest = assemble(*real, 7, after, exclude, "trimmed")
    want_items, *want_rest = reference.merge(*want, 7, after, exclude, "trimmed")
    assert got_rest == want_rest
    assert [item if isinstance(item, Gap) else reference.plain(item) for item in got_items] == [
        item if isinstance(item, Gap) else tuple(item)[:-1] for item in want_items
    ]


def parse_run(run, count):
    payloads, _ = reference.parse_run(run)
    if len(payloads) != count:
        raise ValueError("another count")
    return payloads


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=8), st.data())
def test_a_damaged_run_is_corruption_or_what_the_reference_reads(payloads, data):
    run = run_of(payloads, [data.draw(st.integers(-(2**40), 2**40)) for _ in payloads])
    how = data.draw(st.sampled_from(["whole", "prefix", "longer", "bytes", "count"]))
    count = len(payloads)
    if how == "prefix":
        run = run[: data.draw(st.integers(0, len(run) - 1))]
    elif how == "longer":
        run += data.draw(st.binary(min_size=1, max_size=9))
    elif how == "bytes":
        changed = bytearray(run)
        for _ in range(data.draw(st.integers(1, 4))):
            changed[data.draw(st.integers(0, len(run) - 1))] = data.draw(st.integers(0, 255))
        run = bytes(changed)
    elif how == "count":
        count = data.draw(st.sampled_from([-1, 0, 1, count + 1, 2**31, 2**62]))
    try:
        want = parse_run(run, count)
    except ValueError:
        with pytest.raises(Corruption):
            decode_run(run, count)
    else:
        assert decode_run(run, count) == want


def test_every_prefix_and_every_changed_byte_of_a_run():
    payloads = [b"", b"x", b"y" * 130]
    whole = run_of(payloads, [0, -100, 70_000])
    assert decode_run(whole, 3) == payloads
    for size in range(len(whole)):
        with pytest.raises(Corruption):
            decode_run(whole[:size], 3)
    for at in range(len(whole)):
        for byte in range(256):
            changed = whole[:at] + bytes([byte]) + whole[at + 1 :]
            try:
                want = parse_run(changed, 3)
            except ValueError:
                with pytest.raises(Corruption):
                    decode_run(changed, 3)
            else:
                assert decode_run(changed, 3) == want


@st.composite
def around_the_bounds(draw):
    """A run near the greatest number of frames, or near the greatest size, whole or with another count."""
    count = draw(st.one_of(st.integers(1022, 1027), st.integers(1, 1100)))
    payloads = [b"p" * draw(st.integers(0, 1))] * count
    if draw(st.booleans()):
        payloads[-1] = bytes(reference.MAX_RUN_BYTES - draw(st.integers(-20, 6_000)))
    run = run_of(payloads)
    if draw(st.booleans()):
        claimed = draw(st.one_of(st.integers(1022, 1027), st.sampled_from([2**14, 2**31, 2**55])))
        run = reference.varint(claimed) + run[len(reference.varint(count)) :]
    return run


@given(around_the_bounds())
def test_a_run_larger_than_the_library_writes_is_foreign(run):
    entry = [b"9-3000", [b"run", run]]
    try:
        want = reference.decode([entry], live=True)
    except ValueError:
        with pytest.raises(Corruption):
            decode_entries([entry], 0, live=True)
        return
    got = decode_entries([entry], 0, live=True)
    assert (got.foreign, plain_decoded(got)) == (want.foreign, plain_reference(want))


def test_a_hostile_run_costs_nothing(subtests):
    size = 16 << 20
    for name, run in (
        ("empty frames", reference.varint(size // 2) + bytes(size)),
        ("few frames", reference.varint(2) + bytes(size)),
        ("a count without frames", reference.varint(2**55)),
    ):
        with subtests.test(name):
            tracemalloc.start()
            try:
                got = decode_entries([[b"9-%d" % (size), [b"run", run]]], 0, live=True)
                with pytest.raises(Corruption):
                    decode_run(run, size // 2)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert (got.foreign, got.frames) == (1, [])
            assert peak < 100_000


@pytest.mark.parametrize("varint", [b"\xff" * 8 + b"\x01", b"\x80" * 7 + b"\x80\x01", b"\x80" * 20])
def test_a_varint_of_more_than_eight_bytes(varint):
    with pytest.raises(Corruption):
        decode_run(varint, 1)


def test_lengths_that_would_overflow():
    huge = b"\xff" * 7 + b"\x7f"
    for lengths in (huge + huge, huge + b"\x01"):
        with pytest.raises(Corruption):
            decode_run(b"\x02" + lengths + b"\x00\x00" + b"x" * 10, 2)
    # A count that the id allows is still held to what is there.
    with pytest.raises(Corruption):
        decode_entries([[b"1-%d" % (10**18 - 1), [b"run", reference.varint(1024) + b"x" * 10]]], 0)


# -- pushes ---------------------------------------------------------------------------------------


@st.composite
def pushes(draw):
    """A push of frames, as it is published or damaged."""
    blocks, total = [], 0
    for _ in range(draw(st.integers(0, 3))):
        payloads = draw(st.lists(st.binary(max_size=9), min_size=1, max_size=4))
        fields = []
        for name, values in (
            (b"frame_type", [b"t", b"\xff"]),
            (b"mode", [b"summary", b"best_effort"]),
            (b"prev", [b"0", b"3", b"x"]),
            (b"correlation_id", [b"c"]),
            (b"patch_kind", [b"json-merge-patch", b"other"]),
            (b"summary_version", [b"9", b"1"]),
            (b"encoding", [b"binary"]),
            (b"source", [b"s"]),
            (b"other", [b""]),
        ):
            if draw(st.integers(0, 5)) == 0:
                fields += [name, draw(st.sampled_from(values))]
        times = [draw(st.integers(-300, 300)) for _ in payloads]
        blocks.append(
            reference.block_of(draw(st.sampled_from([b"L", b"V"])), fields, payloads, times)
        )
        total += len(payloads)
    last = total + draw(st.integers(-1, 3))
    push = reference.push_of(draw(st.sampled_from([b"F", b"f"])), 1_000, max(last, 0), blocks)
    how = draw(st.sampled_from(["whole", "whole", "prefix", "longer", "byte"]))
    if how == "prefix":
        push = push[: draw(st.integers(0, len(push)))]
    elif how == "longer":
        push += draw(st.binary(min_size=1, max_size=4))
    elif how == "byte":
        at = draw(st.integers(0, len(push) - 1))
        push = push[:at] + bytes([draw(st.integers(0, 255))]) + push[at + 1 :]
    return push


words = st.sampled_from(
    [b"", b"R", b"L", b"L5", b"L05x", b"L" + b"9" * 19, b"E5-3 1 attempt_success", b"E5-3 3 attempt_success", b"E5-3 0 ",
     b"E5-3 1 attempt_failure no GPU left", b"E5-3 1 expired ", b"E5-3 1 expired \xc5\xbc\xc5", b"E5-3 0 attempt", b"E5-0 0 expired", b"E5 0 expired", b"F5-1", b"F5-1 ", b"F-1 V", b"G5-1 V\0\1\1"]
)  # fmt: skip


@given(st.one_of(pushes(), words, st.binary(max_size=20)))
def test_a_push_is_decoded_as_the_reference_does(message):
    want = reference.decode_push(message, 7)
    got = decode_push(message, 7)
    assert got.kind == want.kind
    if want.kind == "lease":
        assert got.lease_ms == want.lease_ms
    elif want.kind == "end":
        shown = (got.ms, got.last, got.previous, got.end_reason, got.end_error)
        assert shown == (want.ms, want.last, want.previous, want.end_reason, want.end_error)
    elif want.kind == "frames":
        shown = (got.deferred, got.ms, got.first, got.last)
        assert shown == (want.deferred, want.ms, want.first, want.last)
        assert [reference.plain(frame) for frame in got.frames] == [
            tuple(frame)[:-1] for frame in want.frames
        ]
        visible = [frame for frame in got.frames if frame.mode != "best_effort"]
        assert got.visible == visible
    else:
        assert (got.frames, got.visible) == (None, None)


OURS = [b"frame_type", b"t"]
RUN = [b"run", run_of([b"a", b"b"], [0, 0])]


@pytest.mark.parametrize(
    "entry",
    [
        [b"1-2", [*OURS, b"prev", b"-1", b"payload", b""]],
        [b"1-2", [*OURS, b"prev", b"", b"payload", b""]],
        [b"1-2", [*OURS, b"prev", b"1" * 19, b"payload", b""]],
        [b"1-2", [*OURS, b"summary_version", b"0x1", b"payload", b""]],
        [b"1-2", [*OURS, b"patch_kind", b"other", b"payload", b""]],
        [b"1-2", [*OURS, b"patch_kind", b"string-append", b"payload", b""]],
        [b"1-2", [*OURS, b"patch_kind", b"string-append", b"pointer", b"x", b"payload", b""]],
        [b"1-2", [*OURS, b"patch_kind", b"\xff", b"payload", b""]],
        [b"1-2", [*OURS, b"run", b""]],
        [b"1-2", [*OURS, b"run", RUN[1][1:]]],
        [b"1-2", [*OURS, b"run", b"\1" + RUN[1][1:]]],
        [b"1-3", [*OURS, b"run", b"\3" + RUN[1][1:]]],
        [b"1-1", [*OURS, *RUN]],
        [b"1-2", [*OURS, b"run", b"\0"]],
        [b"1-2", [*OURS, b"run", b"\xff" * 8 + b"\x7f"]],
        [b"1-2", [*OURS, b"summary_version", b"1", *RUN]],
        [b"1-2", [b"end", b"x", b"prev", b"y"]],
        [b"12", [*OURS, b"payload", b""]],
        [b"-2", [*OURS, b"payload", b""]],
        [b"1-", [*OURS, b"payload", b""]],
        [b"x-2", [*OURS, b"payload", b""]],
        [b"1-2", [*OURS, b"payload", None]],
        [b"1-2", [None, b"x"]],
        [b"1-2", None],
        [None, []],
        [b"1-2"],
        (b"1-2", []),
        None,
    ],
)  # fmt: skip
def test_a_damaged_entry_is_corruption(entry):
    for live in (False, True):
        with pytest.raises(Corruption):
            decode_entries([entry], 0, live=live)


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [b"odd"],
        [b"a", b"b", b"payload"],
        [b"frame_type", b"t"],
        [b"payload", b"x", b"run", b"y"],
        [b"frame_type", b"t", b"payload", b"x", b"run", b"y"],
        [b"payloads", b"x", b"Run", b"y"],
        [b"end", b"of a story"],
        [b"prev", b"x", b"count", b"y", b"summary_version", b"z", b"patch_kind", b"\xff"],
    ],
)
@pytest.mark.parametrize("live", [False, True])
def test_entries_of_others_are_counted_and_left_out(fields, live):
    ours = [b"2-2", [b"payload", b"p"]]
    for exclude in (False, live):
        got = decode_entries([[b"1-1", fields], ours], 0, None, exclude, live=live)
        assert (got.foreign, got.taken) == (1, 2)
        assert [frame.payload for frame in got.frames] == ([] if exclude else [b"p"])


@pytest.mark.parametrize("fields", [[b"payload", b"x"], RUN, [b"run", b"\xff"]])
@pytest.mark.parametrize("live", [False, True])
def test_frames_are_counted_from_1(fields, live):
    entries = [[b"1-0", fields], [b"2-2", RUN], [b"3-0", fields]]
    got = decode_entries(entries, 0, live=live)
    assert (got.foreign, got.taken, [frame.payload for frame in got.frames]) == (2, 3, [b"a", b"b"])


@pytest.mark.parametrize("live", [False, True])
def test_a_field_that_is_left_out_has_its_usual_value(live):
    usual = "best_effort" if live else "durable"
    for fields in ([b"payload", b"p"], RUN):
        one = decode_entries([[b"5-2", fields]], 1, live=live).frames[-1]
        shown = (one.mode, one.frame_type, one.encoding, one.source, one.correlation_id)
        assert shown == (usual, "token", "utf8", "worker", None)
        assert (one.summary_version, one.patch_kind) == (None, None)
        named = [b"mode", b"summary", b"frame_type", b"t", b"encoding", b"e", b"source", b"s"]
        one = decode_entries([[b"5-2", [*fields, *named]]], 1, live=live).frames[-1]
        assert (one.mode, one.frame_type, one.encoding, one.source) == ("summary", "t", "e", "s")


def test_the_mode_decides_what_is_left_out_of_the_live_window():
    entries = [
        [b"1-1", [b"payload", b"1"]],
        [b"1-2", [b"payload", b"2", b"mode", b"summary"]],
        [b"1-4", RUN],
        [b"1-5", [b"payload", b"5", b"mode", b"best_effort"]],
    ]
    got = decode_entries(entries, 0, None, True, live=True)
    assert ([frame.sequence for frame in got.frames], got.foreign) == ([2], 0)
    got = decode_entries(entries, 0, None, True)
    assert [frame.sequence for frame in got.frames] == [1, 2, 3, 4]


def test_ids_beyond_ours_are_not_ours():
    largest = b"18446744073709551615"
    entries = [[largest + b"-" + largest, [*OURS, b"payload", b"p"]]]
    assert decode_entries(entries, 0).foreign == 1
    assert decode_entries(entries, 0, (5, 5)).taken == 0
    assert decode_entries(entries, 0, (2**64 - 1, 2**64 - 1)).taken == 1


def test_weighing_counts_frames_and_bytes():
    assert weigh_entries([]) == (0, 0)
    entries = [[b"1-1", [*OURS, b"payload", b"12345"]], [b"1-3", [*OURS, *RUN]]]
    assert weigh_entries(entries) == (3, 1 + 5 + 1 + len(RUN[1]))
    # An entry that is none of ours, or a run that ends within its count, is about one frame.
    assert weigh_entries([[b"1-1", [b"count", b"99"]], [b"1-2", [b"run", b"\x80"]]]) == (2, 3)
    assert weigh_entries([[b"1-1", [b"run", b""]], [b"1-2", []]]) == (2, 0)
    with pytest.raises(Corruption):
        weigh_entries([[b"1-1", [b"run", None]]])


def test_a_run_says_how_many_frames_it_holds(subtests):
    for count in (1, 2, 127, 128, 129, 255, 256, 257, 1000, 1023, 1024):
        with subtests.test(f"{count!r:.60}"):
            payloads = [b"%d" % n for n in range(count)]
            run = run_of(payloads, [0] * count)
            assert len(reference.varint(count)) == (1 if count < 128 else 2)
            entries = [[b"7-%d" % count, [b"run", run, b"correlation_id", b"c"]]]
            assert weigh_entries(entries) == (count, len(run) + 1)
            assert weigh_entries(entries * 3)[0] == 3 * count
            got = decode_entries(entries, 0, live=True).frames
            assert [frame.sequence for frame in got] == list(range(1, count + 1))
            assert [frame.payload for frame in got] == payloads == decode_run(run, count)


def test_a_limit_inside_a_millisecond():
    entries = [[b"5-%d" % n, [*OURS, b"payload", b""]] for n in range(1, 6)]
    assert decode_entries(entries, 0, (5, 3)).taken == 3
    assert decode_entries(entries, 0, (4, 9)).taken == 0
    assert decode_entries(entries, 0, (6, 0)).taken == 5


def test_a_cursor_inside_a_run():
    payloads = [b"a", b"b", b"c", b"d"]
    entry = [b"9-14", [*OURS, b"run", run_of(payloads, [-8, -4, -2, 1])]]
    got = decode_entries([entry], 12).frames
    assert [(f.stream_id, f.payload, f.ts_ms) for f in got] == [
        ("9-13", b"c", 7),
        ("9-14", b"d", 10),
    ]


# -- StreamFrame ----------------------------------------------------------------------------------


def frame(**changes):
    fields = {
        "stream_id": "17-4", "frame_type": "t", "payload": b"secret", "ts_ms": 16, "mode": "summary",
        "encoding": "binary", "source": "s", "correlation_id": "c", "summary_version": 3,
        "patch_kind": PatchKind.STRING_APPEND("/text"),
    }  # fmt: skip
    return StreamFrame(**{**fields, **changes})


def test_a_frame_has_what_it_was_made_of():
    one = frame()
    assert (one.stream_id, one.sequence, one.summary_version) == ("17-4", 4, 3)
    assert (one.attempt_index, one.cursor, frame(attempt_index=2).cursor) == (0, "0.17-4", "2.17-4")
    plain = StreamFrame(stream_id="1-1", frame_type="t", payload=b"", ts_ms=1)
    assert (plain.mode, plain.encoding, plain.source) == ("durable", "utf8", "worker")
    assert (plain.correlation_id, plain.summary_version, plain.patch_kind) == (None, None, None)


def test_a_frame_cannot_be_changed():
    one = frame()
    for name in ("stream_id", "sequence", "payload", "ts_ms", "mode", "summary_version", "other"):
        with pytest.raises(AttributeError):
            setattr(one, name, 1)
        with pytest.raises(AttributeError):
            delattr(one, name)


CHANGES = {
    "stream_id": "17-5", "frame_type": "u", "payload": b"x", "ts_ms": 15, "mode": "durable",
    "encoding": "utf8", "source": "z", "correlation_id": None, "summary_version": None,
    "patch_kind": None, "attempt_index": 1,
}  # fmt: skip


def test_frames_compare_by_content(subtests):
    for name, value in CHANGES.items():
        with subtests.test(f"{name!r:.60}"):
            assert frame() == frame()
            assert hash(frame()) == hash(frame())
            other = frame(**{name: value})
            assert frame() != other
            assert not frame() == other  # noqa: SIM201 - both operators are under test
            assert len({frame(), frame(), other}) == 2


def test_frames_have_no_order_and_equal_nothing_else():
    assert frame() != "17-4"
    with pytest.raises(TypeError):
        assert frame() < frame()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_frames_survive_pickle_and_copy(protocol):
    for one in (frame(), frame(correlation_id=None, summary_version=None, patch_kind=None)):
        assert pickle.loads(pickle.dumps(one, protocol)) == one
        assert copy.copy(one) == copy.deepcopy(one) == one


def test_repr_shows_no_payload():
    assert repr(frame()) == (
        "StreamFrame(stream_id='17-4', frame_type='t', mode='summary', payload=<6 bytes>)"
    )


@pytest.mark.parametrize("stream_id", ["", "5", "5-", "-5", "a-1", "1-1-1", "1-" + "9" * 19])
def test_a_frame_needs_an_id(stream_id):
    with pytest.raises(Corruption):
        frame(stream_id=stream_id)


@pytest.mark.parametrize("name", ["stream_id", "frame_type", "payload"])
def test_a_frame_needs_its_fields(name):
    with pytest.raises(TypeError):
        frame(**{name: None})


def test_the_error_of_an_end_is_the_text_that_is_whole():
    end = [b"end", b"attempt_failure", b"prev", b"1"]
    for fields, error in (
        (end, None),
        ([*end, b"error", b""], ""),
        ([*end, b"error", b"no \xc5\xbc\xc5"], "no \u017c"),
    ):
        got = decode_entries([[b"1-2", fields]], 0)
        assert (got.end_reason, got.end_error) == ("attempt_failure", error)

"""Server-sent events in C against their oracle, and against what a browser reads."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ff_fast import StreamFrame
from ff_fast._hot import sse
from ff_fast.types import Gap
from ff_fast.web import EventFraming
from tests import reference_sse
from tests.web.sites import EventSource, text_of

HOSTILE = [
    b"", b"\n", b"\r", b"\r\n", b"\n\n", b"\0", b"data: x\n\n", b"id: 9\n", b": c", b" lead", b"a\nb\rc\r\nd",
    b"\xe2", b"\x82", b"\xac", b"\xf0\x9f", b"\x98\x80", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90", b"\xe0\x80",
    b"x\xe2\x82", "é".encode(), b"\xef\xbb\xbf", b'"\\', b"\x7f\x1f\b\f",
]  # fmt: skip
payloads = st.one_of(
    st.sampled_from(HOSTILE), st.binary(max_size=12), st.text(max_size=8).map(str.encode)
)
types = st.sampled_from(["token", "end", "tool\nevent: end", "ü", "reasoning"])


@st.composite
def batches(draw):
    made, sequence = [], 0
    for batch in draw(
        st.lists(st.lists(st.tuples(payloads, types, st.booleans()), max_size=4), max_size=5)
    ):
        made.append([])
        for payload, kind, gap in batch:
            sequence += 1
            if gap and draw(st.integers(0, 3)) == 0:
                made[-1].append(Gap(sequence, sequence + 1, "trimmed", f"0.5-{sequence}"))
                continue
            made[-1].append(frame(sequence, payload, kind))
    return made


def frame(sequence, payload, kind="token", attempt=0):
    return StreamFrame(
        stream_id=f"{sequence + 10**12}-{sequence}",
        frame_type=kind,
        payload=payload,
        ts_ms=1,
        attempt_index=attempt,
    )


def other(item):
    return b"event: gap\n\n"


def both(**options):
    return sse.Events(other, **options), reference_sse.Events(other, **options)


@given(
    batches(),
    st.sampled_from(["text", "json", "base64"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([b"", b"\xe2", b"\xf0\x9f\x98"]),
)
def test_events_are_those_of_the_oracle(batches, kind, ids, types, carry):
    mine, oracle = both(
        kind=kind,
        ids=ids,
        types=types,
        reserved=frozenset({"end"}),
        carry=carry if kind != "base64" else b"",
    )
    for batch in batches:
        assert mine.join(batch) == oracle.join(batch)


@given(st.binary(max_size=8))
def test_the_beginning_of_a_character_is_recognised(text):
    assert sse.unfinished_bytes(text) == reference_sse.unfinished_bytes(text)


@given(
    st.text() | st.binary(),
    st.none() | st.text(),
    st.none() | st.text(),
    st.none() | st.integers(0, 9),
)
def test_one_event_is_that_of_the_oracle(data, id, name, retry):
    if isinstance(data, str):
        data = data.encode("utf-8", "replace")
    made = sse.event(data, id=id, event=name, retry=retry)
    assert made == reference_sse.event(data, id=id, event=name, retry=retry)


@pytest.mark.parametrize(
    "carry", [b"a", b"\xe2\x82\xac", b"\xff", b"\xf0\x9f\x98\x80", b"\xe0\x80"]
)
def test_what_begins_no_character_is_no_carry(carry):
    with pytest.raises(ValueError, match="carry"):
        sse.Events(other, carry=carry)


def test_a_huge_payload_of_many_lines():
    text = ("é\r\n" * 20_000 + "x" * 5_000).encode()
    mine, oracle = both()
    made = mine.join([frame(1, text)])
    assert made == oracle.join([frame(1, text)])
    assert text_of(EventSource().parse(made)) == text.decode().replace("\r\n", "\n")


def test_batches_make_no_difference():
    shuffled = random.Random(5)
    frames = [frame(i, shuffled.choice(HOSTILE)) for i in range(1, 300)]
    whole = sse.Events(other).join(frames)
    one_by_one = sse.Events(other)
    assert b"".join(one_by_one.join([each]) for each in frames) == whole


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("data", ["text", "json"])
def test_text_that_is_split_anywhere_arrives_whole_from_every_place(size, data):
    text = 'a€\r\n😀é\rb\n\n\0"\\ \U0010ffff' * 3
    raw = text.encode()
    frames = [frame(i + 1, raw[at : at + size]) for i, at in enumerate(range(0, len(raw), size))]
    events = EventSource().parse(EventFraming(data=data).items(frames))
    assert joined(events, data) == expected(text, data)
    for index, each in enumerate(events):
        framing = EventFraming(data=data)
        place = framing.place(each.id)
        rest = EventSource().parse(
            framing.items([later for later in frames if after(later, place)])
        )
        assert joined([*events[: index + 1], *rest], data) == expected(text, data), each.id


def after(frame, place):
    return frame.sequence > int(place.rpartition("-")[2])


def joined(events, data):
    return "".join(json.loads(each.data) if data == "json" else each.data for each in events)


def expected(text, data):
    return text if data == "json" else text.replace("\r\n", "\n").replace("\r", "\n")

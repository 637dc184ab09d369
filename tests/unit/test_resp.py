"""Packing of requests: exact bytes, agreement with the oracle and with hiredis, refusals."""

import doctest
import gc
import itertools

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ff_fast._hot import resp
from ff_fast._hot.resp import ReplyGuard, pack_command, pack_fcall, take_reply

from .. import reference_resp as reference

EXACT = [
    pytest.param(
        (b"ff_ping", (), ()),
        b"*3\r\n$5\r\nFCALL\r\n$7\r\nff_ping\r\n$1\r\n0\r\n",
        id="no keys, no argv",
    ),
    pytest.param(
        (b"f", (b"{q}:a", b"{q}:b"), (b"1",)),
        b"*6\r\n$5\r\nFCALL\r\n$1\r\nf\r\n$1\r\n2\r\n$5\r\n{q}:a\r\n$5\r\n{q}:b\r\n$1\r\n1\r\n",
        id="keys before argv",
    ),
    pytest.param(
        (b"f", (), (b"", b"\x00\r\n$9\r\n")),
        b"*5\r\n$5\r\nFCALL\r\n$1\r\nf\r\n$1\r\n0\r\n$0\r\n\r\n$7\r\n\x00\r\n$9\r\n\r\n",
        id="payload that looks like the protocol",
    ),
    pytest.param(
        (b"f", (b"k",), (), True),
        b"*4\r\n$8\r\nFCALL_RO\r\n$1\r\nf\r\n$1\r\n1\r\n$1\r\nk\r\n",
        id="read-only",
    ),
]


@pytest.mark.parametrize("call, wire", EXACT)
def test_exact_bytes(call, wire):
    assert pack_fcall(*call) == wire


# Lengths on both sides of a power of ten are where a digit count goes wrong.
payloads = st.binary(max_size=12) | st.sampled_from([9, 10, 99, 100, 999, 1000, 9999, 10000]).map(
    bytes
)
payload_tuples = st.lists(payloads, max_size=12).map(tuple)


@given(st.binary(max_size=20), payload_tuples, payload_tuples, st.booleans())
def test_fcall_agrees_with_the_oracle(function, keys, argv, read_only):
    assert pack_fcall(function, keys, argv, read_only) == reference.pack_fcall(
        function, keys, argv, read_only
    )


@given(payload_tuples)
def test_command_agrees_with_the_oracle(parts):
    assert pack_command(*parts) == reference.pack_command(*parts)


@pytest.mark.parametrize("count", [9, 10, 99, 100, 999, 1000])
def test_number_of_parts(count):
    parts = (b"x",) * count
    assert pack_command(*parts) == reference.pack_command(*parts)


@given(st.lists(payloads, min_size=1, max_size=8))
def test_a_parser_reads_it_back(parts):
    reader = hiredis.Reader()
    reader.feed(pack_command(*parts))
    assert reader.gets() == parts
    assert reader.gets() is False


class Bytes(bytes):
    pass


def test_refuses_what_it_would_have_to_guess(subtests):
    for call, message in (
        ((b"f", ("k",), ()), "part 0 must be bytes, not str"),
        ((b"f", (), (b"ok", 7)), "part 1 must be bytes, not int"),
        ((b"f", (), (bytearray(b"x"),)), "part 0 must be bytes, not bytearray"),
        ((b"f", (), (None,)), "part 0 must be bytes, not NoneType"),
        ((b"f", (), (Bytes(b"x"),)), "part 0 must be bytes, not Bytes"),
        ((None, (), ()), "function"),
        (("f", (), ()), "function"),
        ((b"f", [b"k"], ()), "keys"),
        ((b"f", (), None), "argv"),
    ):
        with subtests.test(f"{call!r:.60}"), pytest.raises(TypeError, match=message):
            pack_fcall(*call)


@pytest.mark.parametrize("part", ["x", 7, None, bytearray(b"x"), memoryview(b"x"), Bytes(b"x")])
def test_command_takes_bytes_alone(part):
    with pytest.raises(TypeError, match="part 1 must be bytes"):
        pack_command(b"PING", part)


def test_doctests():
    outcome = doctest.testmod(resp)
    assert outcome.attempted >= 2
    assert outcome.failed == 0


def test_a_large_reply_is_taken_without_a_collection():
    reader = hiredis.Reader()
    reader.feed(b"*2000\r\n" + b"*1\r\n$1\r\nx\r\n" * 2000)
    phases = []

    def watch(phase, _):
        phases.append(phase)

    gc.collect()
    gc.callbacks.append(watch)
    try:
        reply = take_reply(reader.gets)
        during = len(phases)
    finally:
        gc.callbacks.remove(watch)
    assert reply == [[b"x"]] * 2000
    assert during == 0
    assert take_reply(reader.gets) is False
    assert gc.isenabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was_also_by_an_error(enabled):
    reader = hiredis.Reader()
    reader.feed(b"nonsense\r\n")
    if not enabled:
        gc.disable()
    try:
        with pytest.raises(hiredis.ProtocolError):
            take_reply(reader.gets)
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


# -- the sizes that replies announce ---------------------------------------------------------------------------------------


def packed(value):
    """A reply as a server sends it."""
    match value:
        case None:
            return b"$-1\r\n"
        case int():
            return b":%d\r\n" % value
        case str():
            return b"+%b\r\n" % value.encode()
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(value), value)
        case dict():
            pairs = [part for pair in value.items() for part in pair]
            return b"%%%d\r\n" % len(value) + b"".join(map(packed, pairs))
        case _:
            return b"*%d\r\n" % len(value) + b"".join(map(packed, value))


# Strings that look like headers must never be taken for one.
hostile = [b"*2147483647\r\n", b"$9223372036854775807\r\n", b"\r\n*99999999\r\n", b"|1\r\n", b"\r", b"\n"]  # fmt: skip
scalars = (
    st.none()
    | st.integers(-(2**63), 2**63 - 1)
    | st.sampled_from(["OK", ""])
    | st.binary(max_size=30)
    | st.sampled_from(hostile)
)
replies = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.binary(max_size=3), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


def pieces(stream, cuts):
    bounds = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(bounds)]


cuts = st.lists(st.integers(0, 10_000), max_size=8)


@given(st.lists(replies, min_size=1, max_size=4), cuts)
def test_what_a_server_sends_is_accepted_in_any_pieces(values, cuts):
    guard = ReplyGuard()
    assert all(guard.accepts(piece) for piece in pieces(b"".join(map(packed, values)), cuts))


@given(st.lists(replies, min_size=1, max_size=3), cuts, st.integers(0, 10_000), st.sampled_from([b"", *hostile, b"9", b"*", b"x", b"-"]))  # fmt: skip
def test_anything_else_is_judged_as_by_the_oracle(values, cuts, at, inserted):
    stream = b"".join(map(packed, values))
    at %= len(stream)
    stream = stream[:at] + inserted + stream[at + len(inserted) :]
    guard, oracle = ReplyGuard(), reference.ReplyGuard()
    for piece in pieces(stream, cuts):
        verdict = guard.accepts(piece)
        assert verdict == oracle.accepts(piece)
        if not verdict:
            break


def verdicts(stream):
    """Whether the stream is accepted at once, and byte by byte."""
    guard = ReplyGuard()
    whole = ReplyGuard().accepts(stream)
    assert whole == all(guard.accepts(stream[i : i + 1]) for i in range(len(stream)))
    assert whole == reference.sizes_fit(stream)
    return whole


def test_the_limits_of_what_a_reply_may_announce(subtests):
    half = reference.MAX_OWED // 2
    for stream, fits in (
        (b"*%d\r\n" % reference.MAX_OWED, True),
        (b"*%d\r\n" % (reference.MAX_OWED + 1), False),
        (b"*2147483647\r\n", False),
        (b"~2147483647\r\n", False),
        (b">2147483647\r\n", False),
        (b"*999999999\r\n", False),
        (b"*18446744073709551617\r\n", False),
        (b"%%%d\r\n" % half, True),
        (b"%%%d\r\n" % (half + 1), False),
        # What nested replies announce counts together.
        (b"*%d\r\n*%d\r\n" % (half, half), True),
        (b"*%d\r\n*%d\r\n" % (half, half + 2), False),
        (b"*2\r\n:1\r\n*2147483647\r\n", False),
        # What has come is owed no longer.
        ((b"*3\r\n$1\r\nx\r\n$-1\r\n*0\r\n") * 3 + b"*%d\r\n" % reference.MAX_OWED, True),
        (b"$%d\r\n" % reference.MAX_BULK, True),
        (b"$%d\r\n" % (reference.MAX_BULK + 1), False),
        (b"=%d\r\n" % (reference.MAX_BULK + 1), False),
        (b"$9223372036854775807\r\n", False),
        (b"+" + b"x" * (reference.MAX_LINE - 1) + b"\r\n", True),
        (b"-" + b"x" * reference.MAX_LINE + b"\r\n", False),
        (b"|1\r\n", False),
        (b"HTTP/1.1 400\r\n", False),
        (b"$1x\r\n", False),
        (b"$1\rx", False),
        (b"$--1\r\n", False),
        (b"$\r\n", False),
    ):
        with subtests.test(f"{stream!r:.40}"):
            assert verdicts(stream) is fits


MIB = b"$1048576\r\n" + bytes(1 << 20) + b"\r\n"


@pytest.mark.parametrize(
    "piece, taken",
    [
        (MIB, (1 << 20) + reference.VALUE_BYTES),
        ((b"*15\r\n" + b"*0\r\n" * 15) * 4_096, 16 * 4_096 * reference.VALUE_BYTES),
    ],
    ids=["large strings", "small values"],
)
def test_a_reply_that_does_not_end_is_broken_off(piece, taken):
    guard = ReplyGuard()
    for _ in range(2):
        # What came before a reply does not count.
        assert guard.accepts(b"*200\r\n" + MIB * 2)
        assert all(guard.accepts(MIB) for _ in range(198))
    assert guard.accepts(b"*1000000\r\n")
    enough = reference.MAX_REPLY // taken
    assert all(guard.accepts(piece) for _ in range(enough - 1))
    assert not all(guard.accepts(piece) for _ in range(3))


def test_what_the_server_pushes_is_skipped():
    reader = hiredis.Reader()
    reader.feed(b">2\r\n+a\r\n+b\r\n>1\r\n+c\r\n+OK\r\n>1\r\n+d\r\n")
    assert take_reply(reader.gets, hiredis.PushNotification) == b"OK"
    assert take_reply(reader.gets, hiredis.PushNotification) is False

"""Packing of requests: exact bytes, agreement with the oracle and with hiredis, refusals."""

import doctest
import gc

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ff_fast._hot import resp
from ff_fast._hot.resp import pack_command, pack_fcall, take_reply

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

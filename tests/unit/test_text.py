"""Text from bytes that were cut anywhere."""

import doctest
import pickle
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ff_fast
from ff_fast import TextDecoder, _text
from ff_fast.errors import InvalidInput, InvalidPayload, InvalidType

WORDS = "zażółć \U0001f600 e\u0301 \x00 \ufeff \ufffd"


def test_the_examples():
    assert doctest.testmod(_text).failed == 0


@given(st.text(), st.lists(st.integers(1, 7)))
def test_text_is_the_same_however_it_was_cut(text, sizes):
    decoder, data, out = TextDecoder(), text.encode(), ""
    for size in [*sizes, len(data)]:
        piece, data = data[:size], data[size:]
        some = decoder.decode(piece)
        out += some
        # What is held back is less than a character; all else was given out.
        assert len(decoder.pending) < 4
    assert decoder.decode(b"", final=True) == ""
    assert out == text


@given(st.lists(st.binary(max_size=4)))
def test_any_bytes_are_text_or_refused_and_a_refusal_changes_nothing(pieces):
    decoder, whole = TextDecoder(), b""
    for piece in pieces:
        before = decoder.pending
        try:
            text = decoder.decode(piece)
        except InvalidPayload:
            assert decoder.pending == before
            with pytest.raises(UnicodeDecodeError):
                (whole + piece).decode()
            continue
        whole += piece
        assert before + piece == text.encode() + decoder.pending
    replacing = TextDecoder("replace")
    out = "".join(map(replacing.decode, pieces)) + replacing.decode(b"", final=True)
    assert out == b"".join(pieces).decode("utf-8", "replace")


def test_every_kind_of_payload():
    decoder = TextDecoder()
    half, rest = "ż".encode()[:1], "ż".encode()[1:]
    for one, other in (
        (half, bytearray(rest)),
        (bytearray(half), memoryview(rest)),
        (memoryview(half), rest),
    ):
        assert decoder.decode(one) == ""
        assert decoder.pending == half
        assert decoder.decode(other) == "ż"
    assert decoder.decode(WORDS) == WORDS
    decoder.decode(half)
    with pytest.raises(InvalidPayload):
        decoder.decode("text behind half a character")
    for bad in (None, 7, ["x"]):
        with pytest.raises(InvalidType):
            decoder.decode(bad)
    assert decoder.decode(rest) == "ż"


def test_a_half_at_the_end_is_an_error_that_loses_nothing():
    decoder = TextDecoder()
    assert decoder.decode("a€".encode()[:-1]) == "a"
    for _ in range(2):
        with pytest.raises(InvalidPayload, match="ends within a character"):
            decoder.decode(b"", final=True)
    with pytest.raises(InvalidPayload, match="ends within a character"):
        decoder.decode("€b€".encode()[2:-1], final=True)
    assert decoder.pending == "€".encode()[:-1]
    assert decoder.decode("€".encode()[-1:], final=True) == "€"


def test_behind_a_gap_the_half_before_it_is_dropped():
    decoder = TextDecoder()
    decoder.decode("€".encode()[:2])
    decoder.reset()
    assert (decoder.pending, decoder.decode(b"next")) == (b"", "next")


@pytest.mark.parametrize("data", [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"ok\xf5", b"\x80"])
def test_what_is_not_utf_8_is_refused_without_showing_it(data):
    decoder = TextDecoder()
    hidden = bytes(range(0x61, 0x6B))
    with pytest.raises(InvalidPayload, match="is not UTF-8") as caught:
        decoder.decode(hidden + data)
    assert "abcdef" not in "".join(traceback.format_exception(caught.value))
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    assert decoder.decode(b"goes on") == "goes on"


def test_the_byte_that_is_named_is_one_of_the_call():
    decoder = TextDecoder()
    decoder.decode("€".encode()[:2])
    with pytest.raises(InvalidPayload, match="Byte 0 of the 3 given"):
        decoder.decode(b"abc")
    decoder.reset()
    with pytest.raises(InvalidPayload, match="Byte 1 of the 3 given"):
        decoder.decode(b"a\xffb")


def test_other_handlers_of_errors_are_refused():
    for bad in ("ignore", "surrogateescape", None, 1):
        with pytest.raises(InvalidInput):
            TextDecoder(bad)


def test_the_repr_shows_no_text():
    decoder = TextDecoder()
    decoder.decode("€".encode()[:2])
    assert repr(decoder) == "TextDecoder(<2 bytes pending>)"
    assert ff_fast.TextDecoder is TextDecoder

"""The rolling summary: RFC vectors, the defects it must not have, and agreement with the oracle."""

import copy
import doctest
import json
import pickle
import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ff_fast._hot import merge
from ff_fast._hot.merge import (
    DEFAULT_MAX_BYTES,
    MAX_DEPTH,
    SUMMARY_NULL_SENTINEL,
    Document,
)
from ff_fast.errors import Corruption, InvalidInput, InvalidPatch, InvalidType

from .. import reference_merge as reference


def merged(document: bytes, *patches: bytes) -> bytes:
    folded = Document(document)
    for patch in patches:
        folded.merge(patch)
        assert folded.size == len(folded.dumps())
    return folded.dumps()


# RFC 7396, appendix A: original, patch, result.
VECTORS = [
    (b'{"a":"b"}', b'{"a":"c"}', b'{"a":"c"}'),
    (b'{"a":"b"}', b'{"b":"c"}', b'{"a":"b","b":"c"}'),
    (b'{"a":"b"}', b'{"a":null}', b"{}"),
    (b'{"a":"b","b":"c"}', b'{"a":null}', b'{"b":"c"}'),
    (b'{"a":["b"]}', b'{"a":"c"}', b'{"a":"c"}'),
    (b'{"a":"c"}', b'{"a":["b"]}', b'{"a":["b"]}'),
    (b'{"a":{"b":"c"}}', b'{"a":{"b":"d","c":null}}', b'{"a":{"b":"d"}}'),
    (b'{"a":[{"b":"c"}]}', b'{"a":[1]}', b'{"a":[1]}'),
    (b'["a","b"]', b'["c","d"]', b'["c","d"]'),
    (b'{"a":"b"}', b'["c"]', b'["c"]'),
    (b'{"a":"foo"}', b"null", None),
    (b'{"a":"foo"}', b'"bar"', b'"bar"'),
    (b'{"e":null}', b'{"a":1}', b'{"e":null,"a":1}'),
    (b"[1,2]", b'{"a":"b","c":null}', b'{"a":"b"}'),
    (b"{}", b'{"a":{"bb":{"ccc":null}}}', b'{"a":{"bb":{}}}'),
]


class TestRfc7396:
    def test_vector_under_a_key(self, subtests):
        for target, patch, result in VECTORS:
            with subtests.test(f"{target!r:.60}"):
                # One level down every vector has an object at its root; null there removes the member.
                wanted = b"{}" if result is None else b'{"k":' + result + b"}"
                assert merged(b'{"k":' + target + b"}", b'{"k":' + patch + b"}") == wanted

    def test_vector_at_the_root(self, subtests):
        for target, patch, result in VECTORS:
            with subtests.test(f"{target!r:.60}"):
                root = target
                if not target.startswith(b"{"):
                    with pytest.raises(Corruption):
                        Document(target)
                    root = b"{}"
                document = Document(root)
                if patch.startswith(b"{"):
                    document.merge(patch)
                    assert document.dumps() == result
                else:
                    with pytest.raises(InvalidPatch):
                        document.merge(patch)
                    assert document.dumps() == root

    def test_null_for_a_missing_target_removes(self):
        assert merged(b"{}", b'{"a":{"b":null}}') == b'{"a":{}}'
        assert merged(b'{"a":1}', b'{"a":{"b":null,"c":{"d":null},"e":2}}') == (
            b'{"a":{"c":{},"e":2}}'
        )

    def test_null_inside_an_array_stays(self):
        patch = b'{"a":[null,{"b":null,"c":[null]}]}'
        assert merged(b'{"a":{"x":1}}', patch) == patch

    def test_order(self):
        assert merged(b'{"a":1,"b":2,"c":3}', b'{"b":4}') == b'{"a":1,"b":4,"c":3}'
        assert merged(b'{"a":1,"b":2}', b'{"a":null}', b'{"a":3}') == b'{"b":2,"a":3}'
        assert merged(b"{}", b'{"z":1,"a":2}') == b'{"z":1,"a":2}'

    def test_equal_keys_last_value_first_place(self):
        assert merged(b'{"a":1,"b":2,"a":3}') == b'{"a":3,"b":2}'
        assert merged(b"{}", b'{"a":{"x":1},"b":2,"\\u0061":{"y":3}}') == b'{"a":{"y":3},"b":2}'
        assert merged(b'{"a":1}', b'{"a":2,"a":null}') == b"{}"
        assert merged(b"{}", b'{"a":null,"b":1,"a":2}') == b'{"a":2,"b":1}'
        assert merged(b"{}", b'{"a":[{"k":1,"k":2}]}') == b'{"a":[{"k":2}]}'


class TestDefects:
    """FlowFabric's merge fails each of these."""

    def test_empty_object_leaves_target(self):
        assert merged(b'{"a":{"x":1}}', b'{"a":{}}') == b'{"a":{"x":1}}'
        assert merged(b'{"a":1}', b'{"a":{}}') == b'{"a":{}}'

    def test_empty_arrays(self):
        document = b'{"a":[],"b":{"c":[[],{}]},"d":{}}'
        assert merged(document, b'{"e":[]}', b'{"f":1}') == document[:-1] + b',"e":[],"f":1}'

    def test_root_must_be_an_object(self, subtests):
        for root in (b"[]", b"[{}]", b"1", b'"a"', b"null", b"true", b"", b" "):
            with subtests.test(f"{root!r:.60}"):
                with pytest.raises(InvalidPatch, match="root must be an object"):
                    Document().merge(root)
                with pytest.raises(Corruption, match="root must be an object"):
                    Document(root)

    @pytest.mark.parametrize(
        "array",
        [
            b"[false,true]",
            b"[false,null]",
            b'[false,{"x":null}]',
            b"[false," + b"null," * 30 + b"3]",
        ],
    )
    def test_array_replaces_whatever_its_first_item(self, array):
        assert merged(b'{"k":{"a":1}}', b'{"k":' + array + b"}") == b'{"k":' + array + b"}"

    def test_integers(self, subtests):
        for number in (
            b"100000000000000",
            b"123456789012345",
            b"9007199254740993",
            b"1713100800150123",
            b"18446744073709551617",
            b"-" + b"9" * 5000,
            b"0",
            b"-0",
        ):
            with subtests.test(f"{number!r:.60}"):
                self.keeps(number)

    def test_floats(self, subtests):
        for number in (
            b"0.30000000000000004",
            b"3.141592653589793238462643383279502884197",
            b"1.0",
            b"-0.0",
            b"1e400",
            b"-1E-999",
            b"1.50e+007",
            b"0e0",
        ):
            with subtests.test(f"{number!r:.60}"):
                # 1e400 is legal JSON: it is kept, not refused, as nothing here converts it.
                self.keeps(number)

    def keeps(self, number):
        document = b'{"n":' + number + b',"a":[' + number + b"," + number + b"]}"
        assert Document(document).dumps() == document
        assert merged(b'{"n":1,"a":2}', document, b'{"x":1}') == document[:-1] + b',"x":1}'

    @pytest.mark.parametrize(
        "value",
        [b"NaN", b"-NaN", b"Infinity", b"-Infinity", b"nan", b"inf"],
    )
    def test_no_number(self, value):
        self.refuses(b'{"a":' + value + b"}")
        self.refuses(b'{"a":[' + value + b"]}")

    def test_numbers_outside_the_grammar(self, subtests):
        for value in (
            *(b"0x10", b"01", b"-01", b"00", b"1.", b".5", b"+1", b"-", b"--1", b"1.e5", b"1e"),
            *(b"1e+", b"1e1.5", b"1_000", b"1a", "\u0661".encode()),
        ):
            with subtests.test(f"{value!r:.60}"):
                self.refuses(b'{"a":' + value + b"}")
                self.refuses(b'{"a":[' + value + b"]}")

    def test_sentinel_inside_arrays_becomes_null(self):
        patch = b'{"a":["__ff_null__",["__ff_null__",{"b":"__ff_null__"}],"__ff_null_","x"]}'
        assert merged(b"{}", patch) == b'{"a":[null,[null,{"b":null}],"__ff_null_","x"]}'

    @pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"k":', b"}")])
    def test_sentinel_at_any_depth(self, opening, closing):
        levels = MAX_DEPTH - 1
        patch = b'{"a":' + opening * levels + b'"__ff_null__"' + closing * levels + b"}"
        assert merged(b"{}", patch) == patch.replace(b'"__ff_null__"', b"null")

    @pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"k":', b"}")])
    def test_one_depth_limit(self, opening, closing):
        def nested(levels):
            return b'{"a":' + opening * (levels - 1) + b"1" + closing * (levels - 1) + b"}"

        document = Document(nested(MAX_DEPTH))
        document.merge(nested(MAX_DEPTH))
        assert document.dumps() == nested(MAX_DEPTH)
        for levels in (MAX_DEPTH + 1, 1000, 100_000):
            self.refuses(nested(levels))
            self.refuses(nested(levels)[: levels * len(opening)])

    def test_failed_patch_changes_nothing(self):
        document = Document(b'{"a":{"b":1},"t":"x"}')
        for patch in (b'{"a":{"b":2},"c":', b'{"a":null} {}', b'{"a":null,"c":01}'):
            with pytest.raises(InvalidPatch):
                document.merge(patch)
            assert document.dumps() == b'{"a":{"b":1},"t":"x"}'
        fresh = Document()
        with pytest.raises(InvalidPatch):
            fresh.merge(b"[]")
        assert (fresh.dumps(), fresh.size) == (b"{}", 2)

    def test_cap(self):
        document = Document(b'{"a":"12345"}', max_bytes=20)
        document.merge(b'{"b":""}')
        assert document.size == len(b'{"a":"12345","b":""}') == 20
        for change in (
            lambda: document.merge(b'{"b":"2"}'),
            lambda: document.merge(b'{"a":null,"b":"' + b"x" * 20 + b'"}'),
            lambda: document.append(b"/b", b"x"),
            lambda: document.append(b"/b", b"\n"),
            lambda: document.append(b"/c", b""),
        ):
            with pytest.raises(InvalidPatch, match="split"):
                change()
            assert document.dumps() == b'{"a":"12345","b":""}'
        document.merge(b'{"a":null,"b":"1234567890ab"}')
        assert document.dumps() == b'{"b":"1234567890ab"}'
        assert Document().max_bytes == DEFAULT_MAX_BYTES == 16 * 1024 * 1024

    def test_invalid_utf8(self, subtests):
        for raw in (
            *(b"\x80", b"\xff", b"\xc0\x80", b"\xc1\xbf", b"\xc3", b"\xe2\x82", b"\xe0\x80\x80"),
            *(b"\xed\xa0\x80", b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80"),
            *(b"\xf0\x9f\x98", b"abcdefgh\xffijklmnopq", b"\xc3\xa4\xff"),
        ):
            with subtests.test(f"{raw!r:.60}"):
                self.refuses(b'{"a":"' + raw + b'"}')
                self.refuses(b'{"' + raw + b'":1}')
                self.refuses(b'{"a":"' + raw)
                document = Document(b'{"a":"x"}')
                for pointer, text in ((b"/a", raw), (b"/" + raw, b"x")):
                    with pytest.raises(InvalidPatch, match="UTF-8"):
                        document.append(pointer, text)
                assert document.dumps() == b'{"a":"x"}'

    def test_slash_is_not_escaped_and_order_is_kept(self):
        assert merged(b'{"z":"a/b","a":1}', b'{"k/":"\\/"}') == b'{"z":"a/b","a":1,"k/":"/"}'

    def refuses(self, text):
        document = Document(b'{"a":1}')
        with pytest.raises(InvalidPatch):
            document.merge(text)
        with pytest.raises(Corruption):
            Document(text)
        assert document.dumps() == b'{"a":1}'


class TestGrammar:
    def test_refused(self, subtests):
        for text in (
            *(
                b"{",
                b"}",
                b"{}}",
                b"{} x",
                b"{}\x00",
                b"\x00{}",
                b"{,}",
                b'{"a":1,}',
                b'{"a":[1,]}',
            ),
            *(b"{'a':1}", b"{a:1}", b'{"a" 1}', b'{"a":}', b'{"a":1 "b":2}', b'{"a":[1 2]}'),
            *(b'{"a":[}', b'{"a":[1}', b'{"a":{]}', b'{"a":tru}', b'{"a":True}', b'{"a":nul}'),
            *(b'{"a":falsee}', b'{"a":nullx}', b"/*x*/{}", b"{}//x", b'{"a":1/**/}', b"{}{}"),
            *(b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"\x0b{}", b"\xc2\xa0{}", b"{1:2}"),
            *(b'{"a":"\x01"}', b'{"a":"\n"}', b'{"a":"\x00"}', b'{"a":"\x1f"}', b'{"\t":1}'),
            *(b'{"a":"\\x"}', b'{"a":"\\"}', b'{"a":"\\u12"}', b'{"a":"\\u12g4"}', b'{"a":"\\'),
            *(b'{"a":"\\ud800"}', b'{"a":"\\udc00"}', b'{"a":"\\ud800\\n"}', b'{"a":"\\ud800x"}'),
            *(b'{"a":"\\ud800\\ud800"}', b'{"a":"\\ud800\\u0041"}', b'{"a":"\\U0041"}'),
            *(b'{"a":"\\ud83d\\ude0', b'{"a":"\\ud83d\\', b'{"a":"\\ud83d', b'{"\\udfff":1}'),
        ):
            with subtests.test(f"{text!r:.60}"):
                TestDefects().refuses(text)

    def test_strings_have_one_spelling(self, subtests):
        for spelling, ours in (
            (rb"\u0061\u005C\u0022\/", rb"a\\\"/"),
            (rb"\u000a\u0008\u0009\u000C\u000d\n\b\t\f\r", rb"\n\b\t\f\r\n\b\t\f\r"),
            (rb"\u0000\u001F\u007f", b"\\u0000\\u001f\x7f"),
            (rb"\u00e4\u20AC\ud83d\ude00", "\u00e4\u20ac\U0001f600".encode()),
            (rb"\uDBFF\uDFFF\ud800\udc00", "\U0010ffff\U00010000".encode()),
            (rb"\u0080\u07ff\u0800\uffff", "\u0080\u07ff\u0800\uffff".encode()),
            ("\u00e4\u20ac\U0001f600\u2028".encode(), "\u00e4\u20ac\U0001f600\u2028".encode()),
            (rb"0123456789\"0123456789\\", rb"0123456789\"0123456789\\"),
        ):
            with subtests.test(f"{spelling!r:.60}"):
                assert merged(b"{}", b'{"' + spelling + b'":["' + spelling + b'"]}') == (
                    b'{"' + ours + b'":["' + ours + b'"]}'
                )
                document = Document()
                document.append(b"/t", json.loads(b'"' + spelling + b'"').encode())
                assert document.dumps() == b'{"t":"' + ours + b'"}'

    def test_key_identity_is_the_decoded_value(self):
        assert merged(b'{"a/\\n":1}', rb'{"\u0061\/\u000a":2}') == b'{"a/\\n":2}'
        assert merged(b'{"\\u0061":1}', b'{"a":null}') == b"{}"

    def test_no_space_is_kept(self):
        spaced = b' \n{ "a b" :\t[ 1 , { } , [ ] , "c d" ]\r, "e" : { "f" : null } } \n'
        assert Document(spaced).dumps() == b'{"a b":[1,{},[],"c d"],"e":{"f":null}}'

    def test_places_are_told_and_contents_are_not(self):
        secrets = (b'{"k":"hunter2" hunter2}', b'{"hunter2":"hunter2\xff"}', b"hunter2")
        for secret in secrets:
            for call in (Document().merge, Document):
                with pytest.raises((InvalidPatch, Corruption), match=r"at byte \d+ of") as caught:
                    call(secret)
                assert "hunter2" not in repr(caught.value)
        document = Document(b'{"hunter2":[1],"t":"hunter2"}')
        for pointer in (b"/hunter2/9", b"/hunter2", b"/hunter2/0", b"/t/hunter2", b"/hunter2~"):
            with pytest.raises(InvalidPatch) as caught:
                document.append(pointer, b"hunter2")
            assert "hunter2" not in repr(caught.value)
        assert "hunter2" not in repr(document)
        assert f"{document.size} bytes" in repr(document)


class TestSentinel:
    def test_name(self):
        assert SUMMARY_NULL_SENTINEL == reference.SENTINEL == "__ff_null__"
        assert MAX_DEPTH == reference.MAX_DEPTH

    def test_value_becomes_null(self):
        assert merged(b'{"a":1}', b'{"a":"__ff_null__"}') == b'{"a":null}'
        assert merged(b"{}", b'{"a":{"b":"__ff_null__"}}') == b'{"a":{"b":null}}'

    @pytest.mark.parametrize("spelling", [rb"\u005f_ff_null__", rb"\u005F\u005fff_nul\u006c__"])
    def test_however_it_is_escaped(self, spelling):
        assert merged(b"{}", b'{"a":"' + spelling + b'"}') == b'{"a":null}'

    def test_key_is_an_ordinary_key(self):
        patch = b'{"__ff_null__":{"__ff_null__":"__ff_null__"}}'
        assert merged(b"{}", patch) == b'{"__ff_null__":{"__ff_null__":null}}'

    @pytest.mark.parametrize(
        "near", [b"__ff_null__ ", b"__FF_NULL__", b"__ff_null_", b"_ff_null__"]
    )
    def test_near_misses(self, near):
        assert merged(b"{}", b'{"a":"' + near + b'"}') == b'{"a":"' + near + b'"}'

    def test_stored_document(self):
        assert Document(b'{"a":["__ff_null__"]}').dumps() == b'{"a":[null]}'

    def test_append_that_completes_it_is_refused(self, subtests):
        for cut in range(12):
            with subtests.test(f"{cut!r:.60}"):
                head, tail = b"__ff_null__"[:cut], b"__ff_null__"[cut:]
                starts = [Document(b'{"a":"' + head + b'"}')] if cut < 11 else []
                for start in (b"{}", b'{"a":null}', b'{"a":""}'):
                    if cut == 11:
                        break
                    document = Document(start)
                    if cut:
                        document.append(b"/a", head)
                    starts.append(document)
                for document in starts:
                    before = document.dumps()
                    for _ in range(2):
                        with pytest.raises(InvalidPatch, match="sentinel"):
                            document.append(b"/a", tail)
                        assert (document.dumps(), document.size) == (before, len(before))
                    # As told: together with the next piece.
                    document.append(b"/a", tail + b"!")
                    assert document.dumps() == b'{"a":"__ff_null__!"}'

    def test_append_may_pass_it_by(self):
        document = Document(b'{"a":"x"}')
        for piece in (b"__ff_", b"null__", b"__ff_null__"):
            document.append(b"/a", piece)
        assert document.dumps() == b'{"a":"x__ff_null____ff_null__"}'


class TestAppend:
    def test_creates_what_is_missing(self):
        document = Document()
        document.append(b"/a/b/0", b"x")
        document.append(b"/a/b/0", b"y")
        document.append(b"/a/c", b"")
        document.append(b"/", b"empty key")
        assert document.dumps() == b'{"a":{"b":{"0":"xy"},"c":""},"":"empty key"}'

    @pytest.mark.parametrize(
        "pointer, result",
        [
            (b"/a~1b", b'{"a/b":"1x","m~n":"2","c%d":"3","e\\"f":"4"}'),
            (b"/m~0n", b'{"a/b":"1","m~n":"2x","c%d":"3","e\\"f":"4"}'),
            (b"/c%d", b'{"a/b":"1","m~n":"2","c%d":"3x","e\\"f":"4"}'),
            (b'/e"f', b'{"a/b":"1","m~n":"2","c%d":"3","e\\"f":"4x"}'),
            (b"/~01", b'{"a/b":"1","m~n":"2","c%d":"3","e\\"f":"4","~1":"x"}'),
        ],
    )
    def test_pointer_escapes(self, pointer, result):
        document = Document(b'{"a/b":"1","m~n":"2","c%d":"3","e\\"f":"4"}')
        document.append(pointer, b"x")
        assert document.dumps() == result

    def test_null_is_an_empty_string(self):
        document = Document(b'{"a":null,"b":[null]}')
        document.append(b"/a", b"x")
        document.append(b"/b/0", b"")
        assert (document.dumps(), document.size) == (b'{"a":"x","b":[""]}', 18)

    def test_through_arrays(self):
        document = Document(b'{"a":["s",{"t":"u"},["v",null]]}')
        for pointer in (b"/a/0", b"/a/1/t", b"/a/1/new", b"/a/2/0", b"/a/2/1", b"/a/0"):
            document.append(pointer, b"+")
        assert document.dumps() == b'{"a":["s++",{"t":"u+","new":"+"},["v+","+"]]}'

    def test_refused(self, subtests):
        for pointer in (
            *(b"", b"a", b"a/b", b"/o", b"/a", b"/n", b"/t", b"/s/x", b"/n/x", b"/null/x"),
            *(b"/a/-", b"/a/00", b"/a/01", b"/a/2", b"/a/+1", b"/a/-1", b"/a/", b"/a/1x", b"/a/ 1"),
            *(b"/a/0/x", b"/a/1/x", b"/a/99999999999999999999999", "/a/\u0661".encode()),
            *(b"/~", b"/~2", b"/x~", b"/~/0", b"/x/~a", b"/o/" + b"x/" * MAX_DEPTH),
        ):
            with subtests.test(f"{pointer!r:.60}"):
                start = b'{"o":{},"a":["s",1],"n":1,"t":true,"s":"s","null":null}'
                document = Document(start)
                with pytest.raises(InvalidPatch):
                    document.append(pointer, b"x")
                assert (document.dumps(), document.size) == (start, len(start))

    def test_depth(self):
        document = Document()
        document.append(b"/k" * MAX_DEPTH, b"x")
        assert Document(document.dumps()).dumps() == document.dumps()
        document.append(b"/k" * MAX_DEPTH, b"y")
        assert document.dumps().count(b"{") == MAX_DEPTH
        with pytest.raises(InvalidPatch, match="128 levels"):
            document.append(b"/k" * (MAX_DEPTH + 1), b"x")

    def test_characters_are_appended_whole(self):
        document = Document()
        first, rest = "\U0001f600".encode()[:2], "\U0001f600".encode()[2:]
        for piece in (first, rest):
            with pytest.raises(InvalidPatch, match="whole UTF-8 characters"):
                document.append(b"/a", piece)
        document.append(b"/a", first + rest + b'\x00"\\\n\x7f/')
        assert document.dumps() == b'{"a":"' + first + rest + b'\\u0000\\"\\\\\\n\x7f/"}'

    def test_merge_between_appends(self):
        document = Document()
        document.append(b"/a/t", b"one")
        document.merge(b'{"a":{"t":"two"}}')
        document.append(b"/a/t", b"+")
        assert document.dumps() == b'{"a":{"t":"two+"}}'
        document.merge(b'{"a":null}')
        document.append(b"/a/t", b"three")
        assert document.dumps() == b'{"a":{"t":"three"}}'
        document.merge(b'{"a":5}')
        with pytest.raises(InvalidPatch, match="neither object nor array"):
            document.append(b"/a/t", b"x")
        document.merge(b'{"a":{"t":{"t":null}}}')
        with pytest.raises(InvalidPatch, match="another kind"):
            document.append(b"/a/t", b"x")
        assert document.dumps() == b'{"a":{"t":{}}}'

    def test_failed_merge_keeps_the_place(self):
        document = Document()
        document.append(b"/t", b"a")
        with pytest.raises(InvalidPatch):
            document.merge(b'{"t":null')
        document.append(b"/t", b"b")
        assert document.dumps() == b'{"t":"ab"}'

    def test_many_small_pieces_cost_what_they_weigh(self):
        # Linear growth would be 4 times the time; the quadratic kind moves 100 GB and takes a minute.
        document = Document()
        started = time.perf_counter()
        for _ in range(400_000):
            document.append(b"/text", b"piece")
        assert time.perf_counter() - started < 5
        assert document.dumps() == b'{"text":"' + b"piece" * 400_000 + b'"}'

    @given(st.text(max_size=60), st.data())
    def test_any_cut_gives_the_same(self, text, data):
        cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=5)))
        document = Document(b'{"t":"|"}')
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            document.append(b"/t", text[start:end].encode())
        assert document.dumps() == reference.dump({"t": "|" + text}).encode()
        assert document.size == len(document.dumps())


class TestInterface:
    @pytest.mark.parametrize("value", ["{}", bytearray(b"{}"), memoryview(b"{}"), None, 1, {}])
    def test_exact_bytes_only(self, value):
        document = Document(b'{"a":""}')
        for call in (
            lambda: Document(value),
            lambda: document.merge(value),
            lambda: document.append(value, b"x"),
            lambda: document.append(b"/a", value),
        ):
            with pytest.raises(InvalidType, match=f"as bytes, not as {type(value).__name__}"):
                call()

    def test_bytes_subclass(self):
        class Mine(bytes):
            __slots__ = ()

        with pytest.raises(InvalidType, match="Mine"):
            Document(Mine(b"{}"))

    @pytest.mark.parametrize("limit", [1, 0, -1, 1 << 63])
    def test_bad_limit(self, limit):
        with pytest.raises(InvalidInput, match="max_bytes of 2 or more"):
            Document(max_bytes=limit)

    @pytest.mark.parametrize("limit", [1.5, "100", True, None])
    def test_limit_of_another_type(self, limit):
        with pytest.raises(InvalidType, match="max_bytes as int"):
            Document(max_bytes=limit)

    def test_stored_document_over_the_limit_can_shrink(self):
        document = Document(b'{"a":"1234567890","b":"1234567890"}', max_bytes=10)
        with pytest.raises(InvalidPatch, match="split"):
            document.merge(b'{"c":1}')
        document.merge(b'{"b":"12345678"}')
        document.merge(b'{"b":null,"a":"x"}')
        assert document.dumps() == b'{"a":"x"}'

    def test_without_init(self):
        document = Document.__new__(Document)
        document.merge(b'{"a":1}')
        assert document.dumps() == b'{"a":1}'

    def test_failed_init_keeps_the_contents(self):
        document = Document(b'{"a":1}')
        with pytest.raises(Corruption):
            document.__init__(b"[]")
        assert document.dumps() == b'{"a":1}'

    def test_is_not_copied_by_accident(self):
        # A default implementation would make an empty document of it, without a word.
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="pickle"):
                attempt(Document(b'{"a":1}'))

    def test_examples_in_the_docstrings(self):
        outcome = doctest.testmod(merge)
        assert outcome.attempted > 5
        assert outcome.failed == 0

    def test_deepest_input_fits_a_small_stack(self):
        outcomes = []

        def work():
            deep = b'{"k":' * MAX_DEPTH + b"null" + b"}" * MAX_DEPTH
            # At its limit, so that the change is measured before it is made.
            document = Document(deep, max_bytes=len(deep))
            document.merge(deep.replace(b"null", b"true"))
            document.merge(b'{"k":null}')
            document.merge(deep)
            document.dumps()
            for bad in (b'{"k":' * 100_000, b'{"k":' + b"[" * 100_000):
                with pytest.raises(InvalidPatch, match="128 levels"):
                    document.merge(bad)
            outcomes.append(document.size)

        before = threading.stack_size(256 * 1024)
        try:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        finally:
            threading.stack_size(before)
        assert outcomes


# -- agreement with the oracle ---------------------------------------------------------------------

KEYS = ["a", "b", "k", "", "a/b", "~", "0", "1", '"', "\n", "\u00e4", "\U0001f600", "__ff_null__"]
STRINGS = [*KEYS, "__ff_", "null__", "\x00", "\u2028", "\\", "plain text of some length", "\x7f"]
NUMBERS = [
    *("0", "-0", "1", "-17", "12345678901234567890123", "0.1", "1.0", "-0.50", "1e400", "2E-7"),
    *("0.30000000000000004", "9007199254740993", "1.5e+03", "3.14159265358979323846264338327950"),
]
SPACES = ["", "", "", " ", "\n\t", "\r "]


class Maker:
    """Random JSON texts, with every freedom of spelling that the grammar leaves."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def space(self):
        return self.random.choice(SPACES)

    def string(self, text):
        spelled = []
        for character in text:
            style = self.random.randrange(4)
            if style == 0 or (style == 1 and character < " "):
                units = character.encode("utf-16-be").hex()
                units = units.upper() if self.random.random() < 0.3 else units
                spelled += ["\\u" + units[i : i + 4] for i in range(0, len(units), 4)]
            elif character == "/" and style == 1:
                spelled.append("\\/")
            else:
                spelled.append(json.dumps(character, ensure_ascii=False)[1:-1])
        return '"' + "".join(spelled) + '"'

    def value(self, depth):
        kind = self.random.randrange(12 if depth > 0 else 8)
        if kind < 2:
            return self.string(self.random.choice(STRINGS))
        if kind < 4:
            return self.random.choice(NUMBERS)
        if kind < 6:
            return self.random.choice(["null", "null", "true", "false"])
        if kind < 7:
            return '"__ff_null__"'
        if kind < 8:
            return self.random.choice(["{}", "[]"])
        if kind < 11:
            return self.object(depth)
        items = [self.spaced(self.value(depth - 1)) for _ in range(self.random.randrange(5))]
        return "[" + (",".join(items) or self.space()) + "]"

    def spaced(self, text):
        return self.space() + text + self.space()

    def object(self, depth):
        members = [
            self.spaced(self.string(self.random.choice(KEYS)))
            + ":"
            + self.spaced(self.value(depth - 1))
            for _ in range(self.random.randrange(5))
        ]
        return "{" + (",".join(members) or self.space()) + "}"

    def nested(self):
        """One value close to the limit of depth, on either side of it."""
        text = self.value(0)
        for _ in range(MAX_DEPTH - self.random.randrange(-1, 4)):
            text = "[" + text + "]" if self.random.random() < 0.5 else '{"k":' + text + "}"
        return '{"k":' + text + "}"

    def patch(self):
        text = self.nested() if self.random.random() < 0.03 else self.object(3)
        return self.spaced(text).encode()

    def pointer(self):
        steps = [self.random.choice(KEYS) for _ in range(self.random.randrange(1, 4))]
        return "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in steps).encode()


def accepts(document, action, arguments):
    """Call the method *action*; whether it accepted."""
    try:
        getattr(document, action)(*arguments)
    except (InvalidPatch, reference.RefusedError):
        return False
    return True


def agree(ours, theirs, action, *arguments):
    """Do the same to both: both accept or both refuse, and both are the same afterwards."""
    accepted = accepts(theirs, action, arguments)
    assert accepts(ours, action, arguments) == accepted
    assert ours.dumps() == theirs.dumps()
    assert ours.size == len(theirs.dumps())
    return accepted


seeds = st.integers(0, 2**64)


class TestAgainstTheOracle:
    @settings(max_examples=1000)
    @given(seeds, st.sampled_from([DEFAULT_MAX_BYTES, DEFAULT_MAX_BYTES, 60, 120, 250]))
    def test_folds(self, seed, limit):
        maker = Maker(seed)
        start = maker.object(3).encode()
        ours = Document(start, max_bytes=limit)
        theirs = reference.Document(start, max_bytes=limit)
        assert ours.dumps() == theirs.dumps()
        compacted = Document(start, max_bytes=limit)
        pointer = maker.pointer()
        for _ in range(12):
            if maker.random.random() < 0.5:
                call = "merge", (maker.patch(),)
            else:
                if maker.random.random() < 0.4:
                    pointer = maker.pointer()
                call = "append", (pointer, maker.random.choice(STRINGS).encode())
            accepted = agree(ours, theirs, call[0], *call[1])
            # The same onto a document that is stored and parsed again at random places.
            assert accepts(compacted, *call) == accepted
            if maker.random.random() < 0.5:
                compacted = Document(compacted.dumps(), max_bytes=limit)
        assert compacted.dumps() == ours.dumps()
        # No value is the sentinel: resolving it once more changes nothing.
        assert reference.dump(reference.resolved(reference.parse(ours.dumps()))).encode() == (
            ours.dumps()
        )

    @settings(max_examples=1000)
    @given(seeds)
    def test_damaged_patches(self, seed):
        maker = Maker(seed)
        patch = bytearray(maker.patch())
        for _ in range(8):
            damaged = bytearray(patch)
            for _ in range(maker.random.randrange(1, 4)):
                place = maker.random.randrange(len(damaged) + 1)
                action = maker.random.randrange(4)
                if action == 0:
                    del damaged[place : place + maker.random.randrange(1, 5)]
                elif action == 1:
                    damaged.insert(place, maker.random.randrange(256))
                elif action == 2:
                    damaged.insert(place, maker.random.choice(b'{}[]",:\\/u0123eE+-.tfn \xc3\xe4'))
                elif place < len(damaged):
                    damaged[place] ^= 1 << maker.random.randrange(8)
            raw = bytes(damaged)
            start = b'{"a":{"b":1},"k":[]}'
            if not agree(Document(start), reference.Document(start), "merge", raw):
                with pytest.raises(Corruption):
                    Document(raw)

    @settings(max_examples=50)
    @given(seeds)
    def test_every_beginning_of_a_patch_is_refused(self, seed):
        patch = Maker(seed).object(2).encode()
        for size in range(len(patch)):
            with pytest.raises(InvalidPatch):
                Document().merge(patch[:size])
        Document().merge(patch)
        with pytest.raises(InvalidPatch):
            Document().merge(patch + b"x")

    @given(st.binary(max_size=64))
    def test_any_bytes(self, raw):
        start = b'{"a":"x","b":["y"]}'
        for call in (
            ("merge", raw),
            ("merge", b'{"a":"' + raw + b'"}'),
            ("append", raw, b"x"),
            ("append", b"/" + raw, b"x"),
            ("append", b"/b/" + raw, b"x"),
            ("append", b"/a", raw),
        ):
            agree(Document(start), reference.Document(start), *call)

    @given(
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False).filter(lambda number: abs(number) != float("inf"))
            # The sentinel becomes null in a document.
            | st.text().filter(lambda text: text != "__ff_null__"),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=20,
        )
    )
    def test_stored_documents(self, value):
        # Nothing of the oracle's own: what json.dumps writes comes back byte for byte.
        wanted = json.dumps({"v": value}, ensure_ascii=False, separators=(",", ":")).encode()
        for ascii_only in (False, True):
            raw = json.dumps({"v": value}, ensure_ascii=ascii_only, indent=1).encode()
            assert Document(raw).dumps() == wanted


class TestOutOfMemory:
    """Allocation number n fails, for every n: the document is as before, or says that it is half merged."""

    def survive(self, start, act):
        testcapi = pytest.importorskip("_testcapi")
        whole = Document(start)
        act(whole)
        after = whole.dumps()
        half_merged = failures = 0
        for number in range(400):
            document = Document(start)
            document.append(b"/target", b"")
            document.merge(b'{"target":null}')
            error = None
            testcapi.set_nomemory(number, number + 1)
            try:
                act(document)
            except MemoryError as caught:
                error = caught
            finally:
                testcapi.remove_mem_hooks()
            if error is None:
                assert document.dumps() == after
                if number > 300:
                    break
                continue
            failures += 1
            try:
                assert document.dumps() == Document(start).dumps()
                assert document.size == len(document.dumps())
            except Corruption:
                half_merged += 1
                with pytest.raises(Corruption, match="memory"):
                    document.merge(b"{}")
                with pytest.raises(Corruption, match="memory"):
                    document.append(b"/x", b"")
                with pytest.raises(Corruption, match="memory"):
                    document.dumps()
        return failures, half_merged

    def test_merge(self):
        patch = {f"key {i}": {"n": None, "m": [i, "text"], "o": {"p": None}} for i in range(12)}
        raw = json.dumps(patch).encode()
        failures, half_merged = self.survive(b'{"a":1}', lambda document: document.merge(raw))
        assert failures > 50
        assert half_merged > 0

    @pytest.mark.parametrize("start", [b"{}", b'{"a":{"b":"old"}}', b'{"a":{"b":null}}'])
    def test_append(self, start):
        text = b"new " * 40
        failures, half_merged = self.survive(start, lambda document: document.append(b"/a/b", text))
        assert failures > 3
        assert half_merged == 0

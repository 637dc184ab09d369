"""``ff_fast.keys``: one canonical form per id, one slot per execution, no two ids one key."""

import inspect
import re
import uuid
from binascii import crc_hqx
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ff_fast import _library, keys
from ff_fast.errors import InvalidId, InvalidInput, InvalidType

from ..key_table import CHANNELS, TABLE

EID = "{fp:86}:550e8400-e29b-41d4-a716-446655440000"

execution_ids = st.builds("{{fp:{}}}:{}".format, st.integers(0, 65_535), st.uuids().map(str))
indexes = st.integers(0, 2**32 - 1)
lanes = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=64)

OF_EXECUTION = (keys.core, keys.payload, keys.result, keys.tags, keys.usage, keys.history)
OF_ATTEMPT = (keys.attempt, keys.summary, keys.stream, keys.live, keys.head, keys.meta)
OF_PARTITION = (keys.timers, keys.completions, keys.waitpoint_secrets)
OF_FLOW = (keys.flow, keys.flow_members, keys.flow_open)


def all_keys(eid, index):
    return [key(eid) for key in OF_EXECUTION] + [key(eid, index) for key in OF_ATTEMPT]


def test_spelling():
    assert all_keys(EID, 3) == [
        f"ff:exec:{{fp:86}}:{EID}:core".encode(),
        f"ff:exec:{{fp:86}}:{EID}:payload".encode(),
        f"ff:exec:{{fp:86}}:{EID}:result".encode(),
        f"ff:exec:{{fp:86}}:{EID}:tags".encode(),
        f"ff:exec:{{fp:86}}:{EID}:usage".encode(),
        f"ff:exec:{{fp:86}}:{EID}:history".encode(),
        f"ff:attempt:{{fp:86}}:{EID}:3".encode(),
        f"ff:attempt:{{fp:86}}:{EID}:3:summary".encode(),
        f"ff:stream:{{fp:86}}:{EID}:3".encode(),
        f"ff:stream:{{fp:86}}:{EID}:3:live".encode(),
        f"ff:stream:{{fp:86}}:{EID}:3:head".encode(),
        f"ff:stream:{{fp:86}}:{EID}:3:meta".encode(),
    ]
    assert keys.eligible("{fp:7}", "default") == b"ff:idx:{fp:7}:lane:default:eligible"
    assert keys.timers("{fp:7}") == b"ff:idx:{fp:7}:timers"
    assert keys.listed("{fp:7}") == b"ff:idx:{fp:7}:listed"
    assert keys.ended("{fp:7}", "failed") == b"ff:idx:{fp:7}:ended:failed"
    assert keys.queues("{fp:7}") == b"ff:idx:{fp:7}:queues"
    assert keys.completions("{fp:7}") == b"ff:part:{fp:7}:completions"
    assert keys.waitpoint_secrets("{fp:7}") == b"ff:sec:{fp:7}:waitpoint_hmac"
    assert [key("{fp:7}", UUID) for key in OF_FLOW] == [
        f"ff:flow:{{fp:7}}:{UUID}".encode(),
        f"ff:flow:{{fp:7}}:{UUID}:members".encode(),
        f"ff:flow:{{fp:7}}:{UUID}:open".encode(),
    ]
    assert keys.budget_limits("b-1") == b"ff:budget:{b:b-1}:limits"
    assert keys.budget_usage("b-1") == b"ff:budget:{b:b-1}:usage"
    assert keys.budget_charges("b-1", EID) == b"ff:budget:{b:b-1}:charges:" + EID.encode()
    assert keys.ready("llm-7b.eu_west~2") == b"ff:lane:{llm-7b.eu_west~2}:ready"
    assert (
        keys.eligible("{fp:7}", "a", "gpu,\u017c") == b"ff:idx:{fp:7}:lane:a:gpu%2C%C5%BC:eligible"
    )
    assert keys.ready("a", "gpu") == b"ff:lane:{a}:gpu:ready"
    assert keys.hinted("a") == b"ff:lane:{a}:hinted"
    assert keys.lane_news("a", 0) == b"ff:lane:{a}:news:0"
    assert keys.ready("a{b}:c %") == b"ff:lane:{a%7Bb%7D%3Ac%20%25}:ready"
    assert keys.PARTITIONS_CONFIG == b"ff:config:partitions"
    assert keys.key_slot(keys.CLUSTER_PROBE) != keys.key_slot(keys.PARTITIONS_CONFIG)


@given(execution_ids, execution_ids, indexes, indexes)
def test_distinct_ids_give_distinct_keys(one, other, index, other_index):
    mine, theirs = all_keys(one, index), all_keys(other, other_index)
    assert len(set(mine)) == len(mine)
    if one != other:
        assert not set(mine) & set(theirs)
    elif index != other_index:
        shared = set(mine) & set(theirs)
        assert shared == {key(one) for key in OF_EXECUTION}


@given(execution_ids, indexes, lanes)
def test_one_execution_has_one_slot(eid, index, lane):
    tag = keys.slot_tag_of(eid)
    partition = [key(tag) for key in OF_PARTITION] + [keys.eligible(tag, lane)]
    partition += [key(tag, UUID) for key in OF_FLOW]
    slots = {keys.key_slot(key) for key in all_keys(eid, index) + partition}
    assert slots == {crc_hqx(tag[1:-1].encode(), 0) % 16_384}
    assert keys.slot_tag(keys.partition_index(eid)) == tag


@given(lanes, lanes)
def test_lane_keys_are_injective_and_tagged(one, other):
    for key in (keys.ready, lambda lane: keys.eligible("{fp:1}", lane)):
        assert (key(one) == key(other)) == (one == other)
    ready = keys.ready(one)
    assert ready.count(b"{") == ready.count(b"}") == 1
    assert ready.isascii()
    assert not set(ready) & set(b" *?[]\\^")


@given(execution_ids)
def test_canonical_form_is_a_fixed_point(eid):
    assert keys.canonical_execution_id(eid) == eid
    assert keys.canonical_execution_id(eid.encode()) == eid
    tag, _, identity = eid.partition("}:")
    assert keys.canonical_execution_id(f"{tag}}}:{identity.upper()}") == eid


UUID = "550e8400-e29b-41d4-a716-446655440000"


def test_bad_execution_ids(subtests):
    for text in (
        "",
        UUID,
        "{}:" + UUID,
        "{fp:}:" + UUID,
        "{fp:+5}:" + UUID,
        "{fp:-5}:" + UUID,
        "{fp:007}:" + UUID,
        "{fp:00}:" + UUID,
        "{fp: 5}:" + UUID,
        "{fp:5 }:" + UUID,
        "{fp:65536}:" + UUID,
        "{fp:99999}:" + UUID,
        "{fp:5.0}:" + UUID,
        "{fp:1e3}:" + UUID,
        "{fp:\u0665}:" + UUID,
        "{FP:5}:" + UUID,
        "{b:5}:" + UUID,
        "{fp:5}" + UUID,
        "{fp:5}:" + UUID.replace("-", ""),
        "{fp:5}:{" + UUID + "}",
        "{fp:5}:urn:uuid:" + UUID,
        "{fp:5}:" + UUID + "\n",
        "{fp:5}:" + UUID + "\0",
        " {fp:5}:" + UUID,
        "{fp:5}:" + UUID + ":core",
        "{fp:5}:" + UUID[:-1],
        "{fp:5}:" + UUID[:-1] + "g",
        "{fp:5}:" + UUID[:-1] + "é",
        "{fp:5}:" + UUID[:-1] + "*",
        "{fp:5}:" + UUID[:-1] + "\ud800",
        "{fp:5}:" + UUID * 10,
        "a}b",
        "}x",
        "a:b",
        "x*?[]",
        b"\xff",
        b"",
    ):
        with subtests.test(f"{text!r:.60}"), pytest.raises(InvalidId, match="must look like"):
            keys.canonical_execution_id(text)


@given(execution_ids)
def test_an_id_for_a_url_needs_no_escape_and_stands_for_the_same(eid):
    form = keys.url_id(eid)
    assert re.fullmatch(r"[A-Za-z0-9-]+", form)
    assert quote(form, safe="") == form
    assert keys.canonical_execution_id(form) == eid
    assert keys.canonical_execution_id(form.encode()) == eid
    assert keys.url_id(form) == keys.url_id(eid.encode()) == form
    tag, _, identity = form.partition("-")
    assert keys.canonical_execution_id(f"{tag}-{identity.upper()}") == eid


def test_bad_ids_of_a_url(subtests):
    for text in (
        "fp-" + UUID,
        "fp05-" + UUID,
        "fp65536-" + UUID,
        "FP5-" + UUID,
        "fp5:" + UUID,
        "fp5" + UUID,
        "{fp5}-" + UUID,
        "fp5-" + UUID + "\n",
        "fp5-" + UUID.replace("-", ""),
        "fp5-" + UUID[:-1] + "/",
    ):
        with subtests.test(f"{text!r:.60}"), pytest.raises(InvalidId, match="must look like"):
            keys.url_id(text)


texts = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=64)


@given(texts, texts, st.integers(1, 65_535))
def test_a_name_stands_for_one_id(name, namespace, count):
    eid = keys.execution_id_for(name, namespace=namespace, num_partitions=count)
    assert keys.canonical_execution_id(eid) == eid
    identity = uuid.UUID(eid[-36:])
    assert identity == uuid.uuid5(uuid.UUID(bytes=keys._NAMES), f"{namespace}\0{name}")
    assert keys.partition_index(eid) == crc_hqx(identity.bytes, 0) % count


def test_a_name_keeps_its_id():
    # Whoever has stored a name finds its stream by it: these never change.
    assert keys.execution_id_for("chat") == "{fp:159}:c4ca0da1-7d4e-589c-bf13-46a85c444e03"
    assert keys.execution_id_for("chat", namespace="tenant é") == (
        "{fp:135}:b19730f3-8f4e-50be-90d8-2c62ba427c36"
    )


def test_no_two_names_are_one():
    made = [
        keys.execution_id_for(name, namespace=namespace)
        for namespace, name in [("a", "b c"), ("a b", "c"), ("ab", "c"), ("a", "bc"), ("c", "ab")]
    ]
    assert len(set(made)) == len(made)


def test_bad_names(subtests):
    for name in ("", "a\0b", "a\n", "\x85", "\u2028", "\ud800", "é" * 257, "x" * 513):
        with subtests.test(f"{name!r:.60}"), pytest.raises(InvalidId, match=r"^name must be"):
            keys.execution_id_for(name)
    assert keys.execution_id_for("é" * 256)
    with pytest.raises(InvalidId, match=r"^namespace must be"):
        keys.execution_id_for("a", namespace="x" * 257)
    with pytest.raises(InvalidType):
        keys.execution_id_for(b"a")
    with pytest.raises(InvalidInput):
        keys.execution_id_for("a", num_partitions=0)


@given(st.text() | st.binary())
def test_any_text_is_canonical_or_refused(text):
    try:
        eid = keys.canonical_execution_id(text)
    except InvalidId:
        return
    assert keys.canonical_execution_id(eid) == eid


@pytest.mark.parametrize("value", [None, 5, 1.5, True, [EID], bytearray(EID.encode())])
def test_ids_of_another_type(value):
    for check in (
        keys.canonical_execution_id,
        keys.lane_id,
        keys.tag_key,
        lambda text: keys.free_text("worker_id", text),
        lambda text: keys.canonical_uuid("flow_id", text),
        lambda text: keys.opaque_id("lease_id", text),
    ):
        with pytest.raises(InvalidType):
            check(value)


@pytest.mark.parametrize("count", [1, 2, 256, 65_535])
def test_new_ids(count):
    made = {keys.new_execution_id(count) for _ in range(50)}
    assert len(made) == 50
    for eid in made:
        assert keys.canonical_execution_id(eid) == eid
        identity = uuid.UUID(eid.partition("}:")[2])
        assert (identity.version, identity.variant) == (4, uuid.RFC_4122)
        assert keys.partition_index(eid) == crc_hqx(identity.bytes, 0) % count


def test_members_of_a_flow_share_its_partition():
    assert crc_hqx(b"123456789", 0) == 0x31C3
    one = keys.execution_id_for_flow(UUID.upper())
    other = keys.execution_id_for_flow(UUID)
    assert keys.slot_tag_of(one) == keys.slot_tag_of(other) == "{fp:24}"
    assert one != other
    with pytest.raises(InvalidId, match="flow_id must be a UUID"):
        keys.execution_id_for_flow("x")


def test_a_child_shares_the_partition_of_its_parent():
    made = {keys.new_execution_id_beside(EID) for _ in range(50)}
    assert len(made) == 50
    for eid in made:
        assert keys.canonical_execution_id(eid) == eid
        assert keys.slot_tag_of(eid) == "{fp:86}"


@given(execution_ids, indexes)
def test_a_key_tells_its_partition(eid, index):
    for key in all_keys(eid, index):
        assert keys.index_of(key.decode()) == keys.partition_index(eid)
    assert keys.index_of(eid) == keys.index_of(keys.slot_tag_of(eid))


@pytest.mark.parametrize("text", ["", "{fp:}", "{fp:x}", "fp:7", "{b:7}"])
def test_a_text_without_a_partition_is_refused(text):
    with pytest.raises(InvalidId, match="slot tag"):
        keys.index_of(text)


@given(st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True))
def test_a_budget_has_a_slot_of_its_own(budget):
    made = [keys.budget_limits(budget), keys.budget_usage(budget)]
    made.append(keys.budget_charges(budget, EID))
    assert len(set(made)) == 3
    assert {keys.key_slot(key) for key in made} == {crc_hqx(f"b:{budget}".encode(), 0) % keys.SLOTS}


@pytest.mark.parametrize("count", [0, -1, 65_536, True, 2.0, "256", None])
def test_bad_partition_counts(count):
    for make in (keys.new_execution_id, lambda n: keys.execution_id_for_flow(UUID, n)):
        with pytest.raises(InvalidInput, match="num_partitions"):
            make(count)


@given(lanes)
def test_good_lanes(lane):
    assert keys.lane_id(lane) == lane


def test_bad_lanes(subtests):
    for lane in ("", "x" * 65, "a\n", "a\tb", "\x7f", "é", "\0", "\ud800"):
        with subtests.test(f"{lane!r:.60}"), pytest.raises(InvalidId, match="printable ASCII"):
            keys.lane_id(lane)


def test_free_text_with_a_limit_of_its_own():
    assert keys.free_text("reason", "", 5, empty=True) == ""
    assert keys.free_text("reason", "x" * 5, 5) == "x" * 5
    with pytest.raises(InvalidId, match="reason must be 1 to 5 bytes"):
        keys.free_text("reason", "x" * 6, 5)
    for text in ("x" * 6, "a\n"):
        with pytest.raises(InvalidInput, match="reason must be") as caught:
            keys.free_text("reason", text, 5, empty=True, error=InvalidInput)
        assert type(caught.value) is InvalidInput


@pytest.mark.parametrize("text", ["w", "w 1", "{}:*", "é" * 128, "日本", "a" * 256])
def test_good_free_text(text):
    assert keys.free_text("worker_id", text) == text


def test_bad_free_text(subtests):
    for text in ("", "é" * 129, "a" * 257, "a\n", "\r", "\0", "\x7f", "\x85", "\u2028", "\ud800"):
        with subtests.test(f"{text!r:.60}"), pytest.raises(InvalidId, match="worker_id must be"):
            keys.free_text("worker_id", text)


@pytest.mark.parametrize("text", ["a.b", "cairn.instance_id", "a_1.b.c", "a.0"])
def test_good_tag_keys(text):
    assert keys.tag_key(text) == text


def test_bad_tag_keys(subtests):
    for text in ("", "a", "a.", ".b", "A.b", "a..b", "1.b", "a.b\n", "a.b-c"):
        with subtests.test(f"{text!r:.60}"), pytest.raises(InvalidId):
            keys.tag_key(text)


@pytest.mark.parametrize("index", [-1, 2**32, True, 1.0, "1", " 5 ", None])
def test_bad_attempt_indexes(index):
    assert keys.attempt_index(2**32 - 1) == 2**32 - 1
    with pytest.raises(InvalidInput, match="attempt_index"):
        keys.attempt_index(index)


def test_a_refused_secret_is_not_quoted():
    with pytest.raises(InvalidId) as caught:
        keys.opaque_id("lease_id", "canary\n")
    assert "canary" not in f"{caught.value} {caught.value!r}"


def test_slots(subtests):
    for key, hashed in (
        (b"abc", b"abc"),
        (b"{abc}d", b"abc"),
        (b"x{abc}{d}", b"abc"),
        (b"{}abc", b"{}abc"),  # an empty tag is no tag
        (b"{}{a}", b"{}{a}"),
        (b"a}b", b"a}b"),
        (b"{abc", b"{abc"),
        (b"}{a}", b"a"),
        (b"{{a}}", b"{a"),
        (b"", b""),
    ):
        with subtests.test(f"{key!r:.60}"):
            assert keys.key_slot(key) == crc_hqx(hashed, 0) % 16_384


LUA_KEYS = {
    name: re.findall(r"'([^']*)'", parts)
    for name, parts in re.findall(
        r"^  (\w+) = \{ (.*) \},$",
        re.search(
            r"^ff\.KEYS = \{\n(.*?)^\}",
            _library._read_parts()["prelude"],
            re.MULTILINE | re.DOTALL,
        )[1],
        re.MULTILINE,
    )
}
PLACES = re.compile(r"\{fp:N\}|<eid>:<i>|<lane><needs>|\{<lane>\}|\{<owner>\}|<\w+>")


def test_the_table_is_complete_and_names_each_key_once():
    assert len(TABLE) == len({row.pattern for row in TABLE.values()})
    functions = {
        name
        for name, function in inspect.getmembers(keys, inspect.isfunction)
        if function.__module__ == keys.__name__
        and function.__annotations__.get("return") == "bytes"
        and not name.startswith("_")
    }
    channels = {name for name in functions if name.endswith("_channel")}
    assert channels == {f"{name}_channel" for name in CHANNELS}
    assert functions - channels | set(LUA_KEYS) | {"PARTITIONS_CONFIG"} == set(TABLE)


def test_lua_spells_a_key_as_the_table_does(subtests):
    for name, parts in LUA_KEYS.items():
        with subtests.test(f"{name!r:.60}"):
            assert PLACES.split(TABLE[name].pattern) == parts


def test_lua_knows_the_type_of_each_key_that_it_spells():
    types = re.search(
        r"^ff\.TYPES = \{\n(.*?)^\}",
        _library._read_parts()["prelude"],
        re.MULTILINE | re.DOTALL,
    )[1]
    assert dict(re.findall(r"(\w+) = '(\w+)'", types)) == {
        name: TABLE[name].type for name in LUA_KEYS
    }


SAMPLES = {
    "eid": EID,
    "index": 3,
    "slot_tag": "{fp:86}",
    "lane": "lane",
    "flow_id": UUID,
    "budget_id": "b-1",
    "needs": "gpu",
    "seen": 7,
    "name": UUID,
    "owner": "0" * 40,
    "state": "failed",
}


def test_a_function_spells_a_key_as_the_table_does(subtests):
    for name in [name for name in TABLE if callable(getattr(keys, name, None))]:
        with subtests.test(f"{name!r:.60}"):
            function = getattr(keys, name)
            given = {place: SAMPLES[place] for place in inspect.signature(function).parameters}
            assert TABLE[name].matches(function(**given).decode())


def test_a_channel_is_spelled_in_lua_and_here_as_the_table_does():
    table = re.search(
        r"^ff\.CHANNELS = \{\n(.*?)^\}",
        _library._read_parts()["prelude"],
        re.MULTILINE | re.DOTALL,
    )[1]
    spelled = dict(re.findall(r"^  (\w+) = (.*),$", table, re.MULTILINE))
    assert spelled.keys() == CHANNELS.keys()
    for name, parts in spelled.items():
        # It has the parts of a key, or its own.
        key = re.fullmatch(r"ff\.KEYS\.(\w+)", parts)
        given = LUA_KEYS[key[1]] if key else re.findall(r"'([^']*)'", parts)
        assert PLACES.split(CHANNELS[name].pattern) == given
        function = getattr(keys, f"{name}_channel")
        places = {place: SAMPLES[place] for place in inspect.signature(function).parameters}
        channel = function(**places)
        assert CHANNELS[name].matches(channel.decode())
        # A cluster's node publishes and subscribes only in its own slots.
        assert keys.key_slot(channel) == keys.key_slot(keys.core(EID))


def test_no_part_of_lua_spells_a_key_by_itself():
    for part, text in _library._read_parts().items():
        code = re.sub(r"--.*", "", text)
        spelled = [
            key for key in re.findall(r"'[^'\n]*ff:[^'\n]*'", code) if not key.startswith("'^")
        ]
        assert not spelled or part == "prelude", f"lua/{part}.lua: {spelled}"


def test_slots_known_to_a_cluster():
    # Measured with CLUSTER KEYSLOT.
    assert keys.key_slot(b"{}x") == 10_595
    assert keys.key_slot(b"{}{a}") == 13_650

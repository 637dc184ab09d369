"""What `ff_append` refuses.

Every refusal must leave every key as it was, so each is compared byte for byte with what was there before.
"""

import itertools

import pytest

from ff_fast.errors import MAX_INT

from ...heads import head_of, set_head
from ..streams import (
    CODES,
    MAX_PAYLOAD,
    REFUSALS,
    Stream,
    live,
    log,
    part_of,
    patches,
    replaced,
    server_ms,
    spoil,
    visible,
)

MAX_RUN = 2 << 20
NOT_INTEGERS = [
    b"", b"0x10", b" 5 ", b"5\n", b"1e3", b"inf", b"nan", b"-1", b"+1", b"1.0", b"\xb2", b"1\x00",
    b"9007199254740992", b"99999999999999999999",
]  # fmt: skip


def test_every_error_of_append_has_its_refusal_here():
    from ff_fast import _library

    assert sorted(_library.headers()["ff_append"].errors) == sorted(CODES)


@pytest.mark.parametrize("refusal", REFUSALS, ids=CODES)
def test_a_refusal_changes_nothing(stream, refusal):
    block, call = spoil(stream, [refusal])
    error = stream.refused(refusal[0], log(b"good"), block, **call)
    assert type(error) is refusal[3]


@pytest.mark.parametrize("at", range(len(REFUSALS)), ids=CODES)
def test_of_several_reasons_the_first_is_told(stream, at):
    block, call = spoil(stream, REFUSALS[at:])
    stream.refused(CODES[at], log(b"good"), block, **call)


def test_a_fence_that_differs_in_any_part_is_stale(stream, subtests):
    parts = enumerate(("attempt", "lease id", "epoch"))
    for (at, name), value in itertools.product(parts, (b"7", b"", b"0x0", b"00")):
        fence = list(stream.fence)
        fence[at] = value
        # A lease id is any text; what is no fence at all is told apart.
        malformed = name != "lease id" and value in (b"", b"0x0")
        # A later epoch than the server's was granted here: the server has lost it.
        lost = name == "epoch" and value == b"7"
        code = "invalid_input" if malformed else "state_lost" if lost else "stale_owner"
        with subtests.test(name, value=value):
            stream.refused(code, log(b"x"), fence=fence)
            assert stream.open(b"writer-2", fence)[:2] == [0, code.encode()]


def test_a_writer_id_is_a_fence_and_a_text(stream):
    before = stream.everything()
    for writer in (b"", b"writer", b":::", b"0:lease:1", b"0:lease:1:", b"0:a:b:c:d"):
        for function, names, args in (
            ("ff_append", stream.keys, part_of(stream.keys, writer, b"0", b"", *log(b"x"))),
            ("ff_append", (stream.head,), part_of((stream.head,), writer, b"f1-1 ")),
            ("ff_open_writer", (stream.core, stream.head, stream.summary), (writer,)),
        ):
            reply = stream.call(function, names, *args)
            assert reply == [0, b"invalid_input", b"writer"], writer
    assert stream.everything() == before


def test_nobody_appends_under_a_part_of_the_writer_id(stream):
    whole = stream.writer_id()
    for writer in (whole[:-1], whole + b"x", whole + b"\x00", whole.upper()):
        args = part_of(stream.keys, writer, b"0", b"", *log(b"x"))
        reply = stream.call("ff_append", stream.keys, *args)
        assert reply in ([0, b"writer_superseded", b"1"], [0, b"stale_owner"])


@pytest.mark.parametrize("end", ["complete", "fail"])
def test_a_stream_is_closed_by_the_end_of_its_execution(stream, end):
    stream.append(log(b"x"))
    if end == "complete":
        stream.backend.complete(stream.handle, b"done")
    else:
        stream.backend.fail(stream.handle, "broken")
    stream.refused("stream_closed", log(b"y"), first=2)
    # Even what is stored is not acknowledged any more: the answer of the end is the last word.
    stream.refused("stream_closed", log(b"x"))


def test_a_lease_lapses_by_the_servers_clock(raw, backend, lane, wait_until):
    stream = Stream(raw, backend, lane)
    stream.open()
    assert stream.append(log(b"x"))[1] == 1
    backend.renew(stream.handle, 50)
    expires_at = head_of(raw, stream.head).lease_expires_at
    wait_until(lambda: server_ms(raw) >= expires_at)
    stream.refused("lease_expired", log(b"y"), first=2)


@pytest.mark.parametrize("expires_at", [b"1", b"99", b"9" * 12, b"1000000000000", b"0" * 12 + b"9"])
def test_a_lease_that_ended_long_ago_has_ended(stream, expires_at):
    """A time of fewer digits is an earlier one, although its text may be behind today's."""
    stream.append(log(b"1"))
    set_head(stream.raw, stream.head, lease_expires_at=expires_at)
    stream.refused("lease_expired", log(b"2"), first=2)
    stream.refused("lease_expired", live(b"2"), first=2, names="head live")
    stream.refused("lease_expired", log(b"1"))
    stream.refused("lease_expired", [b"K", b"1"], first=2)
    assert stream.open(b"writer-2") == [0, b"lease_expired"]


@pytest.mark.parametrize("ttl_ms", [9_999_999_999_999, 10**15, 2**53 - 1])
def test_a_lease_that_ends_in_ages_has_not_ended(stream, ttl_ms):
    """A time has thirteen digits at most."""
    expires_at = b"9999999999999"
    reply = stream.call("ff_renew_lease", (stream.core,), *stream.fence, ttl_ms)
    assert reply == [1, b"OK", expires_at, stream.fence[2], b"0"]
    answer = stream.append(log(b"1"))
    assert stream.repeated(log(b"1")) == answer
    assert stream.append(live(b"2"), first=2, names="head live")[1] == 2
    assert stream.payloads() == [b"1", b"2"]
    left = stream.backend.describe_stream(stream.eid, 0).lease_left * 1000
    assert left == pytest.approx(int(expires_at) - server_ms(stream.raw), abs=60_000)


def test_a_gap_says_what_was_expected(stream):
    stream.append(log(b"1", b"2"))
    error = stream.refused("sequence_gap", log(b"x"), first=4)
    assert (error.expected, error.got) == (3, 4)
    error = stream.refused("sequence_gap", first=MAX_INT)
    assert (error.expected, error.got) == (3, MAX_INT)


def test_the_sequence_of_the_frame_before_is_a_whole_number(stream, subtests):
    for previous in NOT_INTEGERS:
        with subtests.test(before="no frame", previous=previous):
            stream.refused("invalid_input", log(b"x"), previous=previous)
    stream.append(log(*[b"x"] * 1024))
    for previous in NOT_INTEGERS:
        with subtests.test(before="1,024 frames", previous=previous):
            stream.refused("invalid_input", log(b"x"), previous=previous)
            stream.refused("invalid_input", previous=previous)


@pytest.mark.parametrize(
    "block, limit",
    [
        (log(b"a", bytes(MAX_PAYLOAD + 1)), MAX_PAYLOAD),
        (live(bytes(MAX_PAYLOAD + 1)), MAX_PAYLOAD),
        (patches(bytes(MAX_PAYLOAD + 1), base=0), MAX_PAYLOAD),
        (live(bytes(MAX_RUN // 2), bytes(MAX_RUN // 2)), MAX_RUN),
    ],
    ids=["log", "live", "patch", "run"],
)
def test_a_payload_that_is_too_large(stream, block, limit):
    error = stream.refused("payload_too_large", log(b"good"), block)
    assert error.limit == limit
    assert error.size > limit


def test_more_payload_than_one_call_may_hold(stream):
    largest = bytes(MAX_PAYLOAD)
    stream.refused("invalid_input", log(largest, largest, b"x"))
    stream.refused("invalid_input", log(largest), patches(largest, base=0), live(b"x"))
    assert stream.append(log(largest), live(largest))[1] == 2


def test_the_largest_payloads_are_stored(stream):
    data = bytes(range(256)) * (MAX_PAYLOAD // 256)
    half = data[: MAX_PAYLOAD // 2]
    stream.append(log(data), live(data))
    stream.append(live(half, half), live(half), first=3)
    assert stream.payloads() == [data, data, half, half, half]


ONE_LOG, ONE_LIVE = log(b"p"), live(b"p")
ONE_EXTRA, ONE_WIDE = log(b"p", extras=[b"f", b"v"]), live(b"p", fields=[b"f", b"v"])
ONE_PATCH = patches(b"{}", base=0)
TWO_PATCHES = [*patches(b"{}", base=0), *patches(b"{}", base=1)]
COUNTS = [*NOT_INTEGERS, b"0"]
EACH_BLOCK = {
    "log": ONE_LOG, "live": ONE_LIVE, "extras": ONE_EXTRA, "wide": ONE_WIDE, "patch": ONE_PATCH,
}  # fmt: skip
WITH_FIELDS = {"extras": ONE_EXTRA, "wide": ONE_WIDE, "patch": ONE_PATCH}
MALFORMED = {
    "unknown letter": [b"Z"],
    "lower case": replaced(ONE_LOG, 0, b"l"),
    "empty letter": replaced(ONE_LOG, 0, b""),
    **{f"{name} cut {n}": block[:n] for name, block in EACH_BLOCK.items() for n in range(1, len(block))},
    **{f"{name} count {count}": replaced(block, 1, count) for name, block in EACH_BLOCK.items() for count in COUNTS},
    "log count of more": replaced(ONE_LOG, 1, b"2"),
    "extras count of more": replaced(ONE_EXTRA, 1, b"2"),
    **{f"{name} fields {count}": replaced(block, 2, count) for name, block in WITH_FIELDS.items() for count in NOT_INTEGERS},
    "log fields of more": replaced(ONE_EXTRA, 2, b"2"),
    "live fields of more": replaced(ONE_WIDE, 2, b"2"),
    "patch fields of more": replaced(ONE_PATCH, 2, b"4"),
    "log 33 fields": log(b"p", extras=[b"f", b"v"] * 33),
    "live 33 fields": live(b"p", fields=[b"f", b"v"] * 33),
    "patch 33 fields": patches(b"p", base=0, fields=[b"f", b"v"] * 30),
    **{f"patch base {base}": [*ONE_PATCH[:-1], base] for base in NOT_INTEGERS},
    "patches that do not follow": [*TWO_PATCHES[:-1], b"2"],
    **{f"document version {version}": [b"C", version, b"{}", b"k"] for version in COUNTS},
    "document cut": [b"C", b"1", b"{}"],
    "document beside its patches": [*TWO_PATCHES, b"C", b"3", b"{}", b"k"],
    "document before its patches": [b"C", b"2", b"{}", b"k", *TWO_PATCHES],
    **{f"{letter} cut": [letter.encode()] for letter in "TPKEH"},
    **{f"H {sequence}": [b"H", sequence] for sequence in NOT_INTEGERS if sequence},
    **{f"P {ttl}": [b"P", ttl] for ttl in (*COUNTS, b"0.4")},
    **{f"K {maxlen}": [b"K", maxlen] for maxlen in (*COUNTS, b"0.4")},
    **{
        f"T {oldest}": [b"T", oldest]
        for oldest in (b"", b"5", b"-", b"5-", b"-5", b"5-5-5", b"x-1", b"1-x", b" 1-1", b"9" * 20, b"9" * 20 + b"-1", b"(1-1",
                       b"text", b"-1", b"1.5", b"nan", b"0.4")
    },
    **{f"E {state}": [b"E", state] for state in (b"", b"nan", b"inf", b"-1", b"1e9", b"1" * 40)},
    "too many frames": replaced(ONE_LIVE, 1, b"1025"),
}  # fmt: skip


def test_a_malformed_block_is_refused_whole(stream, subtests):
    stream.append(log(b"1"))
    for name, block in MALFORMED.items():
        with subtests.test(name):
            stream.refused("invalid_input", log(b"good"), live(b"good"), block, first=2)


@pytest.mark.parametrize("given", range(3))
def test_missing_arguments_are_refused(stream, given):
    args = [stream.writer_id(), b"0", b""][:given]
    before = stream.everything()
    reply = stream.call("ff_append", stream.keys, *part_of(stream.keys, *args))
    assert reply == [0, b"invalid_input", b"arguments"]
    reply = stream.call("ff_append", (stream.head,), *part_of((stream.head,), *args[:1][:given]))
    assert reply == [0, b"invalid_input", b"arguments"]
    assert stream.everything() == before
    if given == 0:
        names = (stream.core, stream.head, stream.summary)
        assert stream.call("ff_open_writer", names) == [0, b"invalid_input", b"writer"]


# Blocks, and the keys that a batch needs whose blocks they are.
NEEDED_KEYS = {
    "none": ([], "head log"),
    "L": (log(b"x"), "head log"),
    "X": (log(b"x", extras=[b"f", b"v"]), "head log"),
    "K": ([b"K", b"10"], "head log"),
    "E": ([b"E", b"1"], "head log"),
    "H": ([b"H", b"0"], "head log"),
    "V": (live(b"x"), "head live"),
    "V run": (live(b"x", b"y"), "head live"),
    "W": (live(b"x", fields=[b"f", b"v"]), "head live"),
    "T": ([b"T", b"1-1"], "head live"),
    "P": ([b"P", b"60000"], "head live"),
    "S": (patches(b"{}", base=0), "head log live summary"),
    "C": ([b"C", b"1", b"{}", b"json-merge-patch:"], "head log live summary"),
}
OF_THE_LOG, OF_THE_WINDOW = ("L", "X", "K"), ("V", "V run", "W", "T", "P")


def fewer_than(names):
    """The first keys of *names*, for each count that is too small."""
    names = names.split()
    return [" ".join(names[:count]) for count in range(len(names))]


def first_for(stream, block):
    """A document needs a version, and so a frame before it."""
    if block[:1] != [b"C"]:
        return 1
    stream.append(patches(b"{}", base=0))
    return 2


@pytest.mark.parametrize("name", NEEDED_KEYS)
def test_a_batch_names_the_keys_that_it_needs(stream, name):
    block, names = NEEDED_KEYS[name]
    first = first_for(stream, block)
    for fewer in fewer_than(names):
        stream.refused("invalid_input", block, first=first, names=fewer)
    frames = {"L": 1, "X": 1, "V": 1, "V run": 2, "W": 1, "S": 1}.get(name, 0)
    answer = stream.append(block, first=first, names=names)
    assert answer[1] == len(stream.frames()) == first - 1 + frames
    # A repeat is told by the same keys.
    if frames:
        assert stream.repeated(block, first=first, names=names) == answer


@pytest.mark.parametrize("with_log", [False, True], ids=["window", "log"])
@pytest.mark.parametrize("name", NEEDED_KEYS)
def test_a_batch_for_both_streams_names_both(stream, name, with_log):
    block, names = NEEDED_KEYS[name]
    good = log(b"good") if with_log else live(b"good")
    if name in (OF_THE_WINDOW if with_log else OF_THE_LOG):
        names = "head log live"
        # Whichever of the two it names.
        stream.refused("invalid_input", good, block, names="head live")
        stream.refused("invalid_input", block, good, names="head live")
        stream.refused("invalid_input", block, good, names="head log")
    elif not with_log and names == "head log":
        names = "head live"
    first = first_for(stream, block)
    for fewer in fewer_than(names):
        error = stream.refused("invalid_input", good, block, first=first, names=fewer)
        assert ("keys" if fewer else "parts") in str(error)
    ms, sequence = stream.append(good, block, first=first, names=names)
    assert stream.repeated(good, block, first=first, names=names) == (ms, sequence)
    mode = "durable" if with_log else "best_effort"
    assert stream.frames()[first - 1].payload == b"good"
    assert stream.frames()[first - 1].mode == mode
    assert sequence == len(stream.frames())


def test_a_word_on_the_whole_batch_goes_to_either_stream(stream):
    about = [[b"H", b"0"], [b"E", b"3"]]
    stream.append(live(b"1"), *about, names="head live")
    assert (visible(stream), stream.raw.hget(stream.meta, "estimator")) == (b"0", b"3")
    stream.append(log(b"2"), [b"H", b""], [b"E", b"4"], first=2, names="head log")
    assert (visible(stream), stream.raw.hget(stream.meta, "estimator")) == (None, b"4")
    assert stream.raw.exists(stream.summary) == 0


@pytest.mark.parametrize("refusal", REFUSALS[:6], ids=CODES[:6])
def test_a_refusal_needs_no_more_keys_than_the_batch(stream, refusal):
    """The core, which says why, is spelled from the key of the head."""
    _, call = spoil(stream, [refusal])
    for names in ("head log", "head live", "head log live"):
        frame = live(b"x") if names == "head live" else log(b"x")
        error = stream.refused(refusal[0], frame, names=names, **call)
        assert type(error) is refusal[3], names


def test_a_repeat_is_looked_for_in_both_streams(stream, next_ms):
    """Which one has the frame is not known from its number; both are spelled from the key of the head."""
    first = stream.append(log(b"1"), names="head log")
    next_ms()
    second = stream.append(live(b"2", b"3"), first=2, names="head live")
    for names, block in (("head log", log), ("head live", live)):
        assert stream.repeated(block(b"1"), names=names) == first
        assert stream.repeated(block(b"1", b"2"), names=names) == (second[0], 2)
        assert stream.repeated(block(b"3"), first=3, names=names) == second


@pytest.mark.parametrize("head", [b"", b"head", b"ff:stream:x:head", b"ff:stream:x:0:heads"])
@pytest.mark.standalone("keys of several slots in one command")
def test_no_key_of_a_head_is_no_execution(stream, head):
    before = stream.everything()
    names = (head, stream.log)
    args = part_of(names, stream.writer_id(), b"0", b"", *log(b"x"))
    reply = stream.call("ff_append", names, *args)
    assert reply == [0, b"execution_not_found"]
    assert stream.everything() == before
    assert stream.raw.exists(head) == 0


def test_a_batch_without_frames_does_what_it_says(stream):
    stream.append(live(b"1"))
    stream.append([b"E", b"12.5", b"P", b"60000", b"K", b"10", b"T", b"5-5"], first=2)
    assert stream.raw.hget(stream.meta, "estimator") == b"12.5"
    assert 0 < stream.raw.pttl(stream.live) <= 60_000
    assert stream.raw.pttl(stream.log) < 0
    assert stream.append(log(b"2"), first=2)[1] == 2

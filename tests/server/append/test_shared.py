"""Calls of `ff_append` that several attempts share: what one of them is refused touches no other."""

import pytest
from redis.exceptions import ResponseError

from ff_fast import errors

from ...heads import head_of, set_head
from ..streams import (
    CODES,
    MAX_PAYLOAD,
    REFUSALS,
    appended,
    live,
    log,
    part_of,
    patches,
    spoil,
)

BODY = b" the body"


def shared(raw, *parts):
    """What the answers of one call to its parts say; each part is a stream and its keys and arguments."""
    answers, now = appended(raw, *(part for _, part in parts))
    return [stream.told(answer, now) for (stream, _), answer in zip(parts, answers, strict=True)]


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("refusal", REFUSALS, ids=CODES)
def test_a_refusal_touches_no_neighbour(raw, streams, listen, refusal, place):
    all_three = streams(3)
    spoiled = all_three[place]
    block, call = spoil(spoiled, [refusal])
    before = spoiled.everything()
    listener = listen(*(stream.head for stream in all_three))
    parts = [(stream, stream.part(log(b"x"), push=BODY)) for stream in all_three]
    parts[place] = (spoiled, spoiled.part(log(b"good"), block, push=BODY, **call))
    told = shared(raw, *parts)
    error = told.pop(place)
    assert type(error) is refusal[3]
    assert error.code == refusal[0]
    assert spoiled.everything() == before
    good = [stream for stream in all_three if stream is not spoiled]
    assert [stream.payloads() for stream in good] == [[b"x"], [b"x"]]
    assert listener.heard() == [
        (stream.head, b"F%d-%d" % answer + BODY) for stream, answer in zip(good, told, strict=True)
    ]


@pytest.mark.parametrize("refusal", REFUSALS[:7], ids=CODES[:7])
def test_a_push_has_the_fence_of_an_append(raw, streams, listen, refusal):
    spoiled, good = streams(2)
    _, call = spoil(spoiled, [refusal])
    before = spoiled.everything(), good.everything()
    listener = listen(spoiled.head, good.head)
    error, told = shared(
        raw,
        (spoiled, spoiled.push_part(b"f1-1 x", **call)),
        (good, good.push_part(b"f1-1 y")),
    )
    assert type(error) is refusal[3]
    assert told is None
    assert type(spoiled.push(b"f1-1 x", **call)) is refusal[3]
    assert (spoiled.everything(), good.everything()) == before
    assert listener.heard() == [(good.head, b"f1-1 y")]


def same_text(error, other):
    """Redis names the function, and Valkey does not."""
    return str(error) == str(other).replace("script: ff_append, on", "script: on")


@pytest.mark.parametrize(
    "at", ["core", "head", "log", "live", "summary"], ids=lambda name: f"the {name}"
)
def test_an_error_of_the_server_is_the_answer_to_its_part_alone(raw, streams, listen, at):
    """It has the text of the error with which a call of that part alone fails."""
    first, damaged, last = streams(3)
    raw.set(getattr(damaged, at), "junk")
    if at == "core":
        # A refusal reads it.
        set_head(raw, damaged.head, writer=None)
    blocks = (log(b"1"), live(b"2"), patches(b"{}", base=0))
    alone = damaged.part(*blocks, push=BODY)
    with pytest.raises(ResponseError) as failed:
        appended(raw, alone)
    before = raw.execute_command("DEBUG", "DIGEST-VALUE", *damaged.keys)
    listener = listen(first.head, damaged.head, last.head)
    (one, error, other), now = appended(
        raw, first.part(log(b"x"), push=BODY), alone, last.push_part(b"f1-1 ")
    )
    assert isinstance(error, ResponseError)
    assert same_text(error, failed.value)
    assert type(errors.from_server_error(str(error), "ff_append")) is errors.Corruption
    assert raw.execute_command("DEBUG", "DIGEST-VALUE", *damaged.keys) == before
    assert first.told(one, now)[1] == 1
    assert last.told(other, now) is None
    assert [channel for channel, _ in listener.heard()] == [first.head, last.head]


def test_a_foreign_entry_refuses_its_part_alone(raw, streams):
    damaged, good = streams(2)
    raw.xadd(damaged.log, {"junk": "1"}, id="9999999999999-7")
    for blocks in ((log(b"1"),), (live(b"1"), log(b"2"))):
        with pytest.raises(ResponseError) as failed:
            damaged.append(*blocks)
        answers, now = appended(raw, damaged.part(*blocks), good.part(log(b"x")))
        assert same_text(answers[0], failed.value)
        assert good.told(answers[1], now)[1] == 1
    assert head_of(raw, damaged.head).last_id.endswith(b"-0")


def test_parts_of_one_attempt_are_applied_in_their_order(raw, streams):
    stream, other = streams(2)
    told = shared(
        raw,
        (stream, stream.part(log(b"1"))),
        (stream, stream.push_part(b"f1-1 x")),
        (other, other.part(log(b"x"))),
        (stream, stream.part(log(b"2"), live(b"3"), first=2)),
        (stream, stream.part(log(b"2"), first=2)),
    )
    assert [each and each[1] for each in told] == [1, None, 1, 3, 2]
    assert stream.payloads() == [b"1", b"2", b"3"]


def test_a_resend_may_be_grouped_in_another_way(raw, streams, next_ms):
    one, two, three = streams(3)
    first = shared(
        raw,
        (one, one.part(log(b"1", b"2"), push=BODY)),
        (two, two.part(live(b"1", b"2"), push=BODY)),
    )
    next_ms()
    again = shared(
        raw,
        (three, three.part(log(b"1"))),
        (two, two.part(live(b"1", b"2"), push=BODY)),
        (one, one.part(log(b"1", b"2"), push=BODY)),
        (one, one.part(log(b"3"), first=3)),
    )
    assert again[1:3] == first[::-1]
    assert [stream.payloads() for stream in (one, two, three)] == [
        [b"1", b"2", b"3"], [b"1", b"2"], [b"1"],
    ]  # fmt: skip


def test_a_call_has_128_parts(raw, streams):
    many = streams(4)
    pushes = [(stream, stream.push_part(b"f1-1 ")) for stream in many * 32]
    assert shared(raw, *pushes) == [None] * 128
    parts = [part for _, part in [*pushes, pushes[0]]]
    assert whole_refusal(raw, parts) == [0, b"invalid_input", b"parts"]


def whole_refusal(raw, parts, change=None):
    names = [name for each, _ in parts for name in each]
    args = [arg for each, given in parts for arg in part_of(each, *given)]
    if change is not None:
        change(names, args)
    return raw.fcall("ff_append", len(names), *names, *args)


BAD_HEADS = [
    b"", b"x", b"0", b"-42", b"4", b"40", b"45", b"52", b"62", b"82", b"9" * 30 + b"2", b"inf", b"nan", b"-inf", b"72.5", b"1e300",
]  # fmt: skip


@pytest.mark.parametrize("at", [0, 1])
def test_a_call_whose_parts_do_not_add_up_is_refused_whole(raw, streams, listen, at, subtests):
    both = streams(2)
    names = ("head", "log")
    parts = [stream.part(log(b"x"), push=BODY, names=" ".join(names)) for stream in both]
    head = part_of(*[parts[at][0], *parts[at][1]])[0]
    assert head == b"62"
    listener = listen(*(stream.head for stream in both))
    before = [stream.everything() for stream in both]

    def with_head(value):
        def change(_, args):
            args[at * 7] = value

        return change

    changes = {f"head {head}": with_head(head) for head in BAD_HEADS if head != b"62"}
    changes["a key more"] = lambda names, args: names.append(both[0].live)
    changes["a key less"] = lambda names, args: names.pop()
    changes["an argument more"] = lambda names, args: args.append(b"x")
    changes["an argument less"] = lambda names, args: args.pop()
    changes["no argument"] = lambda names, args: args.clear()
    for name, change in changes.items():
        with subtests.test(name):
            assert whole_refusal(raw, parts, change) == [0, b"invalid_input", b"parts"]
    assert [stream.everything() for stream in both] == before
    assert listener.heard() == []


def test_the_parts_of_a_call_have_1024_entries_together(raw, streams):
    one, two, three, four = streams(4)
    told = shared(
        raw,
        (one, one.part(log(*[b"x"] * 1000))),
        (two, two.part(log(*[b"x"] * 25))),
        # A run is one entry.
        (three, three.part(live(*[b"x"] * 1000))),
        (four, four.part(log(*[b"x"] * 23))),
    )
    assert [each[1] for each in (told[0], *told[2:])] == [1000, 1000, 23]
    assert told[1].code == "invalid_input"
    assert "parts" in str(told[1])


def test_the_parts_of_a_call_have_2_mib_together(raw, streams):
    one, two, three, four = streams(4)
    told = shared(
        raw,
        (one, one.part(log(bytes(MAX_PAYLOAD)))),
        (two, two.push_part(bytes(MAX_PAYLOAD // 2))),
        (three, three.part(log(bytes(MAX_PAYLOAD // 2 + 1)))),
        (three, three.push_part(bytes(MAX_PAYLOAD // 2 + 1))),
        (four, four.part(log(bytes(MAX_PAYLOAD // 2)))),
    )
    assert [getattr(each, "code", None) for each in told] == [
        None, None, "invalid_input", "invalid_input", None,
    ]  # fmt: skip

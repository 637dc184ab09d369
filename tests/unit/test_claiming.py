"""Claims and the hints that lead to them, step by step: what is asked for, and what comes out."""

import types

import hiredis
import pytest

from ff_fast import CapabilitySet, errors, keys
from ff_fast._core import claiming, deployment, operations, ops, ready
from ff_fast._core.deployment import Deployment
from ff_fast._core.steps import Pause

from .script import functions, run

EID = "{fp:1}:550e8400-e29b-41d4-a716-446655440000"
READY = keys.ready("lane")
POP = [b"ZPOPMIN", READY]
MISSING = hiredis.ReplyError("ERR Function not found")
NOPERM = hiredis.ReplyError("NOPERM User u has no permissions to run the 'zpopmin' command")


def claimed(score=b""):
    """The answer of a claim, with the score of the best execution that stays."""
    return [1, b"OK", EID.encode(), b"0", b"attempt", b"1", b"99", b"fresh", score]


def none(offset=b"", score=b""):
    """The answer where nothing fits: where to go on, and the score of the best execution there."""
    return [1, b"NONE", offset, score]


@pytest.fixture
def clock(monkeypatch):
    """The clock of the claims, which goes on by pauses alone."""

    class Clock:
        now = 1000.0

        def pass_(self, seconds):
            self.now += seconds

    running = Clock()
    for module in (claiming, deployment):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: running.now))
    return running


@pytest.fixture
def claim(clock):
    """``claim(*replies, max_wait_s=None)`` of a backend that has looked at its two partitions already."""
    swept = Deployment(2)
    assert swept.sweep_due("lane", 0)

    def call(*replies, max_wait_s=None, on=swept):
        request = claiming.ClaimRequest(
            "lane", "w", "w-1", 30_000, CapabilitySet(["gpu"]), max_wait_s
        )
        return run(claiming.claim(on, request), replies, clock.pass_)

    return call


def test_a_hint_leads_to_the_execution(claim):
    asked, handle = claim([b"1", b"-5"], claimed())
    assert functions(asked) == ["ZPOPMIN", "ff_claim"]
    assert asked[0] == POP
    assert asked[1][3] == keys.eligible("{fp:1}", "lane")
    assert asked[1][4:6] == [b"w", b"w-1"]
    assert asked[1][7] == b"30000"
    assert asked[1][9:] == [b"0", b"gpu"]
    fields = handle.fields()
    assert (fields.execution_id, fields.lease_id.encode()) == (EID, asked[1][6])


def test_a_hint_goes_back_for_what_stays(claim):
    asked, handle = claim([b"1", b"-5"], claimed(b"-3"), 1)
    assert asked[2] == [b"ZADD", READY, b"LT", b"-3", b"1"]
    assert handle is not None


def test_no_hint_is_no_work_until_the_next_look(claim, clock):
    assert claim([]) == ([POP], None)
    clock.now += 1
    asked, handle = claim([], [], [])
    assert handle is None
    assert asked[1:] == [
        [b"ZRANGE", keys.eligible(tag, "lane"), b"0", b"0", b"WITHSCORES"]
        for tag in ("{fp:0}", "{fp:1}")
    ]


def test_a_look_puts_the_hints_that_are_missing(claim):
    found = [[b"a", b"-7"], [b"b", b"-9"]]
    replies = [[], *found, 1, 1, [b"1", b"-9"], claimed()]
    asked, handle = claim(*replies, on=Deployment(2))
    assert functions(asked) == [
        *("ZPOPMIN", "ZRANGE", "ZRANGE", "ZADD", "ZADD", "ZPOPMIN"),
        "ff_claim",
    ]
    assert asked[3:5] == [
        [b"ZADD", READY, b"LT", b"-7", b"0"],
        [b"ZADD", READY, b"LT", b"-9", b"1"],
    ]
    assert handle is not None


def test_a_lane_that_never_runs_dry_is_looked_at_now_and_then(claim, clock):
    assert functions(claim([b"1", b"-5"], claimed())[0])[0] == "ZPOPMIN"
    clock.now += 30
    asked, _ = claim([], [], [b"1", b"-5"], claimed())
    assert functions(asked) == ["ZRANGE", "ZRANGE", "ZPOPMIN", "ff_claim"]
    assert functions(claim([b"1", b"-5"], claimed())[0]) == ["ZPOPMIN", "ff_claim"]


def test_a_stale_hint_costs_one_claim(claim):
    asked, handle = claim([b"0", b"-5"], none(), [b"1", b"-4"], claimed())
    assert functions(asked) == ["ZPOPMIN", "ff_claim", "ZPOPMIN", "ff_claim"]
    assert handle is not None


def test_a_partition_is_claimed_from_page_by_page(claim):
    asked, handle = claim([b"1", b"-5"], none(b"64", b"-9"), none(b"128", b"-9"), claimed())
    assert [each[9] for each in asked[1:]] == [b"0", b"64", b"128"]
    assert handle is not None


def test_work_that_does_not_fit_stays_and_other_work_is_looked_for(claim):
    asked, handle = claim(
        [b"0", b"-9"], none(score=b"-9"), 1, [b"0", b"1"], 1, claimed(),
    )  # fmt: skip
    assert functions(asked) == ["ZPOPMIN", "ff_claim", "ZADD", "ZRANGE", "ZREM", "ff_claim"]
    assert asked[2] == [b"ZADD", READY, b"LT", b"-9", b"0"]
    assert asked[4] == [b"ZREM", READY, b"1"]
    assert handle is not None


def test_a_hint_that_somebody_else_has_taken_is_theirs(claim):
    asked, handle = claim([b"0", b"-9"], none(score=b"-9"), 1, [b"0", b"1"], 0)
    assert functions(asked) == ["ZPOPMIN", "ff_claim", "ZADD", "ZRANGE", "ZREM"]
    assert handle is None


def test_a_wait_for_work_that_does_not_fit_pauses(claim):
    misfit = ([b"0", b"-9"], none(score=b"-9"), 1, [b"0"])
    asked, handle = claim(*misfit, *misfit, *misfit, max_wait_s=0.07)
    assert handle is None
    pauses = [each.seconds for each in asked if isinstance(each, Pause)]
    assert pauses == [pytest.approx(0.05), pytest.approx(0.02)]


@pytest.mark.parametrize("max_wait_s, block", [(2.5, b"2.500"), (60, b"5.000")])
def test_a_wait_blocks_on_the_server(claim, max_wait_s, block):
    asked, handle = claim([], [READY, b"1", b"-5"], claimed(), max_wait_s=max_wait_s)
    assert asked[1] == [b"BZPOPMIN", READY, block]
    assert handle is not None


def test_a_wait_looks_before_it_blocks_again(claim, clock):
    def nothing(seconds):
        clock.now += seconds

    on = Deployment(2)
    request = claiming.ClaimRequest("lane", "w", "w-1", 1, CapabilitySet(), 7.0)
    steps = claiming.claim(on, request)

    def replies():
        yield from ([], [], [])  # the first look
        yield []
        clock.now += 5
        yield None  # BZPOPMIN in vain
        yield from ([], [], [])
        yield []
        clock.now += 2
        yield None

    asked, handle = run(steps, replies(), nothing)
    assert handle is None
    assert [each[2] for each in asked if each[0] == b"BZPOPMIN"] == [b"5.000", b"2.000"]


@pytest.mark.parametrize(
    "replies, error",
    [
        ([NOPERM], errors.PermissionDenied),
        ([b"text"], errors.ProtocolError),
        ([[b"1", b"-5"], [0, b"invalid_input", b"offset"]], errors.InvalidInput),
        ([[b"1", b"-5"], MISSING, 1], errors.FunctionMissing),
        ([[b"1", b"-5"], [1, b"OK"]], errors.ProtocolError),
        ([[b"1", b"-5"], errors.OutcomeUnknown()], errors.OutcomeUnknown),
        ([[b"1", b"-5"], claimed(b"-3"), NOPERM], errors.PermissionDenied),
        ([[b"0", b"-9"], none(score=b"-9"), 1, NOPERM], errors.PermissionDenied),
        ([[b"0", b"-9"], none(score=b"-9"), 1, [b"1"], NOPERM], errors.PermissionDenied),
    ],
)  # fmt: skip
def test_a_refusal_ends_the_claim(claim, replies, error):
    asked, raised = claim(*replies)
    assert type(raised) is error
    assert len(asked) == len(replies)


def test_a_missing_library_leaves_the_hint_for_the_next_try(claim):
    asked, _ = claim([b"1", b"-5"], MISSING, 1)
    assert asked[-1] == [b"ZADD", keys.ready("lane"), b"LT", b"-5", b"1"]


# -- hints -------------------------------------------------------------------------------------------


def completed():
    return ops.Op(b"ff_x", (b"k",), (), lambda status, fields: ("value", ops._hints(fields, 0)))


@pytest.mark.parametrize("lanes", [[], ["a"], ["a", "b"]])
def test_a_call_that_makes_work_claimable_tells_its_lanes(lanes):
    told = [part for lane in lanes for part in (lane.encode(), b"-5")]
    asked, value = run(ready.with_hints(completed(), 3), [[1, b"OK", *told], *[1] * len(lanes)])
    assert value == "value"
    assert asked[1:] == [[b"ZADD", keys.ready(lane), b"LT", b"-5", b"3"] for lane in lanes]


def test_a_refused_call_tells_no_lane():
    asked, error = run(ready.with_hints(completed(), 3), [[0, b"stale_owner"]])
    assert type(error) is errors.StaleOwner
    assert len(asked) == 1


def test_a_created_execution_is_told_to_its_lane_also_by_a_repeat():
    for _ in range(2):
        call = operations.create_execution(Deployment(2), lane="lane", execution_id=EID)
        asked, value = run(call.steps(), [[1, b"OK", b"lane", b"-5"], 0])
        assert value == EID
        assert asked[1] == [b"ZADD", READY, b"LT", b"-5", b"1"]


def test_a_look_at_partitions_that_the_server_refuses():
    _, error = run(ready.sweep("lane", 2), [[], NOPERM])
    assert type(error) is errors.PermissionDenied

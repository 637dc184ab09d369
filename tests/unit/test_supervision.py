"""Supervision step by step: which timers are fired, and what stays for later."""

import contextlib
import logging
import threading

import hiredis
import pytest

from ff_fast import errors, keys
from ff_fast._core import operations, supervision
from ff_fast._core.deployment import Deployment
from ff_fast.types import ScannerFilter

from .script import functions, run

UUID = "550e8400-e29b-41d4-a716-446655440000"
EID = f"{{fp:0}}:{UUID}"
TIME = [b"1700000000", b"5999"]
NOW = b"1700000000005"
BROKEN = hiredis.ReplyError("ERR x script: f, on @user_function:1.")
EVERYTHING = ScannerFilter()
DONE, LATER, SKIPPED, DEFERRED = [
    [1, b"OK", what] for what in (b"done", b"later", b"skipped", b"deferred")
]


def member(kind, n=0):
    return f"{kind}:{{fp:0}}:{UUID[:-4]}{n:04}".encode()


def one_round(*replies, partitions=1, scope=EVERYTHING):
    return run(supervision.Supervision(Deployment(partitions), scope).round(), [TIME, *replies])


def page(index, offset=0, now=NOW):
    timers = keys.timers(keys.slot_tag(index))
    return [b"ZRANGEBYSCORE", timers, b"-inf", now, b"LIMIT", b"%d" % offset, b"32"]


def test_a_round_asks_every_partition_for_what_is_due_by_the_servers_clock():
    asked, fired = one_round([], [], [], partitions=3)
    assert asked == [[b"TIME"], page(0), page(1), page(2)]
    assert fired == 0


@pytest.mark.parametrize("answer, fired", [(DONE, 1), (LATER, 0), (SKIPPED, 0), (DEFERRED, 0)])
def test_what_is_due_is_fired(answer, fired):
    asked, count = one_round([member("lease")], answer)
    assert asked[2][:3] == [b"FCALL", b"ff_fire_timer", b"2"]
    assert asked[2][3:] == [
        keys.timers("{fp:0}"), keys.core(f"{{fp:0}}:{UUID[:-4]}0000"),
        member("lease"), b"lease", b"", b"", b"",
    ]  # fmt: skip
    assert count == fired


def test_lanes_hear_of_what_was_fired():
    asked, _ = one_round(
        [member("delay"), member("lease", 1)],
        [*DONE, b"a", b"", b"-1"], [*DONE, b"b", b"gpu", b"-2"],
        1, 1, 1, [1, b"OK"],
    )  # fmt: skip
    assert functions(asked)[2:] == [
        "ff_fire_timer",
        "ff_fire_timer",
        "ZADD",
        "HSET",
        "PEXPIRE",
        "ff_hint",
    ]
    assert asked[4] == [b"ZADD", keys.ready("a"), b"LT", b"-1", b"0"]
    assert asked[5][:3] == [b"HSET", keys.hinted("a"), b"0"]
    assert asked[7][3:9] == [
        *(keys.lane_needs("b"), keys.ready("b", "gpu"), keys.hinted("b", "gpu")),
        *(b"gpu", b"-2", b"0"),
    ]


def test_a_call_names_its_scope():
    scope = ScannerFilter().with_namespace("tenant").with_instance_tag("a.b", "c")
    asked, _ = one_round([b"lease:" + EID.encode()], DONE, scope=scope)
    assert asked[2][6:] == [b"lease", b"tenant", b"a.b", b"c"]


@pytest.mark.parametrize(
    "name", [b"", b"lease", b"lease:", b"lease:x", b"\xff\xfe", b"lease:{fp:1}:" + UUID.encode()]
)
def test_what_names_nothing_of_its_partition_is_left_to_the_call(name):
    asked, _ = one_round([name], DONE)
    assert asked[2][3:6] == [keys.timers("{fp:0}"), keys.core("{fp:0}:"), name]


def test_behind_a_full_page_comes_the_next_one_after_what_stayed():
    full = [member("lease", n) for n in range(32)]
    asked, fired = one_round(full, *[DONE] * 30, LATER, SKIPPED, [member("lease", 32)], DONE)
    assert [each for each in asked if each[0] == b"ZRANGEBYSCORE"] == [page(0), page(0, 2)]
    assert fired == 31


def test_a_timer_that_cannot_be_fired_does_not_stop_the_others(caplog):
    full = [member("lease", n) for n in range(32)]
    asked, fired = one_round(full, BROKEN, *[DONE] * 30, DEFERRED, 1, [])
    later = b"%d" % (int(NOW) + 60_000)
    assert asked[-2:] == [
        [b"ZADD", keys.timers("{fp:0}"), b"XX", later, full[0]],
        page(0, 0),
    ]
    assert fired == 30
    ((_, level, text),) = caplog.record_tuples
    assert level == logging.WARNING
    assert text.startswith("2 timers of partition 0 cannot be fired")


def test_a_partition_whose_timers_are_another_type_is_left_out_and_logged_once(caplog):
    wrong = hiredis.ReplyError("WRONGTYPE Operation against a key")
    supervisor = supervision.Supervision(Deployment(2), EVERYTHING)
    for _ in range(2):
        _, fired = run(
            supervisor.round(), [TIME, wrong, [member("lease").replace(b":0", b":1")], DONE]
        )
        assert fired == 1
    assert len(caplog.record_tuples) == 1


def test_members_of_a_cancelled_flow_are_cancelled():
    asked, fired = one_round(
        [f"flow:{UUID}".encode()], [1, b"OK", b"7", b"0", b"lane", b"", b"-1"], 1, 1, 1
    )
    assert functions(asked)[2:] == ["ff_cancel_members", "ZADD", "HSET", "PEXPIRE"]
    assert asked[2][3] == keys.flow("{fp:0}", UUID)
    assert fired == 1


@pytest.mark.parametrize(
    "replies, functions_, fired",
    [
        ([b"tenant", [1, b"OK", b"7", b"0"]], ["HGET", "ff_cancel_members"], 1),
        ([None, [1, b"OK", b"0", b"0"]], ["HGET", "ff_cancel_members"], 1),
        ([b"another"], ["HGET"], 0),
        ([b"tenant", BROKEN, 1], ["HGET", "ff_cancel_members", "ZADD"], 0),
    ],
    ids=["ours", "gone", "another's", "damaged"],
)
def test_a_flow_belongs_to_the_supervisor_of_its_namespace(replies, functions_, fired):
    scope = ScannerFilter(namespace="tenant")
    asked, count = one_round([f"flow:{UUID}".encode()], *replies, scope=scope)
    assert functions(asked)[2:] == functions_
    assert count == fired


@pytest.mark.parametrize(
    "replies, error",
    [
        ([hiredis.ReplyError("NOPERM no")], errors.PermissionDenied),
        ([b"text"], errors.ProtocolError),
        ([[member("lease")], hiredis.ReplyError("ERR Function not found")], errors.FunctionMissing),
        ([[member("lease")], errors.Unavailable()], errors.Unavailable),
    ],
)  # fmt: skip
def test_a_refusal_ends_the_round(replies, error):
    _, raised = one_round(*replies)
    assert type(raised) is error


@pytest.mark.parametrize(
    "replies", [[hiredis.ReplyError("OOM no"), 1, 1], [errors.OutcomeUnknown()]]
)
def test_a_hint_that_is_refused_or_lost_does_not_undo_what_was_fired(replies):
    asked, fired = one_round([member("lease")], [*DONE, b"a", b"", b"-1"], *replies)
    assert functions(asked)[3:] == ["ZADD", "HSET", "PEXPIRE"]
    assert fired == 1


# -- executions to be taken over -----------------------------------------------------------------------


CORE = {
    "namespace": "default", "priority": "0", "required_capabilities": "", "created_at": "1",
    "last_transition_at": "1", "total_attempt_count": "3", "current_lease_epoch": "3",
    "retry_max": "0", "retry_backoff": "exponential", "retry_delay_ms": "1000",
    "retry_multiplier_percent": "200", "retry_max_delay_ms": "60000",
    "retry_jitter_percent": "0", "max_reclaims": "100", "retry_count": "0", "reclaim_count": "0",
    "attempt_timeout_ms": "0", "retention_ms": "1",
}  # fmt: skip


def described(state=b"active"):
    core = {"state": state.decode(), "lane_id": "lane", "current_attempt_index": "2", **CORE}
    flat = [word.encode() for field in core.items() for word in field]
    return [1, b"OK", flat, [], [], [], [], []]


def attempt(left=b"0"):
    return [1, b"OK", [], b"0", b"0", b"0", left, [], []]


def find(*replies, partitions=1, limit=10):
    return run(supervision.find_reclaimable(partitions, limit), [TIME, *replies])


def test_an_active_execution_with_a_lapsed_lease_is_found():
    asked, tokens = find([member("delay"), member("lease")], described(), attempt())
    assert functions(asked) == [
        "TIME",
        "ZRANGEBYSCORE",
        "ff_describe_execution",
        "ff_describe_attempt",
    ]
    assert asked[1] == page(0)
    assert asked[3][-1] == b"2"
    (token,) = tokens
    eid = f"{{fp:0}}:{UUID[:-4]}0000"
    assert token == supervision.reclaim_token(eid, "lane", int(NOW))
    assert (token.grant.execution_id, token.grant.lane_id) == (eid, "lane")
    assert token.grant.expires_at_ms == int(NOW) + 60_000


@pytest.mark.parametrize(
    "replies",
    [
        [described(), attempt(b"500")],
        [described(b"waiting"), attempt()],
        [[0, b"execution_not_found"]],
        [described(), [0, b"execution_not_found"]],
        [hiredis.ReplyError("WRONGTYPE Operation against a key")],
        [described(), BROKEN],
    ],
    ids=["renewed", "waiting", "gone", "gone between", "another type", "damaged"],
)
def test_others_are_not(replies):
    assert find([member("lease")], *replies)[1] == []


def test_no_more_are_found_than_are_asked_for():
    asked, tokens = find([member("lease"), member("lease", 1)], described(), attempt(), limit=1)
    assert len(tokens) == 1
    assert functions(asked).count("ff_describe_execution") == 1


def test_timers_of_other_kinds_stand_before_them():
    other = [member("delay", n) for n in range(32)]
    asked, tokens = find(other, [], [member("lease")], described(), attempt(), partitions=2)
    assert asked[1:4] == [page(0), page(1), page(0, 32)]
    assert len(tokens) == 1


@pytest.mark.parametrize(
    "error, answered", [(errors.Unavailable(), False), (errors.PermissionDenied(), True)]
)
def test_who_stands_by_tells_whether_the_server_answers(error, answered):
    told = []
    stop = threading.Event()
    request = operations.SupervisionRequest.standing_by(Deployment(), stop)._replace(interval_s=0)
    actions = request.actions(lambda: False, told.append)
    next(actions)
    actions.send(True)
    assert told == [True]
    # The round, and the next question.
    assert isinstance(actions.send(0), operations.MakeCall)
    with contextlib.suppress(errors.PermissionDenied):
        actions.throw(error)
    assert told == [True, answered]

"""Claims and the hints that lead to them, step by step: what is asked for, and what comes out."""

import types

import hiredis
import pytest

from ff_fast import CapabilitySet, errors, keys
from ff_fast._core import claiming, deployment, line, operations, ops, ready
from ff_fast._core.deployment import Deployment
from ff_fast._core.line import Head
from ff_fast._core.steps import AwaitHint, Pause

from .script import functions, run

EID = "{fp:1}:550e8400-e29b-41d4-a716-446655440000"
READY = keys.ready("lane")
HINTED = keys.hinted("lane")
POP = [b"ZPOPMIN", READY]
LOOK = [b"HGETALL", HINTED]
MISSING = hiredis.ReplyError("ERR Function not found")
NOPERM = hiredis.ReplyError("NOPERM User u has no permissions to run the 'zpopmin' command")
FOREIGN = hiredis.ReplyError("WRONGTYPE Operation against a key holding the wrong kind of value")
OOM = hiredis.ReplyError("OOM command not allowed when used memory > 'maxmemory'.")


def claimed(score=b""):
    """The answer of a claim, with the score of the best execution that stays."""
    return [1, b"OK", EID.encode(), b"0", b"attempt", b"1", b"99", b"fresh", score]


def none(score=b""):
    """The answer where nothing could be claimed, with the score of what is still to be looked at."""
    return [1, b"NONE", score]


def given_back(*hint):
    return [1, b"OK", b"1", *hint]


NOT_HELD = [1, b"OK", b"0"]


@pytest.fixture
def clock(monkeypatch):
    """The clock of the claims, which goes on by pauses alone."""

    class Clock:
        now = 1000.0

        def pass_(self, seconds):
            self.now += seconds

    running = Clock()
    for module in (claiming, deployment, line):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: running.now))
    return running


def swept(*tokens):
    """A deployment of two partitions that a worker with these capabilities has looked at already."""
    on = Deployment(2)
    assert on.sweep_due(on.offer("lane", tokens).kind, 0)
    return on


def claim_of(*tokens, max_wait_s=None):
    request = claiming.ClaimRequest("lane", "w", "w-1", 30_000, CapabilitySet(tokens), max_wait_s)
    return claiming.Claim(request)


def led(on, state):
    """The steps of a claim whose caller waits on the server for its line."""
    steps, replies, failure = claiming.claim(on, state), None, None
    try:
        while True:
            step = steps.send(replies) if failure is None else steps.throw(failure)
            failure = None
            try:
                if isinstance(step, AwaitHint):
                    replies = []
                    step.line.join(state)
                    try:
                        while not state.told and state.left() > 0:
                            yield from step.serve(state)
                    finally:
                        step.line.leave(state)
                else:
                    replies = yield step
            except errors.FFError as error:
                failure = error
    except StopIteration as stop:
        return stop.value


def bzmpop(block, *queues, count=1):
    return [
        b"BZMPOP", block, b"%d" % len(queues), *queues, b"MIN", b"COUNT", b"%d" % count,
    ]  # fmt: skip


@pytest.fixture
def claim(clock):
    """``claim(*replies, max_wait_s=None)`` of a backend that has looked at its two partitions already."""
    known = swept()

    def call(*replies, max_wait_s=None, on=known, state=None):
        state = claim_of(max_wait_s=max_wait_s) if state is None else state
        return run(led(on, state), replies, clock.pass_)

    return call


def test_a_hint_leads_to_the_execution(claim):
    asked, handle = claim([b"1", b"-5"], claimed())
    assert functions(asked) == ["ZPOPMIN", "ff_claim"]
    assert asked[0] == POP
    assert asked[1][3] == keys.eligible("{fp:1}", "lane")
    assert asked[1][7:9] == [b"w", b"w-1"]
    assert asked[1][10] == b"30000"
    # There is one queue, so nothing is compared with its hint.
    assert asked[1][12:] == [b"", b""]
    fields = handle.fields()
    assert (fields.execution_id, fields.lease_id.encode()) == (EID, asked[1][9])


def test_a_hint_that_is_better_than_what_waits_is_put_right_and_the_best_of_all_is_asked_for(clock):
    on = swept("gpu")
    on.offer("lane", ("gpu",)).learn(b"gpu")
    heads = [[], [b"0", b"-5"], [b"1", b"-9"]]
    replies = [*heads, [b"1", b"-9"], [1, b"BEHIND", b"-3"], 1]
    replies += [[], [b"0", b"-5"], [b"1", b"-3"], [b"0", b"-5"], claimed()]
    asked, handle = run(claiming.claim(on, claim_of("gpu")), replies)
    assert handle is not None
    gpu = keys.ready("lane", "gpu")
    assert asked[5] == [b"ZADD", gpu, b"LT", b"-3", b"1"]
    assert asked[9] == [b"ZPOPMIN", READY]


def test_a_hint_goes_back_for_what_stays(claim):
    asked, handle = claim([b"1", b"-5"], claimed(b"-3"), 1)
    assert asked[2] == [b"ZADD", READY, b"LT", b"-3", b"1"]
    assert handle is not None


@pytest.mark.parametrize("failure", [OOM, NOPERM, errors.OutcomeUnknown(), errors.Unavailable()])
def test_a_hint_that_does_not_go_back_costs_no_handle(claim, failure):
    _, handle = claim([b"1", b"-5"], claimed(b"-3"), failure)
    assert handle.fields().execution_id == EID


def test_an_empty_lane_takes_one_round_trip_once_it_is_known_to_be_empty(claim, clock):
    state = claim_of()
    assert claim([], []) == ([POP, LOOK], None)
    steps = claiming.claim(swept(), state)
    assert len(next(steps).commands) == 1
    on = swept()
    claim([], [], on=on)
    assert len(next(claiming.claim(on, state)).commands) == 2
    clock.now += 1
    asked, handle = claim([], [], [], [])
    assert handle is None
    assert asked[2:] == [
        [b"ZRANGE", keys.eligible(tag, "lane"), b"0", b"0", b"WITHSCORES"]
        for tag in ("{fp:0}", "{fp:1}")
    ]


def test_work_whose_hint_somebody_else_has_taken_is_found(claim):
    replies = [[], [b"0", b"m0", b"1", b"m1"], [], [b"x", b"-7"], [1, b"OK"], claimed()]
    asked, handle = claim(*replies)
    assert functions(asked) == [
        *("ZPOPMIN", "HGETALL", "ZRANGE", "ZRANGE"), "ff_forget_hints", "ff_claim",
    ]  # fmt: skip
    # Only the partition without work is forgotten, if no hint has come meanwhile.
    assert asked[4][3:] == [HINTED, b"0", b"m0"]
    assert handle is not None


def test_the_best_of_the_taken_work_is_claimed_first(claim):
    heads = ([b"x", b"-7"], [b"y", b"-9"])
    asked, _ = claim([], [b"0", b"m0", b"1", b"m1"], *heads, none(), claimed())
    assert [each[3] for each in asked[4:]] == [
        keys.eligible("{fp:1}", "lane"), keys.eligible("{fp:0}", "lane"),
    ]  # fmt: skip


def test_foreign_records_of_hints_are_removed(claim):
    asked, handle = claim([b"junk", b"-9"], [b"70000", b"-9"], [b"1", b"-5"], claimed())
    assert functions(asked) == ["ZPOPMIN", "ZPOPMIN", "ZPOPMIN", "ff_claim"]
    assert handle is not None
    asked, handle = claim([], [b"junk", b"m", b"-1", b"m"], [1, b"OK"])
    assert asked[2][3:] == [HINTED, b"junk", b"m", b"-1", b"m"]
    assert handle is None


def test_a_queue_of_another_type_hides_no_work(claim):
    asked, handle = claim(FOREIGN, [b"1", b"m"], [b"x", b"-7"], claimed())
    assert functions(asked) == ["ZPOPMIN", "HGETALL", "ZRANGE", "ff_claim"]
    assert handle is not None
    assert claim(FOREIGN, FOREIGN)[1] is None
    asked, handle = claim(FOREIGN, [], FOREIGN, [], max_wait_s=0.05)
    # A look in the middle of the wait, and one at its end.
    assert [each.seconds for each in asked if isinstance(each, Pause)] == [pytest.approx(0.025)] * 2
    assert handle is None


def test_a_partition_whose_index_is_of_another_type_has_no_work(claim):
    wrong = hiredis.ReplyError(
        "WRONGTYPE Operation against a key holding the wrong kind of value script: ff_claim, "
        "on @user_function:1."
    )
    asked, handle = claim([b"0", b"-9"], wrong, [b"1", b"-5"], claimed())
    assert functions(asked) == ["ZPOPMIN", "ff_claim", "ZPOPMIN", "ff_claim"]
    assert handle is not None


def test_a_look_puts_the_hints_that_are_missing(claim):
    found = [[b"a", b"-7"], [b"b", b"-9"]]
    replies = [[], *found, 1, 1, 1, 1, 1, 1, [b"1", b"-9"], claimed()]
    asked, handle = claim(*replies, on=Deployment(2))
    assert functions(asked) == [
        *(
            "ZPOPMIN",
            "ZRANGE",
            "ZRANGE",
            "ZADD",
            "HSET",
            "PEXPIRE",
            "ZADD",
            "HSET",
            "PEXPIRE",
            "ZPOPMIN",
        ),
        "ff_claim",
    ]
    assert asked[3] == [b"ZADD", READY, b"LT", b"-7", b"0"]
    assert asked[4][:3] == [b"HSET", HINTED, b"0"]
    assert asked[6] == [b"ZADD", READY, b"LT", b"-9", b"1"]
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


def test_a_claim_is_made_again_where_an_index_held_much_that_was_no_work(claim):
    asked, handle = claim([b"1", b"-5"], none(b"-9"), none(b"-9"), claimed())
    assert asked[1] == asked[2] == asked[3]
    assert handle is not None


@pytest.mark.parametrize("max_wait_s, block", [(0.5, b"0.250"), (60, b"1.000")])
def test_a_wait_blocks_on_the_server(claim, max_wait_s, block):
    asked, handle = claim([READY, [[b"1", b"-5"]]], claimed(), max_wait_s=max_wait_s)
    assert asked[0] == bzmpop(block, READY)
    assert handle is not None


def test_a_wait_in_vain_looks_at_taken_work_before_it_goes_on(claim, clock):
    state = claim_of(max_wait_s=1.5)

    def replies():
        for seconds in (0.75, 0.75):
            clock.now += seconds
            yield None  # BZMPOP in vain
            yield []

    asked, handle = run(led(swept(), state), replies(), clock.pass_)
    assert handle is None
    assert functions(asked) == ["BZMPOP", "HGETALL"] * 2
    assert [each[1] for each in asked if each[0] == b"BZMPOP"] == [b"0.750"] * 2


def test_a_wait_that_has_seen_no_look_ends_with_its_own(claim, clock):
    state = claim_of(max_wait_s=0.1)
    steps = claiming.claim(swept(), state)
    assert isinstance(next(steps), AwaitHint)
    clock.now += 0.1
    assert steps.send([]).commands == [ready.command(*each) for each in (POP, LOOK)]


def test_the_wait_of_a_claim_begins_with_its_first_try(claim, clock):
    state = claim_of(max_wait_s=2)
    assert isinstance(claim(errors.Unavailable(), state=state)[1], errors.Unavailable)
    clock.now += 1.5
    asked, _ = claim([READY, [[b"1", b"-5"]]], claimed(), state=state)
    assert asked[0] == bzmpop(b"0.250", READY)


# -- the line ----------------------------------------------------------------------------------------


def in_line(on, count, tokens=()):
    """Claims that wait in one line."""
    claims = [claim_of(*tokens, max_wait_s=10) for _ in range(count)]
    waits = [next(claiming.claim(on, each)) for each in claims]
    for step in waits:
        step.line.join(step.claim)
    return on.offer("lane", tokens), claims


def test_one_pop_serves_as_many_claims_as_there_are_hints_in_their_order(clock):
    on = swept()
    offer, claims = in_line(on, 3)
    hints = [[b"7", b"-9"], [b"junk", b"-8"], [b"3", b"-5"]]
    asked, _ = run(claiming.serve(on, offer), [[READY, hints]])
    assert asked == [bzmpop(b"1.000", READY, count=3)]
    assert [each.given for each in claims] == [Head(-9.0, "", 7), Head(-5.0, "", 3), None]
    assert [each.unsettled for each in claims] == [True, True, False]
    assert list(offer.line.waiting) == claims[2:]


def test_what_no_claim_waits_for_any_more_goes_back_to_its_queue(clock):
    on = swept()
    offer, claims = in_line(on, 3)

    def replies():
        for each in claims[:2]:
            offer.line.leave(each)
        yield [READY, [[b"7", b"-9"], [b"3", b"-5"]]]
        yield 1

    asked, _ = run(claiming.serve(on, offer), replies())
    assert asked[1:] == [[b"ZADD", READY, b"LT", b"-5", b"3"]]
    assert [each.given for each in claims] == [None, None, Head(-9.0, "", 7)]


def test_a_hint_for_a_claim_that_leaves_meanwhile_goes_to_the_next(clock):
    on = swept()
    offer, (first, second) = in_line(on, 2)
    first.wake = lambda: offer.line.leave(first)
    assert offer.line.give(Head(-9.0, "", 7))
    assert second.given == Head(-9.0, "", 7)


def test_a_look_serves_the_whole_line(clock):
    on = swept()
    offer, claims = in_line(on, 3)
    replies = [None, [b"0", b"m", b"1", b"n"], [b"x", b"-7"], [b"y", b"-9"]]
    asked, _ = run(claiming.serve(on, offer), replies)
    assert functions(asked) == ["BZMPOP", "HGETALL", "ZRANGE", "ZRANGE"]
    assert [each.given for each in claims] == [Head(-9.0, "", 1), Head(-7.0, "", 0), None]


def test_the_best_hints_of_all_queues_come_first(clock):
    on = swept("gpu")
    offer, claims = in_line(on, 3, tokens=("gpu",))
    offer.learn(b"gpu")
    gpu = keys.ready("lane", "gpu")
    looks = [[b"1", b"-9", b"2", b"-5"], [b"3", b"-7", b"4", b"-6"]]
    popped = [[b"1", b"-9"], [b"3", b"-7", b"4", b"-6"]]
    asked, _ = run(claiming.serve(on, offer), [[], *looks, *popped])
    assert asked[1][2:4] == [b"0", b"2"]
    assert asked[3:] == [[b"ZPOPMIN", READY], [b"ZPOPMIN", gpu, b"2"]]
    assert [each.given.partition for each in claims] == [1, 3, 4]


def in_rush(on, count, tokens=()):
    """Claims that do not wait, and ask while another one does."""
    claims = [claim_of(*tokens) for _ in range(count)]
    offer = on.offer("lane", tokens)
    offer.asking += 1
    for each in claims:
        each.shares = True
        step = next(claiming.claim(on, each))
        assert step.line is offer.rush
        offer.rush.join(each)
    return offer, claims


def test_claims_that_come_together_ask_together(clock):
    on = swept()
    offer, claims = in_rush(on, 4)
    pop = [[b"7", b"-9", b"3", b"-5"], [b"0", b"m", b"1", b"n"], [b"x", b"-7"], []]
    asked, _ = run(claiming.serve_at_once(on, offer), [*pop, [1, b"OK"]])
    assert functions(asked) == [
        "ZPOPMIN", "pause", "HGETALL", "ZRANGE", "ZRANGE", "ff_forget_hints",
    ]  # fmt: skip
    assert asked[0] == [b"ZPOPMIN", READY, b"4"]
    assert [each.given and each.given.partition for each in claims] == [7, 3, 0, None]
    assert [each.dismissed for each in claims] == [False, False, False, False]
    # Partition 0 may have more than its best.
    asked, _ = run(claiming.serve_at_once(on, offer), [[], []])
    assert functions(asked) == ["ZPOPMIN", "pause", "HGETALL"]
    assert [each.dismissed for each in claims] == [False, False, False, True]
    assert not offer.rush.waiting


@pytest.mark.parametrize("popped", [[b"7", b"-9", b"junk", b"-5"], [b"junk", b"-9", b"x", b"-5"]])
def test_foreign_hints_end_nobodys_claim(popped, clock):
    on = swept()
    offer, claims = in_rush(on, 2)
    run(claiming.serve_at_once(on, offer), [popped])
    assert not any(each.dismissed for each in claims)
    assert len(offer.rush.waiting) == (1 if b"7" in popped else 2)


def test_a_claim_with_capabilities_asks_together_for_the_best_of_all_queues(clock):
    on = swept("gpu")
    offer, claims = in_rush(on, 2, tokens=("gpu",))
    offer.learn(b"gpu")
    looks = [[b"1", b"-5"], [b"3", b"-7", b"4", b"-6"]]
    asked, _ = run(claiming.serve_at_once(on, offer), [[], *looks, [b"3", b"-7", b"4", b"-6"]])
    assert asked[-1] == [b"ZPOPMIN", keys.ready("lane", "gpu"), b"2"]
    assert [each.given.partition for each in claims] == [3, 4]


def test_a_claim_that_asks_alone_asks_itself(claim):
    on = swept()
    state = claim_of()
    state.shares = True
    assert claim([b"1", b"-5"], claimed(), on=on, state=state)[1] is not None
    assert on.offer("lane", ()).asking == 0


def test_a_claim_whose_hint_led_to_nothing_is_the_first_again(clock):
    offer, claims = in_line(swept(), 3)
    assert offer.line.give(Head(-9.0, "", 7))
    offer.line.join(claims[0])
    assert list(offer.line.waiting) == claims


def test_an_error_ends_the_wait_of_each_claim(clock):
    offer, claims = in_line(swept(), 3)
    offer.line.fail(errors.OutcomeUnknown())
    assert [type(each.failure) for each in claims] == [errors.OutcomeUnknown] * 3
    assert len({id(each.failure) for each in claims}) == 3
    # The server may have taken hints out of their queue.
    assert all(each.unsettled for each in claims)


def test_one_claim_leads_its_line_until_it_resigns(clock):
    offer, (first, second, third) = in_line(swept(), 3)
    lines, woken = offer.line, []
    for each in (second, third):
        each.wake = lambda each=each: woken.append(each)
    assert [lines.lead(each) for each in (first, second, first)] == [True, False, True]
    lines.leave(third)
    lines.resign(third)
    assert not woken
    lines.leave(first)
    lines.resign(first)
    assert woken == [second]
    assert lines.lead(second)


@pytest.mark.parametrize("how", ["gone", "late"])
def test_a_leader_that_could_not_resign_is_replaced(how, clock):
    offer, (first, second) = in_line(swept(), 2)
    assert offer.line.lead(first)
    assert not offer.line.lead(second)
    if how == "gone":
        offer.line.leave(first)
    else:
        clock.now += 12
    assert offer.line.lead(second)
    assert not offer.line.lead(first)


def words_of(step):
    reader = hiredis.Reader()
    reader.feed(step.request)
    return reader.gets()


# -- capabilities ------------------------------------------------------------------------------------


def test_a_worker_asks_only_for_what_it_covers(clock):
    on = swept("gpu", "x")
    told = [b"gpu", b"5", b"fpga", b"6", b"gpu,x", b"7", b"gpu,y", b"8"]
    replies = [
        *(told, []),
        # Asked again with what is new.
        *([], [b"0", b"-1"], [], [b"1", b"-2"]),
        *([b"1", b"-2"], claimed(b"-1"), 1),
    ]
    asked, handle = run(claiming.claim(on, claim_of("gpu", "x")), replies)
    assert handle is not None
    assert asked[0] == [
        b"ZRANGEBYSCORE",
        keys.lane_needs("lane"),
        b"(0",
        b"9007199254740991",
        b"WITHSCORES",
    ]
    assert asked[2][2] == b"(8"
    assert [each[1] for each in asked[3:6]] == [
        keys.ready("lane", needs) for needs in ("", "gpu", "gpu,x")
    ]
    # The best of the heads.
    assert asked[6] == [b"ZPOPMIN", keys.ready("lane", "gpu,x")]
    assert asked[7][3] == keys.eligible("{fp:1}", "lane", "gpu,x")
    assert asked[7][-2:] == [b"gpu,x", b"-2"]
    assert asked[8] == [b"ZADD", keys.ready("lane", "gpu,x"), b"LT", b"-1", b"1"]


def test_a_worker_waits_for_what_it_covers_and_for_news(clock):
    on = swept("gpu")
    replies = [
        *([b"gpu", b"5"], [], [], [], []),
        [keys.lane_news("lane", 5), [[b"news", b"0"]]],
        *(1, 1),
        *([b"gpu", b"9"], [], [], [keys.ready("lane", "gpu"), [[b"1", b"-5"]]], claimed()),
    ]
    asked, handle = run(led(on, claim_of("gpu", max_wait_s=9)), replies)
    waits = [each for each in asked if each[0] == b"BZMPOP"]
    queues = [keys.ready("lane"), keys.ready("lane", "gpu")]
    assert waits[0] == bzmpop(b"1.000", *queues, keys.lane_news("lane", 5))
    assert waits[1][5] == keys.lane_news("lane", 9)
    # It wakes the next one who waits.
    at = asked.index(waits[0])
    assert asked[at + 1] == [b"ZADD", keys.lane_news("lane", 5), b"0", b"news"]
    assert asked[at + 2][:2] == [b"PEXPIRE", keys.lane_news("lane", 5)]
    assert handle is not None


def test_a_look_finds_what_no_hint_and_no_registry_tells(clock):
    replies = [[b"gpu", b"fpga"], [], [], [], [b"x", b"-5"], [1, b"OK"]]
    offer = ready.Offer("lane", ["gpu"])
    asked, found = run(ready.sweep(offer, 2), replies)
    assert found
    assert functions(asked) == [
        "SRANDMEMBER",
        "SRANDMEMBER",
        "ZRANGE",
        "ZRANGE",
        "ZRANGE",
        "ff_hint",
    ]
    assert asked[4][1] == keys.eligible("{fp:0}", "lane", "gpu")
    assert offer.needs == ["", "gpu"]


# -- refusals, lost replies, callers that go away ----------------------------------------------------


@pytest.mark.parametrize(
    "replies, error",
    [
        ([NOPERM], errors.PermissionDenied),
        ([b"text"], errors.ProtocolError),
        ([[b"1", b"-5"], [0, b"invalid_input", b"lease_ttl_ms"], 1, 1, 1], errors.InvalidInput),
        ([[b"1", b"-5"], MISSING, 1, 1, 1], errors.FunctionMissing),
        ([[b"1", b"-5"], OOM, OOM, OOM, 0], errors.OutOfMemory),
        ([[b"1", b"-5"], [1, b"OK"]], errors.ProtocolError),
        ([[b"1", b"-5"], errors.OutcomeUnknown()], errors.OutcomeUnknown),
    ],
)  # fmt: skip
def test_a_refusal_ends_the_claim(claim, replies, error):
    asked, raised = claim(*replies)
    assert type(raised) is error
    assert len(asked) == len(replies)


def test_a_connection_that_is_lost_before_the_claim_leaves_the_hint_to_be_put_back(claim):
    state = claim_of()
    _, raised = claim([b"1", b"-5"], errors.Unavailable(), errors.Unavailable(), state=state)
    assert type(raised) is errors.Unavailable
    assert state.lease is None
    assert state.hint_taken


def test_a_refused_claim_leaves_the_hint_for_the_next_try(claim):
    asked, _ = claim([b"1", b"-5"], MISSING, 1, 1, 1)
    assert asked[2] == [b"ZADD", READY, b"LT", b"-5", b"1"]


def test_a_claim_whose_reply_is_lost_is_made_again_under_the_same_lease(claim):
    state = claim_of()
    first, _ = claim([b"1", b"-5"], errors.OutcomeUnknown(), state=state)
    again, handle = claim(claimed(), state=state)
    assert again == [first[1]]
    assert handle.fields().lease_id.encode() == first[1][9]


def test_a_lost_claim_that_granted_nothing_is_followed_by_another(claim):
    state = claim_of()
    claim([b"1", b"-5"], errors.OutcomeUnknown(), state=state)
    asked, handle = claim(none(), [b"0", b"-5"], claimed(), state=state)
    assert functions(asked) == ["ff_claim", "ZPOPMIN", "ff_claim"]
    assert asked[0][9] != asked[2][9]
    assert handle is not None


def test_what_a_caller_leaves_behind_is_given_back_with_its_hint(claim):
    state = claim_of()
    lost, _ = claim([b"1", b"-5"], errors.OutcomeUnknown(), state=state)
    assert state.unsettled
    replies = [given_back(b"lane", b"", b"-5"), 1, 1, 1]
    asked, _ = run(claiming.give_back(swept(), state), replies)
    assert functions(asked) == ["ff_give_back", "ZADD", "HSET", "PEXPIRE"]
    assert asked[0][3:] == [keys.leases("{fp:1}"), lost[1][9]]
    assert not state.unsettled


@pytest.mark.parametrize(
    "leads, sent", [(False, ["ZADD"]), (True, ["HGETALL", "ZRANGE", "ZADD", "HSET", "PEXPIRE"])]
)
def test_a_hint_from_the_line_goes_back_as_it_is(leads, sent, clock):
    on = swept()
    offer, (state,) = in_line(on, 1)
    assert offer.line.give(Head(-9.0, "", 7))
    # Whoever leads may have taken others, which it has not handed out.
    state.blocked = leads
    replies = [[b"7", b"m"], [b"x", b"-9"], 1, 1, 1] if leads else [1]
    asked, _ = run(claiming.give_back(on, state), replies)
    assert functions(asked) == sent
    assert b"7" in asked[-3 if leads else 0]
    assert not state.unsettled


def test_a_lease_that_is_not_there_yet_is_asked_for_again(claim, clock):
    state = claim_of()
    claim([b"1", b"-5"], errors.OutcomeUnknown(), state=state)
    steps = claiming.give_back(swept(), state)
    asked, _ = run(steps, [NOT_HELD, NOT_HELD, given_back(), 1], clock.pass_)
    assert functions(asked) == [
        "ff_give_back",
        "pause",
        "ff_give_back",
        "pause",
        "ff_give_back",
        # Nothing waits there as it did, so the hint alone goes back.
        "ZADD",
    ]


def test_a_claim_that_is_abandoned_while_it_pops_puts_the_hint_back(clock):
    state = claim_of()

    def replies():
        state.abandoned = True
        yield from ([b"1", b"-5"], [b"1", b"m"], [b"x", b"-5"], 1, 1, 1)

    asked, handle = run(claiming.claim(swept(), state), replies())
    assert handle is None
    assert functions(asked) == ["ZPOPMIN", "HGETALL", "ZRANGE", "ZADD", "HSET", "PEXPIRE"]
    assert not state.unsettled


def test_a_claim_that_is_abandoned_while_it_claims_gives_back(clock):
    state = claim_of()

    def replies():
        yield [b"1", b"-5"]
        state.abandoned = True
        yield from (claimed(), given_back(b"lane", b"", b"-5"), 1, 1, 1)

    asked, handle = run(claiming.claim(swept(), state), replies())
    assert handle is None
    assert functions(asked) == ["ZPOPMIN", "ff_claim", "ff_give_back", "ZADD", "HSET", "PEXPIRE"]


def test_a_caller_that_has_nothing_leaves_nothing(claim):
    state = claim_of()
    claim([], [], state=state)
    assert not state.unsettled
    claim([b"1", b"-5"], [], none(), [], [], state=state)
    assert not state.unsettled


# -- hints -------------------------------------------------------------------------------------------


def completed():
    return ops.Op(b"ff_x", (b"k",), (), lambda status, fields: ("value", ops._hints(fields, 0)))


@pytest.mark.parametrize("lanes", [[], ["a"], ["a", "b"]])
def test_a_call_that_makes_work_claimable_tells_its_lanes(lanes):
    told = [part for lane in lanes for part in (lane.encode(), b"", b"-5")]
    asked, value = run(
        ready.with_hints(completed(), 3), [[1, b"OK", *told], *[1, 1, 1] * len(lanes)]
    )
    assert value == "value"
    assert asked[1::3] == [[b"ZADD", keys.ready(lane), b"LT", b"-5", b"3"] for lane in lanes]
    assert [each[:3] for each in asked[2::3]] == [
        [b"HSET", keys.hinted(lane), b"3"] for lane in lanes
    ]
    assert len({each[3] for each in asked[2::3]}) == len(lanes)


def test_a_refused_call_tells_no_lane():
    asked, error = run(ready.with_hints(completed(), 3), [[0, b"stale_owner"]])
    assert type(error) is errors.StaleOwner
    assert len(asked) == 1


def test_a_created_execution_is_told_to_its_lane_also_by_a_repeat():
    for _ in range(2):
        call = operations.create_execution(Deployment(2), lane="lane", execution_id=EID)
        asked, value = run(call.steps(), [[1, b"OK", b"lane", b"", b"-5"], 0, 1, 1])
        assert value == EID
        assert asked[1] == [b"ZADD", READY, b"LT", b"-5", b"1"]


def test_a_look_at_partitions_that_the_server_refuses():
    _, error = run(ready.sweep(ready.Offer("lane", ()), 2), [[], NOPERM])
    assert type(error) is errors.PermissionDenied

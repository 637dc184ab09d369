"""Usage reports and budgets: fenced, once for each key, completely or not at all."""

import threading

import pytest

from ff_fast import ReportUsageResult, UsageDimensions, UsageVerdict, errors, keys
from ff_fast._core import operations, ops
from ff_fast._core import usage as usage_core
from ff_fast._core.operations import Call

from ..unit.script import request_of
from .executions import World

OK, SOFT, HARD, AGAIN = (
    UsageVerdict.OK, UsageVerdict.SOFT_BREACH, UsageVerdict.HARD_BREACH,
    UsageVerdict.ALREADY_APPLIED,
)  # fmt: skip
TOP = 2**53 - 1


@pytest.fixture
def world(server, raw, lane):
    with World(server.url, raw, lane) as world:
        yield world


@pytest.fixture
def budget(world):
    """``budget(hard=..., soft=...)``: the id of a new budget."""

    def make(**limits):
        budget_id = keys.new_uuid()
        world.backend.create_budget(budget_id, **limits)
        return budget_id

    return make


def used(world, budget_id):
    found = world.raw.hgetall(keys.budget_usage(budget_id))
    return {name.decode(): int(amount) for name, amount in found.items() if int(amount)}


def report(world, handle, key=None, **amounts):
    custom = {n: a for n, a in amounts.items() if n not in ("input_tokens", "output_tokens", "wall_ms")}  # fmt: skip
    named = {n: a for n, a in amounts.items() if n not in custom}
    usage = UsageDimensions(custom=custom, dedup_key=key, **named)
    return world.backend.report_usage(handle, usage)


def ledger(world, eid):
    return world.backend.describe(eid).usage


@pytest.mark.cluster
def test_every_dimension_is_counted(world, budget):
    b = budget(hard={"input_tokens": 100})
    eid, handle = world.owned(budgets=[b])
    for _ in range(2):
        assert report(world, handle, input_tokens=1, output_tokens=2, wall_ms=3, calls=4) == (
            ReportUsageResult(OK)
        )
    total = {"input_tokens": 2, "output_tokens": 4, "wall_ms": 6, "calls": 8}
    assert ledger(world, eid) == used(world, b) == total


@pytest.mark.parametrize("amount", [10**15, 10**15 + 1, TOP - 1, TOP])
def test_great_totals_stay_exact(world, budget, amount):
    b = budget(soft={"calls": 10**15 - 1})
    eid, handle = world.owned(budgets=[b])
    result = report(world, handle, calls=amount)
    assert (result.verdict, result.current, result.limit) == (SOFT, amount, 10**15 - 1)
    assert ledger(world, eid) == used(world, b) == {"calls": amount}


def test_a_count_that_would_lose_digits_is_refused(world, budget):
    b = budget(soft={"calls": 1})
    eid, handle = world.owned(budgets=[b])
    report(world, handle, calls=TOP)
    with pytest.raises(errors.InvalidInput):
        report(world, handle, calls=1)
    with pytest.raises(errors.InvalidInput):
        report(world, handle, calls=2**53 + 1)
    assert ledger(world, eid) == used(world, b) == {"calls": TOP}


def test_a_count_that_would_lose_digits_in_the_budget_alone_is_refused(world, budget):
    first, full = budget(hard={"x": 1}), budget(soft={"calls": 1})
    _, other = world.owned(budgets=[full])
    report(world, other, calls=TOP)
    eid, handle = world.owned(budgets=[first, full])
    with pytest.raises(errors.InvalidInput):
        report(world, handle, calls=1)
    assert ledger(world, eid) == used(world, first) == {}


def test_a_dimension_stands_once_in_a_report(world, budget):
    b = budget(hard={"calls": 100})
    eid, handle = world.owned(budgets=[b])
    attempt = ops.Attempt.of(handle)
    usage = UsageDimensions(custom={"calls": 60}, dedup_key="k")
    for op in (
        ops.charge_budget(b, eid, "k", usage, 1000),
        ops.report_usage(attempt, usage, "k", apply=True),
    ):
        doubled = op._replace(argv=(*op.argv, b"calls", b"60"))
        with pytest.raises(errors.InvalidInput):
            world.call(doubled)
    with pytest.raises(errors.InvalidInput):
        UsageDimensions(custom={"input_tokens": 1})
    assert ledger(world, eid) == used(world, b) == {}


def test_an_unknown_budget_is_refused_and_nothing_is_counted(world, budget):
    """Found a defect of ours: the budgets before the unknown one stayed charged."""
    known, unknown = budget(hard={"calls": 9}), keys.new_uuid()
    eid, handle = world.owned(budgets=[known, unknown])
    with pytest.raises(errors.BudgetNotFound):
        report(world, handle, "k", calls=2)
    assert ledger(world, eid) == used(world, known) == used(world, unknown) == {}
    assert world.raw.keys(f"*{unknown}*") == []
    world.backend.create_budget(unknown, hard={"calls": 9})
    assert report(world, handle, "k", calls=2).verdict is OK
    assert used(world, known) == used(world, unknown) == {"calls": 2}


@pytest.mark.parametrize(
    "bad", [b"1.5", b"-1", b"1e3", b"", b"x", b"0x1", b" 1", b"9007199254740992"]
)
def test_only_counts_are_accepted_before_anything_is_written(world, budget, bad):
    b = budget(hard={"calls": 100})
    eid, handle = world.owned(budgets=[b])
    usage = UsageDimensions(input_tokens=1, custom={"calls": 7}, dedup_key="k")
    for op in (
        ops.charge_budget(b, eid, "k", usage, 1000),
        ops.report_usage(ops.Attempt.of(handle), usage, "k", apply=True),
    ):
        assert op.argv[-1] == b"7"
        with pytest.raises(errors.InvalidInput):
            world.call(op._replace(argv=(*op.argv[:-1], bad)))
        with pytest.raises(errors.InvalidInput):
            world.call(op._replace(argv=op.argv[:-1]))
    assert ledger(world, eid) == used(world, b) == {}
    assert report(world, handle, "k", calls=7).verdict is OK


def test_a_hard_limit_refuses_the_whole_report(world, budget):
    b = budget(hard={"calls": 10}, soft={"output_tokens": 5})
    eid, handle = world.owned(budgets=[b])
    assert report(world, handle, "a", calls=10, output_tokens=5).verdict is OK
    result = report(world, handle, "b", calls=1, output_tokens=7)
    assert result == ReportUsageResult(HARD, b, "calls", 10, 10)
    assert ledger(world, eid) == used(world, b) == {"calls": 10, "output_tokens": 5}
    # Refused is not applied: the same report can be made again when there is room.
    world.backend.create_budget(b, hard={"calls": 11}, soft={"output_tokens": 5})
    result = report(world, handle, "b", calls=1, output_tokens=7)
    assert result == ReportUsageResult(SOFT, b, "output_tokens", 12, 5)
    assert report(world, handle, "b", calls=1, output_tokens=7).verdict is AGAIN
    assert ledger(world, eid) == used(world, b) == {"calls": 11, "output_tokens": 12}


def test_a_limit_of_zero_is_a_limit(world, budget):
    _, handle = world.owned(budgets=[budget(hard={"calls": 0})])
    assert report(world, handle, calls=1).verdict is HARD
    assert report(world, handle, other=1).verdict is OK
    assert report(world, handle).verdict is OK


@pytest.mark.parametrize("full", range(3))
def test_several_budgets_all_or_none(world, budget, full):
    budgets = [budget(hard={"calls": 1 if i == full else 100}) for i in range(3)]
    eid, handle = world.owned(budgets=budgets)
    result = report(world, handle, "k", calls=2, x=3)
    assert (result.verdict, result.budget_id) == (HARD, budgets[full])
    assert ledger(world, eid) == {}
    assert [used(world, b) for b in budgets] == [{}, {}, {}]
    assert report(world, handle, "k", calls=1, x=3).verdict is OK
    assert [used(world, b) for b in budgets] == [{"calls": 1, "x": 3}] * 3
    assert ledger(world, eid) == {"calls": 1, "x": 3}


def test_taking_a_charge_back_takes_back_what_was_charged(world, budget):
    """A defect of ours: the amounts of the refused report were taken, whatever the first one of its key had been."""
    first, second = budget(hard={"calls": 100}), budget(hard={"calls": 5})
    eid, handle = world.owned(budgets=[first, second])
    # The first report died after its first charge.
    usage = UsageDimensions(custom={"calls": 3}, dedup_key="k")
    world.call(ops.charge_budget(first, eid, "k", usage, 60_000))
    world.call(ops.charge_budget(first, eid, "other", usage, 60_000))
    assert report(world, handle, "k", calls=6).verdict is HARD
    assert used(world, first) == {"calls": 3}


def test_a_report_that_lost_its_reply_is_completed_by_its_repeat(world, budget):
    b, c = budget(hard={"calls": 100}), budget(hard={"calls": 100})
    eid, handle = world.owned(budgets=[b, c])
    usage = UsageDimensions(custom={"calls": 3}, dedup_key="k")
    world.call(ops.charge_budget(b, eid, "k", usage, 60_000))
    for verdict in (OK, AGAIN, AGAIN):
        assert report(world, handle, "k", calls=3).verdict is verdict
    assert ledger(world, eid) == used(world, b) == used(world, c) == {"calls": 3}


def test_without_a_key_every_report_counts_once(world):
    eid, handle = world.owned()
    for _ in range(3):
        assert report(world, handle, calls=1).verdict is OK
        assert report(world, handle, "", calls=1).verdict is OK
    assert ledger(world, eid) == {"calls": 6}


def test_keys_are_of_one_execution(world, budget):
    b = budget(hard={"calls": 100})
    for n in (1, 2):
        _, handle = world.owned(budgets=[b])
        assert report(world, handle, "k {x}\u00e9", calls=1).verdict is OK
        assert used(world, b) == {"calls": n}


@pytest.mark.parametrize("how", ["lapsed", "stolen", "completed", "suspended", "unknown"])
def test_usage_is_fenced(world, budget, how):
    b = budget(hard={"calls": 100})
    eid, handle = world.owned(budgets=[b])
    if how == "lapsed":
        world.due(eid, "lease")
        error = errors.LeaseExpired
    elif how == "stolen":
        world.fire(eid, "lease")
        world.claim()
        error = errors.StaleOwner
    elif how == "completed":
        world.backend.complete(handle)
        error = errors.ExecutionNotActive
    elif how == "suspended":
        world.raw.hset(keys.core(eid), "state", "suspended")
        error = errors.ExecutionSuspended
    else:
        world.raw.delete(keys.core(eid))
        error = errors.ExecutionNotFound
    with pytest.raises(error):
        report(world, handle, calls=1)
    assert used(world, b) == {}
    assert world.raw.hgetall(keys.usage(eid)) == {}


def test_a_lease_that_is_lost_in_the_middle_takes_the_charges_back(world, budget):
    """A defect of ours: the budgets stayed charged for a report that the execution refused."""
    b, c = budget(hard={"calls": 100}), budget(hard={"calls": 100})
    eid, handle = world.owned(budgets=[b, c])

    usage = UsageDimensions(custom={"calls": 3}, dedup_key="k")

    def cut():
        flow = usage_core.report_usage(ops.Attempt.of(handle), usage, "k")
        step = next(flow)
        charges = 0
        while True:
            charges += b"ff_charge_budget" in request_of(step)
            replies = yield step
            if charges == 2:
                world.due(eid, "lease")
            try:
                step = flow.send(replies)
            except StopIteration as stop:
                return stop.value

    with pytest.raises(errors.LeaseExpired):
        world.backend._run(Call(cut))
    assert used(world, b) == used(world, c) == {}


def test_many_workers_never_pass_a_hard_limit(world, budget):
    b = budget(hard={"calls": 50})
    handles = [world.owned(budgets=[b])[1] for _ in range(4)]
    verdicts = []

    def work(handle):
        verdicts.extend(report(world, handle, calls=1).verdict for _ in range(30))

    threads = [threading.Thread(target=work, args=(handle,)) for handle in handles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert used(world, b) == {"calls": 50}
    assert (verdicts.count(OK), verdicts.count(HARD)) == (50, 70)


def test_usage_survives_the_attempt_and_ends_with_the_execution(world):
    eid, handle = world.owned()
    report(world, handle, "k", calls=1)
    world.fire(eid, "lease")
    successor = world.claim()
    assert report(world, successor, "k", calls=1).verdict is AGAIN
    assert report(world, successor, "l", calls=1).verdict is OK
    world.backend.complete(successor)
    assert ledger(world, eid) == {"calls": 2}
    world.check(eid)


# -- what is remembered has an end -------------------------------------------------------------------------


def test_reports_leave_nothing_behind_that_grows(world, budget):
    """The reports that are remembered, by an execution and by a budget, are those of a window."""
    b = budget(hard={"calls": 10_000})
    eid, handle = world.owned(budgets=[b])
    charges = keys.budget_charges(b, eid)
    fields = []
    for number in (250, 50):
        for _ in range(number):
            assert report(world, handle, calls=1).verdict is OK
        fields.append((world.raw.hlen(window(eid, "recent")), world.raw.hlen(charges)))
    assert fields == [(2 * 100 + 1, 2 * 200 + 1)] * 2
    assert ledger(world, eid) == used(world, b) == {"calls": 300}
    assert world.raw.hlen(window(eid, "dedup")) == 0
    assert 0 < world.raw.pttl(charges) <= 3_600_000


def test_a_report_that_was_taken_back_is_remembered_when_it_is_made_again(world, budget):
    b = budget(hard={"calls": 10_000})
    eid, _ = world.owned(budgets=[b])
    once = UsageDimensions(custom={"calls": 1})

    def charged(name):
        return world.call(ops.charge_budget(b, eid, name, once, 60_000)).verdict

    for _ in range(3):
        assert charged("k") is OK
        world.call(ops.release_charge(b, eid, "k"))
        world.call(ops.release_charge(b, eid, "k"))
    assert charged("k") is OK
    for n in range(199):
        assert charged(f"other {n}") is OK
    assert charged("k") is AGAIN
    assert used(world, b) == {"calls": 200}


def window(eid, name):
    return f"ff:exec:{keys.slot_tag_of(eid)}:{eid}:usage:{name}"


def test_the_last_thousand_keys_count_once_and_older_ones_are_forgotten(world):
    eid, handle = world.owned()
    attempt = ops.Attempt.of(handle)

    def reported(*numbers):
        with world.raw.pipeline(transaction=False) as pipeline:
            for n in numbers:
                usage = UsageDimensions(custom={"calls": 1}, dedup_key=f"k{n}")
                op = ops.report_usage(attempt, usage, f"k{n}", apply=True)
                pipeline.fcall(op.function, len(op.keys), *op.keys, *op.argv)
            return [op.answer(reply).already_applied for reply in pipeline.execute()]

    assert not any(reported(*range(1_001)))
    assert all(reported(*range(1, 1_001)))
    assert reported(0) == [False]
    assert ledger(world, eid) == {"calls": 1_002}
    assert world.raw.hlen(window(eid, "dedup")) == 2 * 1_000 + 1


@pytest.mark.parametrize("lost", range(4))
def test_a_report_without_a_key_that_loses_a_reply_counts_once(world, budget, lost):
    """The same call sends the same id again, whichever of its replies was lost."""
    b = budget(hard={"calls": 100})
    eid, handle = world.owned(budgets=[b])
    request = operations.report_usage(
        world.backend._deployment, handle, UsageDimensions(custom={"calls": 1})
    )

    def cut():
        steps = request.steps()
        step = next(steps)
        for _ in range(lost):
            replies = yield step
            try:
                step = steps.send(replies)
            except StopIteration:
                return

    world.backend._run(Call(cut))
    assert world.backend._run(Call(request.steps)).verdict in (OK, AGAIN)
    assert ledger(world, eid) == used(world, b) == {"calls": 1}

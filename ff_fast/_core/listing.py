"""Listings over all partitions: each partition answers in the order of the listing, and its answers are merged."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from ff_fast import keys
from ff_fast._core import ops
from ff_fast._core.ops import Filter
from ff_fast._core.steps import Step, Steps
from ff_fast.errors import InvalidCursor, InvalidId
from ff_fast.types import ExecutionPage, LaneSummary, WorkerSummary

if TYPE_CHECKING:
    from ff_fast.types import ExecutionSummary

# Rounds of one page: a filter that lets little pass ends a page before it is full.
_ROUNDS = 24
_LEAST_ASKED, _MOST_ASKED = 4, 48
_ACTIVE_A_PAGE = 1_000
_COUNTED = ("delayed", "waiting_children", "active", "suspended", "failed")

# No execution of its millisecond stands behind it.
_LEAST = "{fp:0}:00000000-0000-0000-0000-000000000000"
_CURSOR = re.compile(r"(\d{1,13})\.(fp\d{1,5}-[0-9a-f-]{36})", re.ASCII)


class Place(NamedTuple):
    """Place of an execution in the listing: greater ones come first. Without an id it is behind all of its time."""

    ms: int
    execution_id: str

    @classmethod
    def of(cls, cursor: object) -> Place:
        """Return the place that a cursor names."""
        found = _CURSOR.fullmatch(cursor) if isinstance(cursor, str) else None
        if found is None:
            raise InvalidCursor("after must be the next of a page of list_executions, or None.")
        execution_id = keys.canonical_execution_id(found[2])
        return cls(int(found[1]), "" if execution_id == _LEAST else execution_id)

    @classmethod
    def told(cls, ms: int, member: str) -> Place:
        """Return the place of a member of an index. Whatever else has the time of a foreign one is passed over with it."""
        try:
            return cls(ms, keys.canonical_execution_id(member))
        except InvalidId:
            return cls(ms, "")

    @property
    def cursor(self) -> str:
        """Its cursor."""
        return f"{self.ms}.{keys.url_id(self.execution_id or _LEAST)}"


class _Partition:
    """What is known of the listing of one partition.

    Attributes:
        found: What it has answered and the page has not, in the order of the listing.
        place: Where it continues; None where it has no more, and before its first answer the place of the page.
    """

    __slots__ = ("asked", "ended", "found", "index", "place")

    def __init__(self, index: int, place: Place | None, asked: int) -> None:
        self.index = index
        self.place = place
        self.asked = asked
        self.ended = False
        self.found: list[tuple[Place, ExecutionSummary]] = []

    def told(self, answer: ops.Listed) -> None:
        self.found += [(Place(*place), each) for place, each in answer.found]
        then = None if answer.then is None else Place.told(*answer.then)
        # A place that does not lead on would be asked for without end.
        self.ended = then is None or (self.place is not None and then >= self.place)
        self.place = then
        self.asked = min(2 * self.asked, _MOST_ASKED)


def executions(
    partitions: int, wanted: Filter, after: Place | None, count: int
) -> Steps[ExecutionPage]:
    """Return the page of *count* executions that follows *after*."""
    first = min(max(2 * count // partitions + 2, _LEAST_ASKED), _MOST_ASKED)
    parts = [_Partition(index, after, first) for index in range(partitions)]
    due = parts
    settled: list[tuple[Place, ExecutionSummary]] = []
    horizon: Place | None = None
    for _ in range(_ROUNDS):
        asked = [ops.list_executions(each.index, wanted, each.place, each.asked) for each in due]
        replies = yield Step([op.command() for op in asked], large=True)
        for each, op, reply in zip(due, asked, replies, strict=True):
            each.told(op.answer(reply))
        open_parts = [each for each in parts if not each.ended]
        # Up to here every partition is known.
        horizon = max((each.place for each in open_parts if each.place), default=None)
        everything = sorted(
            (one for each in parts for one in each.found), key=lambda one: one[0], reverse=True
        )
        settled = [one for one in everything if horizon is None or one[0] >= horizon]
        if not open_parts or len(settled) >= count:
            break
        # What stands behind the last one of a full page is not asked for.
        last = everything[count - 1][0] if len(everything) >= count else None
        due = [
            each for each in open_parts if last is None or each.place is None or each.place > last
        ]
    taken = settled[:count]
    then: Place | None = horizon
    if len(settled) > count or (taken and len(taken) == count and horizon is not None):
        then = taken[-1][0]
    return ExecutionPage(tuple(each for _, each in taken), None if then is None else then.cursor)


def lanes(partitions: int) -> Steps[tuple[LaneSummary, ...]]:
    """Return what is in the lanes, those with the most work first."""
    queues: dict[int, str] = dict.fromkeys(range(partitions), "-")
    offsets: dict[int, str] = dict.fromkeys(range(partitions), "0")
    waiting: dict[str, int] = {}
    oldest: dict[str, int] = {}
    counts: dict[tuple[str, str], int] = {}
    while queues or offsets:
        asked = sorted({*queues, *offsets})
        calls = [
            ops.list_lanes(index, queues.get(index, ""), offsets.get(index, "")) for index in asked
        ]
        replies = yield Step([op.command() for op in calls])
        queues, offsets = {}, {}
        for index, op, reply in zip(asked, calls, replies, strict=True):
            answer = op.answer(reply)
            if answer.next_queue:
                queues[index] = answer.next_queue
            if answer.next_offset:
                offsets[index] = answer.next_offset
            for queue, number, created in answer.queues:
                lane = unquote(queue.partition(":")[0])
                waiting[lane] = waiting.get(lane, 0) + number
                oldest[lane] = min(oldest.get(lane, created), created)
            for state, lane, number in answer.counts:
                counts[lane, state] = counts.get((lane, state), 0) + number
    found = []
    for lane in {*waiting, *(lane for lane, _ in counts)}:
        told = {state: counts.get((lane, state), 0) for state in _COUNTED}
        found.append(
            LaneSummary(
                lane=lane,
                waiting=waiting.get(lane, 0),
                oldest_waiting_at_ms=oldest.get(lane),
                **told,
            )
        )
    return tuple(sorted(found, key=lambda each: (-each.waiting - each.active, each.lane)))


def workers(partitions: int) -> Steps[tuple[WorkerSummary, ...]]:
    """Return the workers that hold leases, those with the most first."""
    # Of many executions only sums are kept.
    held: dict[tuple[str, str], WorkerSummary] = {}
    after: Place | None = None
    while True:
        page = yield from executions(partitions, Filter(("active",)), after, _ACTIVE_A_PAGE)
        for each in page.items:
            name = each.worker_id or "", each.worker_instance_id or ""
            held[name] = _with(held.get(name), name, each)
        if page.next is None:
            break
        after = Place.of(page.next)
    return tuple(
        sorted(
            held.values(),
            key=lambda each: (-each.executions, each.worker_id, each.worker_instance_id),
        )
    )


def _with(
    before: WorkerSummary | None, name: tuple[str, str], execution: ExecutionSummary
) -> WorkerSummary:
    """Return a worker with one execution more."""
    lane, claimed_ms = execution.lane, execution.last_transition_at_ms
    expires_ms = execution.lease_expires_at_ms or 0
    if before is None:
        return WorkerSummary(*name, (lane,), 1, claimed_ms, expires_ms)
    lanes = before.lanes if lane in before.lanes else tuple(sorted((*before.lanes, lane)))
    return WorkerSummary(
        *name,
        lanes,
        before.executions + 1,
        min(before.oldest_claim_at_ms, claimed_ms),
        min(before.next_lease_expires_at_ms, expires_ms),
    )

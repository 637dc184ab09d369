"""The ready queues of a lane: hints which partitions have work.

A ready queue is a sorted set of partitions, scored by the best execution of each. A lane has one for executions that
require no capabilities, and one for each set of required capabilities, so that a worker pops no hint that it cannot use.
The executions themselves are in the partitions' eligible sets. A lost hint therefore delays work until the next look,
and a stale hint costs one empty claim. Lane and partition are in different slots, so a hint is a separate command after
the call that made work claimable. That call is done by then, so a hint that is refused or lost never becomes its error.

Beside each queue is a record of the partitions that were hinted and not found empty since: whoever finds the queue empty
looks there, because somebody else may have taken a hint and not claimed yet.
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, TypeVar

from ff_fast import keys
from ff_fast._core import ops
from ff_fast._core.line import Head, Line
from ff_fast._core.steps import Command, Step, Steps, checked, command, is_foreign
from ff_fast.errors import FFError

if TYPE_CHECKING:
    from collections.abc import Iterable

T = TypeVar("T")

_NEEDS_OF_A_PARTITION = 64
"""A sweep reads at most so many sets of required capabilities of a partition, at random where there are more."""

_HEADS_A_STEP = 4096

_KEPT_MS = b"86400000"
"""Time for which a lane keeps the record of hinted partitions, if there is no claim and no hint meanwhile."""

_NEEDS_LIMIT = 1024
"""Sets of required capabilities that a worker asks for; a lane's registry holds as many."""


class Offer:
    """What a kind of worker may take from a lane.

    Attributes:
        lane: The lane.
        tokens: The capabilities that the worker offers.
        plain: Whether it takes executions that require nothing.
        needs: The registered sets of required capabilities that they cover, as comma-separated text. The first is the
            empty one, if it is *plain*.
        seen: Score of the newest entry of the lane's registry that was read.
        idle: Whether the last claim found nothing.
        line: The claims of such workers that wait.
        rush: Those that do not wait for work, and ask together.
        asking: Number of claims that ask on their own.
        empty: The records of hinted partitions that were found empty, with the mark that they had before: while a
            record has this mark, its partition needs no second look.
    """

    __slots__ = (
        "asking",
        "empty",
        "idle",
        "lane",
        "line",
        "needs",
        "plain",
        "rush",
        "seen",
        "tokens",
    )

    def __init__(self, lane: str, tokens: Iterable[str], *, plain: bool = True) -> None:
        self.lane = lane
        self.tokens = frozenset(tokens)
        self.plain = plain
        self.needs = [""] if plain else []
        self.seen = 0
        self.idle = False
        self.line = Line()
        self.rush = Line()
        self.asking = 0
        self.empty: dict[tuple[str, bytes], bytes] = {}

    @property
    def kind(self) -> tuple[str, frozenset[str], bool]:
        """What tells workers of this kind from others."""
        return self.lane, self.tokens, self.plain

    def read(self, told: list[bytes]) -> bool:
        """Take note of new entries of the registry, with their scores; return whether one is covered."""
        known = len(self.needs)
        for required, score in zip(told[::2], told[1::2], strict=True):
            self.learn(required)
            self.seen = max(self.seen, int(float(score)))
        return len(self.needs) > known

    def learn(self, required: bytes) -> None:
        """Take note of a set of required capabilities, if the offered ones cover it."""
        needs = required.decode("utf-8", "replace")
        if needs not in self.needs and self.tokens.issuperset(needs.split(",")):
            if len(self.needs) > _NEEDS_LIMIT:
                # It is learned anew with the next work that requires it.
                del self.needs[int(self.plain)]
            self.needs.append(needs)


def listed(reply: object) -> list[bytes]:
    """Return the answer to a plain command; an empty list where the key is of another type."""
    return [] if is_foreign(reply) else checked(reply)


def partition_of(member: bytes) -> int | None:
    """Return the partition that a hint names; None for a foreign record."""
    if member.isdigit() and len(member) <= 5 and int(member) <= keys.MAX_PARTITIONS:
        return int(member)
    return None


def hint(lane: str, needs: str, score: bytes, partition: int) -> list[Command]:
    """Return the commands that publish a hint; the best score of a partition wins."""
    mark = b"%x" % random.getrandbits(48)
    if needs:
        return [ops.hint(lane, needs, score, partition, mark, _KEPT_MS).command()]
    member, record = b"%d" % partition, keys.hinted(lane)
    return [
        command(b"ZADD", keys.ready(lane), b"LT", score, member),
        command(b"HSET", record, member, mark),
        command(b"PEXPIRE", record, _KEPT_MS),
    ]


def requeue(lane: str, head: Head, score: bytes | None = None) -> Command:
    """Return the command that puts a popped hint back, perhaps with another score; the record has its partition still."""
    best = b"%.0f" % head.score if score is None else score
    return command(b"ZADD", keys.ready(lane, head.needs), b"LT", best, b"%d" % head.partition)


def with_hints(op: ops.Op[tuple[T, ops.Hints]], partition: int) -> Steps[T]:
    """Make a call that may make executions of *partition* claimable, then publish their hints."""
    (reply,) = yield Step((op.command(),))
    value, hints = op.answer(reply)
    yield from publish_hints(hints, partition)
    return value


def publish_hints(hints: ops.Hints, partition: int) -> Steps[None]:
    """Publish the scores of the best executions in *partition*; a look finds what cannot be published."""
    if hints:
        yield from _publish([each for told in hints for each in hint(*told, partition)])


def _publish(hints: list[Command]) -> Steps[bool]:
    """Send hints; return whether all of them were taken."""
    with contextlib.suppress(FFError):
        return not any(isinstance(reply, Exception) for reply in (yield Step(hints)))
    return False


def heads_of(lane: str, places: list[tuple[str, int]]) -> Steps[list[Head | FFError | None]]:
    """Return the best execution of each place, which is a requirement and a partition.

    It is None where there is none, and an error where the node of the partition did not answer.
    """
    found: list[Head | FFError | None] = []
    for start in range(0, len(places), _HEADS_A_STEP):
        part = places[start : start + _HEADS_A_STEP]
        replies = yield Step(
            [
                command(
                    b"ZRANGE",
                    keys.eligible(keys.slot_tag(partition), lane, needs),
                    *(b"0", b"0", b"WITHSCORES"),
                )
                for needs, partition in part
            ],
            partial=True,
        )
        for (needs, partition), reply in zip(part, replies, strict=True):
            if isinstance(reply, FFError):
                found.append(reply)
            else:
                best = listed(reply)
                found.append(Head(float(best[1]), needs, partition) if best else None)
    return found


def _heads_in(found: list[Head | FFError | None], *, patient: bool) -> list[Head]:
    """Return the executions that :func:`heads_of` has found.

    Args:
        found: Its result.
        patient: It does not matter now what stands at nodes that did not answer.

    Raises:
        FFError: There are none, and a node did not answer.
    """
    heads = [each for each in found if isinstance(each, Head)]
    unread = next((each for each in found if isinstance(each, FFError)), None)
    if unread is not None and not heads and not patient:
        raise unread
    return heads


def sweep(offer: Offer, partitions: int, *, patient: bool = True) -> Steps[bool]:
    """Publish a hint for every partition with work for *offer*; return whether any has.

    Raises:
        FFError: None has, a node of a cluster did not answer, and the caller is not *patient*.
    """
    lane = offer.lane
    places = [("", index) for index in range(partitions if offer.plain else 0)]
    if offer.tokens:
        limit = b"%d" % _NEEDS_OF_A_PARTITION
        replies = yield Step(
            [
                command(b"SRANDMEMBER", keys.needs(keys.slot_tag(index), lane), limit)
                for index in range(partitions)
            ],
            partial=True,
        )
        for index, reply in enumerate(replies):
            # What does not answer here does not answer below.
            for each in () if isinstance(reply, FFError) else listed(reply):
                offer.learn(each)
                needs = each.decode("utf-8", "replace")
                if needs in offer.needs:
                    places.append((needs, index))
    heads = _heads_in((yield from heads_of(lane, places)), patient=patient)
    yield from publish_heads(lane, heads)
    return bool(heads)


def publish_heads(lane: str, heads: list[Head]) -> Steps[None]:
    """Publish a hint for each of *heads*; one that is refused is left to the next look."""
    commands = [
        each
        for head in heads
        for each in hint(lane, head.needs, b"%.0f" % head.score, head.partition)
    ]
    if commands:
        yield Step(commands)


def hinted_records(lane: str, required: list[str]) -> list[Command]:
    """Return the commands that read the records of the hinted partitions, one for each requirement."""
    return [command(b"HGETALL", keys.hinted(lane, needs)) for needs in required]


def hinted_heads(
    offer: Offer, records: list[tuple[str, object]], *, patient: bool = False
) -> Steps[list[Head]]:
    """Return those of the hinted partitions that have work, best first; forget those that have none.

    Args:
        offer: Whose records they are.
        records: Each requirement, with the reply to its command of :func:`hinted_records`.
        patient: The caller looks again if nodes do not answer.

    Raises:
        FFError: None has, a node of a cluster did not answer, and the caller is not *patient*.
    """
    places: list[tuple[str, int]] = []
    read: list[tuple[str, bytes, bytes]] = []
    forget: dict[str, list[bytes]] = {}
    known: dict[tuple[str, bytes], bytes] = {}
    for needs, reply in records:
        record = listed(reply)
        for member, mark in zip(record[::2], record[1::2], strict=True):
            partition = partition_of(member)
            if offer.empty.get((needs, member)) == mark:
                known[needs, member] = mark
            elif partition is None:
                forget.setdefault(needs, []).extend((member, mark))
            else:
                places.append((needs, partition))
                read.append((needs, member, mark))
    # What is in no record any more is forgotten here too.
    offer.empty = known
    heads = yield from heads_of(offer.lane, places)
    for (needs, member, mark), head in zip(read, heads, strict=True):
        if head is None:
            offer.empty[needs, member] = mark
            forget.setdefault(needs, []).extend((member, mark))
    if forget:
        yield Step(
            [
                ops.forget_hints(offer.lane, needs, pairs).command()
                for needs, pairs in forget.items()
            ]
        )
    return sorted(_heads_in(heads, patient=patient))

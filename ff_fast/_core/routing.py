"""Routing: to which node each command of a step goes, and what becomes of those that a node has refused.

A shell drives a :class:`Routing` in rounds: it sends what :meth:`Routing.sends` says, to all nodes at once, passes on the
replies, and asks :meth:`Routing.settle` how long to wait before the next round. A refusal that comes before a command was
executed (a redirect, a node that is loading) says that the command was not applied, so it goes again; those of one slot go
again in their order.
"""

from __future__ import annotations

import time
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from ff_fast._core.steps import Command, Step
from ff_fast._core.topology import Address, address_of
from ff_fast._hot.resp import pack_command
from ff_fast.errors import (
    FFError,
    FunctionMissing,
    NotPrimary,
    Outcome,
    ProtocolError,
    Redirected,
    Unavailable,
    from_server_error,
    make_unknown,
    name_server,
    told_by,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ff_fast._core.steps import Retries
    from ff_fast._core.topology import Topology

AT_ONCE = 4
"""Number of rounds that follow redirects without a pause; redirects that go on are those of a cluster in doubt."""

_ASKING = Command(b"", pack_command(b"ASKING"))
_REFUSALS = frozenset(
    {
        "MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "LOADING", "READONLY", "UNBLOCKED",
    }
)  # fmt: skip
_OF_ONE_SLOT = frozenset({"ASK", "TRYAGAIN", "LOADING", "UNBLOCKED"})
# Of a slot that no node is known to have; the text is a server's own.
_NO_OWNER = "CLUSTERDOWN Hash slot not served"


class Send(NamedTuple):
    """Commands that go to one node, in one write.

    Attributes:
        address: The node.
        step: The commands; where *asking* is set, each behind an ``ASKING``.
        indexes: Their places in the step that is routed.
        asking: They follow a redirect of one slot's migration.
        replica: The node need not be the primary.
    """

    address: Address
    step: Step
    indexes: tuple[int, ...]
    asking: bool = False
    replica: bool = False


class Routing:
    """One step on its way to the nodes of a cluster.

    Args:
        step: The step.
        topology: The map of the slots.
        retries: Those of the call, which bound all rounds.
        replicas: Replicas may answer.
        until: When the caller's time is up, in monotonic time.

    Attributes:
        moved: A redirect has shown that the map is old; a refresh may run meanwhile.
        in_doubt: The map has to be asked for before the next round.
        missing: Nodes that lack the library, to be loaded before :meth:`settle`.
    """

    __slots__ = (
        "_again", "_ask", "_due", "_failure", "_loaded", "_pause_for", "_primary_only", "_replicas", "_replies",
        "_retries", "_rounds", "_step", "_topology", "_until", "in_doubt", "missing", "moved",
    )  # fmt: skip

    def __init__(
        self,
        step: Step,
        topology: Topology,
        retries: Retries,
        *,
        replicas: bool = False,
        until: float = inf,
    ) -> None:
        self._step = step = step.in_cluster
        self._topology = topology
        self._retries = retries
        self._replicas = replicas and not step.block_s
        self._until = until
        self._replies: list[object] = [None] * len(step.commands)
        self._due: Sequence[int] = range(len(step.commands))
        self._again: list[int] = []
        # Where a redirect of a slot's migration sends a command.
        self._ask: dict[int, Address] = {}
        self._primary_only: set[int] = set()
        self._rounds = 0
        self._pause_for: FFError | None = None
        self._failure: FFError | None = None
        self._loaded: set[Address] = set()
        self.moved = False
        self.in_doubt = False
        self.missing: set[Address] = set()

    def sends(self) -> list[Send]:
        """Return what goes out in this round, one write for each node."""
        self.moved = self.in_doubt = False
        self._again, self._pause_for = [], None
        self._rounds += 1
        groups: dict[tuple[Address, bool, bool], list[int]] = {}
        for index in self._due:
            place = self._place(index)
            if place is None:
                self._refused(index, Exception(_NO_OWNER), None)
            else:
                groups.setdefault(place, []).append(index)
        return [
            Send(address, self._part(indexes, asking=asking), tuple(indexes), asking, replica)
            for (address, asking, replica), indexes in groups.items()
        ]

    def _place(self, index: int) -> tuple[Address, bool, bool] | None:
        asked = self._ask.pop(index, None)
        if asked is not None:
            return asked, True, False
        topology, slot = self._topology, self._step.commands[index].slot
        if slot is None:
            primaries = topology.primaries
            return (primaries[0], False, False) if primaries else None
        if self._replicas and index not in self._primary_only:
            replicas = topology.replicas(slot)
            if replicas:
                return replicas[slot % len(replicas)], False, True
        primary = topology.primary(slot)
        return None if primary is None else (primary, False, False)

    def _part(self, indexes: list[int], *, asking: bool) -> Step:
        if len(indexes) == len(self._step.commands) and not asking:
            return self._step
        commands = [self._step.commands[index] for index in indexes]
        if asking:
            commands = [each for command in commands for each in (_ASKING, command)]
        return self._step._replace(commands=commands)

    def answered(self, send: Send, replies: list[object]) -> None:
        """Take the replies to what went to one node."""
        answers = replies[1::2] if send.asking else replies
        for index, reply in zip(send.indexes, answers, strict=True):
            self._replies[index] = reply
            if isinstance(reply, Exception):
                self._look_at(index, reply, send)

    def _look_at(self, index: int, reply: Exception, send: Send) -> None:
        text = str(reply)
        rest = text.partition(" ")[2]
        if "script: " in text:
            # A command inside of a function was refused, perhaps after others.
            return
        if _word(reply) == "NOREPLICAS":
            self._replies[index] = Exception(told_by(text, *send.address))
        elif _word(reply) in _REFUSALS:
            self._refused(index, reply, send)
        elif rest.startswith("Function not found"):
            if send.replica:
                self._to_primary((index,))
            elif send.address not in self._loaded:
                self.missing.add(send.address)
                self._again.append(index)

    def _refused(self, index: int, reply: Exception, send: Send | None) -> None:
        """Note that a command was not applied, and goes again."""
        self._replies[index] = reply
        if send is not None and send.replica:
            self._to_primary((index,))
            return
        error = from_server_error(str(reply))
        if isinstance(error, ProtocolError):
            # A redirect that cannot be read; the reply stands.
            return
        self._again.append(index)
        if send is not None and isinstance(error, Unavailable | NotPrimary):
            self._replies[index] = Exception(told_by(str(reply), *send.address))
        if isinstance(error, Redirected) and send is not None:
            address = address_of(error.address, send.address)
            if not error.ask:
                self.moved = True
                self._topology.moved(error.slot, address)
                if self._rounds <= AT_ONCE:
                    return
            elif not _is_function(self._step.commands[index]) and self._rounds <= AT_ONCE:
                # A function also touches keys that its call does not name, so it waits until the whole slot has moved.
                self._ask[index] = address
                return
        if _word(reply) in _OF_ONE_SLOT:
            # It ends by itself, or with a redirect.
            self.moved = True
        else:
            self.in_doubt = True
        self._pause_for = error

    def _to_primary(self, indexes: Sequence[int]) -> None:
        self._primary_only.update(indexes)
        self._again.extend(indexes)

    def failed(self, send: Send, error: FFError) -> None:
        """Take the error of what went to one node: it was not sent, or the replies have not come."""
        if send.replica and error.retryable:
            self.moved = True
            self._to_primary(send.indexes)
            return
        self.in_doubt = True
        error = named(error, send.address)
        if self._step.partial:
            for index in send.indexes:
                self._replies[index] = error
        elif error.outcome is Outcome.NOT_APPLIED and error.retryable:
            for index in send.indexes:
                self._replies[index] = error
            self._again.extend(send.indexes)
            self._pause_for = error
        elif self._failure is None or self._failure.outcome is Outcome.NOT_APPLIED:
            self._failure = error

    def loaded(self, address: Address, error: FFError | None = None) -> None:
        """Note that the library was loaded on a node that lacked it, or why not."""
        self.missing.discard(address)
        if error is None:
            self._loaded.add(address)
        elif error.retryable and not isinstance(error, FunctionMissing):
            self.in_doubt = True
            self._pause_for = error
        elif self._failure is None:
            self._failure = named(error, address)

    def settle(self) -> float | None:
        """End a round; return the seconds until the next one, None if there is none."""
        self._due = sorted(self._again)
        if self._failure is not None or not self._due:
            return None
        if self._pause_for is None:
            return 0.0
        pause = self._retries.pause(self._pause_for)
        if pause is None or time.monotonic() + pause >= self._until:
            return None
        return pause

    def replies(self) -> list[object]:
        """Return the replies, in order; those of commands that were refused to the last are the refusals.

        Raises:
            FFError: Replies have not come.
        """
        failure = self._failure
        if failure is None and not self._step.partial:
            failure = next((each for each in self._replies if isinstance(each, FFError)), None)
        if failure is None:
            return self._replies
        applied = any(
            reply is not None and not isinstance(reply, Exception) for reply in self._replies
        )
        if applied and self._retries.writes:
            make_unknown(failure, "A part of the call was applied.")
        raise failure


def named(error: FFError, address: Address) -> FFError:
    """Return *error* with the address of the node that it concerns."""
    name_server(error, *address)
    return error


def _word(reply: Exception) -> str:
    return str(reply).partition(" ")[0]


def refusal(reply: object) -> FFError | None:
    """Return the error of a command that a node did not execute, for what it is or where the slot is; None otherwise."""
    if not isinstance(reply, Exception):
        return None
    text = str(reply)
    if "script: " in text or text.partition(" ")[0] not in _REFUSALS:
        return None
    return from_server_error(text)


def _is_function(command: Command) -> bool:
    return b"FCALL" in command.request[:24]

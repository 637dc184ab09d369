"""The nodes of a cluster: whom to ask for the topology, and how often."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ff_fast._core.steps import Command, Step
from ff_fast._core.topology import Address
from ff_fast._hot.resp import pack_command
from ff_fast.errors import (
    DeadlineExceeded,
    FFError,
    NotACluster,
    OutcomeUnknown,
    Unavailable,
    from_server_error,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ff_fast._core.steps import Retries
    from ff_fast._core.topology import Topology
    from ff_fast.types import ValkeyConnection

REFRESH_EVERY_S = 0.1
"""Shortest time between two refreshes of the topology, in seconds."""

ASK_S = 1.0
"""Longest time that one node gets for its answer, in seconds; then another one is asked."""

SILENT_S = 0.2
"""A node that owes replies for so long, in seconds, and sends nothing is asked for the topology after the others."""

FORGET_EVERY_S = 1.0
"""After this time, in seconds, a node that has left the cluster is looked at again if somebody waited for it."""

READ_AGAIN_S = 1.0
"""How long the primary answers in place of a replica that has failed, in seconds."""

_MOST_NAMED = 8
"""Bound of the addresses in one sentence."""

SLOTS = Step((Command(b"", pack_command(b"CLUSTER", b"SLOTS")),))


def seeds(server: ValkeyConnection) -> tuple[Address, ...]:
    """Return the nodes that a configuration names."""
    return tuple(Address(*each) for each in ((server.host, server.port), *server.seeds))


class Look:
    """One question to the nodes of a cluster, one after the other, for the topology.

    Those that have told it come after the others: a node that is cut off from the cluster knows only how it was.

    Args:
        topology: What is known.
        heard: The nodes with a connection that works, and when they were last heard of.
        seeds: The nodes that the configuration names.
        tls: The connections use TLS.

    Attributes:
        addresses: Whom to ask, in order, until one has told.
    """

    def __init__(
        self,
        topology: Topology,
        heard: Mapping[Address, float],
        seeds: tuple[Address, ...],
        *,
        tls: bool = False,
    ) -> None:
        told = topology.told
        latest = sorted(heard, key=lambda address: (told.get(address, 0), -heard[address]))
        self._topology = topology
        self._tls = tls
        topology.forming = False
        self._failure: FFError | None = None
        self.addresses = list(dict.fromkeys([*latest, *topology.addresses, *seeds]))

    def answered(self, address: Address, replies: list[object]) -> bool:
        """Take the replies to :data:`SLOTS`; return whether the node has told the topology."""
        if not any(replies):
            # It has left the cluster, or has not joined it yet.
            self._topology.forming = True
            return False
        try:
            _learn(self._topology, replies, address)
        except FFError as error:
            self.failed(address, error)
            return False
        return True

    def failed(self, address: Address, error: FFError) -> None:
        """Note that a node could not be asked, or did not answer."""
        if isinstance(error, DeadlineExceeded | OutcomeUnknown):
            # Nothing was to be applied.
            error = silent(address, tls=self._tls)
        # The first counts; what will not pass tells more than what may.
        if self._failure is None or (self._failure.retryable and not error.retryable):
            self._failure = error

    def failure(self) -> FFError:
        """Return the error that tells best why nobody has told the topology."""
        failure = self._failure
        if failure is None or (failure.retryable and self._topology.forming):
            return forming(self.addresses)
        return failure


def _learn(topology: Topology, replies: list[object], asked: Address) -> None:
    (reply,) = replies
    if isinstance(reply, Exception):
        # Sentinels, and most proxies, have no such command.
        if re.search("cluster support disabled|unknown command", str(reply)):
            error = NotACluster()
            error.host, error.port = asked
            raise error
        raise from_server_error(str(reply))
    topology.learn(reply, asked)


def primary(topology: Topology, slot: int | None) -> Address | None:
    """Return the primary of *slot*, any primary for None; None where none is known."""
    if slot is not None:
        return topology.primary(slot)
    return next(iter(topology.primaries), None)


def no_owner() -> Unavailable:
    """Return the error of a slot that no node is known to have."""
    return Unavailable(
        "No node of the cluster has the slot of the call; the cluster is being changed or is down, try again later."
    )


def forming(asked: Sequence[Address]) -> Unavailable:
    """Return the error of nodes that know of no slot."""
    return Unavailable(
        f"No node that was asked ({', '.join(map(str, asked[:_MOST_NAMED]))}) has or knows of a slot; the cluster is still"
        " being formed, or the nodes belong to none: give out the slots, or try again later."
    )


def pause_while_forming(topology: Topology, error: FFError, retries: Retries) -> float | None:
    """Return how long whoever connects waits for a cluster without slots, in seconds; None if *error* is final."""
    pause = retries.pause(error) if topology.forming else None
    return None if pause is None else max(pause, REFRESH_EVERY_S)


def silent(address: Address, *, tls: bool = False) -> Unavailable:
    """Return the error of a node that does not answer."""
    hint = ", or connect with valkey:// if its port does not use TLS" if tls else ""
    error = Unavailable(f"The node {address} does not answer; try again later{hint}.")
    error.host, error.port = address
    return error

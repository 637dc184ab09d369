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
    from collections.abc import Mapping

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

    Attributes:
        addresses: Whom to ask, in order, until one has told.
    """

    def __init__(
        self, topology: Topology, heard: Mapping[Address, float], seeds: tuple[Address, ...]
    ) -> None:
        told = topology.told
        latest = sorted(heard, key=lambda address: (told.get(address, 0), -heard[address]))
        self._topology = topology
        self._failure: FFError | None = None
        self.addresses = list(dict.fromkeys([*latest, *topology.addresses, *seeds]))

    def answered(self, address: Address, replies: list[object]) -> bool:
        """Take the replies to :data:`SLOTS`; return whether the node has told the topology."""
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
            error = silent(address)
        # The first counts; what will not pass tells more than what may.
        if self._failure is None or (self._failure.retryable and not error.retryable):
            self._failure = error

    def failure(self) -> FFError:
        """Return the error that tells best why nobody has told the topology."""
        return self._failure or no_owner()


def _learn(topology: Topology, replies: list[object], asked: Address) -> None:
    (reply,) = replies
    if isinstance(reply, Exception):
        # Sentinels, and most proxies, have no such command.
        if re.search("cluster support disabled|unknown command", str(reply)):
            error = NotACluster()
            error.host, error.port = asked
            raise error
        raise from_server_error(str(reply))
    if not reply:
        # It has left the cluster, or has not joined it yet.
        raise no_owner()
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


def silent(address: Address) -> Unavailable:
    """Return the error of a node that does not answer."""
    error = Unavailable(f"The node {address} does not answer; try again later.")
    error.host, error.port = address
    return error

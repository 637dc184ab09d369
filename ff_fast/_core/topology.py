"""The topology of a cluster: which node has which slot."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from ff_fast.errors import ProtocolError
from ff_fast.keys import SLOTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# A host that the node does not know; it answers nil, an empty text or this mark for it.
_UNKNOWN_HOSTS = (None, b"", b"?", "", "?")


class Address(NamedTuple):
    """Where a node listens."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Owners(NamedTuple):
    """Who has each slot: the primary, and the replicas."""

    primaries: list[Address | None]
    replicas: list[tuple[Address, ...]]


def _nobody() -> Owners:
    return Owners([None] * SLOTS, [()] * SLOTS)


def _nobody_asks() -> None:
    """Hear of a map that was learned."""


class Topology:
    """The map of a cluster's slots, as far as it is known. Any thread may read it and change it.

    A map that was learned takes the place of the one before in one assignment; a redirect changes one entry.

    Attributes:
        version: Grows with each map that was learned.
        told: Which version each node has told last.
        forming: The last question was answered by a node that knows of no slot, and by none that knows more.
        on_learned: Called, on the thread that has learned a map, after it.
    """

    __slots__ = ("_counter", "_owners", "forming", "on_learned", "told", "version")

    def __init__(self) -> None:
        self._owners = _nobody()
        self._counter = itertools.count(1)
        self.version = 0
        self.forming = False
        self.told: dict[Address, int] = {}
        self.on_learned: Callable[[], None] = _nobody_asks

    @property
    def known(self) -> bool:
        """Whether a map was learned."""
        return self.version > 0

    def primary(self, slot: int) -> Address | None:
        """Return the primary of a slot; None where none is known."""
        return self._owners.primaries[slot]

    def replicas(self, slot: int) -> tuple[Address, ...]:
        """Return the replicas of a slot."""
        return self._owners.replicas[slot]

    @property
    def primaries(self) -> tuple[Address, ...]:
        """The nodes that have slots, in the order of their first ones."""
        return tuple(_each(self._owners.primaries))

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The primaries, and then the replicas."""
        owners = self._owners
        replicas = (each for found in dict.fromkeys(owners.replicas) for each in found)
        return tuple(_each([*_each(owners.primaries), *replicas]))

    def slots_of(self, address: Address) -> frozenset[int]:
        """Return the slots whose primary is the node at *address*."""
        primaries = self._owners.primaries
        return frozenset(slot for slot, owner in enumerate(primaries) if owner == address)

    def learn(self, reply: object, asked: Address) -> None:
        """Take the reply to ``CLUSTER SLOTS``.

        Args:
            reply: The reply.
            asked: The node that gave it; a host that it does not name is its own.

        Raises:
            ProtocolError: The reply has another form; what was known stays.
        """
        owners = _nobody()
        try:
            for first, last, *nodes in _lists(reply):
                begin, end = _slot(first), _slot(last) + 1
                primary, *replicas = [_node(node, asked) for node in _lists(nodes)]
                count = end - begin
                owners.primaries[begin:end] = [primary] * count
                owners.replicas[begin:end] = [tuple(replicas)] * count
        except (ValueError, TypeError, LookupError, AttributeError, UnicodeDecodeError):
            raise ProtocolError from None
        self._owners = owners
        self.forming = False
        self.version = next(self._counter)
        there = {*self.addresses, asked}
        self.told = {at: told for at, told in self.told.items() if at in there}
        self.told[asked] = self.version
        self.on_learned()

    def moved(self, slot: int, address: Address) -> None:
        """Take note of a redirect: the node at *address* has *slot*."""
        owners = self._owners
        if owners.primaries[slot] != address:
            owners.primaries[slot] = address
            owners.replicas[slot] = ()


def address_of(text: str, asked: Address) -> Address:
    """Return the address in a redirect, ``host:port``; a host that it does not name is that of *asked*."""
    host, _, port = text.rpartition(":")
    if host in _UNKNOWN_HOSTS:
        host = asked.host
    return Address(host.removeprefix("[").removesuffix("]"), int(port))


def _each(found: Iterable[Address | None]) -> Iterator[Address]:
    return (each for each in dict.fromkeys(found) if each is not None)


def _lists(reply: object) -> list[list[object]]:
    if not isinstance(reply, list) or not all(isinstance(each, list) for each in reply):
        raise TypeError
    return reply


def _slot(number: object) -> int:
    if type(number) is not int or not 0 <= number < SLOTS:
        raise ValueError
    return number


def _node(node: list[object], asked: Address) -> Address:
    host, port = node[:2]
    if host in _UNKNOWN_HOSTS:
        host = _told_address(node) or asked.host
    if isinstance(host, bytes):
        host = host.decode("utf-8")
    if type(port) is not int or not 0 < port < 65_536 or not isinstance(host, str):
        raise ValueError
    return Address(host, port)


def _told_address(node: list[object]) -> bytes | None:
    """Return the IP address that stands behind a host which the node could not name."""
    told = node[3] if len(node) > 3 else None
    if node[0] in (b"?", "?") and isinstance(told, list):
        fields = dict(zip(told[::2], told[1::2], strict=False))
        found = fields.get(b"ip")
        return found if isinstance(found, bytes) and found else None
    return None

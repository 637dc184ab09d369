"""The servers of a backend, and the connections that a call holds while it runs."""

from __future__ import annotations

import time
from math import inf
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol, Self

from ff_fast import _transport
from ff_fast._core import nodes as core
from ff_fast._core.routing import Routing
from ff_fast._core.topology import Address, Topology, address_of
from ff_fast._sync.connection import Node
from ff_fast.errors import (
    FFError,
    FunctionMissing,
    NotPrimary,
    Redirected,
    from_server_error,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ff_fast._core.routing import Send
    from ff_fast._core.steps import Retries, Step
    from ff_fast._hot.tally import Tally
    from ff_fast._sync.connection import Connection
    from ff_fast.types import BackendConfig

# How long a look may take before another thread looks as well.
_PATIENCE_S = 10.0


class Nodes:
    """The servers of a backend; a standalone server is the only one of its backend.

    Whoever needs a node of a cluster whose topology is in doubt looks at it first, one thread at a time; the others go on
    with what is known.

    Args:
        config: The configuration of the backend.
        tally: Counts the connections that replace lost ones.
        ask: Sends a step to a node to which there may be no connection yet, waits at most some seconds, and returns the
            replies.

    Attributes:
        topology: Which node has which slot; None without a cluster.
    """

    def __init__(
        self,
        config: BackendConfig,
        tally: Tally,
        ask: Callable[[Node, Step, float], list[object]],
    ) -> None:
        self._config = config
        self._tally = tally
        self._ask = ask
        self.only = Node(config, tally)
        # The replicas of a service that sentinels watch, and since when they may be asked: one has failed before.
        self.reads = Node(config, tally, replica=True)
        self.read_at = 0.0 if config.connection.sentinel_service is not None else inf
        self._primaries: dict[Address, Node] = {}
        self._replicas: dict[Address, Node] = {}
        self.topology: Topology | None = None
        self._seeds: tuple[Address, ...] = ()
        if config.connection.cluster:
            self.topology = Topology()
            self._seeds = core.seeds(config.connection)
        # When something last showed that the topology has changed, and when the last successful look began.
        self._doubted_at, self._looked_at = time.monotonic(), 0.0
        # No look before this point in monotonic time. It is far off while a thread looks: an interrupt could leave a lock
        # locked.
        self._look_at = 0.0

    def of(self, slot: int | None, until: float = inf) -> Node:
        """Return the server that holds *slot*; any one for None.

        Args:
            slot: The slot.
            until: When the caller's time is up, in monotonic time.

        Raises:
            Unavailable: No node is known that holds it.
            FFError: No node has ever told the topology.
        """
        topology = self.topology
        if topology is None:
            return self.only
        self.refresh(until)
        if slot is not None:
            address = topology.primary(slot)
            if address is not None:
                return self.at(address)
        elif found := [self.at(address) for address in topology.primaries]:
            return min(found, key=attrgetter("failed_at"))
        self.doubt()
        raise core.no_owner()

    def at(self, address: Address, *, replica: bool = False) -> Node:
        """Return the node at *address*; it is asked as a primary or as a replica."""
        kept = self._replicas if replica else self._primaries
        node = kept.get(address)
        if node is None:
            # Of two that are made at the same moment all get the first.
            node = kept.setdefault(address, self._node(address, replica=replica))
        return node

    def slots_of(self, node: Node) -> frozenset[int] | None:
        """Return the slots of *node*, as far as they are known; None where there is no cluster."""
        topology = self.topology
        if topology is None or node.address is None:
            return None
        version, slots = node.place
        if version != topology.version:
            version, slots = topology.version, topology.slots_of(node.address)
            # Kept, since it takes a millisecond.
            node.place = version, slots
        return slots

    def _node(self, address: Address, *, replica: bool = False) -> Node:
        server = self._config.connection.replace(host=address.host, port=address.port, seeds=())
        config = self._config.replace(connection=server)
        return Node(config, self._tally, address, replica=replica)

    def all(self) -> list[Node]:
        """Return the servers that are known."""
        if self.topology is None:
            return [self.only, self.reads]
        return [*self._primaries.values(), *self._replicas.values()]

    def failed(self, node: Node, error: FFError) -> None:
        """Take note of what the error of a call to *node* tells: where a slot is, or that the topology is in doubt."""
        if isinstance(error, NotPrimary):
            # Whoever connects again may find the primary, by the name of the host or by sentinels.
            node.doubt(time.monotonic())
        if self.topology is None:
            return
        if isinstance(error, Redirected) and not error.ask and node.address is not None:
            self.topology.moved(error.slot, address_of(error.address, node.address))
        if error.retryable and not isinstance(error, FunctionMissing):
            self.doubt()

    def look_at(self, node: Node, replies: list[object]) -> None:
        """Take note of what the refusals of *node* tell."""
        for reply in replies:
            if isinstance(reply, Exception):
                self.failed(node, from_server_error(str(reply)))

    def doubt(self) -> None:
        """Look at the topology before it is used again."""
        self._doubted_at = time.monotonic()

    def refresh(self, until: float = inf) -> None:
        """Look at the topology if it is in doubt, unless another thread does so, or somebody has done so just now.

        Args:
            until: When the caller's time is up, in monotonic time.

        Raises:
            FFError: No node has ever told it.
        """
        topology = self.topology
        began = time.monotonic()
        if topology is None or self._doubted_at < self._looked_at or began < self._look_at:
            return
        self._look_at = began + _PATIENCE_S
        try:
            failure = self._look(topology, until)
            if failure is None:
                self._looked_at = began
        finally:
            self._look_at = time.monotonic() + core.REFRESH_EVERY_S
        if failure is not None and not topology.known:
            raise failure

    def _look(self, topology: Topology, until: float) -> FFError | None:
        """Ask one node after the other until one tells; return the error if none does."""
        working = {
            node.address: node.heard_at
            for node in self.all()
            if node.address is not None and node.heard_at > node.failed_at
        }
        look = core.Look(topology, working, self._seeds, tls=self._config.connection.tls)
        for address in look.addresses:
            node = self._primaries.get(address) or self._node(address)
            longest = min(core.ASK_S, until - time.monotonic())
            if longest <= 0:
                return _transport.not_sent_in_time()
            try:
                replies = self._ask(node, core.SLOTS, longest)
            except FFError as error:
                node.failed_at = time.monotonic()
                look.failed(address, error)
            else:
                if look.answered(address, replies):
                    self._forget(topology)
                    return None
                node.failed_at = time.monotonic()
        return look.failure()

    def _forget(self, topology: Topology) -> None:
        """Close what is idle at nodes that have left the cluster."""
        there = set(topology.addresses)
        for kept in (self._primaries, self._replicas):
            for address in [each for each in list(kept) if each not in there]:
                node = kept.pop(address, None)
                if node is not None:
                    node.gone = True
                    node.close_idle()


class Connections(Protocol):
    """The pool, as far as a call needs it."""

    _nodes: Nodes

    @property
    def closed(self) -> bool: ...

    def _acquire_at(self, node: Node, until: float = inf) -> Connection: ...

    def _release(self, connection: Connection) -> None: ...

    def _load(self, connection: Connection) -> None: ...


class Requests:
    """Sends the steps of one call, on connections that it holds until they are released. Used by one thread.

    Args:
        pool: Where the connections come from.
        retries: Those of the call.
        until: When the call is of no use any more, in monotonic time.
        replicas: Replicas may answer.
    """

    __slots__ = ("_held", "_nodes", "_pool", "_replicas", "_retries", "_until")

    def __init__(
        self,
        pool: Connections,
        retries: Retries,
        *,
        until: float = inf,
        replicas: bool = False,
    ) -> None:
        self._pool = pool
        self._nodes = pool._nodes
        self._retries = retries
        self._until = until
        self._replicas = replicas
        self._held: dict[Node, Connection] = {}

    @property
    def _longest(self) -> float:
        return inf if self._until == inf else _transport.longest_try_s(self._until)

    def request(self, step: Step) -> list[object]:
        """Send the commands of *step*, each to the server of its slot, and return their replies, in order."""
        nodes = self._nodes
        topology = nodes.topology
        if topology is None:
            if self._replicas and time.monotonic() >= nodes.read_at:
                try:
                    return self._on(nodes.reads).request(step, self._longest)
                except FFError:
                    nodes.read_at = time.monotonic() + core.READ_AGAIN_S
            return self._on(nodes.only).request(step, self._longest)
        if step.alone:
            return self._request_alone(step)
        routing = Routing(step, topology, self._retries, replicas=self._replicas, until=self._until)
        while True:
            nodes.refresh(self._until)
            self._round(routing)
            pause = routing.settle()
            if routing.moved or routing.in_doubt:
                nodes.doubt()
            if pause is None or (pause and self._pool.closed):
                return routing.replies()
            time.sleep(pause)

    def _request_alone(self, step: Step) -> list[object]:
        """Send a step that must not be split; refusals come back as replies."""
        node = self._nodes.of(step.commands[0].slot, self._until)
        try:
            replies = self._on(node).request(step.in_cluster, self._longest)
        except FFError as error:
            self._nodes.failed(node, error)
            raise
        self._nodes.look_at(node, replies)
        return replies

    def _round(self, routing: Routing) -> None:
        """Send to all nodes, and then receive from all."""
        asked: list[tuple[Send, Connection]] = []
        for send in routing.sends():
            try:
                asked.append((send, self._on(self._nodes.at(send.address, replica=send.replica))))
            except FFError as error:
                routing.failed(send, error)
        sent: list[tuple[Send, Connection]] = []
        for send, connection in asked:
            try:
                connection.send(send.step, self._longest)
            except FFError as error:
                routing.failed(send, error)
            else:
                sent.append((send, connection))
        for send, connection in sent:
            try:
                replies = connection.receive_all(send.step)
            except FFError as error:
                routing.failed(send, error)
            else:
                routing.answered(send, replies)
        for address in tuple(routing.missing):
            failure = None
            try:
                self._pool._load(self._on(self._nodes.at(address)))
            except FFError as error:
                failure = error
            routing.loaded(address, failure)

    def _on(self, node: Node) -> Connection:
        """Return the connection to *node* that is held; take one if there is none that is open."""
        connection = self._held.get(node)
        if connection is not None and connection.closed:
            self._pool._release(self._held.pop(node))
            connection = None
        if connection is None:
            until = inf if self._until == inf else time.monotonic() + self._longest
            connection = self._held[node] = self._pool._acquire_at(node, until)
            if node.library_missing:
                # First: where it cannot be loaded, only calls of functions are to fail.
                node.library_missing = False
                self._pool._load(connection)
        return connection

    def failed(self, error: FFError) -> None:
        """Take note of the error with which a try of the call ended."""
        for node in self._held:
            node.library_missing = node.library_missing or isinstance(error, FunctionMissing)
            _transport.name_refuser(error, node.reached)
            if self._nodes.topology is None:
                self._nodes.failed(node, error)

    def release(self) -> None:
        """Give back the connections; those that owe a reply are closed."""
        while self._held:
            self._pool._release(self._held.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

"""The servers behind a backend: one without a cluster, else the nodes of the cluster."""

from __future__ import annotations

import asyncio
import copy
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

from ff_fast import _transport
from ff_fast._aio.connection import Connection, run_steps
from ff_fast._aio.sentinel import resolve, resolve_replica
from ff_fast._core import nodes
from ff_fast._core.contact import Contact, name_of
from ff_fast._core.deployment import READS
from ff_fast._core.routing import Routing, Send
from ff_fast._core.steps import Retries, Step
from ff_fast._core.topology import Address, Topology, address_of
from ff_fast.errors import (
    DeadlineExceeded,
    FFError,
    FunctionMissing,
    Redirected,
    Unavailable,
    from_server_error,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from ff_fast._core.deployment import Deployment
    from ff_fast.types import BackendConfig

T = TypeVar("T")

Request = Callable[[Step], Awaitable[list[object]]]
"""Sends a step, and returns its replies in order."""

CALLS_IN_FLIGHT = 256
"""Bound of the requests in flight on the shared connection; beyond it calls queue, and open batches grow."""


async def result_of(task: asyncio.Task[T], longest: float = inf) -> T:
    """Wait for a task of the backend that several callers share, and return its result or raise its error.

    Args:
        task: The task, which goes on for the others when this caller's time is up.
        longest: Longest wait of this caller, in seconds.

    Raises:
        DeadlineExceeded: The time is up.
    """
    # Awaiting the task directly would cancel it along with a cancelled caller.
    await asyncio.wait({task}, timeout=None if longest == inf else max(longest, 0.0))
    if not task.done():
        raise _transport.not_sent_in_time()
    if task.cancelled():
        raise _transport.closed_error()
    error = task.exception()
    if error is not None:
        raise copy.copy(error)
    return task.result()


class SharedConnection:
    """The connection that calls and writers share.

    Attributes:
        connection: None before the first connect, and after a loss until the next one.
        closing: True when the backend is closed; the connection is not made again.
        on_can_write: Called when more may be sent.
        on_lost: Called when the connection is lost.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        spawn: Callable[[Coroutine[Any, Any, Connection]], asyncio.Task[Connection]],
        timeout_s: float,
    ) -> None:
        self._connect_one = connect
        self._spawn = spawn
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._connecting: asyncio.Task[Connection] | None = None
        self._turn = asyncio.Semaphore(CALLS_IN_FLIGHT)
        self._watch: asyncio.TimerHandle | None = None
        self.connection: Connection | None = None
        self.closing = False
        self.on_can_write: Callable[[], None] | None = None
        self.on_lost: Callable[[], None] | None = None

    def watch_soon(self) -> None:
        """Check for a silent server after one request timeout."""
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout_s, self._watch_now)

    def _watch_now(self) -> None:
        """Abort the connection if the server owes replies and has sent nothing for a request timeout."""
        self._watch = None
        connection = self.connection
        if connection is None or not connection.receivers:
            return
        if time.monotonic() - connection.silent_since >= self._timeout_s:
            connection.abort_silent(connection.silent_since)
        else:
            self.watch_soon()

    def _lost(self, connection: Connection) -> None:
        if self.connection is connection:
            self.connection = None
            if self.on_lost is not None:
                self.on_lost()

    @property
    def busy(self) -> bool:
        """Whether somebody waits for it, or for a reply over it."""
        waits = self.connection is not None and bool(self.connection.receivers)
        return waits or self._connecting is not None

    async def connected(self, longest: float = inf) -> Connection:
        """Return the connection; make it again if it was lost. Concurrent callers share one attempt.

        Args:
            longest: Longest wait for an attempt, in seconds; the attempt goes on.
        """
        if self.connection is not None and not self.connection.closed:
            return self.connection
        if self.closing:
            raise _transport.closed_error()
        if self._connecting is None:
            self._connecting = self._spawn(self._connect())
        return await result_of(self._connecting, longest)

    async def _connect(self) -> Connection:
        try:
            connection = await self._connect_one()
        finally:
            self._connecting = None
        if connection.closed:
            raise Unavailable
        if self.closing:
            connection.abort()
            raise _transport.closed_error()
        connection.on_can_write = self.on_can_write
        connection.on_lost.append(self._lost)
        self.connection = connection
        if self.on_can_write is not None:
            self.on_can_write()
        return connection

    async def request(self, step: Step, longest: float = inf) -> list[object]:
        """Send the commands of *step* in turn with other callers, and return their replies, in order.

        Args:
            step: The step.
            longest: Longest time in seconds, from connecting to the last reply, where it is shorter than the timeouts.
        """
        until = inf if longest == inf else time.monotonic() + longest
        connection = await self.connected(longest)
        began = time.monotonic()
        try:
            async with (
                asyncio.timeout(min(self._timeout_s, max(until - began, 0.0))) as waiting,
                self._turn,
            ):
                await connection.wait_writable()
                # The queueing deadline is met; the replies have a deadline of their own.
                waiting.reschedule(None)
                self.watch_soon()
                left = self._timeout_s
                if until != inf:
                    left = min(left, max(until - time.monotonic(), 0.0))
                return await connection.request(step, left)
        except FFError:
            raise
        except TimeoutError:
            late = _transport.not_sent_in_time()
            # Those before it wait for a connection that may have died.
            late.silent = connection.heard_at <= began
        raise late

    def retire(self, connection: Connection | None) -> None:
        """Use *connection* no more; what is in flight on it is awaited. Does nothing if it was replaced already."""
        if connection is not None and self.connection is connection:
            self.connection = None
            connection.leave()

    def stop(self) -> None:
        self.closing = True
        if self._watch is not None:
            self._watch.cancel()
        if self.connection is not None:
            self.connection.abort()


class Node:
    """One server, and the connections to it.

    Attributes:
        address: Where it listens; None where there is no cluster.
        config: The configuration of connections to it.
        reached: The same with the address that sentinels have named last.
        shared: The connection of calls and writers.
        connections: All connections that are open.
        idle: Those that nobody uses; the most recently used is at the right.
        contact: Whether it can be reached.
    """

    def __init__(self, owner: Nodes, address: Address | None) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._loading: asyncio.Task[None] | None = None
        self._reads: SharedConnection | None = None
        self._stopped = False
        self.address = address
        self.config = owner.config
        if address is not None:
            server = owner.config.connection.replace(host=address.host, port=address.port, seeds=())
            self.config = owner.config.replace(connection=server)
        self.reached = self.config
        self.contact = Contact(name_of(self.config.connection), owner.deployment.tally)
        self.connections: set[Connection] = set()
        self.idle: deque[Connection] = deque()
        self.shared = SharedConnection(self.connect, owner.spawn, owner.timeout_s)

    @property
    def reads(self) -> SharedConnection:
        """The connection of reads that need not see the latest."""
        if self._reads is None:
            connect = partial(self.connect, READS)
            self._reads = SharedConnection(connect, self._owner.spawn, self._owner.timeout_s)
            self._reads.closing = self._stopped
        return self._reads

    @property
    def stopped(self) -> bool:
        """Whether it has left the cluster, or the backend is closed."""
        return self._stopped

    @property
    def busy(self) -> bool:
        """Whether a connection is in use."""
        return self.shared.busy or any(each.receivers for each in self.connections)

    @property
    def silent(self) -> bool:
        """Whether it owes replies over the connection of the calls and has sent nothing for a while."""
        connection = self.shared.connection
        if connection is None or not connection.receivers:
            return False
        return time.monotonic() - connection.silent_since > nodes.SILENT_S

    async def connect(self, role: str = "calls") -> Connection:
        """Make a connection and check the server."""
        if self._stopped:
            raise self._gone()
        connection = Connection()
        reached = resolve_replica if role == READS and self.address is None else resolve
        try:
            self.reached = await reached(self.config)
            await connection.open(self.reached)
        except FFError as error:
            # Without a replica the primary is asked.
            if role != READS and not self.stopped:
                self.contact.lost(error)
            raise
        if self._owner.opened is not None:
            self._owner.opened(connection)
        self.connections.add(connection)
        connection.give_back = self.release
        connection.on_lost.append(self.connections.discard)
        connection.on_silent = self._on_silent
        connection.contact = self.contact
        try:
            await self.prepare(connection, role)
        except BaseException:
            connection.abort()
            raise
        if self._stopped:
            connection.abort()
            raise self._gone()
        return connection

    def _gone(self) -> FFError:
        """Return the error of whoever came too late: the backend is closed, or the node has left the cluster."""
        return _transport.closed_error() if self._owner.closed else Unavailable()

    async def prepare(self, connection: Connection, role: str | None = None) -> None:
        """Load the library if it is missing, and check the deployment; its errors are those of connecting."""
        steps = self._owner.deployment.prepare(role, self._owner.place_of(self))
        try:
            connection.checked = await run_steps(steps, self._owner.requests_on(connection))
        except FFError as error:
            failure = _transport.connect_error(error, self.reached)
        else:
            connection.ready = True
            self.contact.made()
            return
        raise failure

    async def load(self, longest: float = inf) -> None:
        """Load the library, which a call has found missing; concurrent callers share one attempt."""
        if self._loading is None:
            self._loading = self._owner.spawn(self._load())
        await result_of(self._loading, longest)

    async def _load(self) -> None:
        try:
            connection = await self.shared.connected()
            await self.prepare(connection)
            if not connection.checked:
                steps = self._owner.deployment.load()
                await run_steps(steps, self._owner.requests_on(connection))
        finally:
            self._loading = None

    def _on_silent(self, since: float) -> None:
        """Close the connections that owe nothing and were last heard of before another one fell silent."""
        for connection in list(self.connections):
            if not connection.receivers and connection.heard_at < since:
                connection.abort()

    def take_idle(self) -> Connection | None:
        """Return a connection that nobody uses; None if there is none."""
        while self.idle:
            connection = self.idle.pop()
            if not connection.closed:
                return connection
        return None

    async def acquire(self) -> Connection:
        """Return a connection for one user, who gives it back."""
        return self.take_idle() or await self.connect()

    def release(self, connection: Connection, most: int = _transport.MAX_IDLE) -> None:
        """Give back a connection; one that owes a reply, or finds *most* idle ones, is dropped."""
        unwanted = self._stopped or self._owner.closed
        if connection.closed or connection.receivers or unwanted or len(self.idle) >= most:
            connection.abort()
        else:
            self.idle.append(connection)
        self._close_idle()

    def _close_idle(self) -> None:
        """Close the connections that have been idle for too long, and look again while there are others."""
        before = time.monotonic() - _transport.MAX_IDLE_S
        while self.idle and (self.idle[0].closed or self.idle[0].heard_at <= before):
            self.idle.popleft().abort()
        if self.idle and self._idle_timer is None and not self._owner.closed:
            wait_s = self.idle[0].heard_at - before
            self._idle_timer = self._loop.call_later(wait_s, self._look_at_idle)

    def _look_at_idle(self) -> None:
        self._idle_timer = None
        self._close_idle()

    def stop(self) -> None:
        """Abort the connections, without waiting."""
        self._stopped = True
        self.shared.stop()
        if self._reads is not None:
            self._reads.stop()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        for connection in list(self.connections):
            connection.abort()


class Own:
    """The connections of somebody who keeps a server busy or waits on it: one a node, as long as it takes.

    Args:
        owner: The nodes.
        blocks_only: Only steps that let the server block go over them.
    """

    def __init__(self, owner: Nodes, *, blocks_only: bool = False) -> None:
        self._owner = owner
        self._held: dict[Node, Connection] = {}
        self.blocks_only = blocks_only

    async def send(self, node: Node, step: Step) -> list[object]:
        """Send *step* to *node*, and return the replies."""
        connection = self._held.get(node)
        if connection is None or connection.closed:
            connection = self._held[node] = await node.acquire()
        return await connection.request(step, self._owner.timeout_s)

    def release(self) -> None:
        """Give the connections back."""
        held, self._held = self._held, {}
        for node, connection in held.items():
            node.release(connection)


class Nodes:
    """The servers of a backend.

    Attributes:
        config: The configuration.
        deployment: The deployment.
        timeout_s: Longest time of one request, in seconds.
        topology: The map of the slots; None where there is no cluster.
        closed: The backend is closed: nothing is tried again.
        first: The node that the configuration names.
        opened: Called with each connection that opens.
    """

    def __init__(
        self,
        config: BackendConfig,
        deployment: Deployment,
        spawn: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
        opened: Callable[[Connection], None] | None = None,
    ) -> None:
        self.config = config
        self.opened = opened
        self.deployment = deployment
        self.spawn = spawn
        self.timeout_s = _transport.request_timeout_s(config)
        self.closed = False
        self._stopped = False
        server = config.connection
        self.topology = Topology() if server.cluster else None
        self._seeds = nodes.seeds(server) if server.cluster else ()
        self._nodes: dict[Address | None, Node] = {}
        self.first = self.at(self._seeds[0] if self._seeds else None)
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = -inf
        self._forgetting: asyncio.TimerHandle | None = None
        self._replicas = config.read_from == "replica" and self.topology is not None
        # Sentinels name the replicas.
        self._reads_of_service = (
            config.read_from == "replica" and server.sentinel_service is not None
        )
        self._read_at = -inf

    @property
    def stopped(self) -> bool:
        """Whether the connections are closed for good."""
        return self._stopped

    # -- which nodes there are ---------------------------------------------------------------------------------------

    def all(self) -> list[Node]:
        """Return the nodes that this backend has, or has had, to do with."""
        return list(self._nodes.values())

    def at(self, address: Address | None) -> Node:
        """Return the node at *address*."""
        node = self._nodes.get(address)
        if node is None:
            if self._stopped:
                raise _transport.closed_error()
            node = self._nodes[address] = Node(self, address)
        return node

    def of(self, slot: int | None) -> Node:
        """Return the node that has *slot*; any for None.

        Raises:
            Unavailable: None is known to have it. The topology is asked for.
        """
        topology = self.topology
        if topology is None:
            return self.first
        address = nodes.primary(topology, slot)
        if address is None:
            _ = self.refresh_soon()
            raise nodes.no_owner()
        return self.at(address)

    def place_of(self, node: Node) -> frozenset[int] | None:
        """Return the slots of *node*, as far as they are known; None where there is no cluster."""
        if self.topology is None or node.address is None:
            return None
        return self.topology.slots_of(node.address)

    def requests_on(self, connection: Connection) -> Request:
        """Return what sends steps on *connection*."""
        return lambda step: connection.request(step, self.timeout_s)

    # -- the topology ------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Connect: reach the server, or the primaries of the cluster, and check the deployment.

        Raises:
            FFError: There is no server, or it is none for this backend.
        """
        topology = self.topology
        if topology is None:
            await self.first.shared.connected()
            return
        retries = Retries(self.config.retry)
        while not topology.known:
            try:
                await self.refresh()
            except FFError as failure:
                pause = nodes.pause_while_forming(topology, failure, retries)
                if pause is None:
                    raise
                await asyncio.sleep(pause)
        found = await asyncio.gather(
            *(self._check(self.at(address)) for address in topology.primaries),
            return_exceptions=True,
        )
        for error in found:
            # A node that cannot be reached is another one's to replace.
            if error is not None and not (isinstance(error, FFError) and error.retryable):
                raise error
        await run_steps(self.deployment.agree(), self.caller(retries))

    async def _check(self, node: Node) -> None:
        connection = await node.shared.connected()
        if not connection.checked:
            await node.prepare(connection)

    def refresh_soon(self) -> asyncio.Task[None]:
        """Ask for the topology; everybody who asks meanwhile shares the answer.

        Raises:
            Unavailable: The backend is closed.
        """
        if self._stopped:
            raise _transport.closed_error()
        if self._refreshing is None:
            self._refreshing = self.spawn(self._refresh())
        return self._refreshing

    async def refresh(self) -> None:
        """Ask for the topology, and wait for the answer.

        Raises:
            FFError: No node has answered.
        """
        await result_of(self.refresh_soon())

    async def settled(self) -> None:
        """Wait until the topology is not asked for any more."""
        if self._refreshing is not None:
            await asyncio.wait({self._refreshing})

    async def _refresh(self) -> None:
        try:
            await asyncio.sleep(
                max(self._refreshed_at + nodes.REFRESH_EVERY_S - time.monotonic(), 0)
            )
            await self._ask()
        finally:
            self._refreshed_at = time.monotonic()
            self._refreshing = None
        self._forget()

    async def _ask(self) -> None:
        assert self.topology is not None
        heard = {
            address: node.shared.connection.heard_at
            for address, node in self._nodes.items()
            if address is not None and node.shared.connection is not None and not node.silent
        }
        look = nodes.Look(self.topology, heard, self._seeds, tls=self.config.connection.tls)
        for address in look.addresses:
            try:
                async with asyncio.timeout(min(nodes.ASK_S, self.timeout_s)):
                    replies = await self.at(address).shared.request(nodes.SLOTS)
            except TimeoutError:
                look.failed(address, DeadlineExceeded())
            except FFError as error:
                look.failed(address, error)
            else:
                if look.answered(address, replies):
                    return
        raise look.failure()

    def _forget(self) -> None:
        """Let the nodes go that have left the cluster, once nobody waits for them."""
        self._forgetting = None
        topology = self.topology
        if topology is None or self._stopped:
            return
        known = {*topology.addresses}
        left = [
            (at, node) for at, node in self._nodes.items() if at is not None and at not in known
        ]
        for address, node in left:
            if not node.busy:
                del self._nodes[address]
                node.stop()
            elif self._forgetting is None:
                loop = asyncio.get_running_loop()
                self._forgetting = loop.call_later(nodes.FORGET_EVERY_S, self._forget)

    # -- calls -------------------------------------------------------------------------------------------------------

    def caller(
        self,
        retries: Retries,
        longest: float = inf,
        *,
        replicas: bool = False,
        own: Own | None = None,
    ) -> Request:
        """Return what sends the steps of one call.

        Args:
            retries: Those of the call.
            longest: Longest time of one try in seconds, where it is shorter than the request timeout.
            replicas: The call changes nothing, so replicas may answer where the configuration says so.
            own: Connections of its own.
        """
        if self.topology is None:
            if own is not None:
                return partial(own.send, self.first)
            if replicas and self._reads_of_service:
                return partial(self._read, longest=longest)
            shared = self.first.shared
            return shared.request if longest == inf else partial(shared.request, longest=longest)
        return partial(
            self.request,
            longest=longest,
            retries=retries,
            replicas=replicas and self._replicas,
            own=own,
        )

    async def _read(self, step: Step, longest: float = inf) -> list[object]:
        """Send *step* to a replica, or to the primary where there is none, or it has failed a moment ago."""
        if time.monotonic() >= self._read_at:
            try:
                return await self.first.reads.request(step, longest)
            except FFError:
                self._read_at = time.monotonic() + nodes.READ_AGAIN_S
        return await self.first.shared.request(step, longest)

    async def request(
        self,
        step: Step,
        longest: float = inf,
        *,
        retries: Retries | None = None,
        replicas: bool = False,
        own: Own | None = None,
    ) -> list[object]:
        """Send each command of *step* to the node of its slot, and return the replies, in order; see `caller`."""
        if self.topology is None:
            return await self.first.shared.request(step, longest)
        retries = retries or Retries(self.config.retry)
        until = inf if longest == inf else time.monotonic() + longest
        routing = Routing(step, self.topology, retries, replicas=replicas, until=until)
        if not self.topology.known:
            await result_of(self.refresh_soon(), longest)
        while True:
            sends = routing.sends()
            if len(sends) == 1:
                await self._send(routing, sends[0], longest, own)
            elif sends:
                await self._send_all(routing, sends, longest, own)
            for address in list(routing.missing):
                await self._load(routing, address, longest)
            if self.closed:
                return routing.replies()
            pause = routing.settle()
            if routing.moved or routing.in_doubt:
                _ = self.refresh_soon()
            if pause is None:
                return routing.replies()
            if pause > 0:
                await asyncio.sleep(pause)
            if routing.in_doubt and self._refreshing is not None:
                left = None if until == inf else max(until - time.monotonic(), 0.0)
                await asyncio.wait({self._refreshing}, timeout=left)

    async def _send(self, routing: Routing, send: Send, longest: float, own: Own | None) -> None:
        try:
            node = self.at(send.address)
            if send.replica:
                replies = await node.reads.request(send.step, longest)
            elif own is not None and (send.step.block_s or not own.blocks_only):
                replies = await own.send(node, send.step)
            else:
                replies = await node.shared.request(send.step, longest)
        except FFError as error:
            routing.failed(send, error)
        else:
            routing.answered(send, replies)

    async def _send_all(
        self, routing: Routing, sends: list[Send], longest: float, own: Own | None
    ) -> None:
        found = await asyncio.gather(
            *(self._send(routing, send, longest, own) for send in sends), return_exceptions=True
        )
        for error in found:
            if error is not None:
                raise error

    def as_sent(self, step: Step) -> Step:
        """Return *step* as it goes to these servers."""
        return step if self.topology is None else step.in_cluster

    async def alone(self, step: Step) -> list[object]:
        """Send a step whole, to the node of its first command, on a connection that nobody else uses."""
        node = self.of(step.commands[0].slot)
        connection = await node.acquire()
        try:
            replies = await connection.request(self.as_sent(step), self.timeout_s)
            self.look_at(node, connection, replies)
        except FFError as error:
            self.failed(node, error)
            raise
        finally:
            node.release(connection)
        return replies

    def look_at(self, node: Node, connection: Connection, replies: list[object]) -> None:
        """Take note of what refusals on a connection of one user tell; then it is used no more."""
        for reply in replies:
            if isinstance(reply, Exception):
                # The server may be no primary any more.
                connection.abort()
                self.failed(node, from_server_error(str(reply)))

    def failed(self, node: Node, error: FFError) -> None:
        """Take note of what the error of a call to *node* tells: where a slot is, or that the topology is in doubt."""
        if self.topology is None or not error.retryable or isinstance(error, FunctionMissing):
            return
        if isinstance(error, Redirected) and not error.ask and node.address is not None:
            self.topology.moved(error.slot, address_of(error.address, node.address))
        if not self._stopped:
            _ = self.refresh_soon()

    async def _load(self, routing: Routing, address: Address, longest: float) -> None:
        try:
            await self.at(address).load(longest)
        except FFError as error:
            routing.loaded(address, error)
        else:
            routing.loaded(address)

    async def load(self) -> None:
        """Load the library wherever it is missing.

        Raises:
            FunctionMissing: This user may not load it.
            FFError: A node cannot be reached.
        """
        if self.topology is None:
            await self.first.load()
            return
        if not self.topology.known:
            await self.refresh()
        found = await asyncio.gather(
            *(self.at(address).load() for address in self.topology.primaries),
            return_exceptions=True,
        )
        for error in found:
            if error is not None:
                raise error

    def stop(self) -> None:
        """Abort all connections, without waiting."""
        self.closed = self._stopped = True
        if self._forgetting is not None:
            self._forgetting.cancel()
        for node in self.all():
            node.stop()

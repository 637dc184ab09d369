"""The connection pool of one backend, and the retries of its calls."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import time
import weakref
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Protocol, TypeVar

from ff_fast import _process, _transport
from ff_fast._core import nodes as core
from ff_fast._core.deployment import READS, Deployment
from ff_fast._core.steps import Retries
from ff_fast._sync.claims import wait_in_line
from ff_fast._sync.connection import Connection, Node, Wanting, run_steps
from ff_fast._sync.credentials import Credentials
from ff_fast._sync.hub import Hub, Hubs
from ff_fast._sync.nodes import Nodes, Requests
from ff_fast._sync.sentinel import Watch, resolve, resolve_replica
from ff_fast.errors import FFError, ForkedClient, Unavailable
from ff_fast.types import BackendTimeouts

if TYPE_CHECKING:
    from ff_fast._core.operations import Call
    from ff_fast._core.steps import Step
    from ff_fast.types import BackendConfig

T = TypeVar("T")


class Paused(Protocol):
    """A reader whose last read has left something to be closed."""

    def _abandon(self) -> None:
        """Close it, unless the reader is being read."""


class Pool:
    """Connections to the servers of a backend, each used by one thread at a time."""

    def __init__(self, config: BackendConfig) -> None:
        self.config = config
        self._deployment = Deployment.of(config)
        self._pid = os.getpid()
        # Calls are refused, and then connections.
        self._closed = self._stopped = False
        provider = config.connection.credential_provider
        self._credentials = None if provider is None else Credentials(provider)
        self._watch: Watch | None = None
        if config.connection.sentinel_service is not None:
            self._watch = Watch(config, partial(_switched, weakref.ref(self)))
        self._nodes = Nodes(config, self._deployment.tally, self._ask)
        # Single calls in C change it, so no lock is needed that an interrupt or a finaliser could leave locked.
        self._busy: dict[int, weakref.ref[Connection]] = {}
        # Readers whose last read has left a reply owed, or a connection being made.
        self._paused: weakref.WeakValueDictionary[int, Paused] = weakref.WeakValueDictionary()
        # At most one thread; the first that puts itself here runs until the lock is released.
        self._sweepers: dict[str, threading.Thread] = {}
        self._sweep_no_more = threading.Lock()
        self._sweep_no_more.acquire()
        self._hub = self._make_hub()
        _process.watch_fork(self)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """Close every connection; threads that wait for a reply get an error.

        What is written is stored first, and claims under way give back what they took, where that takes a short time.
        """
        self._closed = True
        if self._pid == os.getpid():
            self._stop()
            for paused in self._paused.valuerefs():
                reader = paused()
                if reader is not None:
                    reader._abandon()
        with contextlib.suppress(RuntimeError):
            self._sweep_no_more.release()
        self._close_idle()

    def _stop(self) -> None:
        """Wake the threads that wait on connections; only in the process that connected."""
        self._stopped = True
        for connection in [found() for found in list(self._busy.values())]:
            if connection is None:
                continue
            # The writers' and the readers' connections are among them.
            connection.abort()
        for node in self._nodes.all():
            for wanting in tuple(node.wanting):
                wanting.tell(None)
        self._hub.stop()
        if self._watch is not None:
            self._watch.stop()

    def _forked(self) -> None:
        """Reset the state in a forked child."""
        self._hub = self._make_hub()

    def _make_hub(self) -> Hub | Hubs:
        timeout_s, retry = _transport.request_timeout_s(self.config), self.config.retry
        nodes = self._nodes
        if nodes.topology is None:
            return Hub(self._connect, self._discard, self._trusts, timeout_s, retry)
        return Hubs(
            nodes,
            lambda role, address: self._connect(role, nodes.at(address)),
            self._discard,
            self._trusts,
            timeout_s,
            retry,
        )

    def _connect(self, role: str = "calls", node: Node | None = None) -> Connection:
        """Open a connection to *node*; to any server for None."""
        if node is None:
            node = self._nodes.of(None)
        if not self._sweepers and (self._busy or any(each.idle for each in self._nodes.all())):
            # Not where a connection is given back: a finaliser may do that amid the start of another thread.
            args = weakref.ref(self), self._sweepers, self._sweep_no_more
            thread = threading.Thread(target=_sweep, args=args, name="ff_fast idle", daemon=True)
            with contextlib.suppress(RuntimeError):
                thread.start()
        connection = self._open(node, node.config)
        try:
            self._prepare(connection, role)
        except BaseException:
            self._discard(connection)
            raise
        return connection

    def _open(self, node: Node, config: BackendConfig) -> Connection:
        """Open a connection that is not checked yet."""
        try:
            reached = resolve_replica if node is self._nodes.reads else resolve
            node.reached = reached(config)
            connection = Connection(node.reached)
        except FFError as error:
            node.failed_at = time.monotonic()
            if not self._stopped:
                node.contact.lost(error)
            raise
        node.failed_at = 0.0
        connection.node = node
        connection.contact = node.contact
        if self._credentials is not None:
            self._credentials.opened_by(connection)
        self._busy[id(connection)] = weakref.ref(connection)
        if self._watch is not None:
            self._watch.start()
        if self._stopped:
            # close() has already aborted the connections it knew, so it would never wake this thread.
            self._release(connection)
            raise _transport.closed_error()
        return connection

    def _ask(self, node: Node, step: Step, longest: float) -> list[object]:
        """Send a step to *node* on an idle connection, or on one that is opened for it alone."""
        connection = node.take()
        if connection is not None:
            self._busy[id(connection)] = weakref.ref(connection)
        else:
            timeouts = BackendTimeouts(min(_transport.request_timeout_s(node.config), longest))
            connection = self._open(node, node.config.replace(timeouts=timeouts))
        try:
            return connection.request(step, longest)
        finally:
            if connection.ready:
                self._release(connection)
            else:
                self._discard(connection)

    def _begin(self) -> None:
        """Reach the server, or the primaries of the cluster, and check the deployment.

        Raises:
            FFError: There is no server, or it is none for this backend.
        """
        nodes = self._nodes
        if nodes.topology is None:
            self._release(self._acquire())
            return
        retries = Retries(self.config.retry)
        while not nodes.topology.known:
            try:
                nodes.refresh()
            except FFError as error:
                pause = core.pause_while_forming(nodes.topology, error, retries)
                if pause is None:
                    raise
                time.sleep(pause)
        for address in nodes.topology.primaries:
            try:
                self._release(self._acquire_at(nodes.at(address)))
            except FFError as error:
                # A node that cannot be reached is another one's to replace.
                if not error.retryable:
                    raise
        with Requests(self, retries) as requests:
            run_steps(self._deployment.agree(), requests.request)

    def _prepare(self, connection: Connection, role: str | None = None) -> bool:
        """Load the library if it is missing, and check the deployment; its errors are those of connecting.

        Returns:
            Whether the library was checked: a node that has no slots cannot be asked.
        """
        node = connection.node
        steps = self._deployment.prepare(
            READS if node.replica else role, self._nodes.slots_of(node)
        )
        try:
            checked = run_steps(steps, connection.request)
        except FFError as error:
            failure = _transport.connect_error(error, node.reached)
        else:
            connection.ready = True
            node.contact.made()
            return checked
        raise failure

    def _load(self, connection: Connection) -> None:
        """Load the library, which a call has not found on the server of *connection*."""
        if not self._prepare(connection):
            run_steps(self._deployment.load(), connection.request)

    def _discard(self, connection: Connection) -> None:
        connection.close()
        self._busy.pop(id(connection), None)
        connection.node.note_silence(connection)

    def _trusts(self, connection: Connection) -> bool:
        """Whether *connection*, which owes nothing, was heard of since another one of its server fell silent."""
        return connection.node.trusts(connection)

    def _acquire(self, slot: int | None = None, until: float = inf) -> Connection:
        """Return a connection to the server of *slot*, which is the caller's until it is released; see `_acquire_at`."""
        self._check()
        return self._acquire_at(self._nodes.of(slot, until), until)

    def _acquire_at(self, node: Node, until: float = inf) -> Connection:
        """Return a connection to *node*.

        Args:
            node: The server.
            until: When the caller's time is up, in monotonic time. A connection that is made later is the next caller's.

        Raises:
            DeadlineExceeded: The time is up; nothing was sent.
        """
        self._check()
        connection = node.take()
        if connection is None:
            if until == inf:
                return self._connect(node=node)
            connection = self._wait_for(node, until)
        self._busy[id(connection)] = weakref.ref(connection)
        return connection

    def _wait_for(self, node: Node, until: float) -> Connection:
        """Let other threads connect to *node*, as many as there are callers that wait, and wait for one of them."""
        wanting = Wanting()
        node.wanting.add(wanting)
        try:
            while True:
                if len(node.opening) < len(node.wanting):
                    thread = threading.Thread(
                        target=self._open_for, args=(node,), name="ff_fast connect", daemon=True
                    )
                    node.opening.add(thread)
                    try:
                        thread.start()
                    except RuntimeError:
                        # At the end of the interpreter no thread starts.
                        node.opening.discard(thread)
                        return self._connect(node=node)
                wanting.wait(until - time.monotonic())
                self._check()
                connection = node.take()
                if connection is not None:
                    return connection
                if wanting.error is not None:
                    raise copy.copy(wanting.error)
                if node.gone:
                    # No connection to it is kept: its slots are elsewhere.
                    raise Unavailable
                if time.monotonic() >= until:
                    raise _transport.not_sent_in_time()
        finally:
            node.wanting.discard(wanting)

    def _open_for(self, node: Node) -> None:
        """Open a connection for whoever comes next."""
        failure: FFError | None = Unavailable()
        try:
            self._release(self._connect(node=node))
            failure = None
        except FFError as error:
            failure = error
        finally:
            node.opening.discard(threading.current_thread())
            for wanting in tuple(node.wanting):
                wanting.tell(failure)

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise ForkedClient
        if self._closed:
            raise _transport.closed_error()

    def _release(self, connection: Connection, most: int = _transport.MAX_IDLE) -> None:
        """Give a connection back; one that owes a reply, or finds *most* idle ones, is closed."""
        self._busy.pop(id(connection), None)
        connection.node.give(connection, most)
        if self._closed:
            self._close_idle()

    def _close_idle(self, before: float = float("inf"), keep: int = 0) -> None:
        """Close the idle connections that were last heard of before a point in monotonic time, but for *keep* a server."""
        for node in self._nodes.all():
            node.close_idle(before, keep)

    def _run(self, call: Call[T], *, until: float = float("inf")) -> T:
        """Make a call; retry as the configuration and the call allow, but not after *until*, in monotonic time."""
        retries = Retries(self.config.retry, writes=call.writes)
        replicas = self.config.read_from == "replica" and not call.writes
        while True:
            with Requests(self, retries, until=until, replicas=replicas) as requests:
                try:
                    wait = partial(wait_in_line, requests)
                    return run_steps(call.steps(), requests.request, wait)
                except FFError as error:
                    requests.failed(error)
                    pause = None if self._closed else retries.pause(error)
                    if pause is None or time.monotonic() + pause >= until:
                        retries.settle(error)
                        raise
            time.sleep(pause)


def _sweep(
    found: weakref.ref[Pool], sweepers: dict[str, threading.Thread], no_more: threading.Lock
) -> None:
    """Close what has been idle for too long; the last connection to a server stays for its next call."""
    me = threading.current_thread()
    if sweepers.setdefault("", me) is not me:
        return
    while not no_more.acquire(timeout=_transport.MAX_IDLE_S / 4):
        pool = found()
        if pool is None:
            return
        pool._close_idle(time.monotonic() - _transport.MAX_IDLE_S, keep=1)
        del pool


def _switched(found: weakref.ref[Pool], address: tuple[str, int] | None) -> bool:
    """Give up the connections that lead elsewhere than to the new primary; return whether the pool is still there."""
    pool = found()
    if pool is None:
        return False
    if address is not None:
        for connection in [busy() for busy in list(pool._busy.values())]:
            if connection is not None and connection.address != address:
                connection.abort()
        for node in pool._nodes.all():
            node.leave(address)
    return True

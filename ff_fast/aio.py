"""The asyncio shell: the same names as :mod:`ff_fast`, awaited. `Writer.write` stays a plain call.

A backend belongs to the loop that connected it. Calls and writers share one connection with one protocol object, so
cancelling a caller detaches that caller and affects no other. Whatever is pushed comes over a second one, over which tails
also read. Subscriptions, supervisors and the lines of waiting claims have connections of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any, Self

from ff_fast import _transport
from ff_fast._aio.leases import LeaseKeeper
from ff_fast._aio.opening import Opening
from ff_fast._aio.operations import Operations, of_handler
from ff_fast._aio.readers import Completions, Follow, Tail
from ff_fast._aio.streams import OpenedStream
from ff_fast._aio.worker import Handler, Task, WorkerLoop
from ff_fast._aio.writers import Writer
from ff_fast._clients import config_of_client
from ff_fast._core import operations, slots
from ff_fast._core.binding import bind
from ff_fast._log import say
from ff_fast.errors import FFError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ff_fast._core.handlers import Worker
    from ff_fast.embedded import EmbeddedCluster, EmbeddedServer
    from ff_fast.types import BackendConfig

_SUPERVISOR_ENDS_S = 0.5


class ValkeyBackend(Operations):
    """Executions and their streams on one Valkey server. Made by :meth:`connect` or :meth:`embedded`.

    It belongs to the loop that it is made on. Use it with ``async with``, or await :meth:`close`.
    """

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        self._server: EmbeddedServer | EmbeddedCluster | None = None
        # The workers that run, with what supervises for them.
        self._workers = 0
        self._standby: tuple[asyncio.Task[None], asyncio.Event] | None = None

    @classmethod
    def connect(cls, target: str | BackendConfig) -> Opening[ValkeyBackend]:
        """Connect to a server, a cluster, or the primary that sentinels name.

        The function library is loaded if it is missing, older, or another build of this contract. A server that evicts any
        key, stores nothing on disk or is older than Valkey 7.2 is told of by one ``DeploymentWarning``.

        ``async with ValkeyBackend.connect(url) as backend``, or ``await`` it.

        Args:
            target: URL (``valkey://user:password@host:port/db``, ``valkeys://``, ``redis://``, ``rediss://``,
                ``valkey+sentinel://host,host/service``, ``unix:///path``; see :meth:`BackendConfig.from_url`) or a
                :class:`BackendConfig`.

        Raises:
            InvalidInput: The URL is not one of these.
            Unavailable, DeadlineExceeded, TlsFailed: The server cannot be reached.
            AuthenticationFailed, PermissionDenied: It refused the credentials, or a command that connecting needs.
            CredentialsUnavailable: The credential provider failed.
            PrimaryNotFound, NotPrimary: No sentinel names the primary, or they do not agree on it yet.
            ClusterModeRequired, NotACluster: It is a node of a cluster and ``cluster=true`` is not set, or the reverse.
            LibraryMismatch: It holds a newer contract than this library.
            DeploymentMismatch: It stores another partition count than the configuration names.
        """
        config = _transport.config_of(target)

        async def connecting() -> ValkeyBackend:
            backend = cls(config)
            try:
                await backend._nodes.connect()
            except BaseException:
                await backend.close()
                raise
            return backend

        return Opening(connecting)

    @classmethod
    def from_client(cls, client: object, **settings: Any) -> Opening[ValkeyBackend]:
        """Connect to the servers of a client of redis-py, as it does: address, database, credentials and TLS are its own.

        The backend has connections of its own, and does not use those of the client.

        Args:
            client: ``redis.Redis`` or ``redis.RedisCluster``, or the same of ``redis.asyncio``; also one that sentinels
                lead to the primary.
            **settings: Other fields of :class:`BackendConfig`, as ``partitions`` or ``timeouts``.

        Raises:
            InvalidType: *client* is something else.
            InvalidInput: It cannot be followed: it reads from replicas, or uses TLS to the sentinels or the servers alone.
            FFError: Those of :meth:`connect`.
        """
        return cls.connect(config_of_client(client, settings))

    @classmethod
    def embedded(cls, *, cluster: bool = False, **options: Any) -> Opening[ValkeyBackend]:
        """Start a private server or cluster with a supervisor, and connect to it (extra ``embedded``).

        Closing the backend stops the servers.

        ``async with ValkeyBackend.embedded() as backend``, or ``await`` it.

        Args:
            cluster: Start a cluster of three primaries instead of one server.
            **options: Arguments of :class:`ff_fast.embedded.EmbeddedServer`, or of
                :class:`ff_fast.embedded.EmbeddedCluster`.

        Raises:
            MissingDependency: The extra is not installed.
        """

        async def connecting() -> ValkeyBackend:
            from ff_fast.embedded import start

            server = await asyncio.to_thread(start, cluster=cluster, **options)
            try:
                backend = await cls.connect(server.url)
            except BaseException:
                server.stop()
                raise
            backend._server = server
            # No other process knows the embedded server, so none supervises it.
            _ = backend._spawn(backend.supervise())
            return backend

        return Opening(connecting)

    async def close(self) -> None:
        """Close every connection; callers that wait for a reply get an error.

        What is written is stored first, if that takes no more than half a second: close writers first to be sure. The
        `error` of a writer has the frames that were not stored; if nobody looks at it, a ``RuntimeWarning`` says how many
        they were. Closing again does nothing.
        """
        await super().close()
        if self._server is not None and self._pid == os.getpid():
            await asyncio.to_thread(self._server.stop)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"ValkeyBackend({self.config.connection!r})"

    def __reduce__(self) -> Any:
        raise TypeError(_transport.NOT_PICKLED)

    def _open_stream(self, request: operations.StreamRequest) -> Opening[OpenedStream]:
        async def opening() -> OpenedStream:
            return OpenedStream(self, request, await self._do(request.call))

        return Opening(opening)

    open_stream = bind(
        operations.open_stream, _open_stream, "Opening[OpenedStream]", "ValkeyBackend"
    )

    async def _run_worker(
        self, handler: Handler | Worker, options: operations.WorkerOptions
    ) -> None:
        loop = WorkerLoop(self, handler, options)
        async with self._standing_by() if options.supervise else contextlib.nullcontext():
            await loop.run()

    @contextlib.asynccontextmanager
    async def _standing_by(self) -> AsyncIterator[None]:
        """Supervise for the workers of this backend, unless somebody else does."""
        if self._server is not None:
            yield
            return
        if not self._workers:
            stop = asyncio.Event()
            self._standby = (self._spawn(self._stand_by(stop)), stop)
        self._workers += 1
        try:
            yield
        finally:
            self._workers -= 1
            if not self._workers and self._standby is not None:
                supervising, stop = self._standby
                self._standby = None
                stop.set()
                await asyncio.wait([supervising], timeout=_SUPERVISOR_ENDS_S)
                supervising.cancel()

    async def _stand_by(self, stop: asyncio.Event) -> None:
        try:
            await self._supervise(operations.SupervisionRequest.standing_by(self._deployment, stop))
        except FFError as error:
            say(logging.WARNING, slots.NOT_SUPERVISING, error)

    run_worker = of_handler(operations.run_worker, _run_worker)


__all__ = [
    "Completions",
    "Follow",
    "LeaseKeeper",
    "OpenedStream",
    "Tail",
    "Task",
    "ValkeyBackend",
    "Writer",
]

"""The blocking shell: sockets and threads. The core makes the requests and interprets the answers."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Any, Self

from ff_fast import _transport
from ff_fast._clients import config_of_client
from ff_fast._core import operations, slots
from ff_fast._core.binding import bind
from ff_fast._core.handlers import of_handler
from ff_fast._log import say
from ff_fast._sync.leases import LeaseKeeper
from ff_fast._sync.operations import Operations
from ff_fast._sync.readers import Completions, Follow, Tail
from ff_fast._sync.streams import OpenedStream
from ff_fast._sync.worker import Handler, Task, WorkerLoop
from ff_fast._sync.writers import Writer
from ff_fast.errors import FFError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ff_fast._core.handlers import Worker
    from ff_fast.embedded import EmbeddedCluster, EmbeddedServer
    from ff_fast.types import BackendConfig

_SUPERVISOR_ENDS_S = 0.5


class _Supervisor:
    """A thread that supervises.

    Args:
        supervise: Does so until the event is set.
    """

    def __init__(self, supervise: Callable[[threading.Event], None]) -> None:
        self.stop = threading.Event()
        self.thread = threading.Thread(
            target=supervise, args=(self.stop,), name="ff_fast supervisor", daemon=True
        )
        self.thread.start()


class ValkeyBackend(Operations):
    """Executions and their streams on one Valkey server. Made by :meth:`connect` or :meth:`embedded`.

    Thread-safe. Use it as a context manager, or call :meth:`close`.
    """

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        self._server: EmbeddedServer | EmbeddedCluster | None = None
        # What supervises an embedded server; and the workers that run, with what supervises for them.
        self._supervisor: _Supervisor | None = None
        self._workers = 0
        self._standby: _Supervisor | None = None

    @classmethod
    def connect(cls, target: str | BackendConfig) -> Self:
        """Connect to a server, a cluster, or the primary that sentinels name.

        The function library is loaded if it is missing, older, or another build of this contract. A server that evicts any
        key, stores nothing on disk or is older than Valkey 7.2 is told of by one ``DeploymentWarning``.

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
        backend = cls(_transport.config_of(target))
        try:
            backend._begin()
        except BaseException:
            backend.close()
            raise
        return backend

    @classmethod
    def from_client(cls, client: object, **settings: Any) -> Self:
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
    def embedded(cls, *, cluster: bool = False, **options: Any) -> Self:
        """Start a private server or cluster with a supervisor, and connect to it (extra ``embedded``).

        Closing the backend stops the servers.

        Args:
            cluster: Start a cluster of three primaries instead of one server.
            **options: Arguments of :class:`ff_fast.embedded.EmbeddedServer`, or of
                :class:`ff_fast.embedded.EmbeddedCluster`.

        Raises:
            MissingDependency: The extra is not installed.
        """
        from ff_fast.embedded import start

        server = start(cluster=cluster, **options)
        try:
            backend = cls.connect(server.url)
        except BaseException:
            server.stop()
            raise
        backend._server = server
        # No other process knows the embedded server, so none supervises it.
        backend._supervisor = _Supervisor(lambda stop: backend.supervise(stop=stop))
        return backend

    def close(self) -> None:
        """Close every connection; callers that wait for a reply get an error.

        What is written is stored first, if that takes no more than half a second: close writers first to be sure. The
        `error` of a writer has the frames that were not stored; if nobody looks at it, a ``RuntimeWarning`` says how many
        they were. Closing again does nothing.
        """
        super().close()
        if self._server is not None:
            self._server.stop()

    def _stop(self) -> None:
        if self._supervisor is not None:
            # The supervisor ends soon: its event is set, and its connection is aborted.
            self._supervisor.stop.set()
        super()._stop()
        if self._supervisor is not None:
            self._supervisor.thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ValkeyBackend({self.config.connection!r})"

    def __reduce__(self) -> Any:
        raise TypeError(_transport.NOT_PICKLED)

    def _open_stream(self, request: operations.StreamRequest) -> OpenedStream:
        return OpenedStream(self, request, self._do(request.call))

    open_stream = bind(operations.open_stream, _open_stream, "OpenedStream", "ValkeyBackend")

    def _run_worker(self, handler: Handler | Worker, options: operations.WorkerOptions) -> None:
        loop = WorkerLoop(self, handler, options)
        with self._standing_by() if options.supervise else contextlib.nullcontext():
            loop.run()

    @contextlib.contextmanager
    def _standing_by(self) -> Iterator[None]:
        """Supervise for the workers of this backend, unless somebody else does."""
        if self._supervisor is not None:
            yield
            return
        with self._starting:
            if not self._workers:
                self._standby = _Supervisor(self._stand_by)
            self._workers += 1
        try:
            yield
        finally:
            over = None
            with self._starting:
                self._workers -= 1
                if not self._workers:
                    over, self._standby = self._standby, None
            if over is not None:
                over.stop.set()
                over.thread.join(_SUPERVISOR_ENDS_S)

    def _stand_by(self, stop: threading.Event) -> None:
        try:
            self._supervise(operations.SupervisionRequest.standing_by(self._deployment, stop))
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

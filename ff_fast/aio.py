"""The asyncio shell: the same names as :mod:`ff_fast`, awaited. `Writer.write` stays a plain call.

Everything of one backend happens on the loop that connected it. Calls and writers share one connection, which one
protocol object alone reads and writes: cancelling a caller detaches that caller and disturbs nobody else. Tails and
blocking claims have connections of their own.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Self

from ff_fast import _transport
from ff_fast._aio.leases import LeaseKeeper
from ff_fast._aio.operations import Operations
from ff_fast._aio.worker import Handler, Task, WorkerLoop
from ff_fast._aio.writers import Writer
from ff_fast.errors import check_int

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

    from ff_fast.embedded import EmbeddedServer
    from ff_fast.types import BackendConfig, CapabilitySet, StreamMode


class _Connecting:
    """What :meth:`ValkeyBackend.connect` returns: awaited, or entered with ``async with``, it is the backend."""

    def __init__(self, connecting: Callable[[], Coroutine[Any, Any, ValkeyBackend]]) -> None:
        self._connecting = connecting
        self._backend: ValkeyBackend | None = None

    def __await__(self) -> Generator[Any, None, ValkeyBackend]:
        return self._connecting().__await__()

    async def __aenter__(self) -> ValkeyBackend:
        self._backend = await self
        return self._backend

    async def __aexit__(self, *_: object) -> None:
        if self._backend is not None:
            await self._backend.close()


class ValkeyBackend(Operations):
    """Executions and their streams on one Valkey server; see :class:`ff_fast.ValkeyBackend` for every method.

    Made by :meth:`connect` or :meth:`embedded`, on the loop that it then belongs to.
    """

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        self._server: EmbeddedServer | None = None

    @classmethod
    def connect(cls, target: str | BackendConfig) -> _Connecting:
        """Connect to a server: ``async with ValkeyBackend.connect(url) as backend``, or ``await`` it.

        Arguments and errors are those of :meth:`ff_fast.ValkeyBackend.connect`.
        """
        config = _transport.config_of(target)

        async def connecting() -> ValkeyBackend:
            backend = cls(config)
            try:
                await backend._shared.connected()
            except BaseException:
                await backend.close()
                raise
            return backend

        return _Connecting(connecting)

    @classmethod
    def embedded(cls, **options: Any) -> _Connecting:
        """Start a private server that is gone when the backend is closed (extra ``embedded``)."""

        async def connecting() -> ValkeyBackend:
            from ff_fast.embedded import EmbeddedServer

            server = await asyncio.to_thread(EmbeddedServer, **options)
            try:
                backend = await cls.connect(server.url)
            except BaseException:
                server.stop()
                raise
            backend._server = server
            # An embedded server has nobody else to look after it.
            _ = backend._spawn(backend.supervise())
            return backend

        return _Connecting(connecting)

    async def close(self) -> None:
        """Close every connection; what waits for a reply there ends with an error.

        Frames that were not flushed are lost: close writers first. Calling it again does nothing.
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

    async def run_worker(
        self,
        handler: Handler,
        *,
        lane: str = "default",
        worker_id: str = "worker",
        worker_instance_id: str | None = None,
        capabilities: CapabilitySet | None = None,
        lease_ttl_ms: int = 30_000,
        mode: StreamMode | None = None,
        concurrency: int = 1,
        stop: asyncio.Event | None = None,
    ) -> None:
        """Claim executions of a lane and await *handler* for each; see :meth:`ff_fast.ValkeyBackend.run_worker`.

        Cancelling it cancels the handlers that run: what they wrote is stored, and their executions go to other workers
        as from lost ones, within about two seconds. An execution that was being claimed just then comes back when its
        lease lapses.
        """
        check_int("concurrency", concurrency, 1, 10_000)
        await WorkerLoop(
            self,
            handler,
            lane=lane,
            worker_id=worker_id,
            worker_instance_id=worker_instance_id,
            capabilities=capabilities,
            lease_ttl_ms=lease_ttl_ms,
            mode=mode,
            concurrency=concurrency,
            stop=stop,
        ).run()


__all__ = ["LeaseKeeper", "Task", "ValkeyBackend", "Writer"]

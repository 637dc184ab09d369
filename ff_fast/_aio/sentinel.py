"""Where to connect: sentinels know which server is the primary."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING, Any

from ff_fast import _transport
from ff_fast._aio.connection import Connection
from ff_fast._core.sentinel import (
    HELLO,
    LOOK_AGAIN_S,
    LOOK_EVERY_S,
    SUBSCRIBE,
    Search,
    primary_in,
    switched_to,
)
from ff_fast.errors import FFError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from ff_fast.types import BackendConfig


async def resolve(config: BackendConfig) -> BackendConfig:
    """Return *config* with the address of the primary in place of the sentinels; without sentinels, *config* itself.

    Raises:
        PrimaryNotFound: No sentinel answered that knows the service.
        AuthenticationFailed, TlsFailed: None did, and one refused the credentials or the handshake.
    """
    if config.connection.sentinel_service is None:
        return config
    (resolved,) = await _ask(Search(config))
    return resolved


async def resolve_replica(config: BackendConfig) -> BackendConfig:
    """Return *config* with the address of a replica in place of the sentinels.

    Raises:
        Unavailable: There is none that can be read from.
        PrimaryNotFound, AuthenticationFailed, TlsFailed: As for :func:`resolve`.
    """
    found = await replicas(config)
    if not found:
        raise Unavailable("The service has no replica that can be read from.")
    return random.choice(found)  # noqa: S311 - no secret


async def replicas(config: BackendConfig) -> list[BackendConfig]:
    """Return *config* with the address of each replica that can be read from; without sentinels, an empty list.

    Raises:
        PrimaryNotFound, AuthenticationFailed, TlsFailed: As for :func:`resolve`.
    """
    if config.connection.sentinel_service is None:
        return []
    return await _ask(Search(config, replicas=True))


async def _ask(search: Search) -> list[BackendConfig]:
    for sentinel in search:
        connection = Connection()
        try:
            await connection.open(sentinel)
            timeout_s = _transport.request_timeout_s(sentinel)
            (reply,) = await connection.request(search.step, timeout_s)
        except FFError as error:
            search.failed(error)
        else:
            search.answered(reply)
        finally:
            connection.abort()
            await connection.wait_closed()
    return search.result()


class Watch:
    """Hears from a sentinel when another server has become the primary.

    The old one may live on and take writes for seconds, until the sentinels have made it a replica, which loses them.

    Args:
        config: The configuration that names the sentinels.
        on_switch: Called with the address of the new primary.

    Attributes:
        begun: Whether :meth:`run` has begun.
    """

    def __init__(self, config: BackendConfig, on_switch: Callable[[tuple[str, int]], None]) -> None:
        self._config = config
        self._on_switch = on_switch
        self._known: tuple[str, int] | None = None
        self._stopped = asyncio.Event()
        self._connection: Connection | None = None
        self.begun = False

    async def run(self) -> None:
        """Listen to one sentinel after the other, until stopped."""
        while not self._stopped.is_set():
            for sentinel in Search(self._config):
                if self._stopped.is_set():
                    return
                with contextlib.suppress(FFError):
                    await self._hear(sentinel)
                    break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_AGAIN_S):
                    await self._stopped.wait()

    def stop(self) -> None:
        """Let :meth:`run` end; cancelling alone may be lost while it connects."""
        self._stopped.set()
        if self._connection is not None:
            self._connection.abort()

    async def _hear(self, sentinel: BackendConfig) -> None:
        """Listen to *sentinel* until the connection is lost.

        Raises:
            FFError: There is none, or the sentinel does not know the service.
        """
        connection = self._connection = Connection()
        lost = asyncio.Event()
        try:
            await connection.open(sentinel)
            if self._stopped.is_set():
                return
            connection.on_lost.append(lambda _: lost.set())
            timeout_s = _transport.request_timeout_s(sentinel)
            await connection.request(HELLO, timeout_s)
            connection.on_push = self._pushed
            connection.send(SUBSCRIBE, [])
            await self._look(connection, timeout_s)
            with contextlib.suppress(FFError):
                while not connection.closed:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_EVERY_S):
                            await lost.wait()
                    await self._look(connection, timeout_s)
        finally:
            connection.abort()
            await connection.wait_closed()

    async def _look(self, connection: Connection, timeout_s: float) -> None:
        search = Search(self._config)
        (reply,) = await connection.request(search.step, timeout_s)
        address = primary_in(reply)
        if address is None:
            raise search.unknown()
        self._switch(address)

    def _pushed(self, push: list[Any]) -> None:
        address = switched_to(push, self._config.connection.sentinel_service)
        if address is not None:
            self._switch(address)

    def _switch(self, address: tuple[str, int]) -> None:
        before, self._known = self._known, address
        if before != address:
            self._on_switch(address)

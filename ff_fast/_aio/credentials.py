"""Credentials in the asyncio shell: never asked on the loop, unless the provider is made for it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from typing import TYPE_CHECKING, Any

from ff_fast._core.credentials import Login, Renewals, failure_of, login_of
from ff_fast.errors import CredentialsUnavailable, FFError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Protocol, Self

    class Connection(Protocol):
        """A connection, as far as it is logged in again."""

        authenticated_at: float
        on_lost: list[Callable[[Self], None]]

        @property
        def closed(self) -> bool: ...

        def send(self, request: bytes, receivers: list[Callable[[object], None]]) -> None: ...


async def ask(provider: Any, timeout_s: float) -> Login:
    """Return the credentials of *provider*.

    Raises:
        CredentialsUnavailable: It raised, returned something else, or took longer than *timeout_s* seconds.
    """
    failure: FFError
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            found = await _found(provider)
        return login_of(found)
    except FFError as error:
        failure = error
    except Exception as error:  # noqa: BLE001 - its text may hold a secret
        failure = failure_of(error)
        if limit.expired():
            failure = CredentialsUnavailable(
                f"The credential provider did not answer within {timeout_s:g} s."
            )
            failure.retryable = True
    raise failure


async def _found(provider: Any) -> object:
    awaited = getattr(provider, "get_credentials_async", None)
    if awaited is not None and not _inherited(provider):
        return await awaited()
    get = getattr(provider, "get_credentials", provider)
    if inspect.iscoroutinefunction(get) or inspect.iscoroutinefunction(type(get).__call__):
        return await get()
    found = await asyncio.to_thread(get)
    return await found if inspect.isawaitable(found) else found


def _inherited(provider: Any) -> bool:
    """Whether the provider's coroutine is redis-py's own, which asks on the loop."""
    from redis.credentials import CredentialProvider

    mine = getattr(type(provider), "get_credentials_async", None)
    return mine is CredentialProvider.get_credentials_async


class Credentials(Renewals):
    """Logs the open connections of a backend in again, between their requests."""

    def __init__(
        self,
        provider: Any,
        timeout_s: float,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._spawn = spawn
        self._connections: set[Connection] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._asking = False
        super().__init__(provider)

    def opened_by(self, connection: Connection) -> None:
        """Renew *connection* as long as it is open."""
        self.opened()
        self._connections.add(connection)
        connection.on_lost.append(self._connections.discard)
        self._set_timer()
        # What was pushed while it was opened.
        self._renew()

    def stop(self) -> None:
        """Renew nothing any more."""
        self._connections.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def pushed(self, token: object) -> None:
        super().pushed(token)
        # The loop may be closed by now.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._renew)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._connections and not self._asking and self.ask_at != float("inf"):
            wait_s = max(self.ask_at - time.monotonic(), 0.0)
            self._timer = self._loop.call_later(wait_s, self._ask_soon)

    def _ask_soon(self) -> None:
        self._timer = None
        if self._connections:
            self._asking = True
            _ = self._spawn(self._ask())

    async def _ask(self) -> None:
        try:
            self.answered(await ask(self.provider, self._timeout_s))
        except FFError as error:
            self.failed(error)
        finally:
            self._asking = False
        self._renew()

    def _renew(self) -> None:
        for connection in list(self._connections):
            request = self.renewal(connection.authenticated_at)
            if request is not None and not connection.closed:
                connection.authenticated_at = time.monotonic()
                connection.send(request, [self._answered])
        self._set_timer()

    def _answered(self, reply: object) -> None:
        if isinstance(reply, Exception):
            self.refused()
            self._set_timer()

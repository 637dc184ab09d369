"""Credentials that a provider gives, and when open connections log in again."""

from __future__ import annotations

import logging
import random
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from ff_fast._hot.resp import pack_command
from ff_fast._log import say_seldom
from ff_fast.errors import CredentialsUnavailable, FFError, causes

if TYPE_CHECKING:
    from collections.abc import Iterator

RENEW_EVERY_S = 600.0
"""How often open connections log in again with fresh credentials, where the provider does not say when, in seconds.

Tokens of cloud services live 15 minutes and more, and connections that never log in again are cut after 12 hours.
"""

RENEW_SOON_S = 30.0
"""After which time the provider is asked again where it failed, or the server refused what it gave, in seconds."""


class Login(NamedTuple):
    """A user name, None for the default user, and a password."""

    username: str | None
    password: str

    def auth(self) -> bytes:
        """Return the command that logs in."""
        if self.username is None:
            return pack_command(b"AUTH", self.password.encode())
        return pack_command(b"AUTH", self.username.encode(), self.password.encode())

    def __repr__(self) -> str:
        return "Login()"


def login_of(found: object) -> Login:
    """Return the login that a provider returned: a password, or a user name and a password, in a tuple or list.

    Raises:
        CredentialsUnavailable: It is something else.
    """
    if isinstance(found, (tuple, list)) and 1 <= len(found) <= 2:
        texts = [
            each.decode("utf-8", "replace") if isinstance(each, bytes) else each for each in found
        ]
        if all(isinstance(each, str) for each in texts):
            username, password = ("", *texts)[-2:]
            return Login(username or None, password)
    raise CredentialsUnavailable(
        "The credential provider must return (username, password) or (password,); it returned"
        f" {type(found).__name__}."
    )


def login_in(token: object) -> Login | None:
    """Return the login in what a streaming provider pushes: redis-py's token, or what it would return if asked."""
    get_value, try_get = getattr(token, "get_value", None), getattr(token, "try_get", None)
    try:
        if callable(get_value) and callable(try_get):
            return login_of((try_get("oid"), get_value()))
        return login_of(token)
    except Exception:  # noqa: BLE001 - the provider is asked instead
        return None


def failure_of(error: BaseException) -> CredentialsUnavailable:
    """Return our error for the one that a provider raised, whose text may hold a secret."""
    failure = CredentialsUnavailable(
        f"The credential provider raised {type(error).__name__}; look into its own log."
    )
    failure.retryable = any(isinstance(each, OSError) for each in causes(error))
    return failure


class Renewals:
    """When the connections of a backend log in again, and as whom. The shells ask the provider and send.

    Read and changed by any thread, in single assignments.
    """

    def __init__(self, provider: Any) -> None:
        self.provider = provider
        # What the provider gave last, and when, in monotonic time.
        self._login: tuple[Login, float] | None = None
        # When to ask it.
        self.ask_at = float("inf")
        failure: FFError | None = None
        try:
            self.streams = _streams(provider)
            if self.streams:
                _fan_of(provider).listeners.add(self)
        except Exception as error:  # noqa: BLE001 - its text may hold a secret
            failure = failure_of(error)
        if failure is not None:
            raise failure

    def opened(self) -> None:
        """Note that a connection was opened, so that there is something to renew."""
        if self.ask_at == float("inf") and not self.streams:
            self.ask_at = time.monotonic() + _interval_s()

    def renewal(self, authenticated_at: float) -> bytes | None:
        """Return the command by which a connection logs in again that did so last at *authenticated_at*; None if not due."""
        login = self._login
        if login is None or login[1] <= authenticated_at:
            return None
        return login[0].auth()

    def answered(self, login: Login) -> None:
        """Take the credentials of the provider that was asked."""
        self._login = login, time.monotonic()
        self.ask_at = float("inf") if self.streams else time.monotonic() + _interval_s()

    def failed(self, error: FFError) -> None:
        """Note that the provider failed; the connections stay as they are."""
        say_seldom(
            logging.WARNING,
            "credentials",
            error.code,
            "Credentials were not renewed: %s",
            error,
        )
        self.ask_at = time.monotonic() + RENEW_SOON_S

    def refused(self) -> None:
        """Note that the server refused new credentials; the connection stays logged in as it was."""
        # Each connection meets it.
        say_seldom(
            logging.WARNING,
            "credentials",
            "refused",
            "The server refused renewed credentials; they are asked for again.",
        )
        self.ask_at = min(self.ask_at, time.monotonic() + RENEW_SOON_S)

    def pushed(self, token: object) -> None:
        """Take what a streaming provider pushes, on any thread."""
        login = login_in(token)
        if login is None:
            self.ask_at = time.monotonic()
        else:
            self._login = login, time.monotonic()


def _interval_s() -> float:
    # Processes that started together do not ask together.
    return RENEW_EVERY_S * (1 - 0.1 * random.random())  # noqa: S311 - no secret


def _streams(provider: Any) -> bool:
    if not callable(getattr(provider, "on_next", None)):
        return False
    is_streaming = getattr(provider, "is_streaming", None)
    return bool(is_streaming()) if callable(is_streaming) else True


class _Done:
    """What a callback returns: a provider of asyncio awaits it, others drop it."""

    def __await__(self) -> Iterator[None]:
        return iter(())


_DONE = _Done()


class _Fan:
    """Passes what a provider pushes to every backend that uses it: some providers keep only their newest callback."""

    def __init__(self, provider: Any) -> None:
        # Also keeps the provider's id from being used again.
        self._provider = provider
        self.listeners: weakref.WeakSet[Renewals] = weakref.WeakSet()
        provider.on_next(self._next)
        on_error = getattr(provider, "on_error", None)
        if callable(on_error):
            on_error(self._error)

    def _next(self, token: object) -> _Done:
        for each in list(self.listeners):
            each.pushed(token)
        return _DONE

    def _error(self, error: object) -> _Done:
        # The next connect asks the provider, and reports its error.
        name = type(error).__name__
        say_seldom(logging.WARNING, "provider", name, "A credential provider reports %s.", name)
        return _DONE


_fans: dict[int, _Fan] = {}
_fans_lock = threading.Lock()


def _fan_of(provider: Any) -> _Fan:
    """Return the fan of a provider, of which there is one in the process."""
    with _fans_lock:
        for key in [key for key, fan in _fans.items() if not fan.listeners]:
            if key != id(provider):
                del _fans[key]
        fan = _fans.get(id(provider))
        if fan is None:
            fan = _fans[id(provider)] = _Fan(provider)
        return fan

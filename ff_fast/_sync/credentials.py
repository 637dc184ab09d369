"""Credentials in the blocking shell: asked by the thread that connects, and renewed by a thread of their own."""

from __future__ import annotations

import inspect
import threading
import time
from typing import TYPE_CHECKING

from ff_fast._core.credentials import RENEW_SOON_S, Login, Renewals, failure_of, login_of
from ff_fast.errors import CredentialsUnavailable, FFError

if TYPE_CHECKING:
    from typing import Any, Protocol

    class Connection(Protocol):
        """A connection, as far as it is logged in again."""

        authenticated_at: float
        credentials: Credentials | None


def ask(provider: Any) -> Login:
    """Return the credentials of *provider*.

    Raises:
        CredentialsUnavailable: It raised, or returned something else.
    """
    get = getattr(provider, "get_credentials", provider)
    failure: FFError
    try:
        found = get()
        if not inspect.isawaitable(found):
            return login_of(found)
        if inspect.iscoroutine(found):
            found.close()
        failure = CredentialsUnavailable(
            "The credential provider is to be awaited; give the blocking shell one that is not."
        )
    except FFError as error:
        failure = error
    except Exception as error:  # noqa: BLE001 - its text may hold a secret
        failure = failure_of(error)
    raise failure


class Credentials(Renewals):
    """Logs the connections of a backend in again. Each does so itself, before its next request."""

    _asking = False

    def opened_by(self, connection: Connection) -> None:
        """Renew *connection*, from its next request on."""
        self.opened()
        connection.credentials = self

    def due(self, connection: Connection) -> bytes | None:
        """Return the command by which *connection* logs in again, None if that is not due; ask the provider if that is."""
        if time.monotonic() >= self.ask_at and not self._asking:
            self._asking = True
            thread = threading.Thread(target=self._ask, name="ff_fast credentials", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # There are too many threads, or the interpreter ends.
                self._asking = False
                self.ask_at = time.monotonic() + RENEW_SOON_S
        return self.renewal(connection.authenticated_at)

    def _ask(self) -> None:
        try:
            self.answered(ask(self.provider))
        except FFError as error:
            self.failed(error)
        finally:
            self._asking = False

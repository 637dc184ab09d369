"""Whether a server can be reached, as the connections to it tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ff_fast._log import Outage
from ff_fast.errors import OutcomeUnknown

if TYPE_CHECKING:
    from ff_fast._hot.tally import Tally
    from ff_fast.errors import FFError
    from ff_fast.types import ValkeyConnection


_IDLE_S = 30.0


def name_of(server: ValkeyConnection, *, replica: bool = False) -> str:
    """Return how a record names the server that a configuration leads to, or of a service a replica."""
    if server.sentinel_service is not None:
        return f"{'A replica' if replica else 'The primary'} of {server.sentinel_service}"
    if server.unix_path is not None:
        return f"The server {server.unix_path}"
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"The server {host}:{server.port}"


class Contact:
    """Says when the connections to one server are lost, and when it answers again.

    Before the first connection it says nothing: whoever connects gets the error.

    Args:
        name: How a sentence about the server begins.
        tally: Counts the connections that replace lost ones.
    """

    __slots__ = ("_met", "_name", "_outage", "_tally")

    def __init__(self, name: str, tally: Tally) -> None:
        self._name = name
        self._tally = tally
        self._met = False
        self._outage = Outage("contact")

    def lost(self, error: FFError, *, idle_s: float = 0.0) -> None:
        """Note that a connection is lost, or that none can be made.

        A server may close what was idle for long, and its end shows with the next request: that is no loss.

        Args:
            error: What showed it.
            idle_s: How long nothing had come over the connection when the last request was sent, in seconds.
        """
        if not self._met or (idle_s > _IDLE_S and isinstance(error, OutcomeUnknown)):
            return
        self._outage.fails(self._name, "%s is not reached: %s Connecting again.", self._name, error)

    def made(self) -> None:
        """Note that a connection is made, and that the server has answered on it."""
        self._met = True
        again = "%s answers again, %.1f s after a connection to it was lost."
        if self._outage.works(again, self._name):
            self._tally.note("reconnects")

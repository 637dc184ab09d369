"""Where to connect: sentinels know which server is the primary."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from typing import TYPE_CHECKING

from ff_fast._core.sentinel import (
    HELLO,
    LOOK_AGAIN_S,
    LOOK_EVERY_S,
    SUBSCRIBE,
    Search,
    primary_in,
    switched_to,
)
from ff_fast._sync.connection import Connection
from ff_fast.errors import FFError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from ff_fast.types import BackendConfig


def resolve(config: BackendConfig) -> BackendConfig:
    """Return *config* with the address of the primary in place of the sentinels; without sentinels, *config* itself.

    Raises:
        PrimaryNotFound: No sentinel answered that knows the service.
        AuthenticationFailed, TlsFailed: None did, and one refused the credentials or the handshake.
    """
    if config.connection.sentinel_service is None:
        return config
    (resolved,) = _ask(Search(config))
    return resolved


def resolve_replica(config: BackendConfig) -> BackendConfig:
    """Return *config* with the address of a replica in place of the sentinels.

    Raises:
        Unavailable: There is none that can be read from.
        PrimaryNotFound, AuthenticationFailed, TlsFailed: As for :func:`resolve`.
    """
    found = replicas(config)
    if not found:
        raise Unavailable("The service has no replica that can be read from.")
    return random.choice(found)  # noqa: S311 - no secret


def replicas(config: BackendConfig) -> list[BackendConfig]:
    """Return *config* with the address of each replica that can be read from; without sentinels, an empty list.

    Raises:
        PrimaryNotFound, AuthenticationFailed, TlsFailed: As for :func:`resolve`.
    """
    if config.connection.sentinel_service is None:
        return []
    return _ask(Search(config, replicas=True))


def _ask(search: Search) -> list[BackendConfig]:
    for sentinel in search:
        try:
            connection = Connection(sentinel)
            try:
                (reply,) = connection.request(search.step)
            finally:
                connection.close()
        except FFError as error:
            search.failed(error)
        else:
            search.answered(reply)
    return search.result()


class Watch:
    """Hears from a sentinel, on a thread of its own, when another server has become the primary.

    The old one may live on and take writes for seconds, until the sentinels have made it a replica, which loses them.

    Args:
        config: The configuration that names the sentinels.
        on_switch: Called with the address of the new primary, and now and then with None; returns whether anybody still
            wants to know.
    """

    def __init__(
        self, config: BackendConfig, on_switch: Callable[[tuple[str, int] | None], bool]
    ) -> None:
        self._config = config
        self._on_switch = on_switch
        self._known: tuple[str, int] | None = None
        self._stopped = False
        self._woken, self._waking = socket.socketpair()
        self._waking.setblocking(False)
        # At most one; the first that puts itself here runs.
        self._runs: dict[str, threading.Thread] = {}

    def __del__(self) -> None:
        self._woken.close()
        self._waking.close()

    def start(self) -> None:
        """Begin to listen, unless it has begun."""
        if not self._runs and not self._stopped:
            thread = threading.Thread(target=self._main, name="ff_fast sentinel", daemon=True)
            # At the end of the interpreter no thread starts.
            with contextlib.suppress(RuntimeError):
                thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped = True
        with contextlib.suppress(OSError):
            self._waking.send(b".")
        thread = self._runs.get("")
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _main(self) -> None:
        me = threading.current_thread()
        if self._runs.setdefault("", me) is not me:
            return
        while not self._stopped:
            for sentinel in Search(self._config):
                if self._stopped:
                    return
                with contextlib.suppress(FFError):
                    self._hear(sentinel)
                    break
            if not self._stopped:
                self._woken.settimeout(LOOK_AGAIN_S)
                with contextlib.suppress(TimeoutError):
                    self._woken.recv(1)

    def _hear(self, sentinel: BackendConfig) -> None:
        """Listen to *sentinel* until the connection is lost.

        Raises:
            FFError: There is none, or the sentinel does not know the service.
        """
        connection = Connection(sentinel)
        try:
            connection.request(HELLO)
            connection.post(SUBSCRIBE)
            self._look(connection)
            with contextlib.suppress(FFError):
                while not self._stopped:
                    pushed = connection.listen(self._woken, time.monotonic() + LOOK_EVERY_S)
                    for each in pushed:
                        address = switched_to(each, self._config.connection.sentinel_service)
                        if address is not None:
                            self._switch(address)
                    if not pushed and not self._stopped:
                        self._look(connection)
        finally:
            connection.close()

    def _look(self, connection: Connection) -> None:
        search = Search(self._config)
        (reply,) = connection.request(search.step)
        address = primary_in(reply)
        if address is None:
            raise search.unknown()
        self._switch(address)

    def _switch(self, address: tuple[str, int]) -> None:
        before, self._known = self._known, address
        if not self._on_switch(None if address == before else address):
            # The backend was collected.
            self._stopped = True

"""Sentinels: which server is the primary of a service, and which are its replicas."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ff_fast._core.steps import DEFAULT_REQUEST_TIMEOUT_S, Command, Step
from ff_fast._hot.resp import pack_command
from ff_fast.errors import (
    AuthenticationFailed,
    DeadlineExceeded,
    FFError,
    InvalidInput,
    NotPrimary,
    OutcomeUnknown,
    PermissionDenied,
    PrimaryNotFound,
    TlsFailed,
    Unavailable,
    from_server_error,
)
from ff_fast.types import BackendTimeouts, ValkeyConnection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ff_fast.types import BackendConfig

_Address = tuple[str, int]

_SERVICES = 256
"""Services of which is remembered which sentinel to ask first."""

_LEAST_S = 0.05
_NO_ANSWER = (Unavailable, DeadlineExceeded, OutcomeUnknown)

_UNUSABLE = {"s_down", "o_down", "disconnected", "master_down"}
"""Flags of a replica that is not to be read from."""

# Service and sentinels -> index of the sentinel to ask first: the one that answered last, or the next after one that
# named a replica.
_first: dict[tuple[str | None, tuple[_Address, ...]], int] = {}


ROLE = Step((Command(b"", pack_command(b"HELLO", b"2")),))
"""Asks a server for its role. ``HELLO`` needs no right that a user may lack, unlike ``ROLE``."""


HELLO = Step((Command(b"", pack_command(b"HELLO", b"3")),))
"""Lets a sentinel push, so that what it pushes is no reply."""

SUBSCRIBE = pack_command(b"SUBSCRIBE", b"+switch-master")

LOOK_EVERY_S = 5.0
"""How often a sentinel that pushes nothing is asked whether it is alive, in seconds."""

LOOK_AGAIN_S = 0.5
"""Pause before other sentinels are asked where none answers, in seconds."""


def switched_to(push: object, service: str | None) -> _Address | None:
    """Return the address of the primary that a pushed message tells of; None if it is another message."""
    if not isinstance(push, list) or len(push) != 3 or push[:2] != [b"message", b"+switch-master"]:
        return None
    words = bytes(push[2]).split()
    if len(words) != 5 or words[0].decode("utf-8", "replace") != service:
        return None
    return _address(words[3], words[4])


def check_role(reply: object, resolved: ValkeyConnection) -> None:
    """Check the answer to `ROLE` at the address that a sentinel named.

    Raises:
        NotPrimary: The server is a replica. Another sentinel is asked first from now on.
    """
    # A server that does not tell refuses writes, if it is a replica.
    fields = dict(zip(reply[::2], reply[1::2], strict=False)) if isinstance(reply, list) else {}
    if fields.get(b"role", b"master") != b"master":
        ask_another_first(resolved)
        error = NotPrimary(
            f"A sentinel of the service {resolved.sentinel_service} named {resolved.host}:{resolved.port}, which is a replica; try again"
            " when the sentinels have agreed on a primary."
        )
        error.host, error.port = resolved.host, resolved.port
        raise error


def ask_another_first(resolved: ValkeyConnection) -> None:
    """Ask another sentinel first from now on: the one that was asked named a server that is no primary, or is down."""
    service, sentinels = resolved.sentinel_service, resolved.seeds
    _note_first(service, sentinels, _first.get((service, sentinels), 0) + 1)


def _note_first(service: str | None, sentinels: tuple[_Address, ...], index: int) -> None:
    if len(_first) >= _SERVICES:
        _first.clear()
    _first[service, sentinels] = index % len(sentinels)


class Search:
    """One question to the sentinels of a service, in turn. Iterate over it, and ask each that it yields.

    Args:
        config: Configuration whose connection names the sentinels.
        replicas: Ask for the replicas, not for the primary.
    """

    def __init__(self, config: BackendConfig, *, replicas: bool = False) -> None:
        asked = config.connection
        assert asked.sentinel_service is not None
        self._config = config
        self._service = asked.sentinel_service
        self._sentinels = ((asked.host, asked.port), *asked.seeds)
        self._replicas = replicas
        self._found: list[_Address] | None = None
        self._failures: list[FFError] = []
        self._asked = 0
        what = b"REPLICAS" if replicas else b"GET-MASTER-ADDR-BY-NAME"
        request = pack_command(b"SENTINEL", what, self._service.encode())
        self.step = Step((Command(b"", request),))

    def __iter__(self) -> Iterator[BackendConfig]:
        """Yield the configuration of each sentinel, until one has answered. All together take one request timeout."""
        asked = self._config.connection
        left_until = time.monotonic() + (self._config.timeouts.request or DEFAULT_REQUEST_TIMEOUT_S)
        count = len(self._sentinels)
        first = _first.get((self._service, self._sentinels), 0)
        for turn in range(count):
            index = (first + turn) % count
            share = max((left_until - time.monotonic()) / (count - turn), _LEAST_S)
            host, port = self._sentinels[index]
            self._asked = index
            yield self._config.replace(
                connection=ValkeyConnection(
                    host,
                    port,
                    tls=asked.tls,
                    username=asked.sentinel_username,
                    password=asked.sentinel_password,
                    tls_ca_file=asked.tls_ca_file,
                    tls_cert_file=asked.tls_cert_file,
                    tls_key_file=asked.tls_key_file,
                    ssl_context=asked.ssl_context,
                ),
                timeouts=BackendTimeouts(share),
            )
            if self._found is not None:
                return

    def failed(self, error: FFError) -> None:
        """Note that the sentinel did not answer."""
        self._failures.append(error)

    def answered(self, reply: object) -> None:
        """Take the sentinel's answer; one that does not know the service is passed over."""
        if isinstance(reply, Exception):
            self.failed(from_server_error(str(reply)))
            return
        found = _replicas_in(reply) if self._replicas else _primary_in(reply)
        if found is not None:
            self._found = found
            _note_first(self._service, self._sentinels, self._asked)

    def result(self) -> list[BackendConfig]:
        """Return the configuration of the primary, or of each replica.

        Raises:
            PrimaryNotFound: No sentinel answered that knows the service.
            AuthenticationFailed, TlsFailed: None did, and one refused the credentials or the handshake.
        """
        if self._found is None:
            raise self._failure()
        connection = self._config.connection
        if self._replicas:
            # Nobody checks that a replica is a primary.
            plain = connection.replace(
                sentinel_service=None, sentinel_username=None, sentinel_password=None, seeds=()
            )
            return [self._at(plain, address) for address in self._found]
        return [
            self._at(connection.replace(seeds=self._sentinels), address) for address in self._found
        ]

    def _at(self, connection: ValkeyConnection, address: _Address) -> BackendConfig:
        host, port = address
        return self._config.replace(connection=connection.replace(host=host, port=port))

    def unknown(self) -> FFError:
        """Return the error of a sentinel that does not know the service."""
        return self._failure()

    def _failure(self) -> FFError:
        for error in self._failures:
            if isinstance(error, AuthenticationFailed | PermissionDenied):
                error.args = (
                    (
                        f"A sentinel of the service {self._service} refused the credentials; check sentinel_username"
                        " and sentinel_password."
                    ),
                )
                return error
            if isinstance(error, TlsFailed):
                return error
        sentinels = tuple(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            for host, port in self._sentinels
        )
        silent = all(isinstance(error, _NO_ANSWER) for error in self._failures) and len(
            self._failures
        ) == len(sentinels)
        why = "answered" if silent else "that answered knows it"
        missing = PrimaryNotFound(
            f"The primary of the service {self._service} was not found: no sentinel {why}. Asked were"
            f" {', '.join(sentinels)}."
        )
        missing.service, missing.sentinels = self._service, sentinels
        return missing


def primary_in(reply: object) -> _Address | None:
    """Return the address in a sentinel's answer; None where it names none."""
    found = _primary_in(reply)
    return None if found is None else found[0]


def _primary_in(reply: object) -> list[_Address] | None:
    if not isinstance(reply, list) or len(reply) != 2:
        return None
    found = _address(*reply)
    return None if found is None else [found]


def _replicas_in(reply: object) -> list[_Address] | None:
    if not isinstance(reply, list):
        return None
    found: list[_Address] = []
    for each in reply:
        fields = dict(zip(each[::2], each[1::2], strict=False)) if isinstance(each, list) else {}
        flags = str(fields.get(b"flags", b"s_down"), "ascii", "replace").split(",")
        address = _address(fields.get(b"ip"), fields.get(b"port"))
        linked = fields.get(b"master-link-status", b"ok") == b"ok"
        if address is not None and linked and not _UNUSABLE.intersection(flags):
            found.append(address)
    return found


def _address(host: object, port: object) -> _Address | None:
    """Return an address in an answer; None where it is none."""
    if not isinstance(host, bytes) or not isinstance(port, bytes) or not port.isdigit():
        return None
    try:
        place = ValkeyConnection(host.decode("utf-8", "replace"), int(port))
    except InvalidInput:
        return None
    return place.host, place.port

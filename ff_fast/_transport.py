"""Connecting with redis-py, for both shells: its arguments, sockets and errors."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

from ff_fast._core.steps import DEFAULT_REQUEST_TIMEOUT_S, Step
from ff_fast._hot.resp import ReplyGuard
from ff_fast.errors import (
    DeadlineExceeded,
    FFError,
    InvalidInput,
    NotEnoughReplicas,
    NotPrimary,
    Outcome,
    Unavailable,
    name_server,
)
from ff_fast.types import BackendConfig

if TYPE_CHECKING:
    import asyncio
    import socket
    import ssl

    from ff_fast._core.credentials import Login

_BLOCK_MARGIN_S = 2.0

MAX_IDLE = 64
"""Most idle connections of a backend."""

MAX_IDLE_OF_READERS = 8
"""Number of idle connections from which on a reader closes its own: readers come in bursts, and stay long."""

MAX_IDLE_S = 60.0
"""How long a connection stays idle, in seconds, before it is closed."""


def config_of(target: str | BackendConfig) -> BackendConfig:
    """Return *target* as a configuration; a ``str`` is a URL.

    Raises:
        InvalidInput: The URL is malformed.
    """
    config = BackendConfig.from_url(target) if isinstance(target, str) else target
    if not isinstance(config, BackendConfig):
        raise InvalidInput("connect() takes a URL or a BackendConfig.")
    return config


def request_timeout_s(config: BackendConfig) -> float:
    """Return the longest time of one call, in seconds."""
    return config.timeouts.request or DEFAULT_REQUEST_TIMEOUT_S


def wait_s(timeout: float, step: Step) -> float:
    """Return the longest wait for the replies to *step*, in seconds: request timeout, BLOCK time, and a margin."""
    return timeout + (step.block_s + _BLOCK_MARGIN_S if step.block_s else 0.0)


def longest_try_s(until: float) -> float:
    """Return how long one try of a call may take that is of no use after *until*, in monotonic time.

    Half of the time that is left, so that another try may follow; a second or less is not divided.
    """
    left = until - time.monotonic()
    return max(left / 2, min(left, 1.0), 1e-3)


def connection_arguments(config: BackendConfig, login: Login | None = None) -> dict[str, Any]:
    """Return the keyword arguments of a redis-py connection, blocking or asyncio.

    *login* is what the provider of credentials gave; None takes the configured user name and password. Its retries are off, since they would repeat appends. RESP2 is pinned: there are no push messages between replies,
    and every reply has one shape.
    """
    server = config.connection
    timeout = request_timeout_s(config)
    arguments: dict[str, Any] = {
        "db": server.db,
        "username": server.username if login is None else login.username,
        "password": server.password if login is None else login.password,
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "protocol": 2,
        "driver_info": None,
        "health_check_interval": 0,
    }
    if server.unix_path is not None:
        arguments["path"] = server.unix_path
        return arguments
    arguments |= {"host": server.host, "port": server.port, "socket_keepalive": True}
    if server.tls:
        arguments |= {
            "ssl_cert_reqs": "required",
            "ssl_check_hostname": True,
            "ssl_ca_certs": server.tls_ca_file,
            "ssl_certfile": server.tls_cert_file,
            "ssl_keyfile": server.tls_key_file,
        }
    return arguments


class _GuardedReader:
    """A ``hiredis.Reader`` that takes nothing which a :class:`ReplyGuard` refuses."""

    def __init__(self, reader: Any, refusal: type[Exception]) -> None:
        self._reader = reader
        self._guard = ReplyGuard()
        self._refusal = refusal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def feed(self, buffer: bytes | bytearray, start: int = 0, length: int | None = None) -> None:
        data = bytes(buffer if length is None else buffer[start : start + length])
        if not self._guard.accepts(data):
            raise self._refusal(f'Protocol error, got "\\x{data[0]:02x}"')
        self._reader.feed(data)


@functools.cache
def guarded_parser(module: Any) -> Any:
    """Return the parser of redis-py's *module* of connections, with a guard: it reads the answers of the handshake."""
    from redis.exceptions import InvalidResponse

    parser: type[Any] = module.DefaultParser

    def on_connect(self: Any, connection: Any) -> None:
        parser.on_connect(self, connection)
        self._reader = _GuardedReader(self._reader, InvalidResponse)

    return type("GuardedParser", (parser,), {"on_connect": on_connect})


def take_socket(connection: Any) -> socket.socket:
    """Detach the socket from redis-py's connected *connection*, and return it.

    This function, :func:`guarded_parser`, :func:`use_context` and :func:`take_stream` are the only users of redis-py's private names.
    """
    taken: socket.socket = connection._sock
    connection._sock = None
    return taken


def use_context(connection: Any, context: ssl.SSLContext) -> None:
    """Let redis-py's *connection*, which is not open yet, use *context* in place of one that it makes."""
    if hasattr(connection, "ssl_context"):
        connection.ssl_context.context = context
    else:
        connection._wrap_socket_with_ssl = functools.partial(
            context.wrap_socket, server_hostname=connection.host
        )


def wants_read(tls: bool) -> type[OSError]:
    """Return the error of a socket that has nothing to read for the time being."""
    if not tls:
        return BlockingIOError
    import ssl  # takes milliseconds to import

    return ssl.SSLWantReadError


def take_stream(connection: Any) -> asyncio.StreamWriter:
    """Detach the stream from redis-py's connected asyncio *connection*, and return it.

    A collected stream closes its transport: keep the stream as long as the transport.
    """
    taken: asyncio.StreamWriter = connection._writer
    connection._writer = connection._reader = None
    return taken


def connect_error(error: BaseException, config: BackendConfig) -> FFError:
    """Return our error for a failure to connect; see :func:`ff_fast._connect_errors.connect_error`."""
    from ff_fast import _connect_errors  # with ssl, which takes milliseconds to import

    return _connect_errors.connect_error(error, config, request_timeout_s(config))


def name_refuser(error: FFError, config: BackendConfig) -> None:
    """Say in *error* which server has refused to write."""
    if isinstance(error, NotPrimary | NotEnoughReplicas):
        server = config.connection
        name_server(error, server.host, server.port, server.unix_path)


def not_sent_in_time() -> DeadlineExceeded:
    """Return the error of a call whose deadline passed while it was queued."""
    late = DeadlineExceeded("There was no answer in time; the call was not sent.")
    late.outcome = Outcome.NOT_APPLIED
    return late


NOT_PICKLED = "A backend holds connections and cannot be pickled; connect again from its config."


def closed_error() -> FFError:
    """Return the error that a closed backend raises."""
    return Unavailable("The backend is closed; connect again.")

"""How both shells reach a server: redis-py's arguments, and its errors in our words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ff_fast._core.steps import DEFAULT_REQUEST_TIMEOUT_S, Step
from ff_fast.errors import (
    DeadlineExceeded,
    FFError,
    InvalidInput,
    Outcome,
    Unavailable,
)
from ff_fast.types import BackendConfig

if TYPE_CHECKING:
    import asyncio
    import socket

_BLOCK_MARGIN_S = 2.0


def config_of(target: str | BackendConfig) -> BackendConfig:
    """Return *target* as a configuration; a text is a URL.

    Raises:
        InvalidInput: The URL is not one of ours, or names something that is not supported.
    """
    config = BackendConfig.from_url(target) if isinstance(target, str) else target
    if not isinstance(config, BackendConfig):
        raise InvalidInput("connect() takes a URL or a BackendConfig.")
    if config.connection.cluster:
        raise InvalidInput("Clusters are not supported yet; connect to a standalone server.")
    return config


def request_timeout_s(config: BackendConfig) -> float:
    """Seconds that one call may take."""
    return config.timeouts.request or DEFAULT_REQUEST_TIMEOUT_S


def wait_s(timeout: float, step: Step) -> float:
    """Seconds to wait for the replies to *step*: the request timeout, plus its BLOCK time and a margin."""
    return timeout + (step.block_s + _BLOCK_MARGIN_S if step.block_s else 0.0)


def connection_arguments(config: BackendConfig) -> dict[str, Any]:
    """Return the keyword arguments of a redis-py connection, for either of its stacks.

    Its retries are off: it would repeat appends by itself. RESP2 is pinned: no push message can stand between two
    replies, and every reply has one shape.
    """
    server = config.connection
    timeout = request_timeout_s(config)
    arguments: dict[str, Any] = {
        "db": server.db,
        "username": server.username,
        "password": server.password,
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


def take_socket(connection: Any) -> socket.socket:
    """Take the socket of redis-py's connected *connection*, which forgets it.

    Here and in :func:`take_stream` are the only private names of redis-py that the library uses.
    """
    taken: socket.socket = connection._sock
    connection._sock = None
    return taken


def take_stream(connection: Any) -> asyncio.StreamWriter:
    """Take the stream of redis-py's connected asyncio *connection*, which forgets it.

    The stream closes its transport when it is collected: keep it as long as the transport.
    """
    taken: asyncio.StreamWriter = connection._writer
    connection._writer = connection._reader = None
    return taken


def connect_error(error: BaseException, config: BackendConfig) -> FFError:
    """Return ours for what was raised while connecting; see :func:`ff_fast._connect_errors.connect_error`."""
    from ff_fast import _connect_errors  # with ssl, which takes milliseconds to import

    return _connect_errors.connect_error(error, config, request_timeout_s(config))


def not_sent_in_time() -> FFError:
    """What a call raises whose deadline passed before its turn came."""
    late = DeadlineExceeded("There was no answer in time; the call was not sent.")
    late.outcome = Outcome.NOT_APPLIED
    return late


NOT_PICKLED = "A backend holds connections and cannot be pickled; connect again from its config."


def closed_error() -> FFError:
    """What the calls of a closed backend raise."""
    return Unavailable("The backend is closed; connect again.")

"""How both shells reach a server: redis-py's arguments, its errors in our words, and the library on the server."""

from __future__ import annotations

import ssl
from typing import Any

from ff_fast import _library, ops
from ff_fast._hot.resp import pack_command
from ff_fast._steps import DEFAULT_REQUEST_TIMEOUT_S, Flow, Step
from ff_fast.errors import (
    AuthenticationFailed,
    FFError,
    FunctionMissing,
    InvalidInput,
    LibraryMismatch,
    TlsFailed,
    Unavailable,
    from_server_error,
)
from ff_fast.types import BackendConfig


def config_of(target: str | BackendConfig) -> BackendConfig:
    """Return *target* as a configuration; a text is a URL.

    Raises:
        InvalidInput: The URL is not one of ours, or names something that is not supported.
    """
    config = BackendConfig.from_url(target) if isinstance(target, str) else target
    if not isinstance(config, BackendConfig):
        raise InvalidInput("connect() takes a URL or a BackendConfig.")
    return config


def request_timeout_s(config: BackendConfig) -> float:
    """Seconds that one call may take."""
    return config.timeouts.request or DEFAULT_REQUEST_TIMEOUT_S


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


def connect_error(error: BaseException) -> FFError:
    """Return ours for what redis-py raised while it connected; nothing was sent by then."""
    import redis.exceptions as theirs

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return TlsFailed()
        cause = cause.__cause__ or cause.__context__
    # By name and not by isinstance alone: AuthenticationError is a ConnectionError there.
    if isinstance(error, theirs.AuthenticationError):
        return AuthenticationFailed()
    if isinstance(error, theirs.NoPermissionError):
        return from_server_error("NOPERM")
    return Unavailable()


def ensure_library() -> Flow[None]:
    """Load the Lua library where it is missing or another version of the same contract; never replace a newer one.

    Raises:
        LibraryMismatch: The server holds a newer contract.
        FFError: The server refused.
    """
    version = ops.version()
    (reply,) = yield Step(version.request())
    try:
        contract, digest = version.answer(reply)
    except FunctionMissing:
        pass
    else:
        if contract > _library.CONTRACT:
            raise LibraryMismatch(contract, _library.CONTRACT)
        if digest == _library.digest():
            return
    (reply,) = yield Step(
        pack_command(b"FUNCTION", b"LOAD", b"REPLACE", _library.source().encode())
    )
    if isinstance(reply, Exception):
        raise from_server_error(str(reply))

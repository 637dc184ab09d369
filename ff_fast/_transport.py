"""How both shells reach a server: redis-py's arguments, its errors in our words, and the library on the server."""

from __future__ import annotations

import os
import ssl
import weakref
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ff_fast import _library
from ff_fast._core import ops
from ff_fast._core.steps import DEFAULT_REQUEST_TIMEOUT_S, Flow, Step
from ff_fast._hot.resp import pack_command
from ff_fast.errors import (
    AuthenticationFailed,
    DeadlineExceeded,
    FFError,
    FunctionMissing,
    InternalFunctionError,
    InvalidInput,
    LibraryMismatch,
    Outcome,
    TlsFailed,
    Unavailable,
    from_server_error,
)
from ff_fast.types import BackendConfig

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable

    from ff_fast._core.tail import Item, TailCore

T = TypeVar("T")

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
    """Seconds to wait for the replies to *step*: a server that was told to block gets its time on top."""
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
    """Return ours for what was raised while connecting; the caller's own call was not sent by then.

    Raise it outside the ``except`` block: as its context, the original would carry its text along.
    """
    import redis.exceptions as theirs

    if isinstance(error, FFError):
        return _not_sent(error)
    cause: BaseException | None = error
    while cause is not None:
        # redis-py hides what it got behind errors of its own, not in the same way everywhere.
        if isinstance(cause, ssl.SSLError):
            return TlsFailed()
        if config.connection.tls and isinstance(cause, FileNotFoundError | PermissionError):
            return TlsFailed("A file of certificates or keys cannot be read; check the paths.")
        # Before the others: AuthenticationError is a ConnectionError there.
        if isinstance(cause, theirs.AuthenticationError):
            return AuthenticationFailed()
        if isinstance(cause, theirs.NoPermissionError):
            return from_server_error("NOPERM")
        if isinstance(cause, theirs.TimeoutError | TimeoutError):
            return not_sent_in_time()
        if isinstance(cause, theirs.ResponseError):
            refusal = from_server_error(str(cause))
            if isinstance(refusal, InternalFunctionError):
                # Logging in and choosing the database is all that is sent.
                return InvalidInput(f"The server has no database {config.connection.db}.")
            return refusal
        cause = cause.__cause__ or cause.__context__
    return Unavailable()


def _not_sent(error: FFError) -> FFError:
    if error.outcome is Outcome.NOT_APPLIED:
        return error
    if isinstance(error, DeadlineExceeded):
        return not_sent_in_time()
    return Unavailable()


def not_sent_in_time() -> FFError:
    """What a call raises whose deadline passed before its turn came."""
    late = DeadlineExceeded("There was no answer in time; the call was not sent.")
    late.outcome = Outcome.NOT_APPLIED
    return late


NOT_PICKLED = "A backend holds connections and cannot be pickled; connect again from its config."


def closed_error() -> FFError:
    """What the calls of a closed backend raise."""
    return Unavailable("The backend is closed; connect again.")


def ensure_library() -> Flow[None]:
    """Load the Lua library where it is missing or another version of the same contract; never replace a newer one.

    Raises:
        LibraryMismatch: The server holds a newer contract.
        FFError: The server refused.
    """
    version = ops.version()
    (reply,) = yield Step(version.request())
    try:
        contract, digest, _ = version.answer(reply)
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


def with_library(make: Callable[[], Flow[T]]) -> Flow[T]:
    """Run the flow that *make* returns; where the server lost the library, load it and run another."""
    try:
        return (yield from make())
    except FunctionMissing:
        pass
    yield from ensure_library()
    return (yield from make())


def read_on(core: TailCore) -> Flow[list[Item]]:
    """One step of a tail."""
    (reply,) = yield core.step()
    return core.receive(reply)


# -- fork ------------------------------------------------------------------------------------------------------------


class Forkable(Protocol):
    """What must know when its process was forked."""

    def _forked(self) -> None:
        """Called in the child, where no other thread runs, and where locks may be held for ever."""


_forkable: weakref.WeakSet[Forkable] = weakref.WeakSet()


def watch_fork(client: Forkable) -> None:
    """Tell *client* of a fork as long as it lives."""
    _forkable.add(client)


def _tell_of_fork() -> None:
    for client in list(_forkable):
        client._forked()


os.register_at_fork(after_in_child=_tell_of_fork)

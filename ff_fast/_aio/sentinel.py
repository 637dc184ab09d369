"""Where to connect: sentinels know which server is the primary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ff_fast import _transport
from ff_fast._aio.connection import Connection
from ff_fast._core.sentinel import Search
from ff_fast.errors import FFError

if TYPE_CHECKING:
    from ff_fast.types import BackendConfig


async def resolve(config: BackendConfig) -> BackendConfig:
    """Return *config* with the address of the primary in place of the sentinels; without sentinels, *config* itself.

    Raises:
        PrimaryNotFound: No sentinel answered that knows the service.
        AuthenticationFailed, TlsFailed: None did, and one refused the credentials or the handshake.
    """
    if config.connection.sentinel_service is None:
        return config
    (resolved,) = await _ask(Search(config))
    return resolved


async def replicas(config: BackendConfig) -> list[BackendConfig]:
    """Return *config* with the address of each replica that can be read from; without sentinels, an empty list.

    Raises:
        PrimaryNotFound, AuthenticationFailed, TlsFailed: As for :func:`resolve`.
    """
    if config.connection.sentinel_service is None:
        return []
    return await _ask(Search(config, replicas=True))


async def _ask(search: Search) -> list[BackendConfig]:
    for sentinel in search:
        connection = Connection()
        try:
            await connection.open(sentinel)
            timeout_s = _transport.request_timeout_s(sentinel)
            (reply,) = await connection.request(search.step, timeout_s)
        except FFError as error:
            search.failed(error)
        else:
            search.answered(reply)
        finally:
            connection.abort()
            await connection.wait_closed()
    return search.result()

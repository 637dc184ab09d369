"""Where to connect: sentinels know which server is the primary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ff_fast._core.sentinel import Search
from ff_fast._sync.connection import Connection
from ff_fast.errors import FFError

if TYPE_CHECKING:
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

"""The settings of a client of redis-py, read from its public attributes: blocking or asyncio, of one server, sentinels or a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ff_fast.errors import InvalidInput, InvalidType
from ff_fast.types import BackendConfig, ValkeyConnection

if TYPE_CHECKING:
    from collections.abc import Mapping

_TLS_FILES = {
    "ssl_ca_certs": "tls_ca_file",
    "ssl_certfile": "tls_cert_file",
    "ssl_keyfile": "tls_key_file",
}

# Arguments of redis-py's TLS connections, as the class that makes the context of them names them.
_TLS_SETTINGS = {
    "ssl_keyfile": "keyfile",
    "ssl_certfile": "certfile",
    "ssl_cert_reqs": "cert_reqs",
    "ssl_include_verify_flags": "include_verify_flags",
    "ssl_exclude_verify_flags": "exclude_verify_flags",
    "ssl_ca_certs": "ca_certs",
    "ssl_ca_data": "ca_data",
    "ssl_ca_path": "ca_path",
    "ssl_check_hostname": "check_hostname",
    "ssl_min_version": "min_version",
    "ssl_ciphers": "ciphers",
    "ssl_password": "password",
}


def config_of_client(client: object, settings: Mapping[str, Any]) -> BackendConfig:
    """Return the configuration that reaches the servers of *client* as it does.

    Raises:
        InvalidType: *client* is no client of redis-py or of a library made of it.
        InvalidInput: It reaches replicas of a service, or its sentinels in another way than its servers, or no TLS context
            can be made as it would.
    """
    nodes, pool = getattr(client, "nodes_manager", None), getattr(client, "connection_pool", None)
    if nodes is not None and hasattr(nodes, "startup_nodes"):
        connection = _of_cluster(client, nodes)
    elif pool is not None and isinstance(getattr(pool, "connection_kwargs", None), dict):
        if hasattr(pool, "sentinel_manager"):
            connection = _of_sentinels(pool)
        else:
            connection = ValkeyConnection(**_place(pool.connection_kwargs), **_access(pool))
    else:
        raise InvalidType(
            "from_client() takes a client of redis-py: redis.Redis, redis.RedisCluster, or those of redis.asyncio;"
            f" not {type(client).__name__}."
        )
    return BackendConfig(connection, **settings)


def _of_cluster(client: Any, nodes: Any) -> ValkeyConnection:
    given = getattr(client, "connection_kwargs", None) or nodes.connection_kwargs
    seeds = [(str(node.host), int(node.port)) for node in nodes.startup_nodes.values()]
    if not seeds:
        raise InvalidInput("The client of the cluster names no node.")
    host, port = seeds[0]
    uses_tls = given.get("ssl") or _is_tls(given.get("connection_class"))
    access = {**_login(given), **_tls(given, uses_tls)}
    return ValkeyConnection(host, port, seeds=tuple(seeds[1:]), cluster=True, **access)


def _of_sentinels(pool: Any) -> ValkeyConnection:
    if not pool.is_master:
        raise InvalidInput("The client reads from replicas of a service; pass one of master_for().")
    sentinels = pool.sentinel_manager.sentinels
    places = [
        (str(given["host"]), int(given["port"]))
        for given in (each.connection_pool.connection_kwargs for each in sentinels)
    ]
    first = sentinels[0].connection_pool
    access, login = _access(pool), _login(first.connection_kwargs)
    if _uses_tls(first) != bool(access.get("tls")):
        raise InvalidInput("The client uses TLS to the sentinels or to the servers, not to both.")
    if login.get("credential_provider") is not None:
        raise InvalidInput(
            "The sentinels have a credential provider; give them user name and password."
        )
    (host, port), *seeds = places
    return ValkeyConnection(
        host,
        port,
        seeds=tuple(seeds),
        db=int(pool.connection_kwargs.get("db") or 0),
        sentinel_service=pool.service_name,
        sentinel_username=login.get("username"),
        sentinel_password=login.get("password"),
        **access,
    )


def _place(given: Mapping[str, Any]) -> dict[str, Any]:
    db = int(given.get("db") or 0)
    if given.get("path"):
        return {"unix_path": str(given["path"]), "db": db}
    return {
        "host": str(given.get("host") or "localhost"),
        "port": int(given.get("port") or 6379),
        "db": db,
    }


def _access(pool: Any) -> dict[str, Any]:
    given = pool.connection_kwargs
    return {**_login(given), **_tls(given, _uses_tls(pool))}


def _login(given: Mapping[str, Any]) -> dict[str, Any]:
    provider = given.get("credential_provider")
    found: dict[str, Any] = {"client_name": given.get("client_name") or None}
    if provider is not None:
        return {**found, "credential_provider": provider}
    return {
        **found,
        "username": given.get("username") or None,
        "password": given.get("password") or None,
    }


def _uses_tls(pool: Any) -> bool:
    return _is_tls(getattr(pool, "connection_class", None))


def _is_tls(kind: Any) -> bool:
    return any(each.__name__ == "SSLConnection" for each in getattr(kind, "__mro__", ()))


def _tls(given: Mapping[str, Any], used: object) -> dict[str, Any]:
    if not used:
        return {}
    chosen = {name: given[name] for name in _TLS_SETTINGS if given.get(name) is not None}
    verifies = chosen.get("ssl_cert_reqs", "required") in ("required", 2)
    rest = chosen.keys() - _TLS_FILES.keys() - {"ssl_cert_reqs", "ssl_check_hostname"}
    if verifies and chosen.get("ssl_check_hostname", True) and not rest:
        files = {mine: chosen[name] for name, mine in _TLS_FILES.items() if name in chosen}
        return {"tls": True, **files}
    from redis.asyncio.connection import RedisSSLContext

    made: dict[str, Any] = {"cert_reqs": "required", "check_hostname": True}
    made |= {_TLS_SETTINGS[name]: value for name, value in chosen.items()}
    try:
        context = RedisSSLContext(**made).get()
    except (OSError, ValueError):
        # Of a bad certificate too. What it says may name a file or hold a part of it.
        context = None
    if context is None:
        raise InvalidInput("The client's TLS settings are of no use; check its ssl_ arguments.")
    return {"tls": True, "ssl_context": context}

"""The configuration that a client of redis-py stands for, without a server."""

import ssl
import traceback

import pytest
import redis
import redis.asyncio
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.credentials import UsernamePasswordCredentialProvider
from redis.sentinel import Sentinel

from ff_fast._clients import config_of_client
from ff_fast.errors import InvalidInput, InvalidType
from ff_fast.types import BackendTimeouts, ValkeyConnection

KINDS = {"blocking": redis, "asyncio": redis.asyncio}
SENTINELS = {"blocking": Sentinel, "asyncio": AsyncSentinel}
both = pytest.mark.parametrize("kind", KINDS)
CANARY = "s3cret-canary"


def connection(client):
    return config_of_client(client, {}).connection


@both
def test_the_address_and_the_login(kind):
    module = KINDS[kind]
    assert connection(module.Redis()) == ValkeyConnection("localhost")
    given = {"host": "h", "port": 7000, "db": 3, "username": "u", "password": CANARY}
    client = module.Redis(**given, client_name="me", decode_responses=True, socket_timeout=1)
    found = connection(client)
    assert found == ValkeyConnection(**given, client_name="me")
    assert CANARY not in repr(found)
    assert connection(module.Redis.from_url("redis://u:p@h:1/2")) == ValkeyConnection(
        "h", 1, username="u", password="p", db=2
    )
    assert connection(module.Redis.from_url("unix://u:p@/s?db=1")) == ValkeyConnection(
        unix_path="/s", username="u", password="p", db=1
    )
    pool = module.BlockingConnectionPool(host="h", port=2)
    assert connection(module.Redis(connection_pool=pool)) == ValkeyConnection("h", 2)


@both
def test_a_credential_provider(kind):
    provider = UsernamePasswordCredentialProvider("u", CANARY)
    found = connection(KINDS[kind].Redis(credential_provider=provider))
    assert found.credential_provider is provider


@both
def test_tls_as_files_or_as_a_context(kind):
    module = KINDS[kind]
    files = {"ssl_ca_certs": "/ca", "ssl_certfile": "/c", "ssl_keyfile": "/k"}
    assert connection(module.Redis(host="h", ssl=True, **files)) == ValkeyConnection(
        "h", tls=True, tls_ca_file="/ca", tls_cert_file="/c", tls_key_file="/k"
    )
    assert connection(module.Redis.from_url("rediss://h")) == ValkeyConnection("h", tls=True)
    for options, verifies in (
        ({"ssl_cert_reqs": "none"}, False),
        ({"ssl_check_hostname": False}, True),
        ({"ssl_min_version": ssl.TLSVersion.TLSv1_3}, True),
    ):
        found = connection(module.Redis(host="h", ssl=True, **options))
        assert found.ssl_context.verify_mode == (ssl.CERT_REQUIRED if verifies else ssl.CERT_NONE)
        # As the client does.
        named = options.get("ssl_check_hostname", verifies)
        assert found.ssl_context.check_hostname is named


@both
def test_tls_settings_of_no_use_are_told_without_their_text(kind):
    with pytest.raises(InvalidInput, match="check its ssl_ arguments") as caught:
        connection(KINDS[kind].Redis(ssl=True, ssl_ca_data=CANARY))
    assert CANARY not in "".join(traceback.format_exception(caught.value))


@both
def test_a_service_of_sentinels(kind):
    sentinel = SENTINELS[kind](
        [("s1", 26_379), ("s2", 1)], sentinel_kwargs={"username": "w", "password": "x"}
    )
    found = connection(sentinel.master_for("service", password=CANARY, db=2))
    assert found == ValkeyConnection(
        "s1", 26_379, seeds=(("s2", 1),), sentinel_service="service", db=2, password=CANARY,
        sentinel_username="w", sentinel_password="x",
    )  # fmt: skip
    assert CANARY not in repr(found)
    with pytest.raises(InvalidInput, match="master_for"):
        connection(sentinel.slave_for("service"))
    with pytest.raises(InvalidInput, match="not to both"):
        connection(sentinel.master_for("service", ssl=True))
    both_ways = SENTINELS[kind]([("s1", 1)], sentinel_kwargs={"ssl": True})
    assert connection(both_ways.master_for("service", ssl=True)).tls


def test_a_cluster_of_asyncio():
    client = redis.asyncio.RedisCluster("h", 7000, username="u", password="p", ssl=True)
    assert connection(client) == ValkeyConnection(
        "h", 7000, username="u", password="p", tls=True, cluster=True
    )


def test_other_settings_are_those_of_the_configuration():
    config = config_of_client(redis.Redis(), {"partitions": 7, "timeouts": BackendTimeouts(2)})
    assert (config.partitions, config.timeouts.request) == (7, 2)
    with pytest.raises(TypeError):
        config_of_client(redis.Redis(), {"partition": 7})


@pytest.mark.parametrize("other", [None, "redis://h", object(), redis.Redis, 5])
def test_anything_else_is_refused(other):
    with pytest.raises(InvalidType, match="from_client"):
        config_of_client(other, {})

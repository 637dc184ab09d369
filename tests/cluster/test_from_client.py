"""A backend reaches the servers that a client of redis-py reaches, whichever shell either of them has."""

import asyncio

import pytest
import redis
import redis.asyncio
from redis.sentinel import Sentinel

import ff_fast
from ff_fast import aio

from ..shells import KINDS
from .sites import SERVICE, port_of

CLIENTS = {"blocking": redis, "asyncio": redis.asyncio}


async def use(kind, client, lane):
    """Connect with the client's settings, and create and claim an execution."""
    if kind == "asyncio":
        async with aio.ValkeyBackend.from_client(client, partitions=256) as backend:
            eid = await backend.create_execution(lane=lane)
            handle = await backend.claim(lane=lane)
            await backend.complete(handle)
    else:

        def run():
            with ff_fast.ValkeyBackend.from_client(client, partitions=256) as backend:
                eid = backend.create_execution(lane=lane)
                backend.complete(backend.claim(lane=lane))
                return eid

        eid = await asyncio.to_thread(run)
    return eid


async def close(client):
    closing = getattr(client, "aclose", client.close)()
    if closing is not None:
        await closing


@pytest.mark.parametrize("of", CLIENTS)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_of_one_server(kind, of, server, lane):
    client = CLIENTS[of].Redis.from_url(server.url)
    await use(kind, client, lane)
    await close(client)


@pytest.mark.parametrize("of", CLIENTS)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_of_a_cluster(kind, of, cluster, lane):
    client = CLIENTS[of].RedisCluster("127.0.0.1", port_of(cluster.nodes[0].url))
    await use(kind, client, lane)
    await close(client)


@pytest.mark.long
async def test_a_client_that_sentinels_lead(sentinels, lane):
    places = [("127.0.0.1", port_of(each.url)) for each in sentinels.sentinels.servers]
    client = Sentinel(places).master_for(SERVICE)
    for kind in KINDS:
        await use(kind, client, lane)
    client.close()

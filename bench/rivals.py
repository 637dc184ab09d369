"""The jobs of the rivals: the same frames through other clients, each used as its manual shows.

Every function but those at the end runs in a process of its own (:mod:`bench.child`). The time from `Clock.start` to
`Clock.stop` counts; connecting comes before. Each frame is an entry of the six fields that users write today.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, cast

import coredis
import redis
import redis.asyncio
from glide import Batch, GlideClient, GlideClientConfiguration, NodeAddress

from bench.harness import Wire, batches, payloads
from ff_fast._hot.resp import pack_command

if TYPE_CHECKING:
    from collections.abc import Callable

    from redis.typing import EncodableT, FieldT


Entries = list[tuple[bytes, dict[bytes, bytes]]]


class Clock:
    """Measures wall time, and the CPU time of all threads of this process."""

    def start(self) -> None:
        self._cpu = time.process_time()
        self._wall = time.perf_counter()

    def stop(self, count: int) -> dict[str, float]:
        wall = time.perf_counter() - self._wall
        cpu = time.process_time() - self._cpu
        return {"per_second": count / wall, "client_us": cpu / count * 1e6}


def now_ms() -> int:
    return int(time.time() * 1000)


def fields(payload: bytes) -> dict[FieldT, EncodableT]:
    return {
        "frame_type": "token",
        "ts": now_ms(),
        "payload": payload,
        "encoding": "utf8",
        "source": "worker",
        "mode": "durable",
    }


def redis_sync(path: str, key: str, count: int, batch: int) -> dict[str, float]:
    """redis-py: pipelines of *batch* XADD."""
    clock = Clock()
    with redis.Redis(unix_socket_path=path) as client:
        client.ping()
        parts = batches(payloads(count), batch)
        clock.start()
        for part in parts:
            pipeline = client.pipeline(transaction=False)
            for payload in part:
                pipeline.xadd(key, fields(payload))
            pipeline.execute()
        return clock.stop(count)


async def redis_asyncio(path: str, key: str, count: int, batch: int) -> dict[str, float]:
    """redis-py asyncio: pipelines of *batch* XADD; with a *batch* of 1, each XADD awaited."""
    clock = Clock()
    async with redis.asyncio.Redis(unix_socket_path=path) as client:
        await client.ping()
        parts = batches(payloads(count), batch)
        clock.start()
        if batch == 1:
            for (payload,) in parts:
                await client.xadd(key, fields(payload))
        else:
            for part in parts:
                pipeline = client.pipeline(transaction=False)
                for payload in part:
                    pipeline.xadd(key, fields(payload))  # type: ignore[unused-awaitable] # queued
                await pipeline.execute()
        return clock.stop(count)


async def coredis_pipeline(path: str, key: str, count: int, batch: int) -> dict[str, float]:
    """coredis: pipelines of *batch* XADD."""
    clock = Clock()
    async with coredis.Redis(unix_socket_path=path) as client:
        await client.ping()
        parts = batches(payloads(count), batch)
        clock.start()
        for part in parts:
            async with client.pipeline(transaction=False) as pipeline:
                for payload in part:
                    pipeline.xadd(  # queued, not awaited
                        key,
                        {
                            "frame_type": "token",
                            "ts": now_ms(),
                            "payload": payload,
                            "encoding": "utf8",
                            "source": "worker",
                            "mode": "durable",
                        },
                    )
        return clock.stop(count)


async def glide_batch(path: str, key: str, count: int, batch: int) -> dict[str, float]:
    """valkey-glide: batches (not atomic) of *batch* XADD."""
    clock = Clock()
    config = GlideClientConfiguration([NodeAddress(unix_socket_path=path)])
    client = await GlideClient.create(config)
    try:
        await client.ping()
        parts = batches(payloads(count), batch)
        clock.start()
        for part in parts:
            commands = Batch(is_atomic=False)
            for payload in part:
                commands.xadd(
                    key,
                    [
                        ("frame_type", "token"),
                        ("ts", str(now_ms())),
                        ("payload", payload),
                        ("encoding", "utf8"),
                        ("source", "worker"),
                        ("mode", "durable"),
                    ],
                )
            await client.exec(commands, raise_on_error=True)
        return clock.stop(count)
    finally:
        await client.close()


def encoded_xadd(key: str, payload: bytes) -> bytes:
    return pack_command(
        b"XADD", key.encode(), b"*", b"frame_type", b"token", b"ts", b"%d" % now_ms(), b"payload", payload,
        b"encoding", b"utf8", b"source", b"worker", b"mode", b"durable",
    )  # fmt: skip


def blast(path: str, key: str, count: int, batch: int) -> dict[str, float]:
    """No client: XADD encoded beforehand, four pipelines of *batch* in flight; replies are counted, not parsed."""
    clock = Clock()
    parts = batches([encoded_xadd(key, payload) for payload in payloads(count)], batch)
    requests = [b"".join(part) for part in parts]
    with Wire(path) as wire:
        clock.start()
        wire.drain_blast(requests, batch * 2)
        return clock.stop(count)


def fenced_blast(path: str, name: str, count: int, batch: int) -> dict[str, float]:
    """Do the same as :func:`blast` with a call of the fenced function for each frame."""
    clock = Clock()
    one = FencedAttempt(name)
    parts = batches([one.request(payload) for payload in payloads(count)], batch)
    requests = [b"".join(part) for part in parts]
    with Wire(path) as wire:
        clock.start()
        wire.drain_blast(requests, batch * FENCED_REPLY_LINES)
        return clock.stop(count)


# -- reading ------------------------------------------------------------------------------------------------------


def redis_read(path: str, key: str, count: int, page: int, how: str) -> dict[str, float]:
    """redis-py: read every entry of the stream by XREAD or XRANGE, *page* at a time; keep its lists as they are."""
    clock = Clock()
    with redis.Redis(unix_socket_path=path) as client:
        client.ping()
        clock.start()
        seen, last = 0, b"0-0"
        while seen < count:
            if how == "xread":
                answer = cast("dict[bytes, object] | list[object]", client.xread({key: last}, page))
                entries = entries_of(answer)
            else:
                entries = cast("Entries", client.xrange(key, b"(" + last, "+", page))
            seen += len(entries)
            last = entries[-1][0]
        return clock.stop(count)


async def redis_asyncio_read(
    path: str, key: str, count: int, page: int, how: str
) -> dict[str, float]:
    """Do the same as :func:`redis_read` in asyncio."""
    clock = Clock()
    async with redis.asyncio.Redis(unix_socket_path=path) as client:
        await client.ping()
        clock.start()
        seen, last = 0, b"0-0"
        while seen < count:
            if how == "xread":
                answer = cast(
                    "dict[bytes, object] | list[object]", await client.xread({key: last}, page)
                )
                entries = entries_of(answer)
            else:
                entries = cast("Entries", await client.xrange(key, b"(" + last, "+", page))
            seen += len(entries)
            last = entries[-1][0]
        return clock.stop(count)


def entries_of(answer: dict[bytes, object] | list[object]) -> Entries:
    """Return the entries in redis-py's answer to XREAD of one stream; its shape depends on the protocol."""
    if isinstance(answer, dict):
        (found,) = answer.values()
        # Under RESP3 redis-py nests the entries of a stream in one more list.
        entries = found[0] if isinstance(found, list) and isinstance(found[0], list) else found
    else:
        ((_, entries),) = cast("list[tuple[bytes, object]]", answer)
    return cast("Entries", entries)


# -- latency ------------------------------------------------------------------------------------------------------


async def redis_burst_write(path: str, key: str, rate: int, count: int) -> dict[str, float]:
    """Write *rate* frames a second; each XADD is awaited before the next token is taken."""
    async with redis.asyncio.Redis(unix_socket_path=path) as client:
        await client.ping()
        start = time.monotonic()
        late = 0.0
        for i in range(count):
            due = start + i / rate
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            now = time.monotonic_ns()
            late = max(late, now / 1e9 - due)
            await client.xadd(key, fields(b"%d" % now))
        return {"rate": (count - 1) / (time.monotonic() - start), "behind_ms": late * 1000}


async def redis_burst_read(path: str, key: str, count: int) -> dict[str, object]:
    """Read by a blocking XREAD; return for each frame the milliseconds from its write to its arrival here."""
    latencies: list[float] = []
    async with redis.asyncio.Redis(unix_socket_path=path) as client:
        last = b"0-0"
        while len(latencies) < count:
            answer = cast(
                "dict[bytes, object] | list[object]",
                await client.xread({key: last}, count=1000, block=2000),
            )
            if not answer:
                continue
            entries = entries_of(answer)
            last = entries[-1][0]
            for _, entry in entries:
                latencies.append((time.monotonic_ns() - int(entry[b"payload"])) / 1e6)
    return {"latencies_ms": latencies}


# -- one fenced call a frame --------------------------------------------------------------------------------------

# `bench_append` appends one frame a call, with the steps of FlowFabric's append: fence, clock, meta, entry, counters,
# trim. It has 4 keys and 14 arguments.
FENCED_LIBRARY = """#!lua name=bench
redis.register_function('bench_append', function(keys, args)
  if #args[7] > tonumber(args[13]) then
    return {0, 'retention_limit_exceeded'}
  end
  local core = redis.call('HMGET', keys[1], 'current_attempt_index', 'current_lease_id', 'current_lease_epoch',
    'lease_expires_at', 'lifecycle_phase', 'ownership_state')
  local time = redis.call('TIME')
  local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  if core[5] ~= 'active' then
    return {0, 'stream_closed'}
  end
  if core[6] ~= 'leased' or tonumber(core[4]) <= now or core[1] ~= args[2] or core[2] ~= args[3]
    or core[3] ~= args[4] then
    return {0, 'stale_owner_cannot_append'}
  end
  if redis.call('EXISTS', keys[3]) == 0 then
    redis.call('HSET', keys[3], 'frame_count', '0', 'total_bytes', '0', 'has_durable_frame', '0')
  end
  local closed = redis.call('HGET', keys[3], 'closed_at')
  if closed and closed ~= '' then
    return {0, 'stream_closed'}
  end
  local id = redis.call('XADD', keys[2], '*', 'frame_type', args[5], 'ts', args[6], 'payload', args[7],
    'encoding', args[8], 'source', args[10], 'mode', args[14])
  local count = redis.call('HINCRBY', keys[3], 'frame_count', 1)
  redis.call('HINCRBY', keys[3], 'total_bytes', #args[7])
  redis.call('HSET', keys[3], 'last_sequence', id, 'last_frame_at', tostring(now))
  if redis.call('HGET', keys[3], 'has_durable_frame') ~= '1' then
    redis.call('HSET', keys[3], 'has_durable_frame', '1')
    redis.call('PERSIST', keys[2])
  end
  redis.call('XTRIM', keys[2], 'MAXLEN', '=', args[11])
  return {1, 'OK', id, tostring(count), ''}
end)
-- The five commands that our function issues for one durable frame, without its checks: a lower bound of its cost.
redis.register_function('bench_min', function(keys, args)
  redis.call('GET', keys[1])
  redis.call('TIME')
  local id = redis.call('XADD', keys[2], '*', 'payload', args[7])
  redis.call('SETRANGE', keys[1], 17 + #args[2], id)
  redis.call('SPUBLISH', keys[1], args[4])
  return args[2]
end)
-- Each patch decodes, merges and encodes the whole document in Lua.
local function merge(target, patch)
  for name, value in pairs(patch) do
    if type(value) == 'table' and #value == 0 and type(target[name]) == 'table' then
      merge(target[name], value)
    else
      target[name] = value
    end
  end
end
redis.register_function('bench_patch', function(keys, args)
  local document = cjson.decode(redis.call('HGET', keys[1], 'document') or '{}')
  merge(document, cjson.decode(args[1]))
  local version = redis.call('HINCRBY', keys[1], 'version', 1)
  redis.call('HSET', keys[1], 'document', cjson.encode(document), 'last_updated_ms', '1')
  return {1, 'OK', tostring(version)}
end)
"""


# Lines of a reply: one for the length, one for an integer, two for each of four strings.
FENCED_REPLY_LINES = 10


class FencedAttempt:
    """An attempt of the fenced function, with keys of its own."""

    def __init__(self, name: str) -> None:
        tag = b"{bench:%b}" % name.encode()
        self.core, self.stream = tag + b":core", tag + b":stream"
        self._meta, self._summary = tag + b":meta", tag + b":summary"
        self._lease = b"6f0b7c1e-2f5d-4f4e-9d55-0a4be2f6a001"

    def create(self, wire: Wire) -> None:
        wire.command("FUNCTION", "LOAD", "REPLACE", FENCED_LIBRARY)
        wire.command(
            "HSET", self.core, "current_attempt_index", 0, "current_lease_id", self._lease, "current_lease_epoch", 1,
            "lease_expires_at", now_ms() + 3_600_000, "lifecycle_phase", "active", "ownership_state", "leased",
        )  # fmt: skip

    def request(self, payload: bytes) -> bytes:
        """Return the call that appends *payload*."""
        return pack_command(
            b"FCALL", b"bench_append", b"4", self.core, self.stream, self._meta, self._summary,
            self.core, b"0", self._lease, b"1", b"token", b"%d" % now_ms(), payload, b"utf8", b"", b"worker",
            b"10000", b"attempt", b"65536", b"durable",
        )  # fmt: skip


def acknowledged(wire: Wire, requests: list[bytes], each: int) -> Callable[[], None]:
    """Return a function that sends *requests* in pipelines of *each*, and takes all replies to one before the next."""
    parts = [b"".join(part) for part in batches(requests, each)]
    sizes = [len(part) for part in batches(requests, each)]

    def work() -> None:
        for part, size in zip(parts, sizes, strict=True):
            wire.send(part)
            for _ in range(size):
                reply = wire.receive()
                if isinstance(reply, Exception):
                    raise reply
                if isinstance(reply, list) and reply[0] == 0:
                    raise AssertionError(reply[1])

    return work

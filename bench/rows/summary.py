"""P8, P9: the cost of a rolling summary: small patches on a large document, and an answer token by token."""

from __future__ import annotations

import functools
import random
from typing import TYPE_CHECKING, cast

import orjson

from bench.figures import Figure, Report, Row, Target
from bench.harness import Metrics, Stage, batches, check, payloads, per_frame_cpu, take_turns
from bench.jobs import mode_of
from bench.rivals import FENCED_LIBRARY, acknowledged
from ff_fast._hot.resp import pack_command

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = 64
PATCH_BYTES = 25


def document_of(size: int) -> dict[str, dict[str, object]]:
    """Return a document of about *size* bytes of JSON; each of its records has a number to change."""
    record = {"n": 10_000_000, "text": "x" * 70}
    count = max(size // len(orjson.dumps({"k0000": record})), 1)
    return {f"k{i:05d}": dict(record) for i in range(count)}


def patches_for(document: dict[str, dict[str, object]], count: int) -> list[bytes]:
    """Return merge patches of 25 bytes; each changes the number of one record."""
    rng = random.Random(20)
    names = list(document)
    made = []
    for _ in range(count):
        patch = orjson.dumps({rng.choice(names): {"n": rng.randrange(10_000_000, 99_999_999)}})
        made.append(patch.ljust(PATCH_BYTES))
    return made


def merged(document: dict[str, dict[str, object]], made: list[bytes]) -> object:
    """Return the patched document, computed by plain Python."""
    result = {name: dict(record) for name, record in document.items()}
    for patch in made:
        for name, change in orjson.loads(patch).items():
            result[name].update(change)
    return result


def patches(stage: Stage) -> Report:
    """P8."""
    count = stage.pick(200, 4) * BATCH
    document = document_of(10_240)
    first = orjson.dumps(document)
    made = patches_for(document, count)
    expected = merged(document, made)

    def server() -> Metrics:
        stage.fresh()
        core = stage.core(mode_of("merge"))
        core.send([first])
        parts = batches(made, BATCH)
        core.sent_bytes = 0

        def work() -> None:
            for part in parts:
                core.send(part)

        server_us = per_frame_cpu(stage.wire, count, work)
        check_summary(stage, core.execution_id, expected)
        return {"server_us": server_us, "wire_bytes": core.sent_bytes / count}

    def client() -> Metrics:
        stage.fresh()
        answer: dict[str, object] = dict(
            stage.worker("ff_fast").run(
                "bench.jobs:write_patches",
                url=stage.url, first=first.decode(), patches=[p.decode() for p in made], mode="merge",
            )
        )  # fmt: skip
        check_summary(stage, cast("str", answer.pop("execution_id")), expected)
        return cast("Metrics", answer)

    def in_lua() -> Metrics:
        stage.fresh()
        stage.wire.command("FUNCTION", "LOAD", "REPLACE", FENCED_LIBRARY)
        stage.wire.command("HSET", "bench", "document", first)
        few = made[: max(count // 20, 1)]
        requests = [pack_command(b"FCALL", b"bench_patch", b"1", b"bench", patch) for patch in few]
        server_us = per_frame_cpu(stage.wire, len(few), acknowledged(stage.wire, requests, BATCH))
        stored = stage.wire.command("HGET", "bench", "document")
        assert isinstance(stored, bytes)
        check(orjson.loads(stored) == merged(document, few), "the document in Lua differs")
        return {"server_us": server_us}

    report = Report(
        figures=take_turns(
            {
                "ff_fast, batches of 64": server,
                "merge by cjson in Lua": in_lua,
                "ff_fast asyncio": client,
            },
            stage.rounds,
        )
    )
    stage.end_workers()
    report.rows = [
        Row(
            "P8", "server CPU per 25-byte merge patch on 10 KB", "us",
            report.figure("ff_fast, batches of 64", "server_us"),
            "merge by cjson in Lua", report.figure("merge by cjson in Lua", "server_us"), Target(5),
        ),
        Row(
            "P8", "client CPU per such patch, asyncio", "us",
            report.figure("ff_fast asyncio", "client_us"), target=Target(3),
        ),
    ]  # fmt: skip
    return report


def check_summary(stage: Stage, execution_id: str, expected: object) -> None:
    stored = stage.backend.read_summary(execution_id, 0)
    check(stored is not None, "there is no summary")
    assert stored is not None
    check(orjson.loads(stored.document_json) == expected, "the summary is not the patches' fold")


def answer(stage: Stage) -> Report:
    """P9."""
    size = 18 * 1024
    report = Report()

    def exact(length: int, batch: int) -> Metrics:
        stage.fresh()
        tokens = payloads(length // 6)
        core = stage.core(mode_of("append"))
        for part in batches(tokens, batch):
            core.send(part)
        text = b"".join(tokens).decode()
        check_summary(stage, core.execution_id, {"text": text})
        return {"times_its_size": core.sent_bytes / len(text), "bytes": core.sent_bytes}

    def live(rate: int, linger_ms: float) -> Metrics:
        stage.fresh()
        tokens = [payload.decode() for payload in payloads(size // 6)]
        before = received(stage)
        done: dict[str, object] = dict(
            stage.worker("ff_fast").run(
                "bench.jobs:write_answer",
                url=stage.url, tokens=tokens, rate=rate, linger_ms=linger_ms,
            )
        )  # fmt: skip
        # The server has the library already. The calls around the writer are about 2 KB.
        sent = received(stage) - before
        check_summary(stage, cast("str", done["execution_id"]), {"text": "".join(tokens)})
        return {"times_its_size": sent / size, "bytes": sent}

    contenders: dict[str, Callable[[], Metrics]] = {
        f"{length // 1024} KB, batches of {batch}": functools.partial(exact, length, batch)
        for length, batch in (
            (size, 64), (2 * size, 64), (4 * size, 64), (size, 16), (size, 256), (size, 1),
        )
    }  # fmt: skip
    contenders |= {
        "18 KB, asyncio, as fast as it goes": functools.partial(live, 0, 0.0),
        "18 KB, asyncio, 2000 Hz": functools.partial(live, 2000, 0.0),
        "18 KB, asyncio, 2000 Hz, linger 50 ms": functools.partial(live, 2000, 50.0),
    }
    # One turn is enough: the bytes do not depend on speed, or only where batches form by time.
    report.figures = take_turns(contenders, 1, warm=False)
    stage.end_workers()

    def times(name: str) -> Figure:
        return report.figure(name, "times_its_size")

    report.rows = [
        Row(
            "P9", "18 KB by STRING_APPEND, batches of 64: bytes sent over its size", "x",
            times("18 KB, batches of 64"), target=Target(4),
        ),
        Row(
            "P9", "36 KB over 18 KB: bytes sent", "",
            report.figure("36 KB, batches of 64", "bytes"), "18 KB",
            report.figure("18 KB, batches of 64", "bytes"), Target(2.2, of_ratio=True),
        ),
        *(
            Row("P9", f"{name}: bytes sent over its size", "x", times(name))
            for name in (
                "18 KB, batches of 16",
                "18 KB, batches of 1",
                "18 KB, asyncio, as fast as it goes",
                "18 KB, asyncio, 2000 Hz",
                "18 KB, asyncio, 2000 Hz, linger 50 ms",
            )
        ),
    ]  # fmt: skip
    return report


def received(stage: Stage) -> int:
    return int(stage.wire.info("stats")["total_net_input_bytes"])

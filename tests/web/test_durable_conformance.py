"""The conformance suite of Durable Streams, over the read side of the library and the write side of these tests."""

import asyncio
import collections
import json
import os
import subprocess

import pytest
from starlette.routing import Route

from ff_fast import keys
from ff_fast.web import durable_streams
from tests.web import node
from tests.web.durable_facade import LONG_POLL_S, Facade
from tests.web.sites import stream_of

pytestmark = [pytest.mark.web, pytest.mark.timeout(300)]

# By group: how many tests pass, of how many.
PASSED = {
    "Basic Stream Operations": (5, 5),
    "Append Operations": (3, 3),
    "Read Operations": (3, 3),
    "Long-Poll Operations": (2, 2),
    "HTTP Protocol": (15, 15),
    "Browser Security Headers": (9, 9),
    "TTL and Expiry Validation": (5, 5),
    "Case-Insensitivity": (3, 3),
    "Content-Type Validation": (3, 3),
    "HEAD Metadata": (3, 3),
    "Offset Validation and Resumability": (20, 20),
    "Protocol Edge Cases": (12, 12),
    "Long-Poll Edge Cases": (5, 5),
    "TTL and Expiry Edge Cases": (9, 9),
    "HEAD Metadata Edge Cases": (2, 2),
    "TTL Expiration Behavior": (14, 14),
    "Caching and ETag": (5, 5),
    "Chunking and Large Payloads": (2, 2),
    "Read-Your-Writes Consistency": (3, 3),
    "SSE Mode": (31, 31),
    "JSON Mode": (16, 16),
    "Property-Based Tests (fast-check)": (17, 17),
    "Stream Closure": (30, 34),
    # Out of scope; what passes asks for a refusal, or for what any stream does.
    "Idempotent Producer Operations": (6, 29),
    "Fork - Creation": (10, 34),
    "Fork - Reading": (1, 6),
    "Fork - Appending": (2, 5),
    "Fork - Recursive": (1, 5),
    "Fork - Live Modes": (1, 4),
    "Fork - Deletion and Lifecycle": (2, 13),
    "Fork - TTL and Expiry": (7, 9),
    "Fork - JSON Mode": (0, 2),
    "Fork - Edge Cases": (1, 4),
    "Reserved subscription APIs": (0, 6),
}

# By the beginning of a group or of a title: why its tests are not asked for.
OUT_OF_SCOPE = {
    "Idempotent Producer": "Writers of ff_fast are fenced by their leases, not by epochs and numbers that clients declare.",
    "idempotent-close": "As above: it closes with the headers of such a producer.",
    "close-with-different-body-dedup": "As above.",
    "Fork": "A stream of ff_fast has one history; it cannot share that of another stream.",
    "Reserved subscription": "The suite skips them unless a server offers subscriptions, which call other servers back.",
}
ALL, PASSING, IN_SCOPE = 338, 248, 214


def run(site, tmp_path):
    """The result of each test: its group, its title, and its status."""
    facades = []

    def routes(backend):
        facades.append(Facade(backend))
        return facades[0].routes()

    served = site(routes)
    script = node.put("durable_conformance.test.js")
    report = tmp_path / "report.json"
    command = [node.program("vitest"), "run", script.name, "--reporter=json"]
    done = subprocess.run(
        [*command, f"--outputFile={report}"],
        cwd=node.NODE_DIR,
        env={
            **os.environ,
            "CONFORMANCE_TEST_URL": served.url,
            "CONFORMANCE_LONG_POLL_MS": str(int(LONG_POLL_S * 1_000) + 500),
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    served.call(facades[0].close())
    assert report.exists(), done.stdout + done.stderr
    (found,) = json.loads(report.read_text())["testResults"]
    return [
        (each["ancestorTitles"][0], each["title"], each["status"], each["failureMessages"])
        for each in found["assertionResults"]
    ]


def is_in_scope(group, title):
    return not any(group.startswith(each) or title.startswith(each) for each in OUT_OF_SCOPE)


def test_the_suite_passes_but_for_what_is_out_of_scope(site, tmp_path):
    results = run(site, tmp_path)
    failed = [
        (group, title, messages)
        for group, title, status, messages in results
        if is_in_scope(group, title) and status != "passed"
    ]
    assert failed == []
    assert sum(is_in_scope(group, title) for group, title, *_ in results) == IN_SCOPE
    total = collections.Counter(group for group, *_ in results)
    passed = collections.Counter(group for group, _, status, _ in results if status == "passed")
    assert {group: (passed[group], total[group]) for group in total} == PASSED
    assert (total.total(), passed.total()) == (ALL, PASSING)


@pytest.mark.parametrize("live", ["sse", "long-poll"])
def test_the_client_of_the_protocol_reads_every_character_once(site, lane, live):
    """While they are written, in the middle of characters, over responses that end before the stream does."""

    def routes(backend):
        async def stream(request):
            return await durable_streams.read_response(
                backend, request.path_params["eid"], request, sse_lasts=1.2, long_poll=0.2
            )

        return [Route("/{eid:path}", stream)]

    text = "".join(f" {at}: für 🎈 und ❤️, 日本語\n" for at in range(200))
    served = site(routes)
    eid, handle = served.call(stream_of(served.backend, lane, end=False))

    async def produce():
        raw = text.encode()
        async with served.backend.open_writer(handle) as writer:
            for at in range(0, len(raw), 7):
                writer.write(raw[at : at + 7])
                await asyncio.sleep(0.002)
        await served.backend.complete(handle)

    script = node.put("durable_read.js")
    with subprocess.Popen(
        ["node", script.name, f"{served.url}/{keys.url_id(eid)}", live],
        cwd=node.NODE_DIR,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as reader:
        asyncio.run_coroutine_threadsafe(produce(), served.loop).result(60)
        found, errors = reader.communicate(timeout=60)
    assert (reader.returncode, errors) == (0, b"")
    assert found.decode() == text

"""Workers of the tests, as processes of their own: ``python -m tests.web.producers <kind> <url> <name> <count>``.

Each opens the stream of *name*, tells so with a line, and writes *count* pieces of `text_of`, at some 500 a second.
"""

import contextlib
import subprocess
import sys
import time

import orjson

import ff_fast
from ff_fast.web.openai_responses import TextResponse
from tests.conftest import ROOT

PIECES = ("tok", "én ", "日本", "😀\n", '"q" ')


def text_of(count):
    return "".join(PIECES[at % len(PIECES)] for at in range(count))


def respond(stream, name, count):
    answer = TextResponse(stream.write, name, model="test")
    for at in range(count):
        answer.delta(PIECES[at % len(PIECES)])
        time.sleep(0.002)
    answer.complete()


def stream_run(stream, name, count):
    for at in range(count):
        chunk = [{"type": "ai", "content": PIECES[at % len(PIECES)]}, {"at": at}]
        stream.write(orjson.dumps(chunk), frame_type="messages")
        time.sleep(0.002)


KINDS = {"response": respond, "run": stream_run}


@contextlib.contextmanager
def producer(kind, url, name, count):
    """A process that is the producer, or hears that it is not; it has ended at the end of the block."""
    arguments = [sys.executable, "-m", "tests.web.producers", kind, url, name, str(count)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout.readline() == b"producer\n"
        yield process
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main(kind, url, name, count):
    with (
        ff_fast.ValkeyBackend.connect(url) as backend,
        backend.open_stream(name, lease_ttl_ms=1_000) as stream,
    ):
        print(stream.role, flush=True)
        KINDS[kind](stream, name, int(count))


if __name__ == "__main__":
    main(*sys.argv[1:])

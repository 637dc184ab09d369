"""Frames that nobody flushed: the end of the program stores them, or says how many are lost; never silence."""

import os
import re
import subprocess
import sys

import pytest

from ..conftest import ROOT
from .chaos import DOWN, UP
from .stored import frames, stored_once

SECRET = "a payload that no text may show"

OPENED = """
import ff_fast, os, sys, threading
backend = ff_fast.ValkeyBackend.connect(sys.argv[1])
eid = backend.create_execution(lane=sys.argv[2])
handle = backend.claim(lane=sys.argv[2])
print(eid, flush=True)
"""
ASYNC = """
import asyncio, sys
from ff_fast import aio

async def main():
    backend = await aio.ValkeyBackend.connect(sys.argv[1])
    eid = await backend.create_execution(lane=sys.argv[2])
    handle = await backend.claim(lane=sys.argv[2])
    print(eid, flush=True)
    writer = await backend.open_writer(handle)
    writer.write(b"stored")
    await writer.flush()
"""
WRITING = """
import asyncio, sys, threading
from ff_fast import aio

async def main():
    global backend, writer
    backend = await aio.ValkeyBackend.connect(sys.argv[1])
    eid = await backend.create_execution(lane=sys.argv[2])
    handle = await backend.claim(lane=sys.argv[2])
    print(eid, flush=True)
    writer = await backend.open_writer(handle, linger=1)
    for i in range(3): writer.write(b"%d" % i)

"""


def begun(program, url, lane, **options):
    """Start a program in an interpreter of its own; return it and the id that it prints first."""
    child = subprocess.Popen(
        [sys.executable, "-Wignore::DeprecationWarning", "-c", program, url, lane, SECRET],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": ""},
        **options,
    )
    return child, child.stdout.readline().strip()


def ended(child):
    """What a program says on its standard error at its end."""
    _, said = child.communicate("go on\n", timeout=30)
    assert child.returncode == 0, said
    assert SECRET not in said
    return said


FORKING = """
w = backend.open_writer(handle)
w.write(b"0")
w.flush()
w.write(b"1")
child = os.fork()
if child == 0: sys.exit()
os.waitpid(child, 0)
"""
MANY = """
w = backend.open_writer(handle, retention_maxlen=30_000)
for i in range(20_000): w.write(b"%d" % i)
"""
LINGERING = """
w = backend.open_writer(handle, linger=1)
for i in range(3): w.write(b"%d" % i)
"""
CHILD = """
import multiprocessing

def work():
    global backend
    backend = ff_fast.ValkeyBackend.connect(sys.argv[1])
    w = backend.open_writer(handle, linger=1)
    for i in range(3): w.write(b"%d" % i)

process = multiprocessing.get_context("fork").Process(target=work)
process.start()
process.join()
"""
PROGRAMS = {
    "a forked child of multiprocessing": (CHILD, 3),
    "many frames": (MANY, 20_000),
    "frames that linger": (LINGERING, 3),
    "a writer that nobody holds": ('backend.open_writer(handle).write(b"0")', 1),
    "a forked child that ends first": (FORKING, 2),
}


ASYNC_PROGRAMS = {
    "a loop that ends": "asyncio.run(main())",
    "a loop that ends with a task in it": """
async def both():
    await main()
    asyncio.create_task(backend.supervise())

asyncio.run(both())
""",
    "a loop that is kept": """
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
""",
    "a loop on another thread": """
loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
asyncio.run_coroutine_threadsafe(main(), loop).result()
""",
}


@pytest.mark.parametrize("name", ASYNC_PROGRAMS)
def test_a_program_of_asyncio_that_ends_stores_what_it_wrote(name, server, lane):
    child, eid = begun(WRITING + ASYNC_PROGRAMS[name], server.url, lane)
    assert ended(child) == ""
    stored_once(server.url, eid, [b"%d" % i for i in range(3)])


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_ends_stores_what_it_wrote(name, server, lane):
    body, count = PROGRAMS[name]
    child, eid = begun(OPENED + body, server.url, lane)
    assert ended(child) == ""
    stored_once(server.url, eid, [b"%d" % i for i in range(count)])


LOSSES = {
    "the server does not answer": OPENED
    + """
w = backend.open_writer(handle)
w.write(b"stored")
w.flush()
input('flushed ')
ff_fast._process.EXIT_S = 0.2
for i in range(7): w.write(sys.argv[3])
""",
    "its backend is closed": OPENED
    + """
with backend:
    w = backend.open_writer(handle)
    w.write(b"stored")
    w.flush()
    input('flushed ')
    for i in range(7): w.write(sys.argv[3])
""",
    "its loop has ended, and it is kept": ASYNC
    + """
    input('flushed ')
    for i in range(7): writer.write(sys.argv[3])
    kept.append(writer)

from ff_fast import _process
_process.EXIT_S = 0.2
kept = []
asyncio.run(main())
""",
    "its backend of asyncio is closed": ASYNC
    + """
    input('flushed ')
    for i in range(7): writer.write(sys.argv[3])
    await backend.close()

asyncio.run(main())
""",
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_program_that_loses_frames_says_how_many(name, proxy, server, lane):
    child, eid = begun(LOSSES[name], proxy.url, lane)
    # It has the acknowledgement, and waits for a line before it writes the rest.
    assert child.stdout.read(len("flushed ")) == "flushed "
    assert [frame.payload for frame in frames(server.url, eid)] == [b"stored"]
    proxy.hold(UP, DOWN)
    said = ended(child)
    assert re.search(
        rf"RuntimeWarning: Frames of attempt 0 of execution {re.escape(eid)} were not acknowledged.*: 7;",
        said,
    )
    assert said.count("RuntimeWarning") == 1
    proxy.release()

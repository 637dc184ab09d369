"""A server that dies amid writing its log: what a call wrote is there as a whole after the restart, or not at all."""

import os
import re
import signal

import pytest

import ff_fast
from ff_fast import Frame, FrameKind, StreamMode, WaitpointKind, WaitpointSpec, keys
from ff_fast._core import ops
from ff_fast.embedded import EmbeddedServer

from ..conftest import connect_raw
from ..server import streams
from ..shells import WORKER


def log_of(server):
    (path,) = server.directory.glob("appendonlydir/*.incr.aof")
    return path


def everything(raw):
    names = sorted(raw.keys("ff:*"))
    return {name: (raw.dump(name), raw.pexpiretime(name)) for name in names}


def append(backend, raw, handle):
    attempt = ops.Attempt.of(handle)
    writer = ops.writer_id(attempt)
    opening = ops.open_writer(attempt, writer)
    raw.fcall(opening.function, len(opening.keys), *opening.keys, *opening.argv)

    def call():
        blocks = (streams.log(b"a", b"b"), streams.live(b"c", b"d"), [b"E", b"1.5"])
        argv = (writer, b"2", b" push", *(part for block in blocks for part in block))
        streams.appended(raw, (attempt.stream_keys, argv))

    return call


def suspend(backend, raw, handle):
    point = backend.create_waitpoint(handle)
    spec = WaitpointSpec(WaitpointKind.EXTERNAL, b"", point.hmac_token)
    return lambda: backend.suspend(handle, spec, timeout=600)


def complete(backend, raw, handle):
    return lambda: backend.complete(handle, b"result")


@pytest.mark.parametrize("prepared", [append, suspend, complete])
def test_the_effects_of_a_call_vanish_together(prepared, lane):
    with EmbeddedServer(appendonly=True, appendfsync="always") as server:
        with ff_fast.ValkeyBackend.connect(server.url) as backend, connect_raw(server.url) as raw:
            eid = backend.create_execution(lane=lane)
            handle = backend.claim(lane=lane, **WORKER)
            for mode in (StreamMode.durable(), StreamMode.best_effort_live(600_000)):
                backend.append_frame(handle, Frame(b"1", FrameKind.EVENT, mode=mode))
            call = prepared(backend, raw, handle)
            before, began = everything(raw), log_of(server).stat().st_size
            call()
            after = everything(raw)
        os.kill(server.pid, signal.SIGKILL)
        whole = log_of(server).read_bytes()
        effects = whole[began:]
        assert re.findall(rb"\r\n(MULTI|EXEC)\r\n", effects) == [b"MULTI", b"EXEC"]
        for cut in (
            *(began + len(effects) * part // 4 for part in (1, 2, 3)),
            len(whole) - 1,
            None,
        ):
            log_of(server).write_bytes(whole[:cut])
            server.restart()
            with connect_raw(server.url) as raw:
                found = everything(raw)
                assert found == (after if cut is None else before), cut
                assert raw.exists(keys.core(eid))
            os.kill(server.pid, signal.SIGKILL)

"""When a writer's batches leave, and what it holds meanwhile."""

import gc
import sys
from pathlib import Path

import pytest

from ff_fast._hot.writer import arguments_of
from ff_fast.errors import (
    InvalidPatch,
    Overloaded,
    WriterClosed,
)

from ...reference_writer import Server
from .core import LIVE, MERGE, MODES, OOM, TEXT, Shell, payloads_of, position

# -- when batches leave ----------------------------------------------------------------------------


class TestSending:
    def test_first_frame_at_once_then_what_has_gathered(self):
        writer = Shell()
        writer.write(b"1")
        first = writer.take()
        for i in (2, 3, 4):
            writer.write(b"%d" % i)
        assert not writer.queued
        assert writer._next_batch() is None
        writer._acknowledge(first, position(first))
        assert payloads_of(writer.take()) == [b"2", b"3", b"4"]

    @pytest.mark.parametrize("size, count", [(1, 256), (1024, 64), (65_536, 1)])
    def test_a_big_batch_does_not_wait(self, size, count):
        writer = Shell()
        writer.write(b"")
        writer.take()
        for _ in range(count - 1):
            writer.write(bytes(size))
        assert not writer.queued
        writer.write(bytes(size))
        assert writer.take().frame_count == count

    def test_four_on_their_way(self):
        writer = Shell(max_unacknowledged_bytes=1 << 30)
        for _ in range(6000):
            writer.write(b"x")
        sent = []
        while writer.queued:
            sent.append(writer.take())
        assert [batch.frame_count for batch in sent] == [1024] * 4
        assert writer._next_batch() is None
        writer._acknowledge(sent[0], position(sent[0]))
        assert writer.take().first_sequence == 4 * 1024 + 1

    def test_told_once_until_asked(self):
        told = []

        class Counting(Shell):
            def _on_ready(self):
                told.append(self.next_sequence)
                super()._on_ready()

        writer = Counting()
        for _ in range(1000):
            writer.write(b"x")
        assert told == [2]

    def test_linger(self):
        writer = Shell(linger_ms=5)
        writer.write(b"1")
        writer.write(b"2")
        assert (writer.queued, writer.lingers, writer._linger_us) == (False, 1, 5000)
        writer._seal_soon()
        batch = writer.take()
        assert batch.frame_count == 2
        writer.write(b"3")
        assert writer.lingers == 2
        writer._acknowledge(batch, position(batch))
        assert not writer.queued
        writer._seal_soon()
        assert payloads_of(writer.take()) == [b"3"]

    def test_linger_that_ends_while_a_batch_is_on_its_way(self):
        writer = Shell(linger_ms=5)
        writer.write(b"1")
        writer._seal_soon()
        batch = writer.take()
        writer.write(b"2")
        writer._seal_soon()
        assert not writer.queued
        writer._acknowledge(batch, position(batch))
        assert payloads_of(writer.take()) == [b"2"]

    def test_batch_behind_a_full_one_lingers_too(self):
        writer = Shell(linger_ms=5)
        for _ in range(1025):
            writer.write(b"x")
        assert writer.lingers == 2
        first = writer.take()
        assert writer._next_batch() is None
        writer._acknowledge(first, position(first))
        writer._seal_soon()
        assert writer.take().frame_count == 1

    def test_batch_opened_while_another_waits_to_go_again_lingers_too(self):
        writer = Shell(linger_ms=5)
        writer.write(b"1")
        writer._seal_soon()
        writer.take()
        writer._requeue()
        writer.write(b"2")
        assert (writer.queued, writer.lingers) == (True, 2)

    def test_linger_of_a_batch_that_has_left_says_nothing_of_the_next_one(self):
        writer = Shell(linger_ms=5)
        for _ in range(300):
            writer.write(b"x")
        batch = writer.take()
        writer._acknowledge(batch, position(batch))
        writer._seal_soon()
        writer.write(b"y")
        assert not writer.queued

    def test_overload(self):
        writer = Shell(LIVE, max_unacknowledged_bytes=2000)
        for _ in range(20):
            writer.write(bytes(100))
        with pytest.raises(Overloaded) as caught:
            writer.write(b"x")
        assert caught.value.retryable
        assert writer.next_sequence == 21
        batch = writer.take()
        assert writer.unacknowledged_bytes == len(batch.message)
        with pytest.raises(Overloaded):
            writer.write(b"")
        writer._acknowledge(batch, position(batch))
        assert writer.unacknowledged_bytes == 0
        assert writer.write(b"x") == 21

    def test_empty_frames_are_not_free(self):
        writer = Shell(LIVE, max_unacknowledged_bytes=1 << 20)
        for i in range(5000):
            writer.write(b"", correlation_id="ab"[i % 2])
        with pytest.raises(Overloaded):  # noqa: PT012 - somewhere on the way
            for i in range(20_000):
                writer.write(b"", correlation_id="ab"[i % 2])


# -- memory ----------------------------------------------------------------------------------------


IDLE = """
import gc, sys
from ff_fast._hot.writer import WriterCore
from ff_fast.types import StreamMode

def held():
    gc.collect()
    with open("/proc/self/smaps_rollup") as rollup:
        return next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) * 1024

def writer(i):
    base = b"ff:stream:{fp:%d}:8c2f2f0e-0000-4000-8000-%012d:0" % (i % 256, i)
    keys = tuple(base + name for name in (b":head", b"", b":live", b":summary"))
    writer = b"0:8c2f2f0e-0000-4000-8000-%012d:1:8c2f2f0e-0000" % i
    return WriterCore(keys=keys, writer=writer, mode=mode, opened=(1_700_000_000_000, 0, 0, b"", 0))

def acknowledge(writer):
    while (batch := writer._next_batch()) is not None:
        last = batch.first_sequence + batch.frame_count - 1
        ms = 1_700_000_000_000 + 10 * last
        writer._acknowledge(batch, b"%d-%d %d 0" % (ms, last, ms + 30_000), ms)

mode, log = StreamMode.best_effort_live(15_000), StreamMode.durable()
count, burst = int(sys.argv[1]), int(sys.argv[2])
payload = b" token"
acknowledge(writer(0))
before = held()
writers = []
for i in range(count):
    one = writer(i)
    for j in range(burst):
        one.write(payload)
        if j % 7 == 0 and burst > 1:
            one.write(payload, mode=log, correlation_id="c%d" % (j % 30))
    acknowledge(one)
    assert one._idle
    writers.append(one)
print((held() - before) / count)
"""


@pytest.mark.parametrize("burst", [0, 1, 500])
def test_idle_writer_takes_less_than_4_kib(run_python, burst):
    if "libasan" in Path("/proc/self/maps").read_text():
        pytest.skip("a sanitizer keeps what is freed")
    assert float(run_python(IDLE, "2000", str(burst))) < 4096


def test_nothing_leaks():
    def life():
        writer, server = Shell(LIVE), Server()
        for i in range(50):
            writer.write(b"x", mode=MODES[i % 5] if i % 5 != 2 else TEXT, correlation_id=str(i))
        with pytest.raises(InvalidPatch):
            writer.write(b"[]", mode=MERGE)
        batch = writer.take()
        writer._acknowledge(batch, OOM)
        batch = writer.take()
        writer._acknowledge(batch, server.append(arguments_of(batch.message)))
        writer.write(b"x")
        writer._fail(WriterClosed())

    for _ in range(5):
        life()
    gc.collect()
    before = len(gc.get_objects()), sys.getallocatedblocks()
    for _ in range(30):
        life()
    gc.collect()
    assert len(gc.get_objects()) - before[0] < 30
    assert sys.getallocatedblocks() - before[1] < 300

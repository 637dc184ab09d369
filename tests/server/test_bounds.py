"""Every answer to a reader has a bound in bytes, whatever stands in the streams; and slow links make progress."""

import itertools

import pytest

import ff_fast
from ff_fast import End, StreamFrame, TailVisibility
from ff_fast._core import tail as tail_core

from ..shells import with_option
from .readers import BEST_EFFORT, DURABLE, SUMMARY, Stepper, begin, sequences

ALL, EXCLUDE = TailVisibility.ALL, TailVisibility.EXCLUDE_BEST_EFFORT
DONE = End("attempt_success")
KIB = 1024
LARGE = b"L" * 64 * KIB
# An answer, and what the ids and the other fields of its entries take.
BOUND = tail_core._REPLY_BYTES + 128 * KIB


@pytest.fixture
def backend(server):
    with ff_fast.ValkeyBackend.connect(server.url) as connected:
        yield connected


@pytest.fixture
def attempt(backend, lane):
    return begin(backend, lane)


def size_of(reply):
    if isinstance(reply, list):
        return sum(map(size_of, reply))
    return len(reply) if isinstance(reply, bytes) else 8


class Weighing(Stepper):
    """Notes the size of each reply, by the command that asked for it."""

    def __init__(self, raw, core):
        super().__init__(raw, core)
        self.sizes = {}

    def received(self, command, reply):
        self.sizes.setdefault(command, []).append(size_of(reply))

    @property
    def largest(self):
        return max(itertools.chain.from_iterable(self.sizes.values()))


def written(writer, plan):
    """Write ``(count, payload, mode)`` one after the other; return how many frames that is."""
    for count, payload, mode in plan:
        for _ in range(count):
            writer.write(payload, mode=mode)
            writer.drain()
        writer.flush()
    return sum(count for count, _, _ in plan)


SMALL = b"token"
PATCH = b'{"a":"%s"}' % (b"p" * 30 * KIB)
PLANS = {
    "large": [(60, LARGE, DURABLE)],
    "large behind tokens": [(1_500, SMALL, DURABLE), (60, LARGE, DURABLE)],
    "tokens behind large": [(60, LARGE, DURABLE), (1_500, SMALL, DURABLE)],
    "large best effort": [(1_000, SMALL, BEST_EFFORT), (60, LARGE, BEST_EFFORT)],
    "patches": [(60, PATCH, SUMMARY)],
    "both by turns": [(1, LARGE, mode) for _ in range(25) for mode in (DURABLE, BEST_EFFORT)],
    "one large among tokens": [
        (900, SMALL, DURABLE),
        (1, LARGE, BEST_EFFORT),
        (900, SMALL, DURABLE),
        (900, SMALL, BEST_EFFORT),
    ],
    "a KiB each": [(2_500, b"k" * KIB, DURABLE), (200, b"k" * 1_025, DURABLE)],
}


@pytest.mark.parametrize("plan", PLANS)
def test_no_answer_is_larger_than_its_bound(plan, backend, raw, attempt):
    with backend.open_writer(attempt.handle) as writer:
        # Larger than a page of the function takes, and not ours: it costs nobody an answer.
        for key in (attempt.log, attempt.live):
            raw.xadd(key, {"note": b"n" * 100_000}, id="1-1")
        total = written(writer, PLANS[plan])
    backend.complete(attempt.handle)
    for visibility in (ALL, EXCLUDE):
        reading = Weighing(raw, tail_core.TailCore(attempt.eid, 0, None, visibility))
        frames = [item for item in reading.run() if isinstance(item, StreamFrame)]
        assert reading.items[-1] == DONE
        assert len(reading.items) == len(frames) + 1
        if visibility is ALL:
            assert sequences(frames) == list(range(1, total + 1))
        assert reading.largest <= BOUND
        # Small entries are read by the cheaper command, many at once.
        replies = sum(map(len, reading.sizes.values()))
        assert (
            replies <= 8 + sum(len(frame.payload) for frame in frames) / (128 * KIB) + total / 200
        )


def test_a_reader_that_waited_while_frames_grew_gets_few_at_once(backend, raw, attempt):
    reading = Weighing(raw, tail_core.TailCore(attempt.eid, 0, None, ALL))
    with backend.open_writer(attempt.handle) as writer:
        written(writer, [(300, SMALL, DURABLE), (300, SMALL, BEST_EFFORT)])
        while len(reading.items) < 600:
            reading.step()
        # While it does not ask.
        written(writer, [(200, LARGE, DURABLE), (200, LARGE, BEST_EFFORT)])
    backend.complete(attempt.handle)
    reading.run()
    assert sequences(reading.items) == list(range(1, 1_001))
    assert reading.largest <= BOUND
    # Half a MiB each.
    assert len(reading.sizes[b"FCALL_RO"]) < 80


def test_a_reader_that_waited_gets_few_of_the_largest_frames_at_once(server, raw, lane):
    """However the writers and what they send follow one another."""
    huge = bytes(1 << 20)
    with (
        ff_fast.ValkeyBackend.connect(server.url) as usual,
        ff_fast.ValkeyBackend.connect(
            with_option(server.url, f"max_payload_bytes={1 << 20}")
        ) as large,
    ):
        attempt = begin(usual, lane)
        early = Weighing(raw, tail_core.TailCore(attempt.eid, 0, None, ALL))
        assert early.step() == []
        with usual.open_writer(attempt.handle) as writer:
            written(writer, [(20, SMALL, DURABLE)])
        late = Weighing(raw, tail_core.TailCore(attempt.eid, 0, None, ALL))
        with large.open_writer(attempt.handle) as writer:
            written(writer, [(10, SMALL, DURABLE)])
            late.step()
            while len(early.items) < 30:
                early.step()
            written(writer, [(6, huge, DURABLE), (6, huge, BEST_EFFORT)])
        large.complete(attempt.handle)
        for reading in (early, late):
            reading.run()
            assert sequences(reading.items) == list(range(1, 43))
            # Two of each stream, and no more than one where entries are counted by bytes.
            assert reading.largest <= 4 * len(huge) + 128 * KIB
            assert max(reading.sizes[b"FCALL_RO"]) <= 2 * len(huge) + 128 * KIB


@pytest.mark.parametrize("max_bytes", [1, 100_000, 2 << 20])
def test_a_page_has_its_bytes_and_at_most_one_frame_more(max_bytes, backend, raw, attempt):
    with backend.open_writer(attempt.handle) as writer:
        plan = [(50, SMALL, DURABLE), (30, LARGE, DURABLE), (30, LARGE, BEST_EFFORT)]
        total = written(writer, [*plan, (50, SMALL, BEST_EFFORT)])
    backend.complete(attempt.handle)
    got, after, end = [], None, None
    while end is None:
        core = tail_core.TailCore(attempt.eid, 0, after, ALL, 10_000, max_bytes)
        reading = Weighing(raw, core)
        page = reading.drive(tail_core.read_page(core, 10_000, max_bytes))
        sizes = [len(frame.payload) for frame in page]
        assert sum(sizes[:-1]) < max_bytes
        # Nothing is asked for far beyond the page.
        assert sum(sum(some) for some in reading.sizes.values()) <= 2 * max_bytes + 200 * KIB
        got += page
        after, end = page.cursor, page.end_reason
    assert sequences(got) == list(range(1, total + 1))


@pytest.mark.parametrize("payload", [SMALL, LARGE])
def test_the_function_reads_little_more_than_it_answers(payload, backend, raw, attempt):
    with backend.open_writer(attempt.handle) as writer:
        written(writer, [(400, payload, DURABLE), (100, payload, BEST_EFFORT)])
    before = raw.info("commandstats")["cmdstat_xrange"]["calls"]
    core = tail_core.TailCore(attempt.eid, 0, None, ALL)
    reading = Weighing(raw, core)
    reading.step()
    calls = raw.info("commandstats")["cmdstat_xrange"]["calls"] - before
    # Pages of eight where entries are large, and of 128 where they are not.
    assert calls <= 4


def test_an_entry_with_the_greatest_id_stops_no_reader(backend, raw, attempt):
    with backend.open_writer(attempt.handle) as writer:
        written(writer, [(3, SMALL, DURABLE), (3, SMALL, BEST_EFFORT)])
    last = f"{2**64 - 1}-{2**64 - 1}"
    for key in (attempt.log, attempt.live):
        raw.xadd(key, {"payload": "foreign"}, id=last)
    reading = Weighing(raw, tail_core.TailCore(attempt.eid, 0, None, ALL))
    reading.step()
    assert sequences(reading.items) == [1, 2, 3, 4, 5, 6]
    assert sequences(backend.read_stream(attempt.eid)) == [1, 2, 3, 4, 5, 6]
    core = tail_core.TailCore(attempt.eid, 0, None, ALL)
    # Read to its end, and asked again.
    reading = Weighing(raw, core)
    reading.step()
    core.due = True
    assert reading.step() == []


def test_a_run_that_claims_too_much_is_passed_over(backend, raw, attempt):
    with backend.open_writer(attempt.handle) as writer:
        written(writer, [(2, SMALL, BEST_EFFORT)])
    ms = int(raw.xinfo_stream(attempt.live)["last-generated-id"].split(b"-")[0])
    hostile = (
        b"\xff\xff\x7f" + bytes(4 * KIB),
        b"\x81\x08" + bytes(2 * KIB + 2),
        b"\x02" + bytes(3 << 20),
    )
    for n, run in enumerate(hostile, 1):
        raw.xadd(attempt.live, {"run": run}, id=f"{ms + n}-9000000")
    assert sequences(itertools.islice(backend.tail(attempt.eid), 2)) == [1, 2]
    page = backend.read_stream(attempt.eid, count=10_000)
    assert (sequences(page), page.gaps) == ([1, 2], ())

"""The tail without I/O, against a server of a few lines whose streams are cut between any two of its steps.

What is pushed is in test_tail_pushes.py. Here something may always have been missed, so that every step reads.
"""

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ff_fast import (
    Corruption,
    End,
    Gap,
    InvalidCursor,
    InvalidInput,
    ProtocolError,
    StreamFrame,
    TailVisibility,
    keys,
)
from ff_fast._core import tail as tail_core
from ff_fast.errors import ExecutionNotFound, NotPrimary, Unavailable

from ..reference_frames import Written, check_told, count_of, entry_id, lay_out, wanted_of
from .script import request_of

ALL = TailVisibility.ALL
EXCLUDE = TailVisibility.EXCLUDE_BEST_EFFORT
EID = "{fp:7}:6f2c1ed5-4c3a-4b0e-9d3b-0a4a6f7c8d9e"
LOG, LIVE = keys.stream(EID, 0), keys.live(EID, 0)


def is_ours(fields):
    return not {b"payload", b"run", b"end"}.isdisjoint(fields[::2])


class Server:
    """Two streams whose entries appear one by one, in the order of their ids."""

    def __init__(self, log, live):
        self.streams = {LOG: [], LIVE: []}
        self._to_come = sorted(
            [(entry_id(entry[0]), key, entry) for key, many in ((LOG, log), (LIVE, live)) for entry in many],
            key=lambda come: (come[0], come[1]),
        )  # fmt: skip
        self.last = self.visible = self.last_ms = 0
        self.closed = b""
        self.small = True
        self.payload_limit = 65_536
        self.commands = []

    def append(self, count):
        for (ms, sequence), key, (raw, fields) in self._to_come[:count]:
            self.streams[key].append([raw, fields])
            if b"end" in fields[::2]:
                self.closed = fields[fields.index(b"end") + 1]
            elif is_ours(fields):
                self.last, self.last_ms = sequence, ms
                if key == LOG or b"mode" in fields[::2]:
                    self.visible = sequence
        del self._to_come[:count]

    def answer(self, request):
        reader = hiredis.Reader()
        reader.feed(request)
        command = reader.gets()
        self.commands.append(command)
        answers = {b"XRANGE": self._xrange, b"FCALL_RO": self._range}
        return answers[command[0]](command)

    def _between(self, key, raw, to=None):
        return [
            entry
            for entry in self.streams[key]
            if entry_id(entry[0]) > entry_id(raw) and (to is None or entry_id(entry[0]) <= to)
        ]

    def _xrange(self, command):
        _, key, after, to, _, count = command
        assert after[:1] == b"("
        return self._between(key, after[1:], entry_id(to))[: int(count)]

    def _range(self, command):
        assert command[:3] == [b"FCALL_RO", b"ff_read_range", b"4"]
        _, log_after, live_after, count, max_bytes, visibility, _ = command[7:]
        assert visibility in (b"", b"exclude_best_effort")
        limits = int(count), int(max_bytes)
        log = self._taken(LOG, log_after, None, *limits, visible=False)
        to = entry_id(log[1]) if log[2] else None
        live = self._taken(LIVE, live_after, to, *limits, visible=bool(visibility))
        if live[2]:
            to = entry_id(live[1])
            kept = [entry for entry in log[0] if entry_id(entry[0]) <= to]
            log = log if len(kept) == len(log[0]) else [kept, live[1], b"1"]
        last_id = b"%d-%d" % (self.last_ms, self.last)
        rest = [
            last_id,
            b"%d" % self.visible,
            self.closed,
            b"1000",
            b"1" * self.small,
            b"",
            b"%d" % self.payload_limit,
        ]
        return [1, b"OK", *log, *live, *rest]

    def _taken(self, key, after, to, count, max_bytes, visible):
        taken, frames, size, at = [], 0, 0, after
        for entry in self._between(key, after, to):
            at = entry[0]
            fields = entry[1]
            if not is_ours(fields) or (visible and b"mode" not in fields[::2]):
                continue
            more = sum(map(len, fields[1::2]))
            if size and size + more > max_bytes:
                return [taken, taken[-1][0], b"1"]
            taken.append(entry)
            frames += count_of(fields)
            size += more
            if frames >= count or size >= max_bytes:
                return [taken, at, b"1"]
        return [taken, at, b""]


def step(core, server):
    core.due = True
    return core.receive(server.answer(request_of(core.step())))


def run(core, server, limit=10_000):
    items = []
    while not core.ended:
        items += step(core, server)
        limit -= 1
        assert limit, "the tail makes no progress"
    return items


frames = st.builds(
    lambda mode, frame_type: Written(mode, frame_type=frame_type),
    st.sampled_from(["durable", "summary", "best_effort"]),
    st.sampled_from(["a", "b"]),
)
alike = st.tuples(frames, st.integers(1, 9)).map(lambda pair: [pair[0]] * pair[1])
batches = st.lists(st.one_of(st.lists(frames, min_size=1, max_size=5), alike), max_size=12)
wounds = st.tuples(
    st.sampled_from([LOG, LIVE]), st.sampled_from(["trim", "delete", "drop"]), st.integers(0, 20)
)
acts = st.lists(
    st.one_of(
        st.integers(1, 6).map(lambda n: ("append", n)),
        st.just(("step", 1)),
        st.just(("step", 1)),
        st.integers(2, 6).map(lambda n: ("step", n)),
        wounds.map(lambda wound: ("hurt", wound)),
        st.just(("restart", None)),
        st.just(("foreign", None)),
    ),
    max_size=30,
)


def hurt(server, key, verb, amount):
    """Lose entries; return the sequences of their frames."""
    entries = server.streams[key]
    before = list(entries)
    if verb == "drop":
        entries.clear()
    elif verb == "trim":
        del entries[: max(len(entries) - amount, 0)]
    elif entries:
        del entries[amount % len(entries)]
    return frames_in([entry for entry in before if entry not in entries])


def frames_in(entries):
    found = set()
    for raw, fields in entries:
        found.update(range(entry_id(raw)[1] - count_of(fields) + 1, entry_id(raw)[1] + 1))
    return found


@given(
    batches,
    acts,
    st.sampled_from([ALL, EXCLUDE]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 40),
    st.booleans(),
)
def test_whatever_happens_between_two_steps_nothing_is_skipped(
    plan, acts, visibility, log_count, live_count, first, reply_bytes, small
):
    modes = [frame.mode for batch in plan for frame in batch]
    server = Server(*lay_out(plan, end="attempt_success"))
    server.small = small
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail_core, "_FIRST_FRAMES", first)
        patch.setattr(tail_core, "_RANGE_FRAMES", first + 1)
        patch.setattr(tail_core, "_REPLY_BYTES", reply_bytes)
        patch.setattr(tail_core, "_FIRST_COUNTS", (log_count, live_count))
        patch.setattr(tail_core, "_LARGEST_COUNTS", (log_count + 1, live_count + 1))
        core = tail_core.TailCore(EID, 0, None, visibility)
        items, lost = [], set()
        for what, argument in acts:
            if what == "append":
                server.append(argument)
            elif what == "hurt":
                lost |= hurt(server, *argument)
            elif what == "restart":
                core.restart()
            elif what == "foreign":
                # An id between two of ours, as XADD with `*` makes them.
                for key, entries in server.streams.items():
                    last = entry_id(entries[-1][0]) if entries else (0, 1)
                    server.streams[key].append([b"%d-%d" % (last[0], last[1]), [b"note", b"x"]])
            else:
                for _ in range(argument):
                    items += [] if core.ended else step(core, server)
        server.append(10_000)
        items += [] if core.ended else run(core, server)
    assert items.pop() == End("attempt_success")
    never_lost = set(range(1, len(modes) + 1)) - lost
    check_told(items, 0, modes, visibility is EXCLUDE, never_lost)


@given(batches, st.integers(0, 40), st.sampled_from([ALL, EXCLUDE]), wounds)
def test_a_late_reader_gets_all_that_is_stored(plan, cursor, visibility, wound):
    modes = [frame.mode for batch in plan for frame in batch]
    if cursor == len(modes) + 1:
        return  # the end entry's own id
    server = Server(*lay_out(plan, end="attempt_success"))
    server.append(10_000)
    hurt(server, *wound)
    stored = frames_in(server.streams[LOG] + server.streams[LIVE])
    items = run(tail_core.TailCore(EID, 0, f"0-{cursor}", visibility), server)
    assert items.pop() == End("attempt_success")
    check_told(items, cursor, modes, visibility is EXCLUDE, stored)
    assert visibility is ALL or wanted_of(modes, exclude=True) >= {
        item.sequence for item in items if isinstance(item, StreamFrame)
    }


# -- what it asks for -----------------------------------------------------------------------------


def started(log=(), live=(), visibility=ALL, appended=10_000):
    server = Server(log, live)
    server.append(appended)
    core = tail_core.TailCore(EID, 0, None, visibility)
    step(core, server)
    return core, server


def last(server):
    return server.commands[-1]


def test_it_asks_for_nothing_once_it_has_read_all():
    core, _server = started(*lay_out([[Written("durable"), Written("best_effort")]]))
    assert core.step() is None
    core.due = True
    assert core.step() is not None


def test_it_reads_on_while_it_holds_frames(monkeypatch):
    monkeypatch.setattr(tail_core, "_FIRST_FRAMES", 1)
    monkeypatch.setattr(tail_core, "_LARGEST_COUNTS", (3, 3))
    plan = (
        [[Written("durable")]] * 20 + [[Written("best_effort")]] * 20 + [[Written("durable")]] * 20
    )
    core, server = started(*lay_out(plan))
    got = 1
    while got < 60:
        request = core.step()
        assert request is not None
        got += len(core.receive(server.answer(request_of(request))))
    assert len(server.commands) < 60


def test_it_reads_no_entry_twice(monkeypatch):
    monkeypatch.setattr(tail_core, "_FIRST_FRAMES", 1)
    monkeypatch.setattr(tail_core, "_FIRST_COUNTS", (4, 2))
    monkeypatch.setattr(tail_core, "_LARGEST_COUNTS", (4, 2))
    plan = (
        [[Written("durable")]] * 30
        + [[Written("best_effort")] * 5] * 30
        + [[Written("summary")]] * 5
    )
    core, server = started(*lay_out(plan, end="attempt_success"))
    seen = []
    while not core.ended:
        reply = server.answer(request_of(core.step()))
        asked = last(server)[0]
        if asked == b"XRANGE":
            seen += [entry[0] for entry in reply]
        else:
            seen += [entry[0] for part in (reply[2], reply[5]) for entry in part]
        core.receive(reply)
    # All but the one that the first look has read.
    assert len(seen) == len(set(seen)) == 65


def test_how_much_it_asks_for_follows_what_came():
    heavy = [[Written("best_effort", b"x" * 1000)] * 1000] * 40
    core, server = started(*lay_out(heavy))
    sizes = []
    while not sizes or sizes[-1]:
        sizes.append(
            len([i for i in step(core, server) if isinstance(i, StreamFrame)])
            if len(server.commands) < 60
            else 0
        )
    assert max(sizes) <= 2_000
    light = [[Written("durable")]] * 3_000
    core, server = started(*lay_out(light))
    while step(core, server) or core.held[0]:
        assert last(server)[0] != b"XRANGE" or int(last(server)[-1]) <= 1_024
    assert len(server.commands) < 30


def test_a_restart_reads_again_from_the_last_frame():
    core, server = started(*lay_out([[Written("durable")]] * 6), appended=3)
    server.append(1)
    assert [frame.sequence for frame in step(core, server)] == [4]
    core.restart()
    server.append(2)
    assert [frame.sequence for frame in step(core, server)] == [5, 6]
    assert last(server)[0] == b"FCALL_RO"
    assert entry_id(last(server)[8])[1] == 4


def test_a_gap_is_a_trim_until_the_reader_has_caught_up_once(monkeypatch):
    monkeypatch.setattr(tail_core, "_FIRST_FRAMES", 1)
    core, server = started(*lay_out([[Written("durable")]] * 12), appended=6)
    hurt(server, LOG, "delete", 2)
    items = step(core, server) + step(core, server)
    assert [item for item in items if isinstance(item, Gap)] == [Gap(3, 4, "trimmed")]
    assert items[-1].sequence == 6
    server.append(6)
    hurt(server, LOG, "trim", 3)
    assert step(core, server)[0] == Gap(7, 10, "fell_behind")


# -- answers that are none ------------------------------------------------------------------------


class ServerError(Exception):
    """As hiredis gives error replies: a value."""


def test_an_answer_of_another_form_is_an_error_of_ours(subtests):
    for reply, error in (
        (b"text", ProtocolError),
        (5, ProtocolError),
        (None, ProtocolError),
        ([5], Corruption),
        ([[b"1-1"]], Corruption),
        ([[b"1-1", None]], Corruption),
        ([[b"1-1", [b"a", None]]], Corruption),
        ([[b"x", [b"a", b"b"]]], ProtocolError),
        (ServerError("UNBLOCKED client unblocked via CLIENT UNBLOCK"), Unavailable),
        (ServerError("READONLY no"), NotPrimary),
    ):
        with subtests.test(f"{reply!r:.60}"):
            core, _server = started(*lay_out([[Written("durable")]] * 100))
            core.step()
            assert core._small_to is not None
            with pytest.raises(error):
                core.receive(reply)


def test_a_range_of_another_form_is_an_error_of_ours(subtests):
    for reply in (
        None,
        b"x",
        [],
        [1],
        [1, b"OK"],
        [1, b"OK", [], b"0-0", b"", []],
        [1, b"OK", *[b""] * 10],
        [1, b"OK", [], b"0-0", b"", [], b"0-0", b"", b"7", b"0", b"", b""],
        [1, b"OK", [], b"0-0", b"", [], b"0-0", b"", b"7-x", b"0", b"", b""],
        [1, b"OK", [], b"0-0", b"", [], b"0-0", b"", b"7", b"8", b"0", b"", b""],
        [2, 3],
    ):
        with subtests.test(f"{reply!r:.60}"):
            core = tail_core.TailCore(EID, 0, None, ALL)
            core.due = True
            core.step()
            with pytest.raises(ProtocolError):
                core.receive(reply)


def test_refusals_of_the_function_come_through():
    core = tail_core.TailCore(EID, 0, None, ALL)
    core.due = True
    core.step()
    with pytest.raises(ExecutionNotFound):
        core.receive([0, b"execution_not_found"])


def test_a_cursor_inside_what_the_log_never_had(monkeypatch):
    core, server = started(*lay_out([[Written("durable")]] * 3))
    assert core.sequence == 3
    ahead = tail_core.TailCore(EID, 0, "0-9", ALL)
    monkeypatch.setattr(tail_core, "_AHEAD_S", 0)
    assert step(ahead, server) == [Gap(10, 4, "cursor_ahead")]
    server.streams[LOG].append([b"2000-4", [b"payload", b"p"]])
    server.last_ms, server.last = 2000, 4
    assert [frame.sequence for frame in step(ahead, server)] == [4]


@pytest.mark.parametrize("after", ["", "$", "-1", 5, "1.0-0", "1.5-7", "0.", "0.5", "0.x-1"])
def test_a_bad_cursor(after):
    with pytest.raises(InvalidCursor):
        tail_core.TailCore(EID, 0, after, ALL)


@pytest.mark.parametrize(
    "arguments", [("x", 0, None, ALL), (EID, -1, None, ALL), (EID, 0, None, "all")]
)
def test_a_bad_argument(arguments):
    with pytest.raises(InvalidInput):
        tail_core.TailCore(*arguments)

"""Whatever a server loses of what it has acknowledged is stored again under the same ids, or told as lost."""

import copy
import json
import random
import weakref

import pytest

from ff_fast._core.places import Place
from ff_fast._core.summary import fold
from ff_fast._hot.writer import Held, Home, WriterCore
from ff_fast.errors import FramesLost, SequenceGap, StateLost, WriterSuperseded

from ...reference_writer import Server, called
from .core import DURABLE, LIVE, MERGE, NEW, WRITER, live
from .test_calls import Shell

MINUTE_MS = 60_000
KEYS = tuple(b"{p}0:%b" % name for name in (b"head", b"log", b"live", b"summary"))


class World:
    """A writer, its server, and the earlier states of it that a failover may bring back."""

    def __init__(self, held_bytes=1 << 20, held_ms=MINUTE_MS, mode=DURABLE):
        self.outbox = Shell()
        self.server = Server()
        self.unopened = copy.deepcopy(self.server)
        self.unopened.opening = 0
        self.openings = 1
        self.past = [copy.deepcopy(self.server)]
        self.place = Place(Held(held_ms, held_bytes) if held_bytes else None)
        self.mode = mode
        self.writer = self.opened(NEW)
        self.written = []
        # Of each acknowledged frame, the ms of its id.
        self.ids = {}
        self.losses = set()
        self.wire = []

    def opened(self, state):
        return WriterCore(
            keys=KEYS, writer=WRITER, mode=self.mode, opened=(*state, 1), outbox=self.outbox,
            place=self.place,
        )  # fmt: skip

    def write(self, mode=None):
        n = len(self.written) + 1
        payload = json.dumps({f"f{n % 5}": n}).encode()
        self.written.append(payload)
        assert self.writer.write(payload, mode=mode) == n

    def send(self):
        call = self.outbox.next_call()
        if call is not None:
            self.wire.append((call, call.take()))
        return call

    def apply(self, message):
        reply = called(message, {KEYS[0]: self.server})
        self.past.append(copy.deepcopy(self.server))
        return reply

    def answer(self):
        call, message = self.wire.pop(0)
        call(self.apply(message))
        self.note()

    def note(self):
        if self.writer._failure is not None:
            return
        for sequence in range(1, min(self.writer.last_sequence, len(self.server.frames)) + 1):
            if self.server.frames[sequence - 1].mode != b"lost":
                self.ids.setdefault(sequence, self.server.id_ms[sequence])
        self.hear()

    def hear(self):
        try:
            self.place.tell_losses()
        except FramesLost as lost:
            self.losses |= set(range(lost.first, lost.last + 1))

    def cut(self, applied=0):
        for _, message in self.wire[:applied]:
            self.apply(message)
        for call, _ in self.wire:
            call.lost()
        self.wire.clear()
        self.outbox.doubt()

    def fail_over(self, back):
        """Go on with an earlier state."""
        # Whoever was behind another server follows it from then on.
        del self.past[max(len(self.past) - back, 1) :]
        state = self.past[-1]
        now_ms = self.server.now_ms
        self.server = copy.deepcopy(state)
        self.server.now_ms = now_ms

    def open_again(self):
        # The shell is told once all calls are answered.
        if self.writer._opening_lost and not self.wire:
            self.openings += 1
            self.server.opening = 1
            last = len(self.server.frames)
            self.writer._reopened(self.server.id_ms[last], last, 1)
            self.note()

    def settle(self):
        """Everything is stored, and the server has it."""
        for _ in range(2):
            self.writer._seal_soon()
            while True:
                self.open_again()
                if not (self.send() or self.wire):
                    break
                while self.wire:
                    self.answer()
            self.writer._ask()
        while self.send() or self.wire:
            while self.wire:
                self.answer()

    def check(self):
        assert self.writer._failure is None
        assert len(self.server.frames) == len(self.written) == self.writer.last_sequence
        for frame, payload in zip(self.server.frames, self.written, strict=True):
            if frame.mode == b"lost":
                assert frame.sequence in self.losses
                continue
            assert frame.payload == payload
            assert self.server.id_ms[frame.sequence] == self.ids[frame.sequence]
        self.server.check_visible_chain()
        assert self.writer.unacknowledged_bytes == 0

    def folded(self):
        summary = fold(self.server.summary)
        return 0 if summary is None else summary.version

    def lose(self, count):
        """Store frames, of which the server then loses the last ones."""
        before = len(self.past)
        for _ in range(count):
            self.write()
            self.settle()
        self.fail_over(len(self.past) - before)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_lost_is_stored_again_or_told(seed):
    rng = random.Random(seed)
    # One mode, or all in turn; patches make the summary part of it.
    modes = rng.choice([[DURABLE], [LIVE], [MERGE], [DURABLE, LIVE, MERGE], [live(50), MERGE]])
    world = World(rng.choice([1, 700, 3000, 1 << 20, 1 << 20]), mode=modes[0])
    world.past.insert(0, world.unopened)
    for _ in range(rng.randrange(20, 120)):
        what = rng.random()
        if what < 0.4:
            world.write(rng.choice(modes))
            if rng.random() < 0.2:
                world.writer._seal_soon()
        elif what < 0.6:
            world.send()
        elif what < 0.85:
            if world.wire:
                world.answer()
        elif what < 0.9:
            world.cut(rng.randrange(len(world.wire) + 1))
        elif what < 0.93:
            # The new primary is reached over the same connection, as through a proxy.
            world.fail_over(rng.choice([1, 1, 2, 5, 100]))
        else:
            world.cut(rng.randrange(len(world.wire) + 1))
            world.fail_over(rng.choice([1, 1, 2, 5, 100]))
        world.open_again()
    world.settle()
    world.check()
    if MERGE in modes and world.writer.summary_version:
        assert world.folded() == world.writer.summary_version
        expected = {}
        for frame, payload in zip(world.server.frames, world.written, strict=True):
            if frame.mode == b"summary":
                expected.update(json.loads(payload))
        if not world.losses:
            assert json.loads(fold(world.server.summary).document_json) == expected


@pytest.mark.parametrize("count", [1, 3])
def test_the_ids_are_those_that_were_acknowledged(count):
    world = World()
    world.lose(count)
    world.server.now_ms += 1000
    world.write()
    world.settle()
    world.check()
    assert len({*world.server.id_ms}) == count + 2


def test_a_loss_has_the_id_of_its_last_frame():
    world = World(held_bytes=1)
    world.lose(3)
    world.write()
    world.settle()
    world.check()
    assert world.losses == {1, 2, 3}
    assert world.server.id_ms[3] == world.ids[3]


def test_nothing_is_held_where_nothing_is_kept():
    world = World(held_bytes=0)
    world.lose(3)
    world.write()
    world.writer._seal_soon()
    while world.send():
        world.answer()
    assert isinstance(world.writer.error, SequenceGap)


def test_what_is_given_up_in_the_middle_is_held_again():
    world = World()
    world.lose(3)
    world.writer._ask()
    world.send()
    world.answer()
    assert len(world.place.held) == 0
    assert world.writer.unacknowledged_bytes > 0
    world.writer._fail(WriterSuperseded())
    assert len(world.place.held) == 3
    assert [frame.sequence for frame in world.writer.error.unstored] == [1, 2, 3]


def test_a_superseded_writer_stores_nothing_again():
    world = World()
    world.lose(2)
    WriterCore(
        keys=KEYS, writer=b"other", mode=DURABLE, opened=(world.ids[2], 2, 2, b"", 0, 2), place=world.place
    )  # fmt: skip
    world.writer._ask()
    world.server.opening = 0
    world.send()
    world.answer()
    assert isinstance(world.writer.error, StateLost)


def test_what_is_held_waits_for_the_next_server_however_long_that_takes():
    world = World(held_ms=1)
    world.write()
    world.settle()
    world.outbox.doubt()
    held = world.place.held
    for _ in range(50):
        assert world.outbox.let_go_s() > 0
    assert len(held) == 1
    world.settle()
    while world.outbox.keeps:
        world.outbox.let_go_s()
    assert len(held) == 0


@pytest.mark.parametrize("back", [True, False])
def test_what_is_held_goes_after_its_time_from_whatever_outbox_the_writer_has(back):
    world = World(held_ms=1)
    here, other = world.outbox, Shell()
    home = Home(None, here)
    held = Held(1, 1 << 20)
    writer = world.writer = WriterCore(
        keys=KEYS, writer=WRITER, mode=DURABLE, opened=(*NEW, 1), home=home, place=Place(held)
    )  # fmt: skip
    held.owner = weakref.ref(writer)
    world.write()
    world.settle()
    assert here.keeps
    home.outbox = other
    here.hand_over()
    assert (here.keeps, other.keeps) == (False, True)
    if back:
        home.outbox = here
        other.hand_over()
        here, other = other, here
    while other.keeps:
        other.let_go_s()
    assert len(held) == 0


def test_a_small_frame_is_held_in_a_hundred_bytes():
    world = World(held_bytes=30 * 100)
    for _ in range(40):
        world.write()
        world.settle()
    assert len(world.place.held) >= 30

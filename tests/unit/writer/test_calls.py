"""Calls that writers share: what goes into one, who gets which answer, and what is pushed before it is stored."""

import random
import time

import hiredis
import pytest

from ff_fast._hot.writer import Outbox, WriterCore
from ff_fast.errors import (
    LeaseExpired,
    Outcome,
    OutOfMemory,
    PermissionDenied,
    ProtocolError,
    StreamClosed,
    WriterClosed,
)

from ...reference_writer import Server, called, parse, split_push
from .core import DURABLE, LIVE, NEW, NOW_MS, OOM, TEXT, WRITER, live

LOST = object()


class Shell(Outbox):
    def __init__(self, **options):
        super().__init__(lost=(LOST,), **options)
        self.told = 0
        self.answered = []

    def _on_ready(self):
        self.told += 1

    def _on_answer(self, call):
        self.answered.append(call)


class Site:
    """Writers of several attempts on one connection, and the server of each."""

    def __init__(self, count, mode=LIVE, outbox=None, **options):
        self.outbox = Shell() if outbox is None else outbox
        self.servers = {}
        self.writers = [self.writer(i, mode, **options) for i in range(count)]
        # Sent, and not answered.
        self.wire = []

    def writer(self, i, mode, **options):
        keys = tuple(b"{p}%d:%b" % (i, name) for name in (b"head", b"log", b"live", b"summary"))
        self.servers[keys[0]] = Server()
        return WriterCore(
            keys=keys, writer=WRITER, mode=mode, opened=NEW, outbox=self.outbox, **options
        )

    def server(self, writer):
        return list(self.servers.values())[self.writers.index(writer)]

    def send(self):
        call = self.outbox.next_call()
        if call is not None:
            self.wire.append((call, call.take()))
        return call

    def answer(self):
        """The server takes the oldest call, and the writers its reply."""
        call, message = self.wire.pop(0)
        call(called(message, self.servers))

    def lose(self, applied=0):
        """The connection is lost, behind so many calls that the server has taken."""
        for _, message in self.wire[:applied]:
            called(message, self.servers)
        for call, _ in self.wire:
            call(LOST)
        self.wire.clear()

    def settle(self):
        for writer in self.writers:
            writer._seal_soon()
        while self.send() or self.wire:
            while self.wire:
                self.answer()

    def known(self):
        """The outbox knows the server's time: every writer has stored a frame."""
        for writer in self.writers:
            writer.write(b"first")
        self.settle()
        return self


def parts_of(message):
    """The arguments of the parts of a call, each a list."""
    reader = hiredis.Reader()
    reader.feed(message)
    _, _, count, *rest = reader.gets()
    argv, parts = rest[int(count) :], []
    while argv:
        size = int(argv[0][:-1]) + 1
        parts.append(argv[:size])
        argv = argv[size:]
    return parts


def kinds(message):
    """``push`` or ``store`` for each part of a call."""
    return ["push" if part[0].endswith(b"1") else "store" for part in parts_of(message)]


class TestSharedCalls:
    def test_what_is_ready_is_one_call(self):
        site = Site(5, DURABLE)
        for i, writer in enumerate(site.writers):
            writer.write(b"%d" % i)
        assert site.outbox.told == 1
        call = site.send()
        assert len(call) == 5
        assert site.send() is None
        site.answer()
        assert [writer.last_sequence for writer in site.writers] == [1] * 5
        assert site.outbox.answered == [call]
        assert (call.accepted, call.error) == (True, None)

    def test_bounds(self):
        site = Site(300, DURABLE)
        for writer in site.writers:
            writer.write(b"x")
        assert [len(site.send()) for _ in range(3)] == [128, 128, 44]

    @pytest.mark.parametrize("frames, size, most", [(200, 1, 5), (4, 65_536, 3)])
    def test_bounds_of_frames_and_bytes(self, frames, size, most):
        site = Site(12, DURABLE)
        for writer in site.writers:
            for _ in range(frames):
                writer.write(bytes(size))
        calls = []
        while (call := site.send()) is not None:
            calls.append(len(call))
        assert calls == [most] * (12 // most) + [12 % most] * (12 % most > 0)

    def test_a_writer_has_one_part_in_a_call(self):
        site = Site(2, DURABLE)
        for writer in site.writers:
            for _ in range(2048):
                writer.write(b"x")
        assert [len(site.send()) for _ in range(4)] == [1] * 4

    def test_each_gets_its_own_answer(self):
        site = Site(4, DURABLE)
        for writer in site.writers:
            writer.write(b"x")
        call, message = site.send(), None
        first, closed, broken, garbled = site.writers
        call([
            b"%d" % NOW_MS,
            b"%d-1 %d 1" % (NOW_MS, NOW_MS + 5_000),
            [0, b"stream_closed"],
            hiredis.ReplyError("WRONGTYPE Operation against a key"),
            b"nonsense",
        ])  # fmt: skip
        del message
        assert (first.last_sequence, first.lease_left, first.cancel_requested) == (1, 5.0, True)
        assert isinstance(closed.error, StreamClosed)
        assert broken.error is not None
        assert isinstance(garbled.error, ProtocolError)
        assert all(len(writer.error.unstored) == 1 for writer in (closed, broken, garbled))

    def test_a_call_refused_for_now_is_sent_again(self):
        site = Site(3, DURABLE)
        for writer in site.writers:
            writer.write(b"x")
        call, _ = site.send(), site.wire.pop()
        call(OOM)
        assert isinstance(call.error, OutOfMemory)
        assert all(writer.error is None for writer in site.writers)
        assert len(site.send()) == 3

    def test_a_call_refused_for_good_harms_only_whose_fault_it_is(self):
        site = Site(4, DURABLE)
        for writer in site.writers:
            writer.write(b"x")
        refused = hiredis.ReplyError("NOPERM No permissions to access a key")
        call, _ = site.send(), site.wire.pop()
        call(refused)
        assert call.error is None
        again = []
        while (call := site.send()) is not None:
            again.append(call)
            assert len(call) == 1
        assert len(again) == 4
        again[1](refused)
        del site.wire[1]
        while site.wire:
            site.answer()
        assert [type(writer.error) for writer in site.writers] == [
            type(None), PermissionDenied, type(None), type(None)
        ]  # fmt: skip

    def test_a_reply_is_taken_once(self):
        site = Site(2, DURABLE)
        for writer in site.writers:
            writer.write(b"x")
        call = site.send()
        call(LOST)
        call.lost()
        call([b"1", b"1-1 2 0", b"1-1 2 0"])
        assert site.outbox._calls_in_flight == 0
        assert [writer.last_sequence for writer in site.writers] == [0, 0]
        assert len(site.send()) == 2

    def test_every_writer_has_its_answer_although_a_hook_raises(self):
        class Broken(WriterCore):
            def _on_progress(self):
                raise RuntimeError

        site = Site(2, DURABLE)
        broken = Broken(
            keys=(b"m", b"s", b"l", b"u"), writer=WRITER, mode=DURABLE, opened=NEW,
            outbox=site.outbox,
        )  # fmt: skip
        broken._has_waiters = True
        for writer in (broken, *site.writers):
            writer.write(b"x")
        call = site.send()
        with pytest.raises(RuntimeError):
            call([b"1", *[b"1-1 2 0"] * 3])
        assert [writer.last_sequence for writer in (broken, *site.writers)] == [1, 1, 1]
        assert site.outbox.answered == [call]


class TestWaiting:
    def test_one_writer_does_not_wait(self):
        site = Site(1, DURABLE)
        for _ in range(20):
            site.writers[0].write(b"x")
            assert site.outbox.wait_s() == 0.0
            site.send()
            site.answer()
        assert site.outbox.wait_s() == -1.0

    def test_calls_of_many_are_some_time_apart(self):
        site = Site(20, DURABLE)
        # The time may pass here, but not each time.
        for _ in range(100):
            site.known().writers[0].write(b"x")
            wait = site.outbox.wait_s()
            assert wait <= 0.002
            if wait > 0.0:
                return
        pytest.fail("no wait")

    def test_enough_of_them_do_not_wait(self):
        site = Site(64, DURABLE, Shell(linger_ms=1000)).known()
        told = site.outbox.told
        for writer in site.writers:
            assert site.outbox.wait_s() != 0.0
            writer.write(b"x")
        assert site.outbox.wait_s() == 0.0
        assert site.outbox.told == told + 2

    def test_a_full_batch_does_not_wait(self):
        site = Site(20, DURABLE, Shell(linger_ms=1000)).known()
        for _ in range(255):
            site.writers[0].write(b"x")
        assert site.outbox.wait_s() > 0.0
        site.writers[0].write(b"x")
        assert site.outbox.wait_s() == 0.0

    def test_linger(self):
        site = Site(1, DURABLE, Shell(linger_ms=50))
        site.writers[0].write(b"x")
        assert 0.04 < site.outbox.wait_s() <= 0.05

    def test_told_again_after_a_hook_that_raised(self):
        class Interrupted(Shell):
            interrupt = True

            def _on_ready(self):
                if self.interrupt:
                    self.interrupt = False
                    raise KeyboardInterrupt
                super()._on_ready()

        site = Site(2, DURABLE, Interrupted())
        with pytest.raises(KeyboardInterrupt):
            site.writers[0].write(b"x")
        site.writers[1].write(b"x")
        assert site.outbox.told == 1
        site.writers[0].write(b"y")
        site.settle()
        assert [writer.last_sequence for writer in site.writers] == [2, 1]


class TestGroups:
    def one(self, mode=LIVE, **options):
        site = Site(1, mode, **options).known()
        return site, site.writers[0], next(iter(site.servers.values()))

    def pushed(self, site):
        """The next call, which is a push alone, answered."""
        site.send()
        assert kinds(site.wire[-1][1]) == ["push"]
        site.answer()

    def test_pushed_at_once_and_stored_later_as_one_run(self):
        site, writer, server = self.one()
        for i in range(6):
            writer.write(b"%d" % i)
            self.pushed(site)
        assert len(server.frames) == 1
        assert sorted(server.published) == list(range(1, 8))
        assert writer.last_sequence == 1
        assert site.outbox.ready == 0
        assert 0.0 < site.outbox.hold_s() <= 0.1
        time.sleep(0.11)
        assert site.outbox.hold_s() == -1.0
        call = site.send()
        (part,) = parts_of(site.wire[-1][1])
        request = parse(part)
        assert (len(request.frames), request.push, len(request.times)) == (6, None, 6)
        # The ms of a group is that of its first frame.
        assert request.times == sorted(request.times)
        assert request.times[0] == 0
        assert request.pushed_ms is not None
        site.answer()
        assert call.accepted
        assert writer.last_sequence == 7
        server.check_published()
        assert [frame.payload for frame in server.frames[1:]] == [b"%d" % i for i in range(6)]

    def test_the_first_frame_of_a_connection_is_stored(self):
        # The server's time is not known before its first answer.
        site = Site(1)
        site.writers[0].write(b"x")
        site.send()
        assert kinds(site.wire[-1][1]) == ["store"]

    def test_the_first_frame_behind_an_earlier_writer_is_stored(self):
        """The earlier one may have pushed frames under an ms that is later than the time as it is known here."""
        site, first, _ = self.one()
        ms = int(first.last_id.split("-")[0])
        opened = (ms, first.last_sequence, 0, b"", 0, 2)
        second = WriterCore(
            keys=tuple(b"{p}0:%b" % name for name in (b"head", b"log", b"live", b"summary")),
            writer=WRITER, mode=LIVE, opened=opened, outbox=site.outbox,
        )  # fmt: skip
        for expected in ("store", "push"):
            second.write(b"x")
            site.send()
            assert kinds(site.wire[-1][1]) == [expected]
            site.answer()

    @pytest.mark.parametrize("end", ["flush", "close", "another shape", "another kind"])
    def test_what_ends_a_group(self, end):
        site, writer, server = self.one()
        writer.write(b"a")
        self.pushed(site)
        writer.write(b"b")
        if end == "flush":
            writer._seal_soon()
        elif end == "close":
            writer._seal_last()
        elif end == "another shape":
            writer.write(b"c", "other")
        else:
            writer.write(b"c", mode=DURABLE)
        site.send()
        assert kinds(site.wire[-1][1]) == ["store"]
        site.answer()
        assert writer._idle
        server.check_published()
        told = set(server.published)
        # A push has one ms: of a group that was not pushed whole and what follows it has the id alone.
        assert told == ({1, 2, 3} if end in ("flush", "close") else {1, 2})

    def test_what_follows_a_pushed_group_is_pushed_with_the_batch(self):
        site, writer, server = self.one()
        writer.write(b"a")
        self.pushed(site)
        writer.write(b"b", mode=DURABLE)
        writer.write(b"{}", mode=TEXT)
        site.send()
        site.answer()
        assert sorted(server.published) == [1, 2, 3, 4]
        server.check_published()

    def test_no_push_where_many_gather(self):
        site, writer, _ = self.one()
        for _ in range(8):
            writer.write(b"x")
        site.send()
        assert kinds(site.wire[-1][1]) == ["store"]

    def test_no_push_behind_a_batch_whose_ms_the_server_chooses(self):
        site, writer, server = self.one()
        writer.write(b"x", mode=DURABLE)
        site.send()
        writer.write(b"y")
        assert site.send() is None
        site.answer()
        self.pushed(site)
        site.settle()
        server.check_published()

    def test_a_group_behind_one_that_is_being_stored(self):
        site, writer, server = self.one()
        writer.write(b"a")
        self.pushed(site)
        writer._seal_soon()
        site.send()
        writer.write(b"b")
        site.send()
        assert [kinds(message) for _, message in site.wire] == [["store"], ["push"]]
        site.settle()
        assert len(server.frames) == 3
        server.check_published()

    @pytest.mark.parametrize("mode", [DURABLE, TEXT, live(999)])
    def test_only_best_effort_frames_that_live_long_enough(self, mode):
        site, writer, _ = self.one(mode)
        writer.write(b"x")
        site.send()
        assert kinds(site.wire[-1][1]) == ["store"]

    def test_a_lost_push_is_pushed_again_with_the_run(self):
        site, writer, server = self.one()
        writer.write(b"a")
        self.pushed(site)
        writer.write(b"b")
        site.send()
        site.lose()
        site.send()
        (part,) = parts_of(site.wire[-1][1])
        assert [block.payloads for block in parse(part).push] == [[b"a", b"b"]]
        site.settle()
        server.check_published()
        assert sorted(server.published) == [1, 2, 3]

    def test_a_refused_push_ends_the_writer(self):
        site, writer, _ = self.one()
        writer.write(b"a")
        self.pushed(site)
        writer.write(b"b")
        call = site.send()
        call([0, b"lease_expired"])
        assert isinstance(writer.error, LeaseExpired)
        assert [frame.payload for frame in writer.error.unstored] == [b"a", b"b"]

    def test_a_push_says_what_an_answer_says(self):
        site, writer, _ = self.one()
        writer.write(b"a")
        call = site.send()
        call(b"%d %d 1" % (NOW_MS, NOW_MS + 3_000))
        assert (writer.lease_left, writer.cancel_requested) == (3.0, True)
        assert writer.last_sequence == 1

    def test_overload_stores_what_is_held(self):
        site, writer, _ = self.one(max_unacknowledged_bytes=1000)
        writer.write(bytes(400))
        self.pushed(site)
        writer.write(bytes(400))
        with pytest.raises(Exception, match="drain"):
            writer.write(bytes(400))
        site.send()
        assert kinds(site.wire[-1][1]) == ["store"]

    def test_large_frames_are_told_by_their_id(self):
        site, writer, server = self.one()
        writer.write(bytes(9000))
        writer._seal_soon()
        site.send()
        (part,) = parts_of(site.wire[-1][1])
        assert parse(part).push == []
        site.settle()
        assert 2 not in server.published

    def test_a_small_push_is_a_few_bytes_more_than_its_frame(self):
        site, writer, _ = self.one()
        writer.write(b" token")
        site.send()
        (part,) = parts_of(site.wire[-1][1])
        _, _, body = split_push(part[2])
        assert len(body) <= len(b" token") + 6

    def test_unstored_frames_of_a_group(self):
        site, writer, _ = self.one()
        writer.write(b"a")
        self.pushed(site)
        writer.write(b"b")
        assert [frame.payload for frame in writer._unstored_frames()] == [b"a", b"b"]
        writer._fail(WriterClosed())
        assert writer.error.outcome is Outcome.NOT_APPLIED


@pytest.mark.parametrize("seed", range(25))
def test_any_grouping_stores_each_frame_once_under_the_id_that_was_pushed(seed):
    rng = random.Random(seed)
    site = Site(rng.choice([1, 3, 8]))
    written = {writer: [] for writer in site.writers}
    modes = rng.choice(
        [[LIVE], [LIVE, LIVE, LIVE, DURABLE], [LIVE, DURABLE, TEXT, live(15_000, 8)]]
    )
    refusals = [OOM, hiredis.ReplyError("NOPERM x"), hiredis.ReplyError("LOADING x")]
    pushes = 0
    for _ in range(600):
        what = rng.random()
        writer = rng.choice(site.writers)
        if what < 0.55:
            for _ in range(rng.choice([1, 1, 1, 2, 12])):
                payload = b"%d" % len(written[writer])
                writer.write(payload, mode=rng.choice(modes))
                written[writer].append(payload)
        elif what < 0.75:
            if site.send() is not None:
                pushes += kinds(site.wire[-1][1]).count("push")
        elif what < 0.9:
            if site.wire:
                site.answer()
        elif what < 0.95:
            writer._seal_soon()
        elif what < 0.97:
            if site.wire:
                refusal = refusals[1:2] if len(site.wire[0][0]) > 1 else []
                site.wire.pop(0)[0](rng.choice([OOM, refusals[2], *refusal]))
        elif site.wire:
            site.lose(rng.randrange(len(site.wire) + 1))
        for each in site.writers:
            assert each.error is None
    site.settle()
    for writer in site.writers:
        assert writer._idle
        assert writer.unacknowledged_bytes == 0
        server = site.server(writer)
        assert [frame.payload for frame in server.frames] == written[writer]
        server.check_published()
        server.check_visible_chain()
        assert writer.last_id == f"{server.id_ms[-1]}-{len(server.frames)}"
        assert sorted(server.published) or not written[writer]
    assert pushes

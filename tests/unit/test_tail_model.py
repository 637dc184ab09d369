"""Tails against a model of a server: whatever becomes of the pushes, every reader gets every frame once, or is told.

A seed names each case. In each, frames are stored, pushed before they are stored, or too large to be pushed; pushes are
lost, doubled, late and out of order, or damaged; subscriptions are lost and confirmed; reads take their time, fail, and
are interrupted; readers are slow.
"""

import random

import hiredis
import pytest

from ff_fast import End, Gap, TailVisibility, keys
from ff_fast._core import tail as tail_core
from ff_fast._hot import feed as feed_module
from ff_fast._hot.feed import Feed

from ..reference_frames import block_of, push_of, run_of
from .script import request_of

EID = "{fp:7}:6f2c1ed5-4c3a-4b0e-9d3b-0a4a6f7c8d9e"
LOG = keys.stream(EID, 0)


def id_of(raw):
    ms, _, sequence = raw.partition(b"-")
    return int(ms), int(sequence)


class Server:
    """Storage of one attempt, its writer, and what it publishes."""

    def __init__(self, rng):
        self.rng = rng
        self.now = 1_700_000_000.0
        self.log, self.live = [], []
        self.ms = self.last = self.visible = 0
        self.reason = b""
        self.lease_ends = self.now + 5
        # Frames that were pushed and are not stored yet: their ms, and (sequence, payload) each.
        self.group_ms, self.group = 0, []
        self.frames = {}
        self.published = []
        self.payload = 0

    @property
    def now_ms(self):
        return int(self.now * 1000)

    def _payloads(self, count):
        first = self.payload + 1
        self.payload += count
        return [b"%d" % n for n in range(first, first + count)]

    def _stored(self, ms, sequence, payload, durable):
        self.frames[sequence] = (f"{ms}-{sequence}", payload, durable)

    def _store_run(self, ms, payloads):
        self.ms, self.last = ms, self.last + len(payloads)
        first = self.last - len(payloads) + 1
        for sequence, payload in enumerate(payloads, first):
            self._stored(ms, sequence, payload, False)
        self.live.append(
            (ms, self.last, first, [b"%d-%d" % (ms, self.last), [b"run", run_of(payloads)]])
        )
        return block_of(b"V", [], payloads)

    def store_group(self, push=False):
        """Store what was only pushed; a writer that has lost its connection pushes it again."""
        if not self.group:
            return
        block = self._store_run(self.group_ms, [payload for _, payload in self.group])
        self.group = []
        if push:
            self.published.append(push_of(b"F", self.ms, self.last, [block]))

    def append(self, count, durable, large=False):
        self.store_group()
        ms = max(self.now_ms, self.ms)
        payloads = self._payloads(count)
        if durable:
            fields = [b"prev", b"%d" % self.visible] if self.visible != self.last else []
            block = block_of(b"L", fields, payloads)
            for n, payload in enumerate(payloads):
                self.last += 1
                entry = [b"%d-%d" % (ms, self.last), [b"payload", payload, *([] if n else fields)]]
                self.log.append((ms, self.last, self.last, entry))
                self._stored(ms, self.last, payload, True)
            self.ms, self.visible = ms, self.last
        else:
            block = self._store_run(ms, payloads)
        self.published.append(push_of(b"F", self.ms, self.last, [] if large else [block]))

    def defer(self, count):
        if not self.group:
            self.group_ms = max(self.now_ms, self.ms)
        payloads = self._payloads(count)
        for payload in payloads:
            self.group.append((self.last + len(self.group) + 1, payload))
        self.published.append(
            push_of(b"f", self.group_ms, self.group[-1][0], [block_of(b"V", [], payloads)])
        )

    def supersede(self):
        """Another writer begins; what was only pushed is never stored."""
        self.group = []
        self.now += 0.002
        self.published.append(b"R")

    def renew(self):
        self.lease_ends = self.now + 5
        self.published.append(b"L5000")

    def end(self, reason=b"attempt_success"):
        ms = max(self.now_ms, self.ms)
        entry = [b"%d-%d" % (ms, self.last + 1), [b"end", reason, b"prev", b"%d" % self.visible]]
        self.log.append((ms, self.last + 1, self.last + 1, entry))
        self.reason = reason
        self.published.append(b"E%d-%d %d %s" % (ms, self.last + 1, self.visible, reason))

    def answer(self, request):
        reader = hiredis.Reader()
        reader.feed(request)
        command = reader.gets()
        if command[0] == b"XRANGE":
            _, key, after, to, _, count = command
            entries = self.log if key == LOG else self.live
            after, to = id_of(after[1:]), id_of(to)
            return [e[3] for e in entries if after < e[:2] <= to][: int(count)]
        _, log_after, live_after, count, _, visibility, cursor = command[7:]
        place = self.place(id_of(cursor))
        if place is not None:
            log_after = live_after = b"%d-%d" % place
        count = max(int(count) // 16, 1)
        log, log_to, log_more = self._page(self.log, id_of(log_after), count, None)
        live = [] if visibility else self.live
        live, live_to, live_more = self._page(
            live, id_of(live_after), count, log_to if log_more else None
        )
        if live_more:
            kept = [e for e in log if e[:2] <= live_to]
            if len(kept) < len(log):
                log, log_to, log_more = kept, live_to, True
        left = int((self.lease_ends - self.now) * 1000)
        reason = self.reason or (b"producer_lost" if left <= 0 else b"")
        return [
            *(1, b"OK", [e[3] for e in log], b"%d-%d" % log_to, b"1" * log_more),
            *([e[3] for e in live], b"%d-%d" % live_to, b"1" * live_more),
            *(b"%d-%d" % (self.ms, self.last), b"%d" % self.visible, reason),
            *(
                b"" if self.reason else b"%d" % left,
                b"1",
                b"" if place is None else b"%d-%d" % place,
                b"9",
            ),
        ]

    def _page(self, entries, after, count, to):
        found = [e for e in entries if after < e[:2] and (to is None or e[:2] <= to)]
        more = len(found) > count
        found = found[:count]
        return found, found[-1][:2] if found else after, more

    def place(self, cursor):
        """`ff.other_place` in lua/state.lua."""
        ms, sequence = cursor
        if ms == 0 or cursor == (self.ms, self.last):
            return None
        before, other, restart = (0, 0), False, False
        for entries in (self.log, self.live):
            following = next((e for e in entries if e[:2] >= cursor), None)
            if following and following[0] == ms and following[2] <= sequence + 1:
                return None
            other = other or bool(following and following[2] <= sequence)
            preceding = next((e for e in reversed(entries) if e[:2] < cursor), None)
            if preceding:
                restart = restart or preceding[1] >= sequence
                before = max(before, preceding[:2])
        if restart:
            return 0, 0
        return before if other else None


class Reader:
    """A shell's loop over one tail, cut into single acts."""

    def __init__(self, feed, server, visibility, rng):
        self.core = tail_core.TailCore(EID, 0, None, visibility)
        self.feed, self.server, self.rng = feed, server, rng
        self.items = []
        self.request = self.reply = None
        self.timer = None
        self.core.on_wake = lambda: None
        feed.add(self.core)

    def _got(self, items):
        if items and self.rng.random() < 0.02:
            # An interrupt behind the call: nobody got them.
            self.core.restart(self.items[-1].cursor if self.items else self.core.start)
            return
        self.items += items

    def act(self):
        """Do the next thing; return whether there was one."""
        core = self.core
        if core.ended:
            return False
        if self.reply is not None:
            reply, self.reply = self.reply, None
            self._got(core.receive(reply))
            return True
        if self.request is not None:
            request, self.request = self.request, None
            if self.rng.random() < 0.03:
                core.restart()
            else:
                self.reply = self.server.answer(request)
            return True
        items = core.take()
        if items:
            self._got(items)
            return True
        step = core.step()
        if step is None:
            return False
        self.request = request_of(step)
        return True


class Case:
    """One run of the model."""

    def __init__(self, seed, patch, *, loses_group=False, supersedes=False):
        self.rng = rng = random.Random(seed)
        self.server = server = Server(rng)
        patch.setattr(tail_core, "monotonic", lambda: server.now)
        patch.setattr(feed_module, "monotonic", lambda: server.now)
        patch.setattr(tail_core, "_FIRST_COUNTS", (rng.randint(1, 8), rng.randint(1, 3)))
        patch.setattr(tail_core, "_LARGEST_COUNTS", (8, 4))
        self.feed = Feed(keys.attempt_channel(EID, 0))
        self.subscribed = False
        self.flying = []
        self.loses_group, self.supersedes = loses_group, supersedes
        # What a push loses in silence, only the next one, or a look after a long time, tells.
        self.loss = 0 if supersedes else rng.choice([0, 0, 0.1, 0.5])
        self.readers = []
        for _ in range(rng.randint(1, 3)):
            self.join()

    def join(self):
        visibility = self.rng.choice(list(TailVisibility))
        self.readers.append(Reader(self.feed, self.server, visibility, self.rng))

    def subscribe(self, subscribed):
        if subscribed != self.subscribed:
            self.subscribed = subscribed
            self.flying = []
            self.feed.doubt(subscribed)

    def publish(self):
        if self.subscribed:
            for message in self.server.published:
                if self.rng.random() >= self.loss:
                    self.flying += [message] * (2 if self.rng.random() < 0.1 else 1)
        self.server.published = []

    def deliver(self, count):
        for _ in range(min(count, len(self.flying))):
            at = 0 if self.rng.random() < 0.9 else self.rng.randrange(len(self.flying))
            message = self.flying.pop(at)
            if self.rng.random() < 0.02:
                message = message[: self.rng.randrange(len(message) + 1)]
            self.feed.told(message)

    def one(self):
        rng, server = self.rng, self.server
        what = rng.random()
        if what < 0.12:
            server.append(rng.randint(1, 5), durable=True, large=rng.random() < 0.1)
        elif what < 0.2:
            server.append(rng.randint(1, 40), durable=False, large=rng.random() < 0.1)
        elif what < 0.4:
            server.defer(rng.randint(1, 4))
        elif what < 0.48:
            server.store_group(push=rng.random() < 0.2)
        elif what < 0.5:
            server.renew()
        elif what < 0.51 and self.supersedes:
            server.supersede()
        elif what < 0.6:
            self.subscribe(not self.subscribed)
        elif what < 0.62 and len(self.readers) < 5:
            self.join()
        else:
            server.now += rng.choice([0, 0.001, 0.02, 0.2, 1]) * rng.random()
        if server.lease_ends - server.now < 2:
            server.renew()
        self.publish()
        self.deliver(rng.randint(0, 4))
        for reader in self.readers:
            for _ in range(rng.randint(0, 4)):
                reader.act()

    def run(self):
        for _ in range(self.rng.randint(0, 60)):
            self.one()
        if self.loses_group and self.rng.random() < 0.5:
            self.server.group = []
            if self.rng.random() < 0.5:
                # Nobody says so: the lease lapses.
                self.server.lease_ends = self.server.now + 1
                self.finish(b"producer_lost")
                return
        else:
            self.server.store_group()
        self.server.end()
        self.finish(b"attempt_success")

    def finish(self, reason):
        self.publish()
        for reader in self.readers:
            for _ in range(1_000):
                if self.rng.random() < 0.1:
                    self.deliver(1)
                if reader.act():
                    continue
                if reader.core.ended:
                    break
                self.server.now = max(self.server.now, reader.core.wake_at)
            assert reader.core.ended, "the tail does not end"
            self.check(reader, reason.decode())

    def check(self, reader, reason):
        *items, end = reader.items
        assert end == End(reason)
        lossy = self.loses_group or self.supersedes
        got, place = {}, 0
        for item in items:
            if isinstance(item, Gap):
                # Nothing is ever trimmed here, so frames that are void are all that is told of.
                assert lossy
                assert item.reason in ("cursor_ahead", "rewritten")
                place = item.next_sequence - 1
                got = {sequence: frame for sequence, frame in got.items() if sequence <= place}
            else:
                assert item.sequence > place, "a frame twice, or out of order"
                place = item.sequence
                got[place] = (item.stream_id, item.payload)
        wanted = {
            sequence: (stream_id, payload)
            for sequence, (stream_id, payload, durable) in self.server.frames.items()
            if durable or not reader.core.exclude
        }
        assert got == wanted


@pytest.mark.parametrize("part", range(4))
def test_every_reader_gets_every_frame_once(part):
    with pytest.MonkeyPatch.context() as patch:
        for seed in range(part * 400, part * 400 + 400):
            try:
                Case(seed, patch).run()
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise


@pytest.mark.parametrize("how", ["loses_group", "supersedes"])
def test_frames_that_are_never_stored_are_told_as_a_gap(how):
    with pytest.MonkeyPatch.context() as patch:
        for seed in range(600):
            try:
                Case(seed, patch, **{how: True}).run()
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise

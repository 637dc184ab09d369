"""Whatever becomes of an execution, its follower gets every attempt and every frame once, in order, and one end.

The lives are random, by a seed. The follower is driven by hand, and hears of some moves and not of others.
"""

import random

import pytest

from ff_fast import (
    AttemptStarted,
    End,
    FailureClass,
    ResumeCondition,
    RetryPolicy,
    StreamFrame,
    StreamMode,
    WaitpointKind,
    WaitpointSpec,
    keys,
)
from ff_fast._core import ops
from ff_fast._core.follow import FollowCore
from ff_fast.errors import LeaseExpired

from ..shells import KINDS, Reading
from .executions import World
from .readers import BEST_EFFORT, Stepper

LIVES = 48


class Life:
    """An execution, and what its followers should have got so far."""

    def __init__(self, world, seed):
        self.world = world
        self.chance = random.Random(seed)
        self.wanted = []
        self.eid = world.create(retry=RetryPolicy(9, delay=0, max_reclaims=9), deadline=600)
        self.handle = None
        self.resume = None
        self.given_back = False
        self.written = 0

    @property
    def state(self):
        return self.world.state(self.eid)

    def move(self):
        """Let something happen; return whether the execution has ended."""
        state = self.state
        doings = {
            "waiting": [self.claim] * 5 + [self.cancel],
            "delayed": [self.due] * 5 + [self.cancel],
            "suspended": [self.signal] * 5 + [self.cancel],
            "active": [
                *[self.write] * 6, self.fail, self.lose, *[self.take_over] * 3, self.delay, self.suspend,
                *[self.give_back] * 3, self.complete, self.cancel,
            ],
        }  # fmt: skip
        try:
            self.chance.choice(doings[state])()
        except LeaseExpired:
            self.lose()
        return self.state in ("completed", "failed", "cancelled", "expired")

    def claim(self):
        self.claimed(self.world.claim())

    def claimed(self, handle):
        self.handle = handle
        if not self.wanted or not any(item == handle.attempt_index for item in self.wanted):
            self.wanted.append(handle.attempt_index)

    def write(self):
        mode = self.chance.choice((StreamMode.durable(), BEST_EFFORT))
        with self.world.backend.open_writer(self.handle, mode=mode) as writer:
            for _ in range(self.chance.randint(1, 4)):
                self.written += 1
                writer.write(f"frame {self.written}")
                self.wanted.append(f"frame {self.written}")

    def fail(self):
        self.world.backend.fail(self.handle, "no luck", FailureClass.TRANSIENT)

    def lose(self):
        self.world.fire(self.eid, "lease")

    def take_over(self):
        self.world.due(self.eid, "lease")
        if self.chance.random() < 0.5:
            # Nobody has noticed yet.
            return
        tokens = self.world.backend.find_reclaimable(10_000)
        token = next(each for each in tokens if each.grant.execution_id == self.eid)
        op = ops.claim_execution(
            self.eid,
            lane=token.grant.lane_id,
            worker_id="w",
            worker_instance_id="w-2",
            lease_id=keys.new_uuid(),
            lease_ttl_ms=30_000,
            attempt_id=keys.new_uuid(),
            reclaim=True,
            capabilities=(),
        )
        handle, _ = self.world.call(op)
        if handle is not None:
            self.claimed(handle)

    def delay(self):
        self.world.backend.delay(self.handle, 60)

    def due(self):
        self.world.fire(self.eid, "delay")

    def suspend(self):
        point = self.world.backend.create_waitpoint(self.handle)
        spec = WaitpointSpec(WaitpointKind.SIGNAL_NAME, b"go", point.hmac_token)
        self.world.backend.suspend(self.handle, ResumeCondition.any(spec))
        self.resume = point

    def signal(self):
        self.world.backend.deliver_signal(self.eid, self.resume, "go")

    def give_back(self):
        lease_id = self.handle.fields().lease_id
        self.world.call(ops.give_back(keys.partition_index(self.eid), lease_id))

    def complete(self):
        self.world.backend.complete(self.handle)

    def cancel(self):
        self.world.backend.cancel(self.eid)

    def whole(self):
        """What everybody gets who reads it from now on, without the end."""
        count = int(self.world.core(self.eid)["total_attempt_count"])
        return [item for item in self.wanted if isinstance(item, str) or item < count]


class Follower(Stepper):
    """A follower that is driven by hand."""

    def __init__(self, raw, *given, **options):
        super().__init__(raw, FollowCore(*given, **options))

    def look(self):
        """Ask until there is nothing to be asked."""
        self.core.part.due = True
        while not self.core.ended and self.core.part.due:
            step = self.core.step()
            assert step is not None
            self.items += self.core.receive(self._ask(step))

    @property
    def got(self):
        return short(self.items)


class Following(Reading):
    """A follower in a thread of its own."""

    def __init__(self, kind, url, eid):
        self._eid = eid
        super().__init__(kind, url)

    def open(self):
        return self.backend.follow(self._eid)


def short(items):
    """Payloads of frames, and numbers of attempts."""
    return [
        item.payload.decode() if isinstance(item, StreamFrame) else item.attempt_index
        for item in items
        if isinstance(item, StreamFrame | AttemptStarted)
    ]


@pytest.fixture
def world(server, raw, lane):
    with World(server.url, raw, lane) as world:
        yield world


def without_loss(life, got):
    """What a live follower got, without the start of a last attempt that was given back before its first frame."""
    whole = life.whole()
    if len(got) == len(whole) + 1 and isinstance(got[-1], int) and got[-1] in life.wanted:
        return got[:-1]
    return got


@pytest.mark.parametrize("seed", range(LIVES))
def test_a_follower_gets_everything_once(world, raw, seed):
    life = Life(world, seed)
    live = Follower(raw, life.eid, None)
    followers = [live]
    for move in range(40):
        if move == 39:
            world.backend.cancel(life.eid)
        ended = move == 39 or life.move()
        for follower in followers:
            if ended or life.chance.random() < 0.5:
                follower.look()
        if life.chance.random() < 0.15 and live.items:
            # Another process goes on where this one is.
            again = Follower(raw, life.eid, live.items[-1].cursor)
            again.items = list(live.items)
            followers.append(again)
        if ended:
            break
    whole = life.whole()
    for follower in followers:
        assert without_loss(life, follower.got) == whole
        (end,) = [item for item in follower.items if isinstance(item, End)]
        assert end is follower.items[-1]
        assert end.outcome == world.core(life.eid)["outcome"]
        assert end == live.items[-1]
    late = Follower(raw, life.eid, None)
    late.look()
    assert late.got == whole
    assert late.items[-1] == live.items[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_so_does_one_whose_connection_is_lost_again_and_again(world, server, raw, kind, seed):
    life = Life(world, 1_000 + seed)
    follower = Following(kind, server.url, life.eid)
    for _ in range(30):
        if life.move():
            break
        if life.chance.random() < 0.3:
            for each in raw.client_list():
                if each["name"] == "ff_fast:readers":
                    raw.client_kill_filter(_id=each["id"])
    else:
        world.backend.cancel(life.eid)
    items = follower.result()
    assert without_loss(life, short(items)) == life.whole()
    assert [item for item in items if isinstance(item, End)] == [items[-1]]
    assert items[-1].outcome == world.core(life.eid)["outcome"]

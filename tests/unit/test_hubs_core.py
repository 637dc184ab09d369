"""Wherever slots move and nodes die, in whatever order their hubs hear of it: every channel ends up at the node that has
its slot, and every listener knows when it may have missed something."""

import random

import pytest

from ff_fast import keys
from ff_fast._core.hub import HubsCore
from ff_fast._core.topology import Address, Topology
from ff_fast.errors import PermissionDenied, Redirected, Unavailable
from ff_fast.types import BackendRetry

NODES = [Address("node", port) for port in (1, 2, 3)]
CHANNELS = [b"{%d}" % n for n in range(5)]


class Listener:
    def __init__(self):
        self.doubts = []
        self.messages = []
        self.errors = []

    def told(self, message):
        self.messages.append(message)

    def doubt(self, subscribed):
        self.doubts.append(subscribed)

    def failed(self, error):
        self.errors.append(error)


class Site:
    """The channels of a backend, and a cluster whose hubs hear of everything some time later."""

    def __init__(self, chance, retries=1000):
        self.chance = chance
        self.now = 0.0
        self.woken = 0
        self.owners = {name: chance.choice(NODES) for name in CHANNELS}
        self.topology = Topology()
        self.learn()
        # What each hub listens to: by node and channel, the seat and whether the node has confirmed it.
        self.seats = {}
        self.core = HubsCore(
            self.topology,
            BackendRetry(number_of_retries=retries),
            self.listen_at,
            self.unlisten_at,
            self.wake,
        )
        self.listeners = {name: [] for name in CHANNELS}

    def learn(self, _=None):
        slots = [
            [keys.key_slot(name), keys.key_slot(name), [owner.host.encode(), owner.port]]
            for name, owner in self.owners.items()
        ]
        self.topology.learn(slots, NODES[0])

    def wake(self):
        self.woken += 1

    def listen_at(self, address, name, seat):
        self.seats[address, name] = [seat, False]

    def unlisten_at(self, address, name, seat):
        if self.seats.get((address, name), [None])[0] is seat:
            del self.seats[address, name]

    def join(self, name):
        listener = Listener()
        self.listeners[name].append(listener)
        self.core.listen(name, listener, self.now)

    def leave(self, name):
        if self.listeners[name]:
            self.core.unlisten(name, self.listeners[name].pop(0), self.now)

    def move(self, name):
        self.owners[name] = self.chance.choice(NODES)

    def serve(self, _=None):
        """Let the nodes answer the hubs, as far as they have not."""
        for (address, name), entry in list(self.seats.items()):
            seat, confirmed = entry
            if self.owners[name] == address:
                if not confirmed:
                    entry[1] = True
                    seat.doubt(True)
                continue
            if confirmed:
                entry[1] = False
                seat.doubt(False)
            del self.seats[address, name]
            owner = self.owners[name]
            seat.failed(Redirected(ask=False, slot=keys.key_slot(name), address=str(owner)))

    def die(self, name):
        """A connection is lost, and cannot be made again at once."""
        address = self.owners[name]
        for (at, channel), (seat, _) in list(self.seats.items()):
            if at == address:
                del self.seats[at, channel]
                seat.failed(Unavailable())

    def kill(self, name):
        """A node is gone; others take over its channels."""
        gone = self.owners[name]
        self.die(name)
        for channel, owner in self.owners.items():
            if owner == gone:
                self.owners[channel] = self.chance.choice([each for each in NODES if each != gone])

    def settle(self, _=None):
        self.core.settle(self.now)

    def publish(self, name, message):
        seat, confirmed = self.seats.get((self.owners[name], name), (None, False))
        if confirmed:
            seat.told(message)


@pytest.mark.parametrize("part", range(4))
def test_every_channel_ends_up_where_its_slot_is(part):
    for seed in range(50 * part, 50 * part + 50):
        chance = random.Random(seed)
        site = Site(chance)
        doings = [
            *[site.join] * 4, *[site.leave] * 2, *[site.move] * 2, *[site.serve] * 4, site.die, site.kill,
            site.learn, *[site.settle] * 4,
        ]  # fmt: skip
        for _ in range(120):
            site.now += chance.random()
            chance.choice(doings)(chance.choice(CHANNELS))
        for _ in range(10):
            site.now += 5
            site.learn()
            site.settle()
            site.serve()
        again_at = site.core.settle(site.now)
        assert again_at is None, seed
        wanted = {(site.owners[name], name) for name in CHANNELS if site.listeners[name]}
        assert set(site.seats) == wanted, seed
        for name in CHANNELS:
            site.publish(name, b"last")
            for listener in site.listeners[name]:
                assert listener.doubts[-1] is True, seed
                assert listener.messages == [b"last"], seed
                assert listener.errors == [], seed


def test_what_a_former_node_still_tells_reaches_nobody():
    site = Site(random.Random(1))
    (name, *_) = CHANNELS
    site.join(name)
    site.serve()
    (listener,) = site.listeners[name]
    former = site.seats[site.owners[name], name][0]
    site.owners[name] = next(each for each in NODES if each != site.owners[name])
    site.learn()
    site.settle()
    assert listener.doubts == [True, False]
    former.told(b"late")
    former.doubt(False)
    former.failed(Unavailable())
    site.settle()
    site.serve()
    assert (listener.doubts, listener.messages, listener.errors) == ([True, False, True], [], [])


def test_a_channel_that_cannot_be_had_fails_its_own_listeners_alone():
    site = Site(random.Random(1), retries=2)
    denied, other = CHANNELS[:2]
    site.join(denied)
    site.join(other)
    site.serve()
    site.seats[site.owners[denied], denied][0].failed(PermissionDenied())
    site.settle()
    assert [type(each) for each in site.listeners[denied][0].errors] == [PermissionDenied]
    assert site.core.confirmed(other)
    assert not site.core.confirmed(denied)
    assert site.listeners[other][0].errors == []
    for _ in range(3):
        assert site.listeners[other][0].errors == []
        site.seats.pop((site.owners[other], other))[0].failed(Unavailable())
        site.settle()
        site.now += 60
        site.settle()
    assert [type(each) for each in site.listeners[other][0].errors] == [Unavailable]


def test_channels_move_as_soon_as_anybody_has_learned_the_topology():
    site = Site(random.Random(1))
    name = CHANNELS[0]
    site.join(name)
    site.serve()
    site.settle()
    (listener,) = site.listeners[name]
    owner = site.owners[name] = next(each for each in NODES if each != site.owners[name])
    woken = site.woken
    site.learn()
    assert site.woken == woken + 1
    site.settle()
    assert listener.doubts == [True, False]
    site.serve()
    assert (owner, name) in site.seats
    assert listener.doubts == [True, False, True]

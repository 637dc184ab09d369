"""Whatever listeners, refusals and losses come in whatever order, every listener has its channel or an error, and the
server no other channels."""

import random
from collections import deque

import pytest

from ff_fast._core import hub as hub_core
from ff_fast._core.hub import HubCore
from ff_fast.errors import NotPrimary

REFUSAL = "NOPERM this user has no permissions to access one of the channels used as arguments"


class Listener:
    def __init__(self):
        self.subscribed = None
        self.error = None

    def told(self, message):
        """Nothing is published here."""

    def doubt(self, subscribed):
        self.subscribed = subscribed

    def failed(self, error):
        self.error = error


class Connection:
    """A hub, and a server whose answers are on their way for some time."""

    def __init__(self, chance):
        self.core = HubCore()
        self.chance = chance
        self.now = 0.0
        self.channels = [b"%d" % i for i in range(chance.choice((1, 2, 6)))]
        self.listeners = {name: [] for name in self.channels}
        self.denied = {name for name in self.channels if chance.random() < 0.3}
        self.subscribed = set()
        self.sent, self.answers = deque(), deque()

    def join(self, name):
        listener = Listener()
        self.listeners[name].append(listener)
        self.core.listen(name, listener)

    def leave(self, name):
        if self.listeners[name]:
            self.core.unlisten(name, self.listeners[name].pop(), self.now)

    def send(self, _=None):
        for asked in self.core.requests(self.now):
            self.sent.append((asked.kind, list(asked.channels)))

    def serve(self, _=None):
        if not self.sent:
            return
        kind, names = self.sent.popleft()
        if kind == b"ssubscribe" and self.denied.intersection(names):
            self.answers.append(Exception(REFUSAL))
            return
        for name in names:
            (self.subscribed.add if kind == b"ssubscribe" else self.subscribed.discard)(name)
            self.answers.append([kind, name, 1])

    def answer(self, _=None):
        if not self.answers:
            return
        answer = self.answers.popleft()
        if isinstance(answer, Exception):
            assert self.core.refused(answer) is None
        else:
            self.core.received(answer, due=True)
        for name, listeners in self.listeners.items():
            self.listeners[name] = [each for each in listeners if each.error is None]

    def lose(self, _=None):
        self.sent.clear()
        self.answers.clear()
        self.subscribed.clear()
        self.core.lost()

    def change_rights(self, name):
        self.denied ^= {name}

    def end(self, name):
        """The server ends a subscription by itself."""
        if name in self.subscribed and not (self.sent or self.answers):
            self.subscribed.discard(name)
            self.answers.append([b"sunsubscribe", name, 0])

    def settle(self):
        for _ in range(4):
            self.now += 2 * hub_core.LINGER_S
            self.send()
            while self.sent:
                self.serve()
            while self.answers:
                self.answer()


@pytest.mark.parametrize("part", range(4))
def test_every_listener_has_its_channel_or_an_error(part, monkeypatch):
    for seed in range(50 * part, 50 * part + 50):
        chance = random.Random(seed)
        monkeypatch.setattr(hub_core, "MOST_CHANNELS", chance.choice((2, 256)))
        it = Connection(chance)
        doings = [
            *[it.join] * 6, *[it.leave] * 6, *[it.send] * 4, *[it.serve] * 4, *[it.answer] * 5, it.lose,
            it.change_rights, it.end,
        ]  # fmt: skip
        for _ in range(150):
            it.now += chance.random() / 2
            chance.choice(doings)(chance.choice(it.channels))
        it.settle()
        wanted = {name for name, listeners in it.listeners.items() if listeners}
        assert it.subscribed == wanted, seed
        for name, listeners in it.listeners.items():
            assert it.core.confirmed(name) == (name in wanted), seed
            assert all(each.subscribed for each in listeners), seed
        assert it.core.empty == (not wanted), seed


def test_a_channel_that_the_server_ends_answers_no_request_whose_turn_has_not_come():
    core = HubCore()
    listener = Listener()
    core.listen(b"c", listener)
    core.requests(0.0)
    assert core.received([b"ssubscribe", b"c", 1], due=True) is not None
    core.unlisten(b"c", listener, 0.0)
    (asked,) = core.requests(60.0)
    assert asked.kind == b"sunsubscribe"
    # The slot has moved, and replies to what was sent before that request are owed.
    assert core.received([b"sunsubscribe", b"c", 0], due=False) is None
    assert core.received([b"sunsubscribe", b"c", 0], due=True) is asked


REPLICA, PRIMARY = {b"role": b"replica"}, [b"version", b"9.1.0", b"role", b"master"]


def test_a_replica_of_a_cluster_is_of_no_use():
    core = HubCore(by_slot=True)
    assert isinstance(core.opened(REPLICA), NotPrimary)
    assert core.opened(PRIMARY) is None
    assert core.heard(PRIMARY) is None
    assert isinstance(core.heard(REPLICA), NotPrimary)


def test_a_server_that_was_a_replica_from_the_beginning_stays():
    core = HubCore()
    assert core.opened(REPLICA) is None
    assert core.heard(REPLICA) is core.heard(PRIMARY) is core.heard(b"OK") is None


def test_a_server_that_ends_a_subscription_is_asked_for_its_role():
    core = HubCore(by_slot=True)
    assert core.opened(PRIMARY) is None
    core.listen(b"a", Listener())
    core.requests(0.0)
    core.received([b"ssubscribe", b"a", 1], due=True)
    assert not core.doubts_role
    core.received([b"sunsubscribe", b"a", 0], due=False)
    assert core.doubts_role


def test_a_subscription_that_a_node_ends_as_it_is_asked_to_may_be_refused_behind_that():
    """The refusal is no answer to what was asked for next."""
    core = HubCore(by_slot=True)
    listener = Listener()
    core.listen(b"{a}", listener)
    core.requests(0.0)
    core.received([b"ssubscribe", b"{a}", 1], due=True)
    core.unlisten(b"{a}", listener, 0.0)
    core.listen(b"{b}", listener)
    ended, ping, begun = core.requests(hub_core.LINGER_S)
    assert (ended.kind, ping, begun.kind) == (b"sunsubscribe", None, b"ssubscribe")
    assert core.received([b"sunsubscribe", b"{a}", 0], due=True) is ended
    assert core.late(Exception("MOVED 15495 127.0.0.1:6380"))
    assert not core.late(PRIMARY)
    assert not HubCore().late(Exception("MOVED 15495 127.0.0.1:6380"))
    assert core.received([b"ssubscribe", b"{b}", 1], due=True) is begun
    assert core.confirmed(b"{b}")

"""The leases that a backend keeps, and what it hears of them: no server, no thread, no time that passes."""

import logging
from types import SimpleNamespace

import pytest

from ff_fast import errors
from ff_fast._core import leases
from ff_fast._core.leases import KeptLeases, LeaseClock

CHANNEL = b"ff:part:{fp:1}:leases"
LEASE = b"{fp:1}:550e8400-e29b-41d4-a716-446655440000 0"
OTHER = b"{fp:1}:550e8400-e29b-41d4-a716-446655440001 0"
DENIED = errors.PermissionDenied()


class Keeper:
    """Notes what it is told."""

    def __init__(self):
        self.told = []

    def _ask_to_stop(self):
        self.told.append("stop")

    def _renew_soon(self):
        self.told.append("renew")


class Hub:
    """Notes what it is asked for; confirms, or fails, within ``listen`` if it is told to."""

    def __init__(self):
        self.listeners = {}
        self.asked = []
        self.answer = None

    def listen(self, channel, listener):
        self.asked.append(("listen", channel))
        if isinstance(self.answer, errors.FFError):
            listener.failed(self.answer)
            return
        self.listeners[channel] = listener
        if self.answer:
            listener.doubt(True)

    def unlisten(self, channel, listener):
        assert self.listeners.pop(channel) is listener
        self.asked.append(("unlisten", channel))


class Kept:
    """`KeptLeases` with a hub, a clock and timers that the test moves."""

    def __init__(self, monkeypatch):
        self.hub = Hub()
        self.now = 1000.0
        self.timers = []
        monkeypatch.setattr(leases.time, "monotonic", lambda: self.now)
        self.leases = KeptLeases(self.hub, self._later)

    def _later(self, seconds, call):
        timer = [self.now + seconds, call]
        self.timers.append(timer)
        return SimpleNamespace(cancel=lambda: self.timers.remove(timer))

    def keep(self, lease=LEASE, channel=CHANNEL):
        keeper = Keeper()
        self.leases.add(channel, lease, keeper)
        return keeper

    def push(self, what, lease=LEASE):
        self.hub.listeners[CHANNEL].told(what + b" " + lease)

    def pass_s(self, seconds):
        self.now += seconds
        for timer in [each for each in self.timers if each[0] <= self.now]:
            self.timers.remove(timer)
            timer[1]()


@pytest.fixture
def kept(monkeypatch):
    return Kept(monkeypatch)


def test_a_push_reaches_the_keepers_of_its_lease_and_no_other(kept):
    ours, twin, other = kept.keep(), kept.keep(), kept.keep(OTHER)
    kept.push(b"cancel")
    assert (ours.told, twin.told, other.told) == (["stop"], ["stop"], [])
    # Whether it is lost, the server says.
    kept.push(b"lost", OTHER)
    kept.push(b"unheard-of", OTHER)
    assert other.told == ["renew", "renew"]
    kept.leases.remove(CHANNEL, LEASE, ours)
    kept.push(b"lost")
    assert (ours.told, twin.told) == (["stop"], ["stop", "renew"])


def test_each_confirmed_subscription_renews_once_and_a_lost_one_does_not(kept):
    keeper = kept.keep()
    kept.hub.listeners[CHANNEL].doubt(True)
    kept.hub.listeners[CHANNEL].doubt(False)
    kept.hub.listeners[CHANNEL].doubt(True)
    assert keeper.told == ["renew", "renew"]


def test_a_push_that_overtakes_the_answer_of_the_claim_is_not_lost(kept):
    kept.keep()
    kept.push(b"cancel", OTHER)
    assert kept.keep(OTHER).told == ["renew"]
    # They are remembered for a while, and not without bound.
    for index in range(leases._MOST_UNKNOWN):
        kept.push(b"cancel", b"%d" % index)
    assert kept.keep(OTHER).told == []


def test_short_executions_share_one_subscription_which_ends_a_minute_after_the_last(kept):
    for _ in range(100):
        keeper = kept.keep()
        kept.leases.remove(CHANNEL, LEASE, keeper)
        kept.leases.remove(CHANNEL, LEASE, keeper)
    assert kept.hub.asked == [("listen", CHANNEL)]
    assert len(kept.timers) == 1
    kept.pass_s(59)
    last = kept.keep()
    kept.pass_s(60)
    assert kept.hub.asked == [("listen", CHANNEL)]
    kept.leases.remove(CHANNEL, LEASE, last)
    kept.pass_s(60)
    kept.pass_s(60)
    assert kept.hub.asked == [("listen", CHANNEL), ("unlisten", CHANNEL)]
    assert (kept.hub.listeners, kept.timers) == ({}, [])
    # And begins again.
    kept.keep()
    assert kept.hub.asked[2:] == [("listen", CHANNEL)]


def test_a_confirmation_within_listen_renews(kept):
    kept.hub.answer = True
    assert kept.keep().told == ["renew"]


def test_a_subscription_that_fails_is_said_once_and_tried_again_a_minute_later(kept, caplog):
    kept.hub.answer = DENIED
    with caplog.at_level(logging.WARNING, "ff_fast"):
        long = kept.keep()
        # Short executions do not try one by one.
        for index in range(5):
            channel = b"ff:part:{fp:%d}:leases" % (index + 2)
            kept.leases.remove(channel, OTHER, kept.keep(OTHER, channel))
    assert len(kept.hub.asked) == 1
    (said,) = caplog.messages
    assert said.endswith(str(DENIED))
    kept.hub.answer = True
    kept.pass_s(60)
    assert long.told == ["renew"]
    kept.pass_s(60)
    assert kept.timers == []
    assert list(kept.hub.listeners) == [CHANNEL]


def test_a_closed_backend_forgets_its_leases_and_has_no_timer_left(kept):
    keeper, gone = kept.keep(), kept.keep(OTHER)
    kept.leases.remove(CHANNEL, OTHER, gone)
    other = kept.keep(OTHER, b"another")
    kept.leases.remove(b"another", OTHER, other)
    assert kept.leases.close() == [keeper]
    assert kept.timers == []
    kept.leases.remove(CHANNEL, LEASE, keeper)
    assert kept.leases.close() == []


def test_a_lease_of_a_later_attempt_is_renewed_at_once():
    assert LeaseClock(30_000).wait_s == 10
    clock = LeaseClock(30_000, soon=True)
    assert clock.wait_s == 0
    clock.renewed()
    assert clock.wait_s == 10

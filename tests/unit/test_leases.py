"""When a lease is renewed, and which errors say that it is gone."""

import types

import pytest

from ff_fast import errors
from ff_fast._core import leases
from ff_fast._core.leases import LeaseClock, is_lease_lost

AWAY = errors.Unavailable()
STALE = errors.StaleOwner()


@pytest.fixture
def clock(monkeypatch):
    running = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(leases, "time", types.SimpleNamespace(monotonic=lambda: running.now))
    return running


def test_a_lease_is_renewed_when_a_third_of_it_has_passed(clock):
    one = LeaseClock(30_000)
    assert one.wait_s == pytest.approx(10)
    assert one.held_until == 1030
    # An age: no wait is longer than an hour.
    assert LeaseClock(2**48).wait_s == 3600


def test_a_renewal_counts_from_when_it_was_sent(clock):
    one = LeaseClock(30_000)
    clock.now += 10
    one.sending()
    clock.now += 5
    one.renewed()
    assert one.held_until == 1040
    assert one.wait_s == pytest.approx(10)


def test_a_renewal_that_failed_is_tried_again_soon_until_the_lease_lapses(clock):
    one = LeaseClock(30_000)
    clock.now += 10
    one.sending()
    assert one.failed(AWAY) is None
    assert one.wait_s == pytest.approx(2.5)
    assert one.held
    clock.now = 1030
    assert not one.held
    assert isinstance(one.failed(AWAY), errors.LeaseExpired)


@pytest.mark.parametrize("error", [STALE, errors.PermissionDenied()])
def test_a_refusal_is_the_end_of_the_lease(clock, error):
    assert LeaseClock(30_000).failed(error) is error


def test_which_errors_say_that_a_lease_is_gone(subtests):
    for error, lost in (
        (STALE, True),
        (errors.LeaseExpired(), True),
        (errors.ExecutionNotActive(), True),
        (errors.ExecutionNotFound(), True),
        (errors.StreamClosed(), True),
        (errors.ExecutionSuspended(), True),
        (errors.WriterSuperseded(), True),
        (AWAY, False),
        (errors.OutcomeUnknown(), False),
        (errors.PermissionDenied(), False),
        (errors.PayloadTooLarge(1, 2), False),
    ):
        with subtests.test(f"{error!r:.60}"):
            assert is_lease_lost(error) is lost

"""What a backend knows to be stored."""

from ff_fast._core import places
from ff_fast._core.places import Places


def test_the_newest_frame_is_known():
    known = Places()
    assert known.last_id("lease") == b""
    place = known.open("lease")
    assert known.open("lease") is place
    assert known.last_id("lease") == b""
    place.opened(5, 3)
    place.opened(4, 2)
    assert known.last_id("lease") == b"5-3"
    # Later writers of the lease go on, perhaps from an earlier frame.
    place.opened(6, 3)
    assert known.last_id("lease") == b"6-3"


def test_a_caller_may_know_more():
    known = Places()
    known.open("lease").opened(5, 3)
    assert known.last_id("lease", 3) == b"5-3"
    assert known.last_id("lease", 2) == b"5-3"
    assert known.last_id("lease", 4) == b"0-4"
    assert known.last_id("other", 4) == b"0-4"
    assert known.last_id("other", 0) == b""


def test_what_was_confirmed_need_not_be_asked_for():
    known = Places()
    place = known.open("lease")
    place.opened(5, 3)
    known.confirm("lease")
    known.confirm("other")
    assert (place.checked, len(known)) == (3, 1)
    known.forget("lease")
    known.forget("lease")
    assert (known.last_id("lease"), len(known)) == (b"", 0)


def test_after_a_loss_was_told_a_writer_goes_on_from_what_is_stored():
    known = Places()
    place = known.open("lease")
    place.opened(5, 9)
    known.tell("other")
    place.opened(5, 3)
    assert known.last_id("lease") == b"5-9"
    known.tell("lease")
    assert known.last_id("lease") == b"5-9"
    place.opened(5, 3)
    place.opened(5, 2)
    assert known.last_id("lease") == b"5-3"


def test_leases_that_nobody_ends_are_forgotten(monkeypatch):
    monkeypatch.setattr(places, "MAX_PLACES", 2)
    known = Places()
    for lease in "abc":
        known.open(lease).opened(1, 1)
    assert [known.last_id(lease) for lease in "abc"] == [b"", b"1-1", b"1-1"]


def test_the_last_frame_of_a_released_lease_stays_known_for_a_while(monkeypatch):
    monkeypatch.setattr(places, "MAX_RELEASED", 2)
    known = Places(60_000, 4096)
    for lease in "abc":
        known.open(lease).opened(5, 3)
        known.release(lease)
        known.release(lease)
    known.open("unused")
    known.release("unused")
    assert [known.last_id(lease) for lease in "abc"] == [b"", b"5-3", b"5-3"]
    assert (known.last_id("unused"), len(known)) == (b"", 0)
    # A writer that is opened because the release was lost goes on from there.
    assert known.open("b").sequence == 3
    known.forget("c")
    assert known.last_id("c") == b""


def test_a_failover_that_loses_frames_of_every_stream_is_one_line(caplog):
    known = Places()
    for number in range(50):
        known.open(f"lease {number}").lose(1, 9)
    assert len(caplog.messages) == 1

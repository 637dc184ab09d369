"""What the tests of this folder write, and proof of what was stored."""

import ff_fast


async def claimed(backend, lane, lease_ttl_ms=600_000):
    """A new execution of *lane*, claimed: its id and the handle."""
    eid = await backend.create_execution(lane=lane)
    handle = await backend.claim(
        lane=lane, worker_id="w", worker_instance_id="w-1", lease_ttl_ms=lease_ttl_ms
    )
    assert handle is not None
    return eid, handle


def frames(url, eid):
    """Every frame that the server holds of an attempt, past any proxy; no gap may be among them."""
    with ff_fast.ValkeyBackend.connect(url) as backend:
        found, after = [], None
        while page := backend.read_stream(eid, 0, after=after, count=10_000):
            assert not page.gaps
            found += page
            after = page.cursor
        return found


def stored_once(url, eid, payloads):
    """Assert that exactly *payloads* are stored, in order, from sequence 1."""
    found = frames(url, eid)
    assert [frame.sequence for frame in found] == list(range(1, len(payloads) + 1))
    assert [frame.payload for frame in found] == payloads

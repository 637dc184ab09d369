"""Every key that the library makes on a server is in the table of ``ff_fast.keys``, with its type."""

import pytest

from ff_fast import (
    CapabilitySet,
    FailureClass,
    ResumeCondition,
    StreamMode,
    UsageDimensions,
    WaitpointKind,
    WaitpointSpec,
    keys,
)
from ff_fast._core import ops
from ff_fast._core.operations import Call
from ff_fast.embedded import EmbeddedServer

from ..conftest import connect_raw
from ..key_table import TABLE, row_of
from .executions import World


@pytest.fixture
def world(lane):
    """A world on a server of its own, so every key there is one of the test's."""
    with (
        EmbeddedServer() as server,
        connect_raw(server.url) as raw,
        World(server.url, raw, lane) as world,
    ):
        yield world


def test_every_key_of_a_full_lifecycle_is_in_the_table(world):
    seen = {}

    def look():
        for key in world.raw.scan_iter():
            seen[key.decode()] = world.raw.type(key).decode()

    backend = world.backend
    flow = world.create_flow()
    backend.create_budget("b-1", hard={"input_tokens": 100})
    eid, handle = world.owned(
        flow_id=flow, payload=b"in", tags={"a.b": "c"}, budgets=["b-1"], deadline=60
    )
    with backend.open_writer(handle) as writer:
        writer.write(b"durable")
        writer.write(b"live", mode=StreamMode.best_effort_live(5_000))
        writer.write(b'{"a":1}', mode=StreamMode.durable_summary())
    backend.report_usage(handle, UsageDimensions(1, 2, dedup_key="report-1"))
    backend.report_usage(handle, UsageDimensions(1, 2))
    point = backend.create_waitpoint(handle)
    backend.deliver_signal(eid, point, "early", idempotency_key="once", payload=b"p")
    look()
    other = backend.create_waitpoint(handle)
    leaves = [
        WaitpointSpec(WaitpointKind.EXTERNAL, b"", each.hmac_token) for each in (point, other)
    ]
    backend.suspend(handle, ResumeCondition(tuple(leaves), 2))
    look()
    backend.deliver_signal(eid, other, "go")
    handle = world.claim()
    child = world.create(flow_id=flow, parent_id=eid)
    backend.wait_children(handle)
    look()
    backend.fail(world.claim(), "broken", FailureClass.PERMANENT)
    backend.complete(world.claim(), b"out")
    gpu = CapabilitySet(["gpu"])
    needy = world.create(required_capabilities=gpu)
    look()
    backend.complete(backend.claim(lane=world.lane, capabilities=gpu))
    waiting = world.create(flow_id=flow)
    look()
    backend.cancel_flow(flow)
    look()
    task = ops.TaskName("{fp:0}", keys.new_uuid())
    for op in (
        ops.save_task(task, "0" * 40, 0, "", "save-1", 60_000, b"d", b"e"),
        ops.note_task("0" * 40, "t", 1, 5, "2", "-", 60_000),
    ):
        backend._do(Call(lambda op=op: ops.call(op)))
    # Written before a wait for replicas.
    world.raw.set(keys.written("{fp:0}"), 1)
    world.raw.set(keys.PARTITIONS_CONFIG, 256)
    # By whoever supervises.
    world.raw.set(keys.supervisor(), "host-1")
    look()

    assert world.state(needy) == "completed"
    assert {world.state(each) for each in (eid, child, waiting)} == {
        "completed", "failed", "cancelled",
    }  # fmt: skip
    for key, kind in seen.items():
        assert row_of(key).type == kind, key
    unseen = {name for name, row in TABLE.items() if row not in map(row_of, seen)}
    assert unseen == set()

"""Subscriptions to the executions that end: nothing is missed and nothing comes twice, whatever happens in between."""

import subprocess
import sys
import time

import pytest

import ff_fast
from ff_fast import (
    CancelFlowPolicy,
    FailureClass,
    ScannerFilter,
    TimeoutBehavior,
    WaitpointKind,
    WaitpointSpec,
    errors,
    keys,
)
from ff_fast.embedded import EmbeddedServer

from ..clock import SteppedServer
from ..conftest import ENGINES, PROMPT, ROOT, connect_raw, second_engine
from ..shells import KINDS, WORKER
from ..waiting import wait_until
from .streams import server_ms
from .workers import Subscription, Supervisor


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def backend(server):
    with ff_fast.ValkeyBackend.connect(server.url) as connected:
        yield connected


@pytest.fixture
def namespace(lane):
    """A namespace that no other test uses."""
    return f"ns-{lane}"


@pytest.fixture
def scope(namespace):
    return ScannerFilter().with_namespace(namespace)


@pytest.fixture
def end(backend, lane, namespace):
    """``end(result)``: an execution of the test's namespace that has completed; returns its id."""

    def complete(result=b"", **options):
        eid = backend.create_execution(lane=lane, **{"namespace": namespace, **options})
        handle = backend.claim(lane=lane, **WORKER)
        assert handle.fields().execution_id == eid
        backend.complete(handle, result)
        return eid

    return complete


def here(raw):
    """A cursor of now, by the server's clock."""
    return f"{server_ms(raw) - 1}-0"


def listening(raw):
    """Connections that listen to completions."""
    return [c for c in raw.client_list() if int(c["ssub"])]


@pytest.mark.cluster
def test_every_way_to_end_is_told_once(kind, server, backend, lane, namespace, scope, raw):
    begun = server_ms(raw)
    subscription = Subscription(kind, server.url, scope, here(raw), count=14)
    expected = {}

    def create(**options):
        return backend.create_execution(lane=lane, namespace=namespace, **options)

    def claimed(**options):
        eid = create(**options)
        return eid, backend.claim(lane=lane, **WORKER)

    flow = backend.create_flow(namespace=namespace)
    with Supervisor("sync", server.url):
        for options in ({}, {"flow_id": flow}):
            eid, handle = claimed(**options)
            backend.complete(handle, b"result")
            expected[eid] = ("success", b"result", options.get("flow_id"))
            eid, handle = claimed(**options)
            backend.fail(handle, "no", FailureClass.PERMANENT)
            expected[eid] = ("failed", None, options.get("flow_id"))
            eid, handle = claimed(**options)
            backend.cancel(eid)
            expected[eid] = ("cancelled", None, options.get("flow_id"))
            eid = create(deadline=0.001, **options)
            expected[eid] = ("expired", None, options.get("flow_id"))
            wait_until(lambda eid=eid: backend.describe(eid).state == "expired")
            eid, _ = claimed(attempt_timeout=0.001, **options)
            expected[eid] = ("expired", None, options.get("flow_id"))
            wait_until(lambda eid=eid: backend.describe(eid).state == "expired")
            eid, handle = claimed(**options)
            waitpoint = backend.create_waitpoint(handle)
            backend.suspend(
                handle,
                WaitpointSpec(
                    kind=WaitpointKind.EXTERNAL, matcher=b"", hmac_token=waitpoint.hmac_token
                ),
                timeout=0.001,
                on_timeout=TimeoutBehavior.FAIL,
            )
            expected[eid] = ("failed", None, options.get("flow_id"))
            wait_until(lambda eid=eid: backend.describe(eid).state == "failed")
        waiting = create(flow_id=flow)
        expected[waiting] = ("cancelled", None, flow)
        delayed = create(flow_id=flow, delay=1000)
        expected[delayed] = ("cancelled", None, flow)
        backend.cancel_flow(flow, CancelFlowPolicy.CANCEL_ALL)
        told = subscription.result()
    assert len(told) == len(expected) == 14
    assert {c.execution_id: (c.outcome, c.payload_bytes, c.flow_id) for c in told} == expected
    ended = server_ms(raw)
    assert all(begun <= c.produced_at_ms <= ended for c in told)


def test_filters_by_namespace_and_tag(kind, server, backend, lane, namespace, scope, end, raw):
    cursor = here(raw)
    alone = end(b"a", tags={"app.user": "ada"})
    other_tag = end(b"b", tags={"app.user": "bob"})
    end(b"c", namespace=f"{namespace}-2", tags={"app.user": "ada"})
    last = end(b"d", tags={"app.user": "ada", "app.more": "x"})

    def told(scope, count):
        return {
            c.execution_id for c in Subscription(kind, server.url, scope, cursor, count).result()
        }

    assert told(scope, 3) == {alone, other_tag, last}
    assert told(scope.with_instance_tag("app.user", "ada"), 2) == {alone, last}
    assert told(scope.with_instance_tag("app.more", "x"), 1) == {last}


def test_a_filter_by_tag_leaves_out_what_is_gone(kind, server, backend, scope, end, raw):
    cursor = here(raw)
    gone = end(b"x", tags={"app.user": "ada"})
    large_and_gone = end(bytes(100_000), tags={"app.user": "ada"})
    raw.delete(keys.core(gone), keys.core(large_and_gone))
    kept = end(b"y", tags={"app.user": "ada"})
    tagged = scope.with_instance_tag("app.user", "ada")
    (told,) = Subscription(kind, server.url, tagged, cursor, 1).result()
    assert told.execution_id == kept
    # Without one, the record says what it can.
    told = Subscription(kind, server.url, scope, cursor, 3).result()
    assert {c.execution_id: c.payload_bytes for c in told} == {
        gone: None,
        large_and_gone: None,
        kept: b"y",
    }


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 3 << 20])
def test_results_of_any_size(kind, server, scope, end, raw, size):
    cursor = here(raw)
    result = bytes(i % 251 for i in range(min(size, 1_000))) * (size // 1_000 + 1)
    end(result[:size])
    (told,) = Subscription(kind, server.url, scope, cursor, 1).result()
    assert told.payload_bytes == (result[:size] or None)


@pytest.mark.cluster
def test_a_cursor_goes_on_without_hole_or_repeat(kind, server, scope, end, raw):
    cursor = here(raw)
    eids = [end(b"%d" % n) for n in range(40)]
    seen = []
    # Now one, now several, across subscriptions of their own; more come in between.
    for count in (1, 2, 7, 13, 1, 16):
        told = Subscription(kind, server.url, scope, cursor, count).result()
        seen += told
        cursor = told[-1].cursor
    assert sorted(c.execution_id for c in seen) == sorted(eids)
    later = [end(b"later") for _ in range(3)]
    told = Subscription(kind, server.url, scope, cursor, 3).result()
    assert sorted(c.execution_id for c in told) == sorted(later)


def test_start_is_all_that_is_kept(kind, server, scope, end):
    eids = [end() for _ in range(3)]
    told = Subscription(kind, server.url, scope, "start", 3).result()
    assert sorted(c.execution_id for c in told) == sorted(eids)


def test_none_begins_now(kind, server, scope, end, raw):
    end(b"before")
    before = server_ms(raw)
    wait_until(lambda: server_ms(raw) > before + 1)
    subscription = Subscription(kind, server.url, scope, None, count=20)
    wait_until(lambda: subscription.begun)
    eids = [end(b"after") for _ in range(20)]
    assert sorted(c.execution_id for c in subscription.result()) == sorted(eids)


def test_a_lost_connection_leaves_no_hole(kind, server, scope, end, raw):
    subscription = Subscription(kind, server.url, scope, here(raw), count=30)
    eids = []
    for _ in range(3):
        wait_until(lambda: listening(raw))
        eids += [end() for _ in range(5)]
        for client in wait_until(lambda: listening(raw)):
            raw.client_kill_filter(_id=client["id"])
        # While it is away.
        eids += [end() for _ in range(5)]
    told = [c.execution_id for c in subscription.result()]
    assert sorted(told) == sorted(eids)


PROGRAM = """
import sys
from ff_fast import ScannerFilter, ValkeyBackend
url, namespace, cursor, count = sys.argv[1:]
with ValkeyBackend.connect(url) as backend:
    for completion in backend.subscribe_completions(ScannerFilter().with_namespace(namespace), after=cursor):
        print(completion.execution_id, completion.cursor, flush=True)
"""


def test_a_cursor_goes_on_in_another_process(server, namespace, end, raw):
    cursor = here(raw)
    eids = [end() for _ in range(12)]
    seen = []
    for count in (1, 4, 7):
        program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, server.url, namespace, cursor, str(count)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(count):
            eid, cursor = program.stdout.readline().split()
            seen.append(eid)
        # In the middle of anything: what it has printed is all that counts.
        program.kill()
        program.communicate(timeout=10)
    assert sorted(seen) == sorted(eids)


def test_closing_the_backend_ends_a_subscription(server, raw):
    import threading

    with ff_fast.ValkeyBackend.connect(server.url) as own:
        ended = []

        def follow():
            try:
                next(own.subscribe_completions(ScannerFilter().with_namespace("nobody's")))
            except errors.FFError as error:
                ended.append(error)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        wait_until(lambda: listening(raw))
        own.close()
        thread.join(10)
    assert ended[0].retryable


def test_a_cursor_whose_successors_are_trimmed_is_refused(
    kind, server, backend, namespace, end, scope, raw
):
    flow = backend.create_flow(namespace=namespace)
    completions = keys.completions(keys.flow_slot_tag(flow, 256))
    before = here(raw)
    eids = [end(flow_id=flow) for _ in range(3)]
    found = Subscription(kind, server.url, scope, before, count=3).result()
    assert [completion.execution_id for completion in found] == eids
    raw.xtrim(completions, maxlen=1, approximate=False)
    for cursor in (before, found[0].cursor):
        with pytest.raises(errors.InvalidCursor):
            Subscription(kind, server.url, scope, cursor, count=1).result()
    eids.append(end(flow_id=flow))
    for cursor, rest in (("start", eids[2:]), (found[2].cursor, eids[3:])):
        again = Subscription(kind, server.url, scope, cursor, count=len(rest)).result()
        assert [completion.execution_id for completion in again] == rest


# -- clocks, retention and what others put there ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ENGINES)
def stepped(request):
    executable = second_engine() if request.param == "redis_server" else None
    with SteppedServer(executable=executable, **PROMPT) as running:
        yield running


@pytest.mark.parametrize("step", [-1, -60, -100_000, 60])
def test_a_step_of_the_servers_clock_loses_nothing(kind, stepped, step, lane, namespace, scope):
    with ff_fast.ValkeyBackend.connect(stepped.url) as backend, connect_raw(stepped.url) as raw:

        def end(count):
            """End executions of several partitions, and of one."""
            flow = backend.create_flow()
            eids = []
            for n in range(count):
                options = {"flow_id": flow} if n % 2 else {}
                eid = backend.create_execution(lane=lane, namespace=namespace, **options)
                backend.complete(backend.claim(lane=lane, lease_ttl_ms=10**9, **WORKER), b"r")
                eids.append(eid)
            return eids

        def told(count, after):
            result = Subscription(kind, stepped.url, scope, after, count).result()
            return [each.execution_id for each in result], result[-1].cursor

        before = end(6)
        _, cursor = told(6, "start")
        waiting = Subscription(kind, stepped.url, scope, None, count=6)
        wait_until(lambda: waiting.begun)
        was, at = server_ms(raw), time.monotonic()
        stepped.step_clock(step)

        def off_ms():
            """How far its clock is from where the step has put it, however long ago that was."""
            return server_ms(raw) - was - step * 1000 - (time.monotonic() - at) * 1000

        wait_until(lambda: abs(off_ms()) < 900)
        after = end(6)
        assert sorted(each.execution_id for each in waiting.result()) == sorted(after)
        found, cursor = told(6, cursor)
        assert sorted(found) == sorted(after)
        new = Subscription(kind, stepped.url, scope, None, count=2)
        wait_until(lambda: new.begun)
        last = end(2)
        assert sorted(each.execution_id for each in new.result()) == sorted(last)
        assert sorted(told(2, cursor)[0]) == sorted(last)
        assert sorted(told(14, "start")[0]) == sorted([*before, *after, *last])


def test_records_keep_no_result(kind, server, scope, end, raw):
    cursor = here(raw)
    result = bytes(range(256)) * 200
    gone = end(result, retention=0.001)
    wait_until(lambda: not raw.exists(keys.core(gone)))
    kept = end(result)
    told = Subscription(kind, server.url, scope, cursor, 2).result()
    assert {c.execution_id: c.payload_bytes for c in told} == {gone: None, kept: result}
    for eid in (gone, kept):
        stream = keys.completions(eid.split(":", 2)[0] + ":" + eid.split(":", 2)[1])
        assert raw.memory_usage(stream) < 6_000 + 200 * raw.xlen(stream)


def test_records_are_kept_for_a_day_and_by_number(server, lane):
    with (
        SteppedServer(**PROMPT) as own,
        ff_fast.ValkeyBackend.connect(own.url) as backend,
        connect_raw(own.url) as raw,
    ):
        flow = backend.create_flow()
        stream = keys.completions(keys.flow_slot_tag(flow, 256))

        def end(count):
            for _ in range(count):
                backend.cancel(backend.create_execution(lane=lane, flow_id=flow))

        end(120)
        first = raw.xinfo_stream(stream)["first-entry"][0]
        subscription = backend.subscribe_completions(after="start")
        told = []
        while len(told) < 120:
            told += subscription.next_batch()
        own.step_clock(86_400 + 60)
        wait_until(lambda: not raw.exists(keys.flow(keys.flow_slot_tag(flow, 256), flow)))
        backend.create_flow(flow)
        end(120)
        assert raw.xinfo_stream(stream)["first-entry"][0] > first
        assert raw.xlen(stream) < 200
        # What was trimmed had been read, so a reader that comes back later goes on.
        told += backend.subscribe_completions(after=told[-1].cursor).next_batch()
        assert len({each.execution_id for each in told}) == len(told) > 120
        with pytest.raises(errors.InvalidCursor):
            backend.subscribe_completions(after=told[10].cursor).next_batch()
        with raw.pipeline() as pipe:
            for n in range(4_000):
                pipe.xadd(stream, {"n": n})
            pipe.execute()
        end(30)
        assert 2_000 <= raw.xlen(stream) < 2_300


FOREIGN = (
    {"a": "b"},
    {"execution_id": "x", "outcome": "success", "namespace": "n", "produced_at_ms": "1"},
    {"execution_id": b"\xff", "outcome": "success", "namespace": b"\xff", "produced_at_ms": "x"},
    {"outcome": "success", "produced_at_ms": "1"},
)


def test_what_others_put_there_harms_nobody(kind, lane):
    with (
        EmbeddedServer() as own,
        ff_fast.ValkeyBackend.connect(own.url) as backend,
        connect_raw(own.url) as raw,
    ):
        eids = []

        flow = backend.create_flow()

        def end(count):
            for _ in range(count):
                eids.append(backend.create_execution(lane=lane, flow_id=flow))
                backend.complete(backend.claim(lane=lane, **WORKER), b"r")

        subscription = Subscription(kind, own.url, None, "start", count=6)
        end(2)
        for index in range(0, 256, 5):
            for fields in FOREIGN:
                raw.xadd(keys.completions(keys.slot_tag(index)), fields)
        end(2)
        # A key of another type in one partition, met by one that waits and by one that begins.
        indexes = range(256)
        free = [i for i in indexes if not raw.exists(keys.completions(keys.slot_tag(i)))]
        raw.set(keys.completions(keys.slot_tag(free[0])), "no stream")
        begins = Subscription(kind, own.url, None, "start", count=6)
        end(2)
        for each in (subscription, begins):
            told = each.result()
            assert [c.execution_id for c in told] == eids
            assert {c.payload_bytes for c in told} == {b"r"}


def test_a_key_of_another_type_stops_no_execution_from_ending(lane):
    with (
        EmbeddedServer() as own,
        ff_fast.ValkeyBackend.connect(own.url) as backend,
        connect_raw(own.url) as raw,
    ):
        flow = backend.create_flow()
        completions = keys.completions(keys.flow_slot_tag(flow, 256))
        for spoil in (
            lambda: raw.set(completions, "no stream"),
            lambda: raw.xadd(completions, {"a": "b"}, id=f"{2**64 - 1}-{2**64 - 1}"),
        ):
            raw.delete(completions)
            spoil()
            eid = backend.create_execution(lane=lane, flow_id=flow)
            backend.complete(backend.claim(lane=lane, **WORKER), b"r")
            assert backend.describe(eid).state == "completed"
            assert raw.pttl(keys.core(eid)) > 0
        raw.delete(completions)
        backend.create_execution(lane=lane, flow_id=flow)
        backend.complete(backend.claim(lane=lane, **WORKER))
        assert raw.xlen(completions) == 1


def test_a_result_that_became_something_else_ends_no_subscription(kind, server, scope, end, raw):
    cursor = here(raw)
    broken, whole = end(b"r"), end(b"r")
    raw.delete(keys.result(broken))
    raw.sadd(keys.result(broken), "no string")
    told = Subscription(kind, server.url, scope, cursor, 2).result()
    assert {c.execution_id: c.payload_bytes for c in told} == {broken: None, whole: b"r"}


def test_a_server_that_comes_back_without_its_data_is_told(kind, lane):
    with EmbeddedServer() as own:
        with ff_fast.ValkeyBackend.connect(own.url) as backend, connect_raw(own.url) as raw:
            backend.cancel(backend.create_execution(lane=lane))
            subscription = Subscription(kind, own.url, None, "start")
            wait_until(lambda: subscription.items and listening(raw))
        own.restart()
        with pytest.raises(errors.InvalidCursor):
            subscription.result()

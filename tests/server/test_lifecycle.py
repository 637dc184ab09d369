"""Create, claim, renew, complete and fail, through both shells, on real engines.

What runs on the second engine is the same whichever shell has sent it, so one shell suffices there.
"""

import dataclasses
import re
import threading
import time

import pytest

import ff_fast
from ff_fast import CapabilitySet, ClaimPolicy, Handle, StreamMode, errors, keys
from ff_fast._core import claiming as claiming_core
from ff_fast.errors import Outcome

from ..heads import head_of, set_head
from ..shells import Opener
from .streams import server_ms

WORKER = {"worker_id": "w", "worker_instance_id": "w-1"}
ALL_BYTES = bytes(range(256)) + b"\r\n\x00\xff"


PLACES = [
    pytest.param(("sync", "server"), id="sync"),
    pytest.param(("asyncio", "server"), id="asyncio"),
    pytest.param(("sync", "redis_server"), id="redis", marks=pytest.mark.second_engine),
]
# For what a client refuses without a server.
each_shell = pytest.mark.parametrize("place", PLACES[:2], indirect=True)


@pytest.fixture(params=PLACES)
def place(request):
    """A shell and the name of the server that it talks to."""
    return request.param


@pytest.fixture
def opener(place):
    opener = Opener(place[0])
    yield opener
    opener.close()


@pytest.fixture
def engine(place, request):
    return request.getfixturevalue(place[1])


@pytest.fixture
def backend(opener, engine):
    return opener(engine.url)


@pytest.fixture
def create(backend, lane):
    def call(**options):
        return backend.create_execution(lane=lane, **options)

    return call


@pytest.fixture
def claim(backend, lane):
    def call(**options):
        return backend.claim(lane=lane, **WORKER, **options)

    return call


@pytest.fixture
def owned(create, claim):
    """An execution that this test's worker owns: its id and its handle."""
    eid = create(payload=b"prompt", tags={"app.user": "ada"}, retention=60)
    return eid, claim()


@pytest.fixture
def everything(raw):
    """``everything(eid)``: every key of an execution, byte for byte, and when it expires."""

    def look(eid):
        found = sorted(raw.keys(f"*{eid[-36:]}*"))
        return {key: (raw.dump(key), raw.pexpiretime(key)) for key in found}

    return look


@pytest.fixture
def lapse(raw, wait_until):
    """Let the lease of an execution run out, by the server's clock."""

    def wait(eid):
        ends_at = server_ms(raw) + 5
        set_head(raw, keys.head(eid, 0), lease_expires_at=ends_at)
        wait_until(lambda: server_ms(raw) >= ends_at)

    return wait


def stolen(handle):
    """The handle of somebody who guesses: everything is right but the lease."""
    fields = handle.fields()
    names = ("execution_id", "attempt_index", "attempt_id", "lease_epoch", "lease_ttl_ms")
    return Handle.encode(
        **{name: getattr(fields, name) for name in names},
        lease_id="00000000-0000-4000-8000-000000000000",
        lane_id=fields.lane_id,
        worker_instance_id=fields.worker_instance_id,
    )


def same_partition_ids(count):
    flow = keys.new_uuid()
    return [keys.execution_id_for_flow(flow) for _ in range(count)]


# -- create ------------------------------------------------------------------------------------------


def test_what_was_created_can_be_claimed_and_read(create, claim, backend, raw):
    eid = create(payload=ALL_BYTES, priority=7, namespace="tenant", tags={"app.user": "ada"})
    handle = claim(lease_ttl_ms=12_345)
    fields = handle.fields()
    assert (fields.execution_id, fields.attempt_index, fields.lease_epoch) == (eid, 0, 1)
    assert (fields.lease_ttl_ms, fields.worker_instance_id) == (12_345, "w-1")
    assert backend.read_payload(handle) == ALL_BYTES
    told = backend.describe(eid)
    assert (told.execution_id, told.state, told.lane) == (eid, "active", fields.lane_id)
    assert (told.priority, told.namespace) == (7, "tenant")
    assert (told.tags, told.usage) == ({"app.user": "ada"}, {})
    (claimed,) = told.history
    assert (claimed.from_state, claimed.to_state, claimed.attempt_index) == ("waiting", "active", 0)
    expires_at = head_of(raw, keys.head(eid, 0)).lease_expires_at
    assert expires_at - told.started_at_ms == 12_345
    assert told.lease_expires_at_ms == expires_at
    assert fields.lease_id not in f"{told} {told!r} {dataclasses.asdict(told)}"
    assert fields.lease_id not in repr(handle)


def test_an_empty_payload_is_read_as_empty(create, claim, backend):
    create()
    assert backend.read_payload(claim()) == b""


def test_creating_again_with_the_same_id_changes_nothing(create, claim, everything):
    eid = keys.new_execution_id()
    assert create(execution_id=eid, payload=b"one", priority=1) == eid
    before = everything(eid)
    assert create(execution_id=eid, payload=b"two", priority=9000, tags={"a.b": "c"}) == eid
    assert everything(eid) == before
    claim()
    before = everything(eid)
    assert create(execution_id=eid.upper().replace("FP", "fp"), payload=b"three") == eid
    assert everything(eid) == before
    # The hint of the repeat is stale: it leads nowhere.
    assert claim() is None


@pytest.fixture
def sent(raw):
    """``sent()``: how many calls the engine has had that could be ours."""

    def count():
        stats = raw.info("commandstats")
        names = ("fcall", "fcall_ro", "zadd", "zpopmin", "bzmpop", "zrange")
        return [stats.get(f"cmdstat_{name}", {}).get("calls") for name in names]

    return count


@each_shell
def test_a_refusal_comes_before_anything_is_sent(owned, backend, sent):
    """One of each kind of method; which arguments are refused is held in ``tests/unit/test_operations.py``."""
    eid, handle = owned
    refused = [
        lambda: backend.create_execution(priority=9001),
        lambda: backend.claim(lane=""),
        lambda: backend.renew("handle"),
        lambda: backend.complete(handle, None),
        lambda: backend.open_writer(handle, linger=2),
        lambda: backend.append_frame(handle, b"no frame"),
        lambda: backend.read_stream(eid, after="$"),
        lambda: backend.tail(eid, after="$"),
        lambda: backend.subscribe_completions(after="now"),
        lambda: backend.supervise("everything"),
        lambda: backend.run_worker(print, lane=""),
    ]
    before = sent()
    for call in refused:
        with pytest.raises(errors.InvalidInput) as caught:
            call()
        assert caught.value.outcome is Outcome.NOT_APPLIED
    assert sent() == before


# -- claim: what, and for whom -----------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False], ids=["one partition", "many"])
def test_the_highest_priority_is_claimed_first_then_the_oldest(
    create, claim, raw, wait_until, together
):
    made = same_partition_ids(6) if together else [keys.new_execution_id() for _ in range(6)]
    created = {}
    for eid, priority in zip(made, (0, 5, 9000, 5, 0, 8999), strict=True):
        now = server_ms(raw)
        wait_until(lambda now=now: server_ms(raw) > now)
        created[create(execution_id=eid, priority=priority)] = priority
    claimed = [claim().fields().execution_id for _ in created]
    assert claimed == [made[i] for i in (2, 5, 1, 3, 0, 4)]
    assert claim() is None


@pytest.mark.parametrize("together", [True, False], ids=["one partition", "many"])
def test_work_that_a_worker_cannot_do_is_left_for_others(create, claim, together):
    made = same_partition_ids(4) if together else [keys.new_execution_id() for _ in range(4)]
    needs = [["gpu", "a100"], ["gpu"], [], ["fpga"]]
    for eid, tokens in zip(made, needs, strict=True):
        create(execution_id=eid, required_capabilities=CapabilitySet(tokens), priority=len(tokens))

    def taken(*offered):
        handle = claim(capabilities=CapabilitySet(offered))
        return handle and made.index(handle.fields().execution_id)

    assert taken() == 2
    assert taken() is None
    # A part of a token is no token.
    assert taken("gp", "a10", "gpu-a100") is None
    assert taken("gpu", "other") == 1
    assert taken("gpu") is None
    assert taken("gpu", "fpga", "a100") == 0
    assert taken("gpu", "fpga", "a100") == 3
    assert taken("gpu", "fpga", "a100") is None


def test_fitting_work_is_found_among_thousands_that_do_not_fit(server, lane, raw):
    opener = Opener("sync")
    backend = opener(server.url)
    made = same_partition_ids(2101)
    fit = [0, 62, 63, 64, 65, 1000, 2047, 2048, 2100]
    gpu = CapabilitySet(["gpu"])
    for i, eid in enumerate(made):
        needs = None if i in fit else gpu
        backend.create_execution(
            lane=lane, execution_id=eid, priority=5000 - i, required_capabilities=needs
        )
    claimed = [backend.claim(lane=lane, **WORKER).fields().execution_id for _ in fit]
    assert claimed == [made[i] for i in fit]
    assert backend.claim(lane=lane, **WORKER) is None
    index = keys.eligible(keys.slot_tag_of(made[0]), lane, "gpu")
    assert raw.zcard(index) == len(made) - len(fit)
    opener.close()


def test_a_claimed_execution_is_in_no_index(owned, raw, lane):
    eid, _ = owned
    assert raw.zscore(keys.eligible(keys.slot_tag_of(eid), lane), eid) is None
    assert raw.zcard(keys.ready(lane)) == 0


def test_a_lane_of_any_characters_is_spelled_alike_on_both_sides(backend, raw):
    printable = "".join(map(chr, range(0x20, 0x7F)))
    for part in (printable[:60], printable[60:]):
        lane = f"{part}{keys.new_uuid()[:4]}"
        eid = backend.create_execution(lane=lane)
        index = keys.eligible(keys.slot_tag_of(eid), lane)
        assert raw.zcard(index) == 1
        handle = backend.claim(lane=lane, **WORKER)
        assert raw.zcard(index) == 0
        # Waiting again: what the server spells itself leads a worker here.
        backend.wait_children(handle)
        assert raw.zcard(index) == 1
        assert backend.claim(lane=lane, **WORKER).fields().execution_id == eid
        assert raw.zcard(index) == 0


@pytest.mark.parametrize("why", ["gone", "active"])
def test_an_index_entry_without_work_is_dropped(create, claim, raw, lane, why):
    stale, other = same_partition_ids(2)
    create(execution_id=stale, priority=1)
    if why == "gone":
        raw.delete(keys.core(stale))
    else:
        raw.hset(keys.core(stale), "state", "active")
    create(execution_id=other)
    assert claim().fields().execution_id == other
    assert raw.zcard(keys.eligible(keys.slot_tag_of(stale), lane)) == 0
    assert claim() is None


@pytest.mark.parametrize("place", [PLACES[0], PLACES[2]], indirect=True)
@pytest.mark.parametrize("workers", [8])
def test_of_workers_that_race_for_one_execution_one_gets_it(opener, engine, lane, workers):
    backends = [opener(engine.url) for _ in range(workers)]
    for _ in range(10):
        eid = backends[0].create_execution(lane=lane)
        got = []
        start = threading.Barrier(workers)

        def race(backend, start=start, got=got):
            start.wait()
            got.append(backend.claim(lane=lane, **WORKER))

        threads = [threading.Thread(target=race, args=(backend,)) for backend in backends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        handles = [handle for handle in got if handle is not None]
        assert [handle.fields().execution_id for handle in handles] == [eid]


def test_a_crowd_of_workers_does_everything_once(server, lane):
    opener = Opener("sync")
    backend = opener(server.url)
    made = {backend.create_execution(lane=lane, priority=i % 3) for i in range(60)}
    done = []

    def work():
        own = opener(server.url)
        while handle := own.claim(lane=lane, **WORKER, policy=ClaimPolicy.with_max_wait(0.3)):
            done.append(handle.fields().execution_id)
            own.complete(handle)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == sorted(made)
    opener.close()


# -- claim: hints and waiting ------------------------------------------------------------------------


def test_a_lost_hint_is_found_by_the_sweep(create, claim, raw, lane):
    eid = create()
    raw.delete(keys.ready(lane))
    assert claim().fields().execution_id == eid


def test_a_hint_that_is_lost_between_two_sweeps_only_delays(create, claim, raw, lane, backend):
    assert claim() is None  # sweeps
    eid = create()
    raw.delete(keys.ready(lane))
    assert backend_claims(backend, claim) == eid


def backend_claims(backend, claim):
    deadline = time.monotonic() + 10
    while (handle := claim()) is None:
        assert time.monotonic() < deadline
    return handle.fields().execution_id


def test_a_waiting_worker_sweeps_too(create, claim, raw, lane, monkeypatch):
    monkeypatch.setattr(claiming_core, "SWEEP_EVERY_S", 0.1)
    assert claim() is None
    eid = create()
    raw.delete(keys.ready(lane))
    handle = claim(policy=ClaimPolicy.with_max_wait(10))
    assert handle.fields().execution_id == eid


def test_a_stale_hint_leads_nowhere_and_hides_nothing(create, claim, raw, lane):
    eid = create()
    partition = keys.partition_index(eid)
    empty = [other for other in (1, 2, 3) if other != partition]
    raw.zadd(keys.ready(lane), {str(other): -9e15 for other in empty})
    assert claim().fields().execution_id == eid
    assert claim() is None
    assert raw.zcard(keys.ready(lane)) == 0


def test_stale_hints_do_not_pile_up_beside_work_that_nobody_can_do(create, claim, raw, lane):
    waiting = keys.partition_index(
        create(priority=9000, required_capabilities=CapabilitySet(["gpu"]))
    )
    for _ in range(5):
        create()
    for _ in range(5):
        assert claim() is not None
    assert claim() is None
    assert raw.exists(keys.ready(lane), keys.hinted(lane)) == 0
    assert [int(each) for each in raw.zrange(keys.ready(lane, "gpu"), 0, -1)] == [waiting]


def test_a_hint_goes_back_for_what_stays(create, claim, raw, lane):
    high, low = same_partition_ids(2)
    create(execution_id=high, priority=2)
    create(execution_id=low, priority=1)
    assert claim().fields().execution_id == high
    ((partition, score),) = raw.zrange(keys.ready(lane), 0, -1, withscores=True)
    assert int(partition) == keys.partition_index(low)
    assert score == raw.zscore(keys.eligible(keys.slot_tag_of(low), lane), low)


def blocked_in(raw, command):
    return [
        client
        for client in raw.client_list()
        if client["cmd"].lower() == command and "b" in client["flags"]
    ]


def test_a_waiting_claim_blocks_on_the_server_and_wakes(engine, raw, claim, lane, wait_until):
    got = []
    worker = threading.Thread(
        target=lambda: got.append(claim(policy=ClaimPolicy.with_max_wait(30)))
    )
    worker.start()
    wait_until(lambda: blocked_in(raw, "bzmpop"))
    other = Opener("sync")
    eid = other(engine.url).create_execution(lane=lane)
    worker.join(timeout=10)
    assert got[0].fields().execution_id == eid
    assert not blocked_in(raw, "bzmpop")
    other.close()


@pytest.mark.parametrize("max_wait", [0, 0.15])
def test_a_claim_gives_up_after_its_wait(claim, max_wait):
    assert claim() is None
    began = time.monotonic()
    assert claim(policy=ClaimPolicy.with_max_wait(max_wait)) is None
    assert time.monotonic() - began >= max_wait


def test_a_claim_waits_no_longer_for_work_that_it_cannot_do(create, claim, raw, lane):
    create(required_capabilities=CapabilitySet(["gpu"]))
    assert claim(policy=ClaimPolicy.with_max_wait(0.2)) is None
    # It is there for whoever can.
    assert raw.zcard(keys.ready(lane, "gpu")) == 1
    assert claim(capabilities=CapabilitySet(["gpu"])) is not None


# -- renew -------------------------------------------------------------------------------------------


def test_renewing_extends_the_lease(owned, backend, raw):
    eid, handle = owned
    set_head(raw, keys.head(eid, 0), lease_expires_at=server_ms(raw) + 500)
    for ttl, length in ((None, 30_000), (90_000, 90_000)):
        before = server_ms(raw)
        renewed = backend.renew(handle, ttl)
        assert before + length <= renewed.expires_at_ms <= server_ms(raw) + length
        assert renewed.lease_epoch == 1
        assert head_of(raw, keys.head(eid, 0)).lease_expires_at == renewed.expires_at_ms


# -- what is refused to whom -------------------------------------------------------------------------


def _calls(backend):
    return {
        "renew": backend.renew,
        "complete": lambda handle: backend.complete(handle, b"result"),
        "fail": lambda handle: backend.fail(handle, "reason"),
    }


@pytest.mark.parametrize("name", ["renew", "complete", "fail"])
@pytest.mark.parametrize(
    "why, error",
    [
        ("gone", errors.ExecutionNotFound),
        ("stolen", errors.StaleOwner),
        ("suspended", errors.ExecutionSuspended),
        ("waiting", errors.ExecutionNotActive),
        ("lapsed", errors.LeaseExpired),
    ],
)
def test_calls_of_an_owner_are_refused_to_others(
    owned, backend, raw, everything, lapse, name, why, error
):
    eid, handle = owned
    if why == "gone":
        raw.delete(*everything(eid))
    elif why == "stolen":
        handle = stolen(handle)
    elif why == "lapsed":
        lapse(eid)
    else:
        raw.hset(keys.core(eid), "state", why)
        set_head(raw, keys.head(eid, 0), writer=None)
    before = everything(eid)
    with pytest.raises(error) as caught:
        _calls(backend)[name](handle)
    assert type(caught.value) is error
    assert caught.value.outcome is Outcome.NOT_APPLIED
    assert everything(eid) == before


@pytest.mark.parametrize("first", ["complete", "fail"])
def test_after_the_end_nothing_is_renewed_or_ended_otherwise(owned, backend, everything, first):
    eid, handle = owned
    calls = _calls(backend)
    calls[first](handle)
    before = everything(eid)
    for name in {"renew", "complete", "fail"} - {first}:
        with pytest.raises(errors.ExecutionNotActive) as caught:
            calls[name](handle)
        assert caught.value.state == {"complete": "completed", "fail": "failed"}[first]
    with pytest.raises(errors.StaleOwner):
        calls[first](stolen(handle))
    assert everything(eid) == before


# -- the end -----------------------------------------------------------------------------------------

REASONS = {"complete": "attempt_success", "fail": "attempt_failure"}
ERRORS = {"complete": {}, "fail": {b"error": b"reason"}}


@pytest.mark.parametrize("how", REASONS)
def test_the_end_closes_the_stream_and_limits_every_key(owned, backend, raw, everything, how, lane):
    eid, handle = owned
    with backend.open_writer(handle) as writer:
        writer.write(b"durable")
        writer.write(b"live", mode=StreamMode.best_effort_live(5_000))
        writer.write(b'{"a":1}', mode=StreamMode.durable_summary())
    before = server_ms(raw)
    _calls(backend)[how](handle)
    after = server_ms(raw)
    closed_at, reason = raw.hmget(keys.meta(eid, 0), "closed_at", "closed_reason")
    assert before <= int(closed_at) <= after
    assert reason.decode() == REASONS[how]
    end_id, end = raw.xrevrange(keys.stream(eid, 0), count=1)[0]
    assert end_id.endswith(b"-4")
    assert end == {b"end": reason, b"prev": b"3", **ERRORS[how]}
    there = everything(eid)
    names = [keys.core(eid), keys.payload(eid), keys.tags(eid), keys.history(eid)]
    names += [keys.attempt(eid, 0)]
    names += [key(eid, 0) for key in (keys.stream, keys.live, keys.head, keys.meta, keys.summary)]
    names += [keys.result(eid)] * (how == "complete")
    assert sorted(there) == sorted(names)
    for key, (_, expires_at) in there.items():
        assert before + 60_000 <= expires_at <= after + 60_000, key
    page = backend.read_stream(eid, 0)
    assert [frame.payload for frame in page] == [b"durable", b"live", b'{"a":1}']
    assert (page.end_reason, page.gaps) == (REASONS[how], ())
    assert raw.zcard(keys.eligible(keys.slot_tag_of(eid), lane)) == 0


@pytest.mark.parametrize("how", REASONS)
def test_the_end_stands_behind_the_last_frame_whatever_the_clock_says(owned, backend, raw, how):
    eid, handle = owned
    ahead = server_ms(raw) + 100_000
    set_head(raw, keys.head(eid, 0), last_id=f"{ahead}-0")
    with backend.open_writer(handle) as writer:
        writer.write(b"x")
        assert writer.flush().stream_id == f"{ahead}-1"
    _calls(backend)[how](handle)
    assert raw.xrevrange(keys.stream(eid, 0), count=1)[0][0] == b"%d-2" % ahead
    assert backend.read_stream(eid, 0).end_reason == REASONS[how]


@pytest.mark.parametrize("how", REASONS)
@pytest.mark.parametrize("opened", [True, False], ids=["writer", "no writer"])
def test_an_attempt_without_a_frame_ends_the_same_way(owned, backend, raw, how, opened):
    eid, handle = owned
    if opened:
        backend.open_writer(handle).close()
    _calls(backend)[how](handle)
    ((end_id, end),) = raw.xrange(keys.stream(eid, 0))
    assert end_id.endswith(b"-1")
    assert end == {b"end": REASONS[how].encode(), b"prev": b"0", **ERRORS[how]}
    page = backend.read_stream(eid, 0)
    assert (page, page.end_reason, page.gaps) == ((), REASONS[how], ())
    for key in (keys.stream(eid, 0), keys.head(eid, 0), keys.meta(eid, 0), keys.core(eid)):
        assert 0 < raw.pttl(key) <= 60_000


@pytest.mark.parametrize(
    "payload", [ALL_BYTES, b"", b"\x00", "zażółć", bytearray(b"b"), bytes(1 << 20)]
)
def test_a_result_is_kept_exactly(owned, backend, raw, payload):
    eid, handle = owned
    backend.complete(handle, payload)
    wanted = payload.encode() if isinstance(payload, str) else bytes(payload)
    assert (raw.get(keys.result(eid)) or b"") == wanted
    assert raw.hmget(keys.core(eid), "state", "outcome") == [b"completed", b"success"]


def test_a_repeated_complete_answers_with_the_first_outcome(owned, backend, everything, lapse):
    eid, handle = owned
    assert backend.complete(handle, b"first") is None
    before = everything(eid)
    assert backend.complete(handle, b"first") is None
    # Also when the lease has run out since, and whatever the repeat brings: the first call ended it.
    assert backend.complete(handle, b"second") is None
    assert backend.complete(handle) is None
    assert everything(eid) == before


def test_a_repeated_complete_after_the_lease_is_answered(owned, backend, raw, lapse):
    eid, handle = owned
    backend.complete(handle, b"first")
    lapse(eid)
    backend.complete(handle, b"first")
    assert raw.get(keys.result(eid)) == b"first"


def test_a_repeated_fail_answers_with_the_first_outcome(owned, backend, raw, everything):
    eid, handle = owned
    first = backend.fail(handle, "one", ff_fast.FailureClass.TIMEOUT)
    before = everything(eid)
    assert backend.fail(handle, "two") == first == ff_fast.FailOutcome.TERMINAL_FAILED
    assert everything(eid) == before


@pytest.mark.parametrize("failure_class", ff_fast.FailureClass)
def test_a_failure_is_kept_with_its_class_and_detail(create, claim, backend, raw, failure_class):
    # A crash that is reported counts as a lost worker, of which there may be none here.
    eid = create(retry=ff_fast.RetryPolicy(max_reclaims=0))
    handle = claim()
    reason = ff_fast.FailureReason("out of łuck", ALL_BYTES)
    outcome = backend.fail(handle, reason, failure_class)
    assert (outcome.retry_scheduled, outcome.delay_until_ms) == (False, None)
    names = ("state", "outcome", "failure_reason", "failure_class", "failure_detail")
    assert raw.hmget(keys.core(eid), *names) == [
        b"failed",
        b"failed",
        "out of łuck".encode(),
        failure_class.value.encode(),
        ALL_BYTES,
    ]


def test_a_reported_crash_makes_way_for_another_worker(create, claim, backend, raw):
    eid = create()
    handle = claim()
    reason = ff_fast.FailureReason("oom", b"detail")
    now = server_ms(raw)
    outcome = backend.fail(handle, reason, ff_fast.FailureClass.INFRA_CRASH)
    assert outcome.retry_scheduled
    assert now <= outcome.delay_until_ms <= server_ms(raw)
    assert backend.fail(handle, reason, ff_fast.FailureClass.INFRA_CRASH) == outcome
    names = ("state", "failure_reason", "failure_class", "failure_detail", "reclaim_count")
    assert raw.hmget(keys.core(eid), *names) == [
        b"waiting",
        b"oom",
        b"infra_crash",
        b"detail",
        b"1",
    ]
    assert backend.read_stream(eid, 0).end_reason == "producer_lost"
    fields = claim().fields()
    assert (fields.execution_id, fields.attempt_index, fields.lease_epoch) == (eid, 1, 2)


@pytest.mark.parametrize("retention_ms", [1, 50])
def test_after_the_retention_nothing_is_left(create, claim, backend, raw, wait_until, retention_ms):
    eid = create(payload=b"p", retention=retention_ms / 1000, tags={"a.b": "c"})
    handle = claim()
    with backend.open_writer(handle) as writer:
        writer.write(b"x")
        writer.write(b"y", mode=StreamMode.best_effort_live(60_000))
        writer.write(b"{}", mode=StreamMode.durable_summary())
    backend.complete(handle, b"r")
    wait_until(lambda: not raw.keys(f"*{eid[-36:]}*"))
    with pytest.raises(errors.ExecutionNotFound):
        backend.describe(eid)
    with pytest.raises(errors.ExecutionNotFound):
        backend.complete(handle, b"r")


def test_nothing_expires_while_the_attempt_lives(owned, backend, everything):
    eid, handle = owned
    with backend.open_writer(handle) as writer:
        writer.write(b"x")
        writer.write(b"{}", mode=StreamMode.durable_summary())
        writer.write(b"y", mode=StreamMode.best_effort_live(60_000))
    limited = [key for key, (_, expires_at) in everything(eid).items() if expires_at >= 0]
    assert limited == [keys.live(eid, 0)]


# -- errors inside functions -------------------------------------------------------------------------


def test_a_function_that_fails_is_named_with_its_place(create, backend, raw):
    eid = create()
    raw.delete(keys.core(eid))
    raw.set(keys.core(eid), "s3cr3t-canary")
    with pytest.raises(errors.Corruption) as caught:
        backend.describe(eid)
    assert caught.value.outcome is errors.Outcome.NOT_APPLIED
    assert caught.value.function == "ff_describe_execution"
    assert re.fullmatch(r"lua/execution\.lua:\d+", caught.value.location)
    assert caught.value.location in str(caught.value)
    assert "canary" not in f"{caught.value!r} {vars(caught.value)}"


def test_what_a_function_may_not_do_is_named(create, opener, engine, raw, lane):
    eid = create()
    raw.execute_command("ACL", "SETUSER", lane, "on", ">p", "~*", "&*", "+@all", "-hgetall")
    url = engine.url.replace("://", f"://{lane}:p@", 1)
    backend = opener(url)
    with pytest.raises(errors.PermissionDenied) as caught:
        backend.describe(eid)
    raw.execute_command("ACL", "DELUSER", lane)
    assert (caught.value.denied, caught.value.function) == ("command", "ff_describe_execution")
    assert re.fullmatch(r"lua/execution\.lua:\d+", caught.value.location)
    assert lane not in f"{caught.value!r} {vars(caught.value)}"


def test_a_description_tells_the_times_that_are_set(create, claim, backend, raw):
    eid = create(delay=60, deadline=120)
    told = backend.describe(eid)
    assert told.delay_until_ms == told.created_at_ms + 60_000
    assert told.deadline_at_ms == told.created_at_ms + 120_000
    assert told.attempt_deadline_at_ms is told.lease_expires_at_ms is None
    eid = create(attempt_timeout=90)
    claim(lease_ttl_ms=30_000)
    told = backend.describe(eid)
    assert told.attempt_timeout == 90
    assert told.attempt_deadline_at_ms == told.started_at_ms + 90_000
    assert told.lease_expires_at_ms == told.started_at_ms + 30_000
    assert (told.attempt_index, told.attempt_count, told.worker_instance_id) == (0, 1, "w-1")

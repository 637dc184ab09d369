"""Work that is bad fails alone: its worker and the next execution are well."""

import contextlib
import itertools
import re
import threading

import pytest

from ff_fast import (
    FailureClass,
    StreamMode,
    WaitpointHmac,
    WaitpointKind,
    WaitpointSpec,
    errors,
    keys,
)
from ff_fast._core import slots

from ...key_table import TABLE
from ...shells import WORKER
from ...waiting import wait_until
from ..workers import Worker, opened
from .attempts import RETRY

SUMMARY = StreamMode.durable_summary()
OF_AN_EXECUTION = [name for name, row in TABLE.items() if "<eid>" in row.pattern]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(slots, "_FIRST_PAUSE_S", 0.01)


def key_of(name, eid):
    """The key of an execution, or of its first attempt."""
    pattern = TABLE[name].pattern.replace("<eid>", eid).replace("<i>", "0")
    return pattern.replace("{fp:N}", keys.slot_tag_of(eid))


def spoil(raw, name, eid):
    """Put a value of another type in the place of a key."""
    key = key_of(name, eid)
    raw.delete(key)
    if TABLE[name].type == "string":
        raw.rpush(key, "foreign")
    else:
        raw.set(key, "foreign")


@pytest.fixture
def claimed_then(kind, server, backend, lane):
    """``claimed_then(change)``: an execution that a worker claims, and then finds changed. The worker must go on."""
    running = Worker(kind, server.url, lambda task: b"well", lane=lane).begin()
    carry_out, meanwhile, claimed = running.backend._do, [], [True]

    def do(call, **renewing):
        if renewing:
            return carry_out(call, **renewing)
        # The call after a claim loads what the handler starts from. The first claim may have begun before this was put
        # in its place.
        if claimed[0] and call.claim is None and meanwhile:
            meanwhile[0]()
            meanwhile.clear()
        claimed[0] = call.claim is not None
        return carry_out(call)

    running.backend._do = do

    def create(then, **options):
        """An execution that the worker has claimed, and to which *then* happens before it is loaded."""
        created, eids = threading.Event(), []

        def act():
            assert created.wait(10)
            then(eids[0])

        meanwhile.append(act)
        eids.append(backend.create_execution(lane=lane, **options))
        created.set()
        wait_until(lambda: not meanwhile)
        return eids[0]

    yield create
    running.ask()
    # The worker has not ended with an error.
    running.result()


# -- what is stored is not what it should be ----------------------------------------------------------------------------


def test_a_key_of_another_type_harms_its_execution_alone(claimed_then, backend, raw, lane, state):
    for name in OF_AN_EXECUTION:
        eid = claimed_then(lambda eid, name=name: spoil(raw, name, eid), payload=b"x")
        assert state(backend.create_execution(lane=lane)) == "completed"
        if name in ("payload", "summary"):
            assert state(eid) == "failed"
            told = backend.describe(eid)
            assert told.failure_class is FailureClass.PERMANENT
            assert told.failure_reason.startswith("Corruption: The server function ff_")
            assert told.attempt_count == 1


def test_a_worker_outlives_executions_that_cannot_be_claimed(
    kind, server, backend, raw, lane, state
):
    for name in OF_AN_EXECUTION:
        spoil(raw, name, backend.create_execution(lane=lane, payload=b"x"))
    with Worker(kind, server.url, lambda task: b"well", lane=lane):
        assert state(backend.create_execution(lane=lane)) == "completed"


JUNK = (b"junk", b"", b"-1", b"9" * 30)


def test_a_field_of_junk_harms_its_execution_alone(claimed_then, backend, raw, lane, state):
    fields = set()
    for name in ("core", "meta"):
        # The fields of the first one are those of all.
        claimed_then(
            lambda eid, name=name: fields.update((name, f) for f in raw.hkeys(key_of(name, eid)))
        )
    assert len(fields) > 20
    for (name, field), value in itertools.product(sorted(fields), JUNK):
        claimed_then(lambda eid, at=(name, field, value): raw.hset(key_of(at[0], eid), *at[1:]))
    for value in JUNK:
        claimed_then(lambda eid, value=value: raw.set(keys.head(eid, 0), value))
    assert state(backend.create_execution(lane=lane)) == "completed"


def resumed(backend, lane):
    """An execution that waits to be continued, with a summary."""
    eid = backend.create_execution(lane=lane)
    handle = backend.claim(lane=lane, **WORKER)
    waitpoint = backend.create_waitpoint(handle)
    with backend.open_writer(handle, mode=SUMMARY) as writer:
        for _ in range(3):
            writer.write(b'{"a":1}')
        writer.write(b"x", mode=StreamMode.best_effort_live(50))
    spec = WaitpointSpec(
        kind=WaitpointKind.SIGNAL_NAME, matcher=b"go", hmac_token=waitpoint.hmac_token
    )
    backend.suspend(handle, spec)
    backend.deliver_signal(eid, waitpoint, "go", payload=b"x")
    return eid


def test_a_field_of_junk_in_what_is_continued_harms_it_alone(
    kind, server, backend, raw, lane, state
):
    probe = f"{lane[:40]}-probe"
    eid = resumed(backend, probe)
    fields = [
        (name, field)
        for name in ("core", "meta", "summary", "suspension", "attempt")
        for field in raw.hkeys(key_of(name, eid))
    ]
    assert len(fields) > 40
    partitions = set()
    for number, ((name, field), value) in enumerate(itertools.product(fields, JUNK[::3])):
        own = f"{probe}-{number}"
        eid = resumed(backend, own)
        partitions.add(keys.partition_index(eid))
        raw.hset(key_of(name, eid), field, value)
        # From here on it is work of the lane.
        found = keys.eligible(keys.slot_tag_of(eid), own)
        raw.zunionstore(keys.eligible(keys.slot_tag_of(eid), lane), [found])
        raw.zadd(keys.ready(lane), {str(keys.partition_index(eid)): 0})
    with Worker(kind, server.url, lambda task: b"well", lane=lane):
        eid = keys.new_execution_id()
        while keys.partition_index(eid) in partitions:
            eid = keys.new_execution_id()
        assert state(backend.create_execution(lane=lane, execution_id=eid)) == "completed"


def test_an_execution_that_vanishes_in_part_harms_no_other(claimed_then, backend, raw, lane, state):
    for name in OF_AN_EXECUTION:
        claimed_then(lambda eid, name=name: raw.delete(key_of(name, eid)), payload=b"x")
        assert state(backend.create_execution(lane=lane)) == "completed"


def test_every_worker_outlives_the_same_bad_work(kind, server, backend, raw, lane, state):
    eid = backend.create_execution(lane=lane, payload=b"x", retry=RETRY)
    spoil(raw, "payload", eid)
    fleet = [Worker(kind, server.url, lambda task: b"well", lane=lane) for _ in range(3)]
    with fleet[0], fleet[1], fleet[2]:
        assert state(eid) == "failed"
        assert backend.describe(eid).attempt_count == 1
        for _ in range(6):
            assert state(backend.create_execution(lane=lane)) == "completed"


def test_signals_that_cannot_be_read_fail_the_execution_that_waited_for_them(
    worker, backend, raw, lane, state
):
    waiting = []

    def handler(task):
        if task.payload == b"ask":
            waiting.append((yield task.create_waitpoint()))
            token = waiting[0].hmac_token
            yield task.suspend(
                WaitpointSpec(kind=WaitpointKind.SIGNAL_NAME, matcher=b"go", hmac_token=token),
                timeout=30,
            )
        return b"well"

    worker(handler)
    eid = backend.create_execution(lane=lane, payload=b"ask", retry=RETRY)
    state(eid, "suspended")
    signal_id = "00000000-0000-4000-8000-000000000000"
    ref = f"{waiting[0].waitpoint_id}:{signal_id}"
    raw.hset(key_of("signals", eid), ref, "foreign")
    raw.rpush(key_of("suspension_signals", eid), ref)
    backend.deliver_signal(eid, waiting[0], "go")
    assert state(eid) == "failed"
    assert "ff_observe_signals" in backend.describe(eid).failure_reason
    assert state(backend.create_execution(lane=lane)) == "completed"


# -- what a handler is refused for good ---------------------------------------------------------------------------------


def too_large(task):
    yield opened(task)
    task.write(b"x" * 65_537)


def half_a_character(task):
    yield opened(task)
    task.write("\ud800")


def no_patch(task):
    yield opened(task)
    task.write(b"{", mode=SUMMARY)


def no_patch_and_no_word_of_it(task):
    yield opened(task)
    with contextlib.suppress(errors.InvalidPatch):
        task.write(b"{", mode=SUMMARY)
        yield task.flush()
    return bytes((16 << 20) + 1)


def bad_argument(task):
    yield task.progress(101)


def no_such_waitpoint(task):
    waitpoint = yield task.create_waitpoint()
    token = WaitpointHmac(waitpoint.hmac_token.kid + ":" + "0" * 40)
    yield task.suspend(
        WaitpointSpec(kind=WaitpointKind.SIGNAL_NAME, matcher=b"x", hmac_token=token)
    )


def from_another_error(task):
    try:
        yield from too_large(task)
    except errors.PayloadTooLarge as error:
        raise RuntimeError("the model is too chatty") from error


def in_a_group(task):
    try:
        yield from too_large(task)
    except errors.PayloadTooLarge as error:
        raise ExceptionGroup("tools", [error]) from None


def refused_behind(task):
    """What the writer is refused comes to light when it is flushed or closed."""
    writer = yield opened(task)
    writer.write(b"stored")
    yield task.flush()
    writer._fail(errors.InvalidPatch())
    return b"well"


HANDLERS = [
    too_large,
    half_a_character,
    no_patch,
    no_patch_and_no_word_of_it,
    bad_argument,
    no_such_waitpoint,
    from_another_error,
    in_a_group,
    refused_behind,
]


@pytest.fixture
def one_by_one(worker):
    """A worker that calls the handler of HANDLERS that the payload names."""
    named = {handler.__name__.encode(): handler for handler in HANDLERS}

    def handler(task):
        if task.payload in named:
            return (yield from _steps(named[task.payload](task)))
        return b"well"

    return worker(handler)


def _steps(generator):
    return (yield from generator)


def test_what_is_refused_for_good_is_not_tried_again(one_by_one, backend, lane, state, subtests):
    for handler in HANDLERS:
        with subtests.test(handler.__name__):
            eid = backend.create_execution(lane=lane, payload=handler.__name__, retry=RETRY)
            assert state(eid) == "failed"
            told = backend.describe(eid)
            assert told.failure_class is FailureClass.PERMANENT, told.failure_reason
            assert told.attempt_count == 1
            assert re.search(r"Invalid|TooLarge", told.failure_reason)
    assert state(backend.create_execution(lane=lane)) == "completed"


def test_what_may_pass_later_is_tried_again(worker, backend, lane, state, supervisor):
    def handler(task):
        if task.attempt_index == 0:
            raise errors.Overloaded
        return b"well"

    worker(handler)
    eid = backend.create_execution(lane=lane, retry=RETRY)
    assert state(eid) == "completed"
    assert backend.describe(eid).attempt_count == 2

"""What a worker and a supervisor say."""

import logging

import pytest

from ff_fast import End, FailureClass, OnCancel, ScannerFilter, TaskFailed, errors

from ...shells import WORKER, Opener
from ...waiting import wait_until
from ..workers import Supervisor, opened, until
from .attempts import RETRY
from .test_leases import lapse

SECRET = "s3cr3t-canary"


@pytest.fixture
def open_shell(kind, server):
    """Opens a backend of the test's shell behind the blocking face."""
    opener = Opener(kind)
    yield lambda: opener(server.url)
    opener.close()


def fields_of(record):
    return tuple(
        getattr(record, name, None) for name in ("execution_id", "attempt_index", "worker_id")
    )


def test_a_handler_that_raised_is_an_error_with_its_traceback(
    worker, backend, lane, state, said, supervisor, caplog
):
    leases = []

    def handler(task):
        leases.append(task.handle.fields().lease_id)
        yield opened(task)
        task.write(SECRET)
        raise ValueError("boom")

    worker(handler, worker_id="w-7")
    eid = backend.create_execution(lane=lane, payload=SECRET, retry=RETRY.replace(max_retries=1))
    assert state(eid) == "failed"
    raised = said(logging.WARNING)
    assert [each.levelno for each in raised] == [logging.ERROR] * 2
    for index, record in enumerate(raised):
        assert record.getMessage() == f"Attempt {index} of execution {eid} has raised ValueError."
        assert fields_of(record) == (eid, index, "w-7")
        kind, error, where = record.exc_info
        assert (kind, str(error)) == (ValueError, "boom")
        names = []
        while where is not None:
            names.append(where.tb_frame.f_code.co_name)
            where = where.tb_next
        assert "handler" in names
    told = caplog.text + "".join(str(record.__dict__) for record in said(logging.DEBUG))
    assert SECRET not in told
    assert not any(lease in told for lease in leases)


def test_a_healthy_run_says_nothing_but_starts_and_stops(
    worker, kind, server, backend, open_shell, lane, state, said, caplog
):
    def handler(task):
        yield opened(task)
        if task.payload == b"delay" and not task.resumed:
            yield task.delay(0.001)
        for _ in range(3):
            task.write(SECRET)
        yield task.flush()
        return SECRET

    with Supervisor(kind, server.url):
        running = worker(handler, concurrency=2)
        for _ in range(5):
            eid = backend.create_execution(lane=lane, payload=SECRET)
            assert state(eid) == "completed"
            *_, end = backend.follow(eid)
            assert end.outcome == "success"
        assert state(backend.create_execution(lane=lane, payload="delay")) == "completed"
        shell = open_shell()
        with shell.open_stream(lane, namespace=lane) as stream:
            stream.write(SECRET)
            shell.tail(stream.execution_id).next_batch(10)
        shell.cancel(shell.create_execution(lane="nobody"))
        running.ask()
        running.join(10)
    assert sorted(each.getMessage() for each in said(logging.INFO)) == sorted(
        [
            "A supervisor has started.",
            "A supervisor has stopped.",
            f"Worker worker has started: lane {lane}, 2 handlers at once.",
            f"Worker worker of lane {lane} has stopped.",
        ]
    )
    assert {each.levelno for each in said(logging.INFO)} == {logging.INFO}
    assert SECRET not in caplog.text


def test_an_attempt_that_is_asked_to_stop_is_no_error(worker, backend, lane, state, said):
    started = []

    def handler(task):
        started.append(task)
        yield until(task, lambda: task.cancelled)
        raise ValueError("stopped in the middle")

    worker(handler)
    eid = backend.create_execution(lane=lane)
    wait_until(lambda: started)
    backend.cancel(eid, grace=30)
    assert state(eid) == "cancelled"
    wait_until(lambda: any("has raised" in each.getMessage() for each in said(logging.DEBUG)))
    assert said(logging.WARNING) == []


def test_a_lost_lease_is_said_once(worker, backend, lane, said, supervisor, raw):
    started = []

    def handler(task):
        if task.attempt_index == 0:
            started.append(task)
            task.write(b"a")
            yield until(task, lambda: task.lost)
        return b"done"

    worker(handler, worker_id="w-7", lease_ttl_ms=10_000, on_cancel=OnCancel.TELL)
    eid = backend.create_execution(lane=lane)
    wait_until(lambda: started)
    lapse(raw, eid)
    wait_until(lambda: backend.describe(eid).state == "completed")
    wait_until(lambda: said(logging.WARNING))
    (lost,) = said(logging.WARNING)
    assert lost.levelno == logging.WARNING
    assert lost.getMessage().startswith(f"The lease of attempt 0 of execution {eid} is lost: ")
    assert fields_of(lost)[:2] == (eid, 0)


def test_a_lease_that_ends_with_the_execution_is_not_lost(worker, backend, lane, state, said):
    """Renewals that are under way when the end is stored are refused."""

    def handler(task):
        task._keeper._renew_soon()
        return b"done"

    worker(handler)
    for _ in range(20):
        assert state(backend.create_execution(lane=lane)) == "completed"
    assert said(logging.WARNING) == []


def test_an_execution_that_ends_under_its_handler_is_no_error_of_the_handler(
    worker, backend, lane, state, said
):
    """The writer may be told of it before the lease is known to be lost."""

    def handler(task):
        yield opened(task)
        backend.cancel(task.execution_id, grace=0)
        while True:
            task.write(SECRET)
            yield task.flush()

    worker(handler)
    for _ in range(10):
        assert state(backend.create_execution(lane=lane)) == "cancelled"
    assert said(logging.WARNING) == []


def test_a_writer_that_another_one_supersedes_is_said_with_what_it_lost(
    kind, open_shell, lane, said
):
    backend = open_shell()
    eid = backend.create_execution(lane=lane)
    handle = backend.claim(lane=lane, **WORKER)
    first = backend.open_writer(handle)
    second = backend.open_writer(handle)
    first.write(SECRET)
    with pytest.raises(errors.WriterSuperseded):
        first.flush()
    (superseded,) = said(logging.WARNING)
    assert superseded.levelno == logging.WARNING
    assert superseded.getMessage() == (
        f"The writer of attempt 0 of execution {eid} was superseded: another one was opened under the same lease."
        " Frames that were not stored: 1."
    )
    assert fields_of(superseded) == (eid, 0, None)
    second.close()
    backend.complete(handle)


def test_every_attempt_keeps_its_own_error(worker, backend, lane, state, supervisor, raw):
    started = []

    def handler(task):
        if task.attempt_index == 0:
            raise ValueError("the first")
        if task.attempt_index == 1:
            started.append(task)
            yield until(task, lambda: task.lost)
        raise TaskFailed("the last" + "ż" * 1000)

    worker(handler, lease_ttl_ms=10_000, on_cancel=OnCancel.TELL)
    eid = backend.create_execution(lane=lane, retry=RETRY)
    wait_until(lambda: started)
    lapse(raw, eid)
    assert state(eid) == "failed"
    found = backend.describe(eid)
    assert [each.error and each.error[:9] for each in found.attempts] == [
        "ValueErro",
        "The worke",
        "the lastż",
    ]
    first, second, third = found.attempts
    assert (first.end_reason, first.failure_class) == ("attempt_failure", FailureClass.TRANSIENT)
    assert first.error == "ValueError: the first"
    assert (second.end_reason, second.failure_class) == ("producer_lost", None)
    assert (third.end_reason, third.failure_class) == ("attempt_failure", FailureClass.PERMANENT)
    # The core has all of the last one, the history its beginning, cut behind a letter.
    assert found.failure_reason == "the last" + "ż" * 1000
    assert third.error == "the last" + "ż" * 508
    *_, end = backend.follow(eid)
    assert isinstance(end, End)
    assert end.error == found.failure_reason


def test_subscribers_of_completions_get_the_error(backend, lane):
    with backend.subscribe_completions(ScannerFilter(namespace=lane)) as completions:
        completions.next_batch(0)
        wanted = {}
        for outcome in ("success", "failed", "cancelled"):
            eid = backend.create_execution(lane=lane, namespace=lane)
            handle = backend.claim(lane=lane, **WORKER)
            if outcome == "success":
                backend.complete(handle)
                wanted[eid] = None
            elif outcome == "failed":
                backend.fail(handle, "x" * 255 + "ż")
                wanted[eid] = "x" * 255
            else:
                backend.cancel(eid, reason="stop it")
                wanted[eid] = "stop it"
        found = {}
        wait_until(
            lambda: (
                found.update((each.execution_id, each.error) for each in completions.next_batch(1))
                or len(found) == 3
            )
        )
        assert found == wanted


def test_a_tail_ends_with_the_error_of_its_attempt(open_shell, lane, supervisor):
    """As it is pushed, and as it is read later."""
    writer, reader = open_shell(), open_shell()
    eid = writer.create_execution(lane=lane, retry=RETRY.replace(max_retries=1))
    wanted = []
    for end in (
        lambda handle: writer.fail(handle, "no room " * 3, FailureClass.TRANSIENT),
        lambda handle: writer.fail(handle, "out of it", FailureClass.INFRA_CRASH),
        lambda handle: writer.cancel(handle, reason="x" * 1023 + "ż"),
    ):
        handle = wait_until(lambda: writer.claim(lane=lane, **WORKER), 10)
        with writer.open_writer(handle) as frames:
            frames.write(b"a")
        tail = reader.tail(eid, len(wanted))
        assert len(tail.next_batch(10)) == 1
        end(handle)
        wanted += tail.next_batch(10)
    assert [each.reason for each in wanted] == [
        "attempt_failure",
        "producer_lost",
        "attempt_cancelled",
    ]
    errors_ = [each.error for each in wanted]
    assert errors_ == ["no room no room no room ", "out of it", "x" * 1023]
    for index, end in enumerate(wanted):
        again = reader.tail(eid, index)
        assert [*again.next_batch(10)][-1] == end
        behind = reader.tail(eid, index, after=f"{index}.0-1")
        assert behind.next_batch(10)[-1].error == end.error
    assert [each.error for each in writer.describe(eid).attempts] == errors_

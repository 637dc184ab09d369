"""Traces from whoever creates an execution to the worker that runs it."""

import pytest
from opentelemetry import trace as api
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from ff_fast import OnCancel, keys, tracing

from ...waiting import wait_until
from ..workers import opened, until
from .attempts import RETRY
from .test_leases import lapse


@pytest.fixture
def spans():
    """``spans.tracer`` makes spans, ``spans.ended()`` are those that have ended."""

    class Spans:
        def __init__(self):
            self._exporter = InMemorySpanExporter()
            self.provider = TracerProvider()
            self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
            self.tracer = self.provider.get_tracer("test")

        def ended(self):
            return self._exporter.get_finished_spans()

    made = Spans()
    yield made
    made.provider.shutdown()


def traced(worker, handler, spans):
    running = worker(handler)
    tracing.trace(running.backend, spans.tracer)
    return running


def test_an_attempt_has_a_span_that_is_linked_to_its_creator(
    worker, backend, lane, state, spans, raw
):
    seen = []

    def handler(task):
        yield opened(task)
        task.write("a")
        yield task.flush()
        seen.append(api.get_current_span().get_span_context())
        return b"done"

    traced(worker, handler, spans)
    tracing.trace(backend, spans.tracer)
    with spans.tracer.start_as_current_span("request") as request:
        eid = backend.create_execution(lane=lane, tags={"a.b": "c"})
    assert state(eid) == "completed"
    (span,) = wait_until(lambda: [each for each in spans.ended() if each.name != "request"])
    creator = request.get_span_context()
    assert span.name == f"process {lane}"
    assert span.kind is api.SpanKind.CONSUMER
    assert span.parent is None
    assert [link.context.span_id for link in span.links] == [creator.span_id]
    assert span.links[0].context.trace_id == creator.trace_id
    assert dict(span.attributes) == {
        "messaging.system": "ff_fast",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": lane,
        "messaging.message.id": eid,
        "ff_fast.attempt_index": 0,
    }
    assert span.status.status_code is api.StatusCode.UNSET
    assert [each.span_id for each in seen] == [span.context.span_id]
    # It is no tag.
    assert backend.get_tags(eid) == backend.describe(eid).tags == {"a.b": "c"}
    stored = raw.hget(keys.core(eid), "traceparent").decode()
    assert stored.split("-")[1:3] == [f"{creator.trace_id:032x}", f"{creator.span_id:016x}"]


def test_each_attempt_that_fails_has_its_error(worker, backend, lane, state, spans, supervisor):
    def handler(task):
        yield opened(task)
        raise ValueError("boom")

    traced(worker, handler, spans)
    eid = backend.create_execution(lane=lane, retry=RETRY.replace(max_retries=1))
    assert state(eid) == "failed"
    found = wait_until(lambda: len(spans.ended()) == 2 and spans.ended())
    for index, span in enumerate(found):
        assert span.attributes["ff_fast.attempt_index"] == index
        assert span.attributes["error.type"] == "ValueError"
        assert span.status.status_code is api.StatusCode.ERROR
        (event,) = span.events
        assert event.attributes["exception.message"] == "boom"
        assert span.links == ()


class UnspeakableError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def test_an_exception_without_a_text_fails_its_attempt_and_not_the_worker(
    worker, backend, lane, state, spans
):
    def handler(task):
        if task.payload == b"broken":
            raise UnspeakableError
        return b"done"

    traced(worker, handler, spans)
    broken = backend.create_execution(lane=lane, payload=b"broken")
    assert state(broken) == "failed"
    assert state(backend.create_execution(lane=lane)) == "completed"
    first, second = wait_until(lambda: len(spans.ended()) == 2 and spans.ended())
    assert first.attributes["error.type"] == "UnspeakableError"
    assert first.status.status_code is api.StatusCode.ERROR
    assert second.status.status_code is api.StatusCode.UNSET


@pytest.mark.parametrize("grace", [30, None])
def test_an_attempt_that_is_cancelled_has_no_error(worker, backend, lane, state, spans, grace):
    started = []

    def handler(task):
        started.append(task)
        yield until(task, lambda: task.cancelled)
        raise ValueError("stopped in the middle")

    traced(worker, handler, spans)
    eid = backend.create_execution(lane=lane)
    wait_until(lambda: started)
    backend.cancel(eid, grace=grace)
    assert state(eid) == "cancelled"
    (span,) = wait_until(spans.ended)
    assert span.status.status_code is api.StatusCode.UNSET
    assert span.events == ()
    assert "error.type" not in span.attributes


def test_an_attempt_that_loses_its_lease_has_that_as_its_error(
    worker, backend, lane, state, spans, supervisor, raw
):
    started = []

    def handler(task):
        if task.attempt_index == 0:
            started.append(task)
            task.write(b"a")
            yield until(task, lambda: task.lost)
        return b"done"

    traced(lambda run: worker(run, lease_ttl_ms=10_000, on_cancel=OnCancel.TELL), handler, spans)
    eid = backend.create_execution(lane=lane)
    wait_until(lambda: started)
    lapse(raw, eid)
    assert state(eid) == "completed"
    found = wait_until(lambda: len(spans.ended()) == 2 and spans.ended())
    errors = {span.attributes["ff_fast.attempt_index"]: span for span in found}
    assert errors[0].status.status_code is api.StatusCode.ERROR
    assert len(errors[0].events) == 1
    assert errors[1].status.status_code is api.StatusCode.UNSET


def test_an_attempt_that_goes_on_has_another_span_with_the_same_link(
    worker, backend, lane, state, spans, supervisor
):
    def handler(task):
        if not task.resumed:
            yield task.delay(0.001)
        return b"done"

    traced(worker, handler, spans)
    tracing.trace(backend, spans.tracer)
    with spans.tracer.start_as_current_span("request") as request:
        eid = backend.create_execution(lane=lane)
    assert state(eid) == "completed"
    found = wait_until(
        lambda: (
            len(kept := [each for each in spans.ended() if each.name != "request"]) == 2 and kept
        )
    )
    for span in found:
        assert span.status.status_code is api.StatusCode.UNSET
        assert [each.context.span_id for each in span.links] == [request.get_span_context().span_id]


def test_a_span_is_linked_to_a_creator_that_is_not_sampled_and_has_no_parent(spans):
    """The worker's own sampler decides; whatever has started the worker is no parent."""
    unsampled = TracerProvider(sampler=ALWAYS_OFF)
    made = tracing._Tracing(spans.tracer)
    with unsampled.get_tracer("web").start_as_current_span("request") as request:
        traceparent = made.traceparent()
        with made.attempt("chat", "an id", 0, traceparent) as span:
            assert api.get_current_span() is span
    unsampled.shutdown()
    (span,) = spans.ended()
    assert span.parent is None
    assert [each.context.span_id for each in span.links] == [request.get_span_context().span_id]
    assert not span.links[0].context.trace_flags.sampled


@pytest.mark.parametrize("stored", [None, "", "not a traceparent", "00-0-0-00", "\N{SNOWMAN}"])
def test_what_is_no_traceparent_is_no_link(spans, stored):
    with tracing._Tracing(spans.tracer).attempt("chat", "an id", 0, stored):
        pass
    assert spans.ended()[0].links == ()


def test_without_traces_nothing_is_stored_and_no_span_is_made(
    worker, backend, lane, state, spans, raw
):
    worker(lambda task: b"done")
    with spans.tracer.start_as_current_span("request"):
        eid = backend.create_execution(lane=lane)
    assert state(eid) == "completed"
    assert not raw.hexists(keys.core(eid), "traceparent")
    assert [each.name for each in spans.ended()] == ["request"]

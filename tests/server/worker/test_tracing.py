"""Traces from whoever creates an execution to the worker that runs it."""

import pytest
from opentelemetry import trace as api
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ff_fast import keys, tracing

from ...waiting import wait_until
from ..workers import opened
from .attempts import RETRY


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


def test_without_traces_nothing_is_stored_and_no_span_is_made(
    worker, backend, lane, state, spans, raw
):
    worker(lambda task: b"done")
    with spans.tracer.start_as_current_span("request"):
        eid = backend.create_execution(lane=lane)
    assert state(eid) == "completed"
    assert not raw.hexists(keys.core(eid), "traceparent")
    assert [each.name for each in spans.ended()] == ["request"]

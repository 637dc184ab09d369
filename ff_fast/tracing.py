"""Traces of OpenTelemetry across the queue: from whoever creates an execution to the worker that runs it.

Needs the extra ``otel``. No frame has a span.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol

from ff_fast import _library
from ff_fast.errors import MissingDependency

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from opentelemetry.trace import Span, Tracer

    from ff_fast._core.deployment import Deployment


class _Backend(Protocol):
    """A backend of either shell."""

    @property
    def _deployment(self) -> Deployment: ...


def trace(backend: _Backend, tracer: Tracer | None = None) -> None:
    """Trace what *backend* creates and runs, from here on.

    `create_execution` stores the W3C ``traceparent`` of the current span with the execution, where only workers see it.
    `run_worker` opens a span ``process <lane>`` of kind ``CONSUMER`` for each attempt, from the moment it is loaded to its
    end, with a link to the span that created the execution. It has no parent, and is the current span of the handler. An
    attempt that fails, loses its lease or is broken off has the status ``ERROR`` and the exception as an event; one that
    is cancelled has neither. An attempt that continues after a suspension or a delay gets another span.

    Args:
        backend: A backend of either shell.
        tracer: Makes the spans; None takes ``ff_fast`` of the global provider.

    Raises:
        MissingDependency: The extra is not installed.
    """
    try:
        from opentelemetry import trace as api  # noqa: PLC0415 - an extra
    except ImportError:
        raise MissingDependency(
            "Traces need OpenTelemetry; install it with: pip install 'ff_fast[otel]'."
        ) from None
    if tracer is None:
        tracer = api.get_tracer("ff_fast", _library.VERSION)
    backend._deployment.tracing = _Tracing(tracer)  # noqa: SLF001 - no part of its interface


class _Tracing:
    """What the core calls; see :class:`ff_fast._core.traces.Tracing`."""

    def __init__(self, tracer: Tracer) -> None:
        from opentelemetry import context  # noqa: PLC0415 - an extra
        from opentelemetry import trace as api  # noqa: PLC0415 - an extra
        from opentelemetry.trace.propagation import tracecontext  # noqa: PLC0415 - an extra

        self._api = api
        self._root = context.Context()
        self._tracer = tracer
        self._propagator = tracecontext.TraceContextTextMapPropagator()

    def traceparent(self) -> str | None:
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return carrier.get("traceparent")

    def attempt(
        self, lane: str, execution_id: str, attempt_index: int, traceparent: str | None
    ) -> AbstractContextManager[Span]:
        links = []
        if traceparent:
            context = self._propagator.extract({"traceparent": traceparent})
            creator = self._api.get_current_span(context).get_span_context()
            if creator.is_valid:
                links.append(self._api.Link(creator))
        # Those of the semantic conventions for messaging: the lane is what has few values, and the execution an id.
        attributes: dict[str, Any] = {
            "messaging.system": "ff_fast",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": lane,
            "messaging.message.id": execution_id,
            "ff_fast.attempt_index": attempt_index,
        }
        return self._tracer.start_as_current_span(
            f"process {lane}",
            # Whatever started the worker goes on for as long as the process.
            context=self._root,
            kind=self._api.SpanKind.CONSUMER,
            links=links,
            attributes=attributes,
            # The core tells which error is the attempt's.
            record_exception=False,
            set_status_on_exception=False,
        )

    def failed(self, span: Span, error: BaseException) -> None:
        name = type(error).__qualname__
        span.set_attribute("error.type", name)
        span.set_status(self._api.Status(self._api.StatusCode.ERROR, name))
        # str() of the error runs the handler's code.
        with contextlib.suppress(Exception):
            span.record_exception(error)

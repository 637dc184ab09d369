"""What traces need of the core; :mod:`ff_fast.tracing` implements it where OpenTelemetry is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class Tracing(Protocol):
    """Makes spans."""

    def traceparent(self) -> str | None:
        """Return the W3C ``traceparent`` of the current span; None without one."""

    def attempt(
        self, lane: str, execution_id: str, attempt_index: int, traceparent: str | None
    ) -> AbstractContextManager[Any]:
        """Return the span of an attempt, which is the current one in its block.

        *traceparent* is that of the span that created the execution.
        """

    def failed(self, span: Any, error: BaseException, /) -> None:  # noqa: ANN401 - of another library
        """Note in the span of an attempt with which error it failed."""

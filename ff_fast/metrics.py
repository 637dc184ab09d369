"""The numbers of backends for Prometheus and OpenTelemetry.

Both are read when somebody collects: nothing is called when a frame is written or read. A ``PrometheusCollector`` needs the
extra ``metrics``, `instrument` the extra ``otel``.
"""

from __future__ import annotations

from functools import cache, partial, reduce
from math import inf
from operator import add
from typing import TYPE_CHECKING, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from ff_fast import _library
from ff_fast.errors import InvalidInput, MissingDependency

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from opentelemetry.metrics import CallbackOptions, Meter, Observation
    from prometheus_client import Metric

    from ff_fast.types import Histogram, Stats, Value


class HasStats(Protocol):
    """A backend of either shell."""

    def stats(self) -> Stats:
        """Return its numbers."""


class _Number(NamedTuple):
    """A number of the stats.

    Attributes:
        field: Its field.
        name: Its name for Prometheus, without prefix and ending.
        otel: Its name for OpenTelemetry.
        unit: Its unit for OpenTelemetry.
        text: What it is.
        label: What its parts are told apart by; None for a plain number.
        gauge: It is a state, and no count.
    """

    field: str
    name: str
    otel: str
    unit: str
    text: str
    label: str | None = None
    gauge: bool = False


_NUMBERS = (
    _Number(
        "frames_written",
        "frames_written",
        "messaging.client.sent.messages",
        "{message}",
        "Frames that were put into batches.",
        "mode",
    ),
    _Number(
        "frames_acknowledged",
        "frames_acknowledged",
        "ff_fast.frames.acknowledged",
        "{message}",
        "Frames whose storage the server has confirmed.",
        "mode",
    ),
    _Number(
        "frames_read",
        "frames_read",
        "messaging.client.consumed.messages",
        "{message}",
        "Frames that readers got; each reader counts for itself.",
        "mode",
    ),
    _Number(
        "bytes_written",
        "written_bytes",
        "ff_fast.written",
        "By",
        "Payload bytes of the written frames.",
    ),
    _Number("bytes_read", "read_bytes", "ff_fast.read", "By", "Payload bytes of the read frames."),
    _Number("batches", "batches", "ff_fast.batches", "{batch}", "Batches of the written frames."),
    _Number("resends", "resends", "ff_fast.resends", "{batch}", "Batches that were sent again."),
    _Number(
        "reconnects",
        "reconnects",
        "ff_fast.reconnects",
        "{reconnect}",
        "Times that a server was connected to again after a connection to it was lost.",
    ),
    _Number("gaps", "gaps", "ff_fast.gaps", "{gap}", "Gaps that readers were told of.", "reason"),
    _Number(
        "executions_claimed",
        "executions_claimed",
        "ff_fast.executions.claimed",
        "{execution}",
        "Executions that were claimed.",
    ),
    _Number(
        "executions_completed",
        "executions_completed",
        "ff_fast.executions.completed",
        "{execution}",
        "Executions that were completed.",
    ),
    _Number(
        "executions_failed",
        "executions_failed",
        "ff_fast.executions.failed",
        "{execution}",
        "Attempts that were failed, whether or not a retry follows.",
    ),
    _Number(
        "executions_cancelled",
        "executions_cancelled",
        "ff_fast.executions.cancelled",
        "{execution}",
        "Executions that were cancelled.",
    ),
    _Number(
        "leases_lost", "leases_lost", "ff_fast.leases.lost", "{lease}", "Leases that were lost."
    ),
    _Number(
        "unacknowledged_bytes",
        "unacknowledged_bytes",
        "ff_fast.unacknowledged",
        "By",
        "Bytes in memory that wait for the server.",
        gauge=True,
    ),
    _Number(
        "unacknowledged_frames",
        "unacknowledged_frames",
        "ff_fast.frames.unacknowledged",
        "{message}",
        "Frames that wait for the server.",
        gauge=True,
    ),
    _Number(
        "tails_open",
        "tails_open",
        "ff_fast.tails.open",
        "{reader}",
        "Tails and followers that are listening.",
        gauge=True,
    ),
    _Number(
        "writers_open",
        "writers_open",
        "ff_fast.writers.open",
        "{writer}",
        "Writers that are open.",
        gauge=True,
    ),
)


class _Spread(NamedTuple):
    """A histogram of the stats: its field, its names, its unit for OpenTelemetry, what it is, and what one is worth."""

    field: str
    name: str
    otel: str
    unit: str
    text: str
    scale: float = 1.0


_SPREADS = (
    _Spread(
        "batch_frames", "batch_frames", "ff_fast.batch.frames", "{message}", "Frames of a batch."
    ),
    _Spread(
        "write_to_acknowledged_us",
        "write_to_acknowledged_seconds",
        "ff_fast.write_to_acknowledged",
        "s",
        "Time from the first frame of a batch to its acknowledgement.",
        1e-6,
    ),
    _Spread(
        "read_lag_us",
        "read_lag_seconds",
        "ff_fast.read_lag",
        "s",
        "Time from the server's stamp of a pushed frame to its reader, by the clocks of both.",
        1e-6,
    ),
)


def _total(backends: Sequence[HasStats]) -> Stats:
    return reduce(add, (backend.stats() for backend in backends))


def _checked(backends: tuple[HasStats, ...]) -> tuple[HasStats, ...]:
    if not backends:
        raise InvalidInput("Pass at least one backend.")
    return backends


def _parts(value: Value) -> Iterator[tuple[str, int]]:
    for name in type(value).__match_args__:
        yield name, getattr(value, name)


def _cumulated(spread: Histogram, scale: float) -> Iterator[tuple[float, int]]:
    """Yield the bound of each bucket, and how many values are at most that."""
    below = 0
    for bound, number in zip(spread.bounds, spread.buckets, strict=True):
        below += number
        # Without what the binary fraction adds.
        yield float(f"{bound * scale:.12g}"), below


class PrometheusCollector:
    """A collector of ``prometheus_client``: ``REGISTRY.register(PrometheusCollector(backend))``.

    The names begin with ``ff_fast_``: ``ff_fast_frames_written_total{mode="durable"}``, ``ff_fast_unacknowledged_bytes``,
    ``ff_fast_write_to_acknowledged_seconds`` and so on, one for each field of :class:`ff_fast.Stats`.

    Args:
        backends: One backend of either shell, or several, whose numbers are added.

    Raises:
        MissingDependency: The extra ``metrics`` is not installed.
        InvalidInput: There is no backend.
    """

    def __init__(self, *backends: HasStats) -> None:
        try:
            import prometheus_client  # noqa: F401, PLC0415 - an extra
        except ImportError:
            raise MissingDependency(
                "The collector needs prometheus-client; install it with: pip install 'ff_fast[metrics]'."
            ) from None
        self._backends = _checked(backends)

    def collect(self) -> Iterable[Metric]:
        """Yield the numbers as they are now."""
        from prometheus_client import core, utils  # noqa: PLC0415 - an extra

        stats = _total(self._backends)
        for number in _NUMBERS:
            kind = core.GaugeMetricFamily if number.gauge else core.CounterMetricFamily
            value = getattr(stats, number.field)
            labels = [] if number.label is None else [number.label]
            family = kind(f"ff_fast_{number.name}", number.text, labels=labels)
            if number.label is None:
                family.add_metric([], value)
            else:
                for part, count in _parts(value):
                    family.add_metric([part], count)
            yield family
        for spread in _SPREADS:
            found: Histogram = getattr(stats, spread.field)
            histogram = core.HistogramMetricFamily(f"ff_fast_{spread.name}", spread.text)
            buckets = [
                (utils.floatToGoString(bound), below)  # type: ignore[no-untyped-call]
                for bound, below in _cumulated(found, spread.scale)
            ]
            histogram.add_metric([], buckets, found.total * spread.scale)
            yield histogram


def instrument(*backends: HasStats, meter: Meter | None = None) -> None:
    """Make observable instruments of OpenTelemetry for the numbers of backends.

    Frames are ``messaging.client.sent.messages`` and ``messaging.client.consumed.messages``, by the semantic conventions;
    the others begin with ``ff_fast.``. Of a histogram there are three counters: ``.count``, ``.sum``, and ``.bucket`` with
    the attribute ``le``, as no histogram can be observed.

    A meter has these instruments once: the numbers of backends that a later call names are added to them.

    Args:
        backends: One backend of either shell, or several, whose numbers are added.
        meter: Makes the instruments; None takes ``ff_fast`` of the global provider.

    Raises:
        MissingDependency: The extra ``otel`` is not installed.
        InvalidInput: There is no backend.
    """
    try:
        from opentelemetry import metrics  # noqa: PLC0415 - an extra
    except ImportError:
        raise MissingDependency(
            "The instruments need OpenTelemetry; install it with: pip install 'ff_fast[otel]'."
        ) from None
    _checked(backends)
    if meter is None:
        meter = _global_meter()
    observed_ones = _observed_by.get(meter)
    if observed_ones is not None:
        # OpenTelemetry would drop another instrument of the same name without a word.
        observed_ones += [each for each in backends if each not in observed_ones]
        return
    observed_ones = _observed_by[meter] = list(backends)

    def observing(
        observe: Callable[[Stats], Iterable[tuple[float, dict[str, str]]]],
    ) -> list[Callable[[CallbackOptions], Iterable[Observation]]]:
        def observed(_: CallbackOptions) -> Iterable[Observation]:
            for value, attributes in observe(_total(observed_ones)):
                yield metrics.Observation(value, {"messaging.system": "ff_fast", **attributes})

        return [observed]

    for number in _NUMBERS:
        # A state of several processes adds up, so it is no gauge of OpenTelemetry, which has one value of each.
        create = (
            meter.create_observable_up_down_counter
            if number.gauge
            else meter.create_observable_counter
        )
        callbacks = observing(partial(_observed, number))
        create(number.otel, callbacks=callbacks, unit=number.unit, description=number.text)
    for spread in _SPREADS:
        for ending, unit, observe in (
            ("count", "1", _counted),
            ("sum", spread.unit, _summed),
            ("bucket", "1", _bucketed),
        ):
            meter.create_observable_counter(
                f"{spread.otel}.{ending}",
                callbacks=observing(partial(observe, spread)),
                unit=unit,
                description=spread.text,
            )


_observed_by: WeakKeyDictionary[Meter, list[HasStats]] = WeakKeyDictionary()
"""The backends whose numbers the instruments of a meter give."""


@cache
def _global_meter() -> Meter:
    """Return the meter of the global provider, which may be set later."""
    from opentelemetry import metrics  # noqa: PLC0415 - an extra

    return metrics.get_meter("ff_fast", _library.VERSION)


_OPERATIONS = {
    "frames_written": {"messaging.operation.name": "send", "messaging.operation.type": "send"},
    "frames_read": {"messaging.operation.name": "receive", "messaging.operation.type": "receive"},
}


def _observed(number: _Number, stats: Stats) -> Iterator[tuple[float, dict[str, str]]]:
    value = getattr(stats, number.field)
    fixed = _OPERATIONS.get(number.field, {})
    if number.label is None:
        yield value, fixed
    else:
        for part, count in _parts(value):
            yield count, {**fixed, f"ff_fast.{number.label}": part}


def _counted(spread: _Spread, stats: Stats) -> Iterator[tuple[float, dict[str, str]]]:
    yield getattr(stats, spread.field).count, {}


def _summed(spread: _Spread, stats: Stats) -> Iterator[tuple[float, dict[str, str]]]:
    yield getattr(stats, spread.field).total * spread.scale, {}


def _bucketed(spread: _Spread, stats: Stats) -> Iterator[tuple[float, dict[str, str]]]:
    for bound, number in _cumulated(getattr(stats, spread.field), spread.scale):
        yield number, {"le": "+Inf" if bound == inf else str(bound)}

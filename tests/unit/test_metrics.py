"""Numbers for Prometheus and OpenTelemetry."""

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest

from ff_fast import FramesByMode, GapsByReason, Histogram, Stats, errors
from ff_fast.metrics import PrometheusCollector, instrument

STATS = Stats(
    frames_written=FramesByMode(1, 2, 3),
    frames_acknowledged=FramesByMode(durable=1),
    frames_read=FramesByMode(best_effort=7),
    bytes_written=10,
    bytes_read=11,
    batches=4,
    resends=5,
    reconnects=6,
    unacknowledged_bytes=7,
    unacknowledged_frames=8,
    gaps=GapsByReason(trimmed=9),
    tails_open=10,
    writers_open=11,
    executions_claimed=12,
    executions_completed=13,
    executions_failed=14,
    executions_cancelled=15,
    leases_lost=16,
    batch_frames=Histogram(3, 7, (1, 1, 1, *[0] * 29)),
    write_to_acknowledged_us=Histogram(1, 3, (0, 0, 1, *[0] * 29)),
    read_lag_us=Histogram(1, 1 << 40, (*[0] * 31, 1)),
)


class Backend:
    def stats(self):
        return STATS


def test_stats_are_added_field_by_field():
    twice = STATS + STATS
    assert twice.frames_written == FramesByMode(2, 4, 6)
    assert twice.batch_frames.buckets[:4] == (2, 2, 2, 0)
    assert STATS + Stats() == STATS
    with pytest.raises(TypeError):
        STATS + 1


def test_prometheus_gets_every_number():
    registry = CollectorRegistry(auto_describe=True)
    registry.register(PrometheusCollector(Backend()))
    text = generate_latest(registry).decode()
    samples = dict(
        line.rsplit(" ", 1)
        for line in text.splitlines()
        if not line.startswith("#") and "created" not in line
    )
    assert samples['ff_fast_frames_written_total{mode="durable_summary"}'] == "2.0"
    assert samples['ff_fast_frames_read_total{mode="best_effort"}'] == "7.0"
    assert samples['ff_fast_gaps_total{reason="trimmed"}'] == "9.0"
    assert samples["ff_fast_written_bytes_total"] == "10.0"
    assert samples["ff_fast_unacknowledged_bytes"] == "7.0"
    assert samples["ff_fast_executions_failed_total"] == "14.0"
    assert samples['ff_fast_batch_frames_bucket{le="1.0"}'] == "1.0"
    assert samples['ff_fast_batch_frames_bucket{le="4.0"}'] == "3.0"
    assert samples['ff_fast_batch_frames_bucket{le="+Inf"}'] == "3.0"
    assert samples["ff_fast_batch_frames_sum"] == "7.0"
    assert samples['ff_fast_write_to_acknowledged_seconds_bucket{le="2e-06"}'] == "0.0"
    assert samples['ff_fast_write_to_acknowledged_seconds_bucket{le="4e-06"}'] == "1.0"
    assert samples['ff_fast_read_lag_seconds_bucket{le="1073.741824"}'] == "0.0"
    names = {name.partition("{")[0] for name in samples}
    for field in Stats.__match_args__:
        assert any(_same(field, name) for name in names), field


def _same(field, name):
    words = set(field.removesuffix("_us").split("_"))
    return words <= set(name.split("_"))


def collected(*backends):
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    instrument(*backends, meter=provider.get_meter("test"))
    (resource,) = reader.get_metrics_data().resource_metrics
    (scope,) = resource.scope_metrics
    provider.shutdown()
    return {metric.name: metric for metric in scope.metrics}


def test_opentelemetry_gets_every_number_by_the_semantic_conventions():
    found = collected(Backend(), Backend())

    def values(name):
        return {
            tuple(
                sorted(
                    (k, v)
                    for k, v in point.attributes.items()
                    if k.startswith("ff_fast") or k == "le"
                )
            ): point.value
            for point in found[name].data.data_points
        }

    sent = found["messaging.client.sent.messages"]
    assert sent.unit == "{message}"
    assert sent.data.is_monotonic
    attributes = dict(sent.data.data_points[0].attributes)
    assert attributes["messaging.system"] == "ff_fast"
    assert (
        attributes["messaging.operation.name"] == attributes["messaging.operation.type"] == "send"
    )
    assert values("messaging.client.sent.messages") == {
        (("ff_fast.mode", "durable"),): 2,
        (("ff_fast.mode", "durable_summary"),): 4,
        (("ff_fast.mode", "best_effort"),): 6,
    }
    assert values("messaging.client.consumed.messages")[(("ff_fast.mode", "best_effort"),)] == 14
    assert values("ff_fast.tails.open") == {(): 20}
    # It adds up over processes and may shrink.
    assert found["ff_fast.tails.open"].data.is_monotonic is False
    assert values("ff_fast.batch.frames.bucket")[(("le", "4.0"),)] == 6
    assert values("ff_fast.write_to_acknowledged.sum") == {(): pytest.approx(6e-6)}
    # 18 numbers, and three counters for each of three histograms.
    assert len(found) == 18 + 9


def test_the_backends_of_later_calls_are_added():
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    meter = provider.get_meter("test")
    first = Backend()
    for backends in ([first], [first], [Backend(), Backend()]):
        instrument(*backends, meter=meter)
    (scope,) = reader.get_metrics_data().resource_metrics[0].scope_metrics
    provider.shutdown()
    (open_tails,) = [each for each in scope.metrics if each.name == "ff_fast.tails.open"]
    assert [point.value for point in open_tails.data.data_points] == [30]


@pytest.mark.parametrize("make", [PrometheusCollector, instrument])
def test_without_a_backend_there_is_nothing_to_measure(make):
    with pytest.raises(errors.InvalidInput):
        make()


@pytest.mark.parametrize(
    "program, extra",
    [
        (
            "from ff_fast.metrics import PrometheusCollector as f; name = 'prometheus_client'",
            "metrics",
        ),
        ("from ff_fast.metrics import instrument as f; name = 'opentelemetry'", "otel"),
        ("from ff_fast.tracing import trace as f; name = 'opentelemetry'", "otel"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(program, extra, run_python):
    told = run_python(
        f"{program}\n"
        "import sys; from ff_fast import MissingDependency; assert name not in sys.modules; sys.modules[name] = None\n"
        "try: f(object())\n"
        "except MissingDependency as error: print(error)"
    )
    assert f"ff_fast[{extra}]" in told

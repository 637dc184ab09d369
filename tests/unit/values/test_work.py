"""Claiming, retries, failures, usage, filters and descriptions."""

import datetime

import pytest

from ff_fast.errors import (
    InvalidCapabilities,
    InvalidInput,
    InvalidType,
    PayloadTooLarge,
)
from ff_fast.types import (
    BackendTimeouts,
    CancelFlowWait,
    CapabilitySet,
    ClaimPolicy,
    FailOutcome,
    FailureReason,
    Namespace,
    RetryPolicy,
    ScannerFilter,
    UsageDimensions,
)

from .samples import DESCRIBED

# -- claiming --------------------------------------------------------------------------------------


def test_capabilities():
    assert CapabilitySet().is_empty()
    assert CapabilitySet().csv() == b""
    some = CapabilitySet(["gpu", "cuda", "gpu"])
    assert some.tokens == ("cuda", "gpu")
    assert some.csv() == b"cuda,gpu"
    assert some == CapabilitySet({"cuda", "gpu"}) == CapabilitySet(tokens=iter(["gpu", "cuda"]))
    assert len(CapabilitySet(f"t{n}" for n in range(256)).tokens) == 256
    assert len(CapabilitySet(["x" * 4096]).csv()) == 4096


def test_bad_capabilities(subtests):
    for tokens in (
        [""],
        ["a,b"],
        ["a b"],
        ["a\n"],
        ["\0"],
        ["\x7f"],
        ["\ud800"],
        ["x" * 4097],
        ["é" * 2049],
        [f"t{n}" for n in range(257)],
    ):
        with subtests.test(f"{tokens!r:.60}"), pytest.raises(InvalidCapabilities):
            CapabilitySet(tokens)


@pytest.mark.parametrize("tokens", ["gpu", b"gpu", None, 5, [5], [b"gpu"], [None]])
def test_capabilities_of_another_type(tokens):
    with pytest.raises(InvalidType):
        CapabilitySet(tokens)


def test_durations():
    assert ClaimPolicy.immediate() == ClaimPolicy() == ClaimPolicy(max_wait=None)
    assert ClaimPolicy.with_max_wait(datetime.timedelta(milliseconds=500)).max_wait == 0.5
    assert ClaimPolicy.with_max_wait(0).max_wait == 0.0
    assert CancelFlowWait.wait_timeout(1).timeout == 1.0
    assert not CancelFlowWait.NO_WAIT.wait
    assert CancelFlowWait.WAIT_INDEFINITE.timeout is None
    assert BackendTimeouts().request is None
    assert BackendTimeouts(2).request == 2.0


def test_bad_durations(subtests):
    for value in (
        -1,
        float("nan"),
        float("inf"),
        1e9,
        10**400,
        True,
        "1",
        b"1",
        [],
        1j,
    ):
        with subtests.test(f"{value!r:.60}"):
            for make in (
                ClaimPolicy.with_max_wait,
                ClaimPolicy,
                CancelFlowWait.wait_timeout,
                BackendTimeouts,
            ):
                with pytest.raises(InvalidInput, match=r"max_wait|timeout|request"):
                    make(value)


def test_a_request_takes_time():
    with pytest.raises(InvalidInput, match="longer than 0"):
        BackendTimeouts(0)


# -- ending, usage, filters ------------------------------------------------------------------------


def test_failures():
    assert FailureReason("boom").detail is None
    assert FailureReason.with_detail("boom", b"stack").detail == b"stack"
    for bad in (5, None, b"boom", "\ud800"):
        with pytest.raises(InvalidInput):
            FailureReason(bad)
    for what, make, advice in (
        ("message", lambda n: FailureReason("x" * n), "shorten it."),
        (
            "detail",
            lambda n: FailureReason("m", b"x" * n),
            "store it elsewhere and pass a reference.",
        ),
    ):
        make(65_536)
        with pytest.raises(PayloadTooLarge, match=f"{what} has 65537 .* {advice}") as caught:
            make(65_537)
        assert caught.value.what == what
    retry, terminal = FailOutcome.RETRY_SCHEDULED(42), FailOutcome.TERMINAL_FAILED
    assert (retry.retry_scheduled, retry.delay_until_ms) == (True, 42)
    assert (terminal.retry_scheduled, terminal.delay_until_ms) == (False, None)
    for bad in ((True,), (False, 1), (1, 1), (True, True)):
        with pytest.raises(InvalidInput):
            FailOutcome(*bad)


def test_usage():
    assert UsageDimensions() == UsageDimensions(custom={})
    given_dict = {"net_bytes": 42, "a": 1}
    usage = (
        UsageDimensions(custom=given_dict)
        .with_input_tokens(10)
        .with_output_tokens(20)
        .with_wall_ms(150)
        .with_dedup_key("k1")
        .with_custom("a", 2)
    )
    assert (usage.input_tokens, usage.output_tokens, usage.wall_ms) == (10, 20, 150)
    assert list(usage.custom.items()) == [("a", 2), ("net_bytes", 42)]
    assert given_dict == {"net_bytes": 42, "a": 1}
    assert usage.dedup_key == "k1"
    assert UsageDimensions(dedup_key="").dedup_key is None


# FlowFabric accepts most of these, and then counts usage wrongly.
def test_bad_usage(subtests):
    for fields in (
        *({"input_tokens": bad} for bad in (-1, 2**53, True, 1.0, "1")),
        {"output_tokens": -1},
        {"wall_ms": -1},
        *({"custom": bad} for bad in ({"a": -1}, {"a": 1.0}, {"": 1}, {5: 1}, [("a", 1)], None)),
        {"custom": {"input_tokens": 1}},
        {"custom": {f"d{n}": 1 for n in range(62)}},
        {"dedup_key": "a\n"},
    ):
        with subtests.test(f"{fields!r:.60}"), pytest.raises(InvalidInput):
            UsageDimensions(**fields)


def test_scanner_filter():
    assert ScannerFilter() == ScannerFilter.NOOP
    assert ScannerFilter.NOOP.is_noop()
    assert ScannerFilter.NOOP.matches()
    assert ScannerFilter.NOOP.matches("t1", "v")
    both = ScannerFilter().with_namespace("tenant-a").with_instance_tag("cairn.instance_id", "i-1")
    assert isinstance(both.namespace, Namespace)
    assert both.matches(Namespace("tenant-a"), "i-1")
    for core_namespace, tag in (
        ("tenant-a", "i-2"),
        ("tenant-b", "i-1"),
        (None, "i-1"),
        ("tenant-a", None),
    ):
        assert not both.matches(core_namespace, tag)
    assert ScannerFilter(namespace="tenant-a").matches("tenant-a")
    for bad in ("", "a\n", 5):
        with pytest.raises(InvalidInput):
            ScannerFilter(namespace=bad)
    for bad in ("x", ("a.b",), ("bad", "v"), ("a.b", 5)):
        with pytest.raises(InvalidInput):
            ScannerFilter(instance_tag=bad)


# -- retries, conditions, descriptions -------------------------------------------------------------


def test_bad_retry_policies(subtests):
    for fields in (
        *({"max_retries": value} for value in (-1, 2**32, True, 1.0, "1", None)),
        *({"delay": value} for value in (-1, 31_536_001, True, "1", float("nan"))),
        *({"max_delay": value} for value in (-1, 31_536_001, True, "1", float("inf"))),
        *({"jitter_percent": value} for value in (-1, 101, True, 0.5)),
        *({"max_reclaims": value} for value in (-1, 2**32, True, 0.5)),
        *({"multiplier": value} for value in (0.99, 101, float("nan"), float("inf"), True, "2")),
        {"backoff": "fixed"},
    ):
        with subtests.test(f"{fields!r:.60}"):
            assert RetryPolicy().max_retries == 0
            with pytest.raises(InvalidInput, match=next(iter(fields))):
                RetryPolicy(**fields)


def test_a_description_is_a_copy_of_what_it_was_made_of():
    tags = {"a.b": "v"}
    value = DESCRIBED.replace(tags=tags)
    tags["a.b"] = "w"
    assert value.tags == {"a.b": "v"}
    assert value == DESCRIBED != DESCRIBED.replace(state="failed")
    assert DESCRIBED.replace(retry=RetryPolicy(3), retry_count=1).retries_left == 2

"""What a new connection checks, and which lanes are swept when: step by step, without a server."""

import types
import warnings

import hiredis
import pytest

from ff_fast import _library, errors, keys
from ff_fast._core import deployment
from ff_fast._core.deployment import Deployment

from .script import functions, run

CONTRACT, DIGEST = _library.CONTRACT, _library.digest()
COUNT = keys.PARTITIONS_CONFIG
NO_LIBRARY = hiredis.ReplyError("ERR Function not found")
NOPERM = hiredis.ReplyError("NOPERM User u has no permissions to run the 'set' command")
OOM = hiredis.ReplyError("OOM command not allowed when used memory > 'maxmemory'.")
LOADED = b"ff_fast"

ASKS, LOADS, STORES = ["ff_version"], ["FUNCTION"], ["SET", "GET"]


def version(contract=CONTRACT, digest=DIGEST, stored=b"256"):
    return [1, b"OK", b"%d" % contract, digest.encode(), *([] if stored is None else [stored])]


# -- the check of a connection --------------------------------------------------------------------------------------------

# What it is configured with, the replies; what is asked; the count that it uses, or the error.
PREPARED = {
    "all is as it should be": (None, [version()], ASKS, 256),
    "it takes the server's count": (None, [version(stored=b"64")], ASKS, 64),
    "the configured count is the server's": (64, [version(stored=b"64")], ASKS, 64),
    "another count than the configured one": (
        256,
        [version(stored=b"64")],
        ASKS,
        errors.DeploymentMismatch,
    ),
    "no library": (
        None,
        [NO_LIBRARY, LOADED, version(stored=b""), b"OK", b"256"],
        ASKS + LOADS + ASKS + STORES,
        256,
    ),
    "no library, and one that may not load it": (
        None,
        [NO_LIBRARY, NOPERM],
        ASKS + LOADS,
        errors.PermissionDenied,
    ),
    "an older contract": (
        None,
        [version(CONTRACT - 1, "old"), LOADED, version()],
        ASKS + LOADS + ASKS,
        256,
    ),
    "an older contract that knows no count": (
        None,
        [version(CONTRACT - 1, "old", None), LOADED, version(stored=b"64")],
        ASKS + LOADS + ASKS,
        64,
    ),
    "another text of the same contract": (
        None,
        [version(digest="other"), LOADED, version()],
        ASKS + LOADS + ASKS,
        256,
    ),
    "a newer contract": (None, [version(CONTRACT + 1, "new")], ASKS, errors.LibraryMismatch),
    "a newer contract that answers less": (
        None,
        [version(CONTRACT + 1, "new", None)],
        ASKS,
        errors.LibraryMismatch,
    ),
    "no count": (None, [version(stored=b""), b"OK", b"256"], ASKS + STORES, 256),
    "no count, and one is configured": (7, [version(stored=b""), b"OK", b"7"], ASKS + STORES, 7),
    "another client was first": (None, [version(stored=b""), None, b"64"], ASKS + STORES, 64),
    "another client was first, with another count": (
        7,
        [version(stored=b""), None, b"64"],
        ASKS + STORES,
        errors.DeploymentMismatch,
    ),
    "no count, and one that may not store it": (
        7,
        [version(stored=b""), NOPERM, None],
        ASKS + STORES,
        7,
    ),
    "no count, and one that may neither store nor read it": (
        None,
        [version(stored=b""), NOPERM, NOPERM],
        ASKS + STORES,
        256,
    ),
    "an older library; the count is known, to one that may not store it": (
        None,
        [version(CONTRACT - 1, "old", None), LOADED, version(stored=b""), NOPERM, b"64"],
        ASKS + LOADS + ASKS + STORES,
        64,
    ),
    "no library; another count than the configured one, to one that may not store it": (
        256,
        [NO_LIBRARY, LOADED, version(stored=b"64")],
        ASKS + LOADS + ASKS,
        errors.DeploymentMismatch,
    ),
    "no count, and no room": (
        None,
        [version(stored=b""), OOM, None],
        ASKS + STORES,
        errors.OutOfMemory,
    ),
    "a count that may not be read": (
        None,
        [version(stored=b""), None, NOPERM],
        ASKS + STORES,
        errors.PermissionDenied,
    ),
    "a count that is none": (
        None,
        [version(stored=b""), None, b"many"],
        ASKS + STORES,
        errors.Corruption,
    ),
    **{
        f"an absurd count: {count}": (None, [version(stored=count)], ASKS, errors.Corruption)
        for count in (b"0", b"-1", b"65536")
    },
    "a version that is none": (None, [b"7"], ASKS, errors.ProtocolError),
    "a server that refuses": (
        None,
        [hiredis.ReplyError("LOADING Valkey is loading the dataset in memory")],
        ASKS,
        errors.Unavailable,
    ),
    **{
        f"a node of a cluster: {text}": (
            None,
            [hiredis.ReplyError(text)],
            ASKS,
            errors.ClusterModeRequired,
        )
        for text in (
            "CROSSSLOT Keys in request don't hash to the same slot",
            "MOVED 7 127.0.0.1:7001",
            "CLUSTERDOWN Hash slot not served",
        )
    },
}


def test_a_new_connection(subtests):
    for what, (configured, replies, asks, wanted) in PREPARED.items():
        with subtests.test(f"{what!r:.60}"):
            on = Deployment(configured)
            asked, value = run(on.prepare(), replies)
            assert functions(asked) == asks
            if isinstance(wanted, int):
                assert value is True
                assert on.partitions == wanted
            else:
                assert type(value) is wanted
                assert on.partitions == (configured or 256)


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-lfu", "allkeys-random"])
def test_a_server_that_evicts_any_key_is_told_once(policy):
    on = Deployment()
    reply = [*version(), policy.encode()]
    with pytest.warns(RuntimeWarning, match=f"maxmemory-policy is {policy}.*Set it to noeviction"):
        run(on.prepare(), [reply])
    # A warning here is an error.
    run(on.prepare(), [reply])


@pytest.mark.parametrize("policy", ["", "noeviction", "volatile-lru", "volatile-ttl"])
def test_no_other_policy_is_warned_of(policy):
    assert run(Deployment().prepare(), [[*version(), policy.encode()]])[1] is True


def test_the_library_is_loaded_whole_in_place_of_another():
    asked, _ = run(Deployment().prepare(), [version(digest="other"), LOADED, version()])
    assert asked[1] == [b"FUNCTION", b"LOAD", b"REPLACE", _library.source().encode()]


def test_the_count_is_stored_only_where_there_is_none():
    asked, _ = run(Deployment(7).prepare(), [version(stored=b""), b"OK", b"7"])
    assert asked[1:] == [[b"SET", COUNT, b"7", b"NX"], [b"GET", COUNT]]


def test_the_errors_say_both_sides():
    _, mismatch = run(Deployment(7).prepare(), [version(stored=b"64")])
    assert (mismatch.server, mismatch.client) == (64, 7)
    _, newer = run(Deployment().prepare(), [version(CONTRACT + 1, "new")])
    assert (newer.server, newer.client) == (CONTRACT + 1, CONTRACT)


def test_the_count_of_the_first_connection_holds():
    on = Deployment()
    run(on.prepare(), [version(stored=b"64")])
    assert run(on.prepare(), [version(stored=b"64")])[1] is True
    _, value = run(on.prepare(), [version(stored=b"256")])
    assert isinstance(value, errors.DeploymentMismatch)
    assert on.partitions == 64


def test_whoever_may_not_load_the_library_waits_for_it_once_it_was_there():
    on = Deployment()
    run(on.prepare(), [version()])
    for replies, wanted in (
        ([NO_LIBRARY, NOPERM], errors.FunctionMissing),
        ([version(digest="other"), NOPERM], None),
        ([version(CONTRACT - 1, "old"), NOPERM], errors.PermissionDenied),
        ([NO_LIBRARY, OOM], errors.OutOfMemory),
    ):
        asked, value = run(on.prepare(), replies)
        assert functions(asked) == ASKS + LOADS
        assert value is True if wanted is None else type(value) is wanted
    _, value = run(on.prepare(), [NO_LIBRARY, NOPERM])
    assert value.retryable
    assert "may not load" in str(value)


def test_a_connection_that_fails_teaches_nothing():
    on = Deployment()
    _, value = run(on.prepare(), [errors.Unavailable()])
    assert isinstance(value, errors.Unavailable)
    assert run(on.prepare(), [version(stored=b"64")])[1] is True
    assert on.partitions == 64


# -- sweeps ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    running = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(deployment, "time", types.SimpleNamespace(monotonic=lambda: running.now))
    return running


def test_an_empty_lane_is_swept_at_once_and_then_now_and_then(clock):
    on = Deployment()
    assert on.sweep_due("lane", 5)
    assert not on.sweep_due("lane", 5)
    clock.now += 4.9
    assert not on.sweep_due("lane", 5)
    assert on.sweep_due("other", 5)
    clock.now += 0.1
    assert on.sweep_due("lane", 5)
    assert not on.sweep_due("lane", 5)


def test_a_lane_that_never_runs_dry_is_swept_too(clock):
    on = Deployment()
    assert not on.sweep_overdue("lane")
    clock.now += 29.9
    assert not on.sweep_overdue("lane")
    clock.now += 0.1
    assert on.sweep_overdue("lane")
    assert not on.sweep_overdue("lane")
    clock.now += 30
    assert on.sweep_overdue("lane")


def test_one_that_was_swept_when_it_was_empty_is_not_overdue(clock):
    on = Deployment()
    assert on.sweep_due("lane", 5)
    clock.now += 29
    assert on.sweep_due("lane", 5)
    clock.now += 1
    assert not on.sweep_overdue("lane")


def test_only_so_many_lanes_are_remembered(clock):
    on = Deployment()
    lanes = [f"lane-{number}" for number in range(deployment._LANES + 1)]
    assert all(on.sweep_due(lane, 5) for lane in lanes)
    assert len(on._sweeps) == deployment._LANES
    # The oldest was forgotten, and is swept once more; the others are remembered.
    assert not on.sweep_due(lanes[-1], 5)
    assert not on.sweep_due(lanes[1], 5)
    assert on.sweep_due(lanes[0], 5)


# -- what is wrong with the server ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy, engine, persistence, wanted",
    [
        (b"allkeys-lru", b"Valkey 9.1.2", None, ["noeviction"]),
        (b"", b"Valkey 7.2.4", [b"appendonly", b"no", b"save", b""], ["on disk"]),
        (b"", b"Redis 7.0.15", [b"appendonly", b"yes", b"save", b""], ["Redis 7.0.15"]),
        (
            b"allkeys-lfu",
            b"Redis 6.2.0",
            [b"save", b"", b"appendonly", b"no"],
            ["noeviction", "on disk", "Redis 6.2.0"],
        ),
        (b"noeviction", b"Redis 7.4.0", [b"appendonly", b"no", b"save", b"60 1"], []),
        (b"", b"Valkey 10.0.0", [], []),
        (b"", b"Valkey 9.1.2", hiredis.ReplyError("ERR unknown command 'CONFIG'"), []),
        (b"", b"unknown", NOPERM, []),
    ],
)
def test_all_that_is_wrong_with_a_server_is_told_once_in_one_text(
    policy, engine, persistence, wanted
):
    on = Deployment()
    settings = b"" if persistence is None else b"1"
    reply = [*version(), policy, engine, settings]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asked, _ = run(on.prepare(), [reply, *([] if persistence is None else [persistence])])
        run(on.prepare(), [reply])
    if persistence is not None:
        assert asked[-1] == [b"CONFIG", b"GET", b"appendonly", b"save"]
    texts = [str(each.message) for each in caught]
    assert len(texts) == bool(wanted)
    assert all(each in texts[0] for each in wanted)
    assert all(each.category is errors.DeploymentWarning for each in caught)

"""The map of a cluster's slots, from what its nodes say."""

import pytest

from ff_fast import errors, keys
from ff_fast._core import nodes
from ff_fast._core.topology import Address, Topology, address_of

ASKED = Address("seed.example", 7000)
ONE, TWO, THREE = (Address("10.0.0.1", port) for port in (7001, 7002, 7003))


def node(address, host=None, metadata=()):
    return [
        address.host.encode() if host is None else host,
        address.port,
        b"id-%d" % address.port,
        [*metadata],
    ]


def learned(*rows):
    topology = Topology()
    topology.learn([list(row) for row in rows], ASKED)
    return topology


def test_a_slot_has_a_primary_and_replicas():
    topology = learned((0, 99, node(ONE), node(THREE)), (100, 16_383, node(TWO)))
    assert topology.primary(0) == topology.primary(99) == ONE
    assert topology.replicas(99) == (THREE,)
    assert topology.primary(100) == topology.primary(16_383) == TWO
    assert topology.replicas(100) == ()
    assert topology.primaries == (ONE, TWO)
    assert topology.addresses == (ONE, TWO, THREE)
    assert topology.slots_of(ONE) == set(range(100))
    assert topology.slots_of(THREE) == set()


def test_nothing_is_known_before_the_first_answer():
    topology = Topology()
    assert not topology.known
    assert topology.primary(7) is None
    assert topology.primaries == topology.addresses == ()
    topology.learn([], ASKED)
    assert topology.known
    assert topology.primary(7) is None


def test_a_slot_that_nobody_serves_has_no_primary():
    topology = learned((0, 9, node(ONE)), (11, 16_383, node(TWO)))
    assert topology.primary(10) is None


@pytest.mark.parametrize("host", [None, b"", b"?"])
def test_a_host_that_is_not_named_is_the_one_that_was_asked(host):
    row = [0, 16_383, [host, 7001, b"id", []]]
    topology = Topology()
    topology.learn([row], ASKED)
    assert topology.primary(0) == Address("seed.example", 7001)


def test_an_unknown_name_is_replaced_by_the_address_beside_it():
    topology = learned((0, 1, node(ONE, b"?", [b"ip", b"10.9.9.9"])))
    assert topology.primary(0) == Address("10.9.9.9", 7001)


def test_a_redirect_changes_one_slot():
    topology = learned((0, 16_383, node(ONE), node(THREE)))
    topology.moved(5, TWO)
    assert topology.primary(5) == TWO
    assert topology.replicas(5) == ()
    assert topology.primary(4) == topology.primary(6) == ONE
    assert topology.primaries == (ONE, TWO)
    topology.learn([[0, 16_383, node(THREE)]], ASKED)
    assert topology.primaries == (THREE,)


GARBAGE = (
    b"OK",
    None,
    7,
    [b"OK"],
    [[0]],
    [[0, 5]],
    [[0, 5, []]],
    [[0, 5, b"host"]],
    [[0, 5, [b"host"]]],
    [[0, 5, [b"host", b"7000"]]],
    [[0, 5, [b"host", 0]]],
    [[0, 5, [b"host", 70_000]]],
    [[0, 5, [b"\xff\xfe", 7000]]],
    [[0, 5, [7, 7000]]],
    [[-1, 5, [b"host", 7000]]],
    [[0, 16_384, [b"host", 7000]]],
    [[b"0", 5, [b"host", 7000]]],
    [[True, 5, [b"host", 7000]]],
    [[0, 5, [b"host", 7000], 7]],
)


@pytest.mark.parametrize("reply", GARBAGE, ids=repr)
def test_an_answer_that_is_not_understood_changes_nothing(reply):
    topology = learned((0, 16_383, node(ONE)))
    with pytest.raises(errors.ProtocolError):
        topology.learn(reply, ASKED)
    assert topology.primary(0) == ONE


def test_addresses_in_redirects():
    assert address_of("10.0.0.1:7001", ASKED) == ONE
    assert address_of(":7001", ASKED) == Address("seed.example", 7001)
    assert address_of("?:7001", ASKED) == Address("seed.example", 7001)
    assert address_of("::1:7001", ASKED) == Address("::1", 7001)
    assert str(Address("::1", 7001)) == "[::1]:7001"
    assert str(ONE) == "10.0.0.1:7001"


def asked(heard, topology, seeds):
    return nodes.Look(topology, heard, seeds).addresses


def test_who_was_heard_of_last_is_asked_first():
    topology = learned((0, 5, node(ONE)), (6, 9, node(TWO), node(THREE)))
    assert asked({}, topology, (ASKED, ONE)) == [ONE, TWO, THREE, ASKED]
    assert asked({TWO: 1.0, THREE: 2.0}, topology, (ASKED,)) == [THREE, TWO, ONE, ASKED]
    for told in (THREE, TWO):
        topology.learn([[0, 5, node(ONE)], [6, 9, node(TWO), node(THREE)]], told)
    assert asked({TWO: 1.0, THREE: 2.0, ONE: 0.0}, topology, ()) == [ONE, THREE, TWO]


NO_CLUSTER = "ERR This instance has cluster support disabled"
# Of a Sentinel.
NO_COMMAND = "ERR unknown command 'CLUSTER', with args beginning with: 'SLOTS'"


def look(*answers):
    """What becomes of a look at a node for each of the answers, none of which tells the topology."""
    found = nodes.Look(Topology(), {}, ())
    for address, answer in zip((ONE, TWO, THREE), answers, strict=False):
        if isinstance(answer, errors.FFError):
            found.failed(address, answer)
        else:
            assert not found.answered(address, [answer])
    return found.failure()


@pytest.mark.parametrize("refusal", [NO_CLUSTER, NO_COMMAND])
def test_a_server_without_a_cluster_is_told_apart(refusal):
    error = look(errors.Unavailable(), Exception(refusal), errors.Unavailable())
    assert isinstance(error, errors.NotACluster)
    assert "connect without cluster=true" in str(error)
    assert (error.host, error.port) == TWO
    assert not error.retryable


def test_who_may_not_ask_for_the_topology_is_told():
    assert isinstance(look(Exception("NOPERM no permissions")), errors.PermissionDenied)


@pytest.mark.parametrize("silence", [errors.DeadlineExceeded(), errors.OutcomeUnknown()])
def test_a_question_for_the_topology_applies_nothing(silence):
    error = look(silence, errors.Unavailable())
    assert isinstance(error, errors.Unavailable)
    assert error.outcome is errors.Outcome.NOT_APPLIED
    assert (error.host, error.port) == ONE


@pytest.mark.parametrize("slots", [[], None])
def test_a_node_without_slots_tells_more_than_one_that_does_not_answer(slots):
    error = look(errors.DeadlineExceeded(), slots, errors.Unavailable())
    assert "still being formed" in str(error)
    assert error.retryable
    assert isinstance(look(slots, Exception("NOPERM no permissions")), errors.PermissionDenied)


def test_a_node_that_tells_ends_the_look():
    topology = Topology()
    found = nodes.Look(topology, {}, (ONE, TWO))
    assert not found.answered(ONE, [Exception(NO_CLUSTER)])
    assert found.answered(TWO, [[[0, 16_383, node(TWO)]]])
    assert topology.primary(7) == TWO


def test_a_key_for_a_node_is_in_one_of_its_slots():
    assert keys.key_in(frozenset()) is None
    for slots in ({keys.key_slot(b"ff:config:3")}, {0, 1}, set(range(8192, 16_384))):
        key = keys.key_in(slots)
        assert keys.key_slot(key) in slots
        assert key.startswith(b"ff:config:")

"""To which node a command goes, and what follows a refusal: by scripts of replies, and by a model of a cluster."""

import random
import re
from collections import defaultdict

import hiredis
import pytest

from ff_fast import errors, keys
from ff_fast._core.routing import AT_ONCE, Routing
from ff_fast._core.steps import Command, Retries, Step, command
from ff_fast._core.topology import Address, Topology
from ff_fast._hot.resp import pack_fcall
from ff_fast.types import BackendRetry

from .script import words

A, B, C = (Address("h", port) for port in (7001, 7002, 7003))
FEW = BackendRetry(number_of_retries=3, factor=1)


def refusal(text):
    return hiredis.ReplyError(text)


def key_of(slot_tag):
    return b"k{%d}" % slot_tag


def get(tag):
    return command(b"GET", key_of(tag))


def call(tag):
    return Command(key_of(tag), pack_fcall(b"ff_x", (key_of(tag),), ()))


def slot(tag):
    return keys.key_slot(key_of(tag))


def map_of(**owners):
    """A topology in which each letter has the slots of some tags; the last one has the rest."""
    topology = Topology()
    topology.learn([[0, 16_383, [b"h", 7003, b"", []]]], A)
    for name, tags in owners.items():
        for tag in tags:
            topology.moved(slot(tag), {"a": A, "b": B, "c": C}[name])
    return topology


class Drive:
    """Drives a routing by hand."""

    def __init__(self, commands, topology, *, retry=FEW, writes=True, partial=False, **options):
        self.pauses = []
        self.routing = Routing(
            Step(tuple(commands), partial=partial),
            topology,
            Retries(retry, writes=writes),
            **options,
        )

    def sends(self, *wanted):
        found = self.routing.sends()
        assert [
            (send.address, [name(each) for each in words(send.step.request)]) for send in found
        ] == [*wanted]
        self.sent = found
        return self

    def answers(self, *replies):
        for send, reply in zip(self.sent, replies, strict=True):
            if isinstance(reply, errors.FFError):
                self.routing.failed(send, reply)
            else:
                self.routing.answered(send, reply)
        self.pause = self.routing.settle()
        return self


def name(one):
    """ASKING, or the tag of the key."""
    found = re.search(rb"\{(\d+)\}", b" ".join(one))
    return int(found[1]) if found else one[0].decode()


def test_a_step_is_split_by_node_and_the_replies_are_in_order():
    drive = Drive([get(1), get(2), get(3), get(4)], map_of(a=[1, 4], b=[2]))
    drive.sends((A, [1, 4]), (B, [2]), (C, [3])).answers([b"1", b"4"], [b"2"], [b"3"])
    assert drive.pause is None
    assert drive.routing.replies() == [b"1", b"2", b"3", b"4"]


def test_a_command_without_a_slot_goes_to_any_node():
    drive = Drive([Command(b"", get(1).request)], map_of(a=[1]))
    ((send),) = drive.routing.sends()
    assert send.address in (A, C)


def test_a_redirect_is_followed_at_once_and_learned():
    topology = map_of(a=[1, 2])
    drive = Drive([get(1), get(2)], topology)
    moved = refusal(f"MOVED {slot(1)} h:7002")
    drive.sends((A, [1, 2])).answers([moved, b"2"])
    assert drive.pause == 0.0
    assert drive.routing.moved
    assert not drive.routing.in_doubt
    assert topology.primary(slot(1)) == B
    drive.sends((B, [1])).answers([b"1"])
    assert drive.pause is None
    assert drive.routing.replies() == [b"1", b"2"]


def test_a_redirect_without_a_host_leads_to_the_one_that_sent_it():
    drive = Drive([get(1)], map_of(a=[1]))
    drive.sends((A, [1])).answers([refusal(f"MOVED {slot(1)} :7009")])
    drive.sends((Address("h", 7009), [1]))


def test_what_was_refused_of_a_slot_goes_again_in_order():
    drive = Drive([get(1), get(2), get(1), get(1)], map_of(a=[1], b=[2]))
    moved = refusal(f"MOVED {slot(1)} h:7003")
    drive.sends((A, [1, 1, 1]), (B, [2])).answers([b"first", moved, moved], [b"2"])
    drive.sends((C, [1, 1])).answers([b"second", b"third"])
    assert drive.routing.replies() == [b"first", b"2", b"second", b"third"]


def test_redirects_in_a_circle_get_pauses_and_an_end():
    drive = Drive([get(1)], map_of(a=[1]))
    pauses = []
    while True:
        (send,) = drive.routing.sends()
        to = B if send.address == A else A
        drive.routing.answered(send, [refusal(f"MOVED {slot(1)} h:{to.port}")])
        pause = drive.routing.settle()
        if pause is None:
            break
        pauses.append(pause)
    assert len(pauses) == AT_ONCE + FEW.number_of_retries
    assert not any(pauses[:AT_ONCE])
    assert all(pauses[AT_ONCE:])
    (reply,) = drive.routing.replies()
    assert str(reply).startswith("MOVED")


def test_a_plain_command_follows_a_migration_with_asking_in_one_write():
    drive = Drive([get(1), get(2)], map_of(a=[1, 2]))
    drive.sends((A, [1, 2])).answers([refusal(f"ASK {slot(1)} h:7009"), b"2"])
    assert drive.pause == 0.0
    drive.sends((Address("h", 7009), ["ASKING", 1])).answers([b"OK", b"1"])
    assert drive.pause is None
    assert drive.routing.replies() == [b"1", b"2"]


def test_a_function_waits_for_the_end_of_a_migration():
    topology = map_of(a=[1])
    drive = Drive([call(1)], topology)
    drive.sends((A, [1])).answers([refusal(f"ASK {slot(1)} h:7009")])
    assert drive.pause > 0
    assert drive.routing.moved
    assert not drive.routing.in_doubt
    drive.sends((A, [1])).answers([[1, b"OK"]])
    assert drive.routing.replies() == [[1, b"OK"]]


WAITS = ("TRYAGAIN x", "CLUSTERDOWN x", "MASTERDOWN x", "LOADING x", "READONLY x", "UNBLOCKED x")


@pytest.mark.parametrize("text", WAITS)
def test_a_node_that_is_not_ready_is_asked_again_after_a_pause(text):
    drive = Drive([get(1), get(3)], map_of(a=[1]))
    drive.sends((A, [1]), (C, [3])).answers([refusal(text)], [b"3"])
    assert drive.pause > 0
    assert drive.routing.in_doubt or drive.routing.moved
    drive.sends((A, [1])).answers([b"1"])
    assert drive.routing.replies() == [b"1", b"3"]


def test_a_refusal_inside_of_a_function_stands():
    text = "READONLY You can't write script: ff_x, on @user_function:7."
    drive = Drive([call(1)], map_of(a=[1]))
    drive.sends((A, [1])).answers([refusal(text)])
    assert drive.pause is None
    assert str(drive.routing.replies()[0]) == text


def test_the_retries_of_the_call_are_the_bound_and_the_refusal_its_end():
    retries = Retries(FEW)
    for _ in range(2):
        routing = Routing(Step((get(1),)), map_of(a=[1]), retries)
        rounds = 0
        while True:
            (send,) = routing.sends()
            rounds += 1
            routing.answered(send, [refusal("CLUSTERDOWN x")])
            if routing.settle() is None:
                break
        assert rounds in (1 + FEW.number_of_retries, 1)
    assert rounds == 1
    error = errors.from_server_error(str(routing.replies()[0]))
    assert isinstance(error, errors.Unavailable)
    assert (error.host, error.port) == A
    assert str(error).endswith("The server is h:7001.")


def test_nothing_is_tried_again_after_the_deadline():
    drive = Drive([get(1)], map_of(a=[1]), until=0.0)
    drive.sends((A, [1])).answers([refusal("TRYAGAIN x")])
    assert drive.pause is None


def test_a_slot_without_an_owner_waits_for_one():
    topology = Topology()
    topology.learn([], A)
    drive = Drive([get(1)], topology)
    drive.sends().answers()
    assert drive.pause > 0
    assert drive.routing.in_doubt
    topology.moved(slot(1), B)
    drive.sends((B, [1])).answers([b"1"])
    assert drive.routing.replies() == [b"1"]


def test_a_slot_that_stays_without_an_owner_is_unavailable():
    topology = Topology()
    topology.learn([], A)
    drive = Drive([get(1)], topology, retry=BackendRetry(number_of_retries=0))
    drive.sends().answers()
    (reply,) = drive.routing.replies()
    assert isinstance(errors.from_server_error(str(reply)), errors.Unavailable)


def test_what_was_not_sent_goes_again_and_what_was_answered_does_not():
    drive = Drive([get(1), get(2)], map_of(a=[1], b=[2]))
    drive.sends((A, [1]), (B, [2])).answers(errors.Unavailable(), [b"2"])
    assert drive.pause > 0
    assert drive.routing.in_doubt
    drive.sends((A, [1])).answers([b"1"])
    assert drive.routing.replies() == [b"1", b"2"]


@pytest.mark.parametrize("writes", [True, False])
def test_the_end_of_what_was_not_sent_says_whether_a_part_was_applied(writes):
    drive = Drive(
        [get(1), get(2)],
        map_of(a=[1], b=[2]),
        writes=writes,
        retry=BackendRetry(number_of_retries=0),
    )
    drive.sends((A, [1]), (B, [2])).answers(errors.Unavailable(), [b"2"])
    assert drive.pause is None
    with pytest.raises(errors.Unavailable) as caught:
        drive.routing.replies()
    wanted = errors.Outcome.UNKNOWN if writes else errors.Outcome.NOT_APPLIED
    assert caught.value.outcome is wanted


def test_what_reaches_one_node_counts_where_the_step_says_so():
    drive = Drive([get(1), get(2), get(3)], map_of(a=[1], b=[2]), partial=True)
    drive.sends((A, [1]), (B, [2]), (C, [3]))
    drive.answers(errors.Unavailable(), errors.DeadlineExceeded(), [b"3"])
    assert drive.pause is None
    assert drive.routing.in_doubt
    first, second, third = drive.routing.replies()
    assert isinstance(first, errors.Unavailable)
    assert isinstance(second, errors.DeadlineExceeded)
    assert third == b"3"


def test_a_lost_connection_is_told_with_the_worst_outcome():
    drive = Drive([get(1), get(2), get(3)], map_of(a=[1], b=[2]))
    drive.sends((A, [1]), (B, [2]), (C, [3]))
    drive.answers(errors.AuthenticationFailed(), errors.OutcomeUnknown(), [b"3"])
    assert drive.pause is None
    assert drive.routing.in_doubt
    with pytest.raises(errors.OutcomeUnknown):
        drive.routing.replies()


def test_a_node_without_the_library_gets_it_and_the_call_goes_again():
    drive = Drive([call(1), call(2)], map_of(a=[1], b=[2]))
    drive.sends((A, [1]), (B, [2]))
    (first, second) = drive.sent
    drive.routing.answered(first, [refusal("ERR Function not found")])
    drive.routing.answered(second, [[1, b"2"]])
    assert drive.routing.missing == {A}
    drive.routing.loaded(A)
    assert drive.routing.settle() == 0.0
    drive.sends((A, [1])).answers([[1, b"1"]])
    assert drive.routing.replies() == [[1, b"1"], [1, b"2"]]


def test_a_library_that_stays_missing_is_told():
    drive = Drive([call(1)], map_of(a=[1]))
    for _ in range(2):
        drive.sends((A, [1]))
        drive.routing.answered(drive.sent[0], [refusal("ERR Function not found")])
        for address in list(drive.routing.missing):
            drive.routing.loaded(address)
        pause = drive.routing.settle()
    assert pause is None
    assert isinstance(
        errors.from_server_error(str(drive.routing.replies()[0])), errors.FunctionMissing
    )


@pytest.mark.parametrize(
    "error, again", [(errors.NotPrimary(), True), (errors.FunctionMissing(), False)]
)
def test_a_library_that_cannot_be_loaded(error, again):
    drive = Drive([call(1)], map_of(a=[1]))
    drive.sends((A, [1]))
    drive.routing.answered(drive.sent[0], [refusal("ERR Function not found")])
    drive.routing.loaded(A, error)
    pause = drive.routing.settle()
    if again:
        assert pause > 0
        drive.sends((A, [1])).answers([[1, b"OK"]])
        assert drive.routing.replies() == [[1, b"OK"]]
    else:
        assert pause is None
        with pytest.raises(errors.FunctionMissing):
            drive.routing.replies()


def with_replicas():
    topology = Topology()
    nodes = [[b"h", port, b"", []] for port in (7001, 7002)]
    topology.learn([[0, 16_383, *nodes]], A)
    return topology


def test_a_replica_answers_where_the_caller_allows_it():
    drive = Drive([get(1)], with_replicas(), replicas=True)
    drive.sends((B, [1])).answers([b"1"])
    assert drive.sent[0].replica
    assert drive.routing.replies() == [b"1"]
    Drive([get(1)], with_replicas()).sends((A, [1]))


def test_what_may_block_goes_to_the_primary():
    routing = Routing(Step((get(1),), block_s=1.0), with_replicas(), Retries(FEW), replicas=True)
    assert [send.address for send in routing.sends()] == [A]


@pytest.mark.parametrize(
    "answer",
    [
        [refusal(f"MOVED {slot(1)} h:7001")],
        [refusal("LOADING x")],
        [refusal("MASTERDOWN x")],
        [refusal("ERR Function not found")],
        errors.OutcomeUnknown(),
        errors.Unavailable(),
    ],
    ids=repr,
)
def test_the_primary_answers_for_a_replica_that_does_not(answer):
    drive = Drive([get(1)], with_replicas(), replicas=True, writes=False)
    drive.sends((B, [1])).answers(answer)
    assert drive.pause == 0.0
    drive.sends((A, [1])).answers([b"1"])
    assert drive.routing.replies() == [b"1"]


class Cluster:
    """A model: nodes with slots and logs, which refuse what is not theirs, and move slots at any time."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.addresses = [A, B, C]
        self.tags = range(12)
        self.owner = {slot(tag): self.random.choice(self.addresses) for tag in self.tags}
        self.applied = defaultdict(list)
        self.without_library = set(self.random.sample(self.addresses, 1))
        self.topology = Topology()
        self.learn()

    def learn(self):
        rows = [[at, at, [b"h", owner.port, b"", []]] for at, owner in self.owner.items()]
        self.topology.learn(rows, A)

    def change(self):
        for at in self.owner:
            if self.random.random() < 0.3:
                self.owner[at] = self.random.choice(self.addresses)

    def execute(self, send):
        """The replies; the owner of a slot may change between two commands. None where the connection is lost."""
        replies = []
        if self.random.random() < 0.1:
            raise errors.Unavailable
        for one in send.step.commands:
            if not one.key:
                replies.append(b"OK")
                continue
            if self.random.random() < 0.1:
                self.change()
            chance = self.random.random()
            owner = self.owner[one.slot]
            if owner != send.address:
                replies.append(refusal(f"MOVED {one.slot} h:{owner.port}"))
            elif chance < 0.1:
                replies.append(refusal(self.random.choice(WAITS)))
            elif send.address in self.without_library:
                replies.append(refusal("ERR Function not found"))
            else:
                argument = words(one.request)[0][-1]
                self.applied[one.slot].append(argument)
                replies.append([1, argument])
        return replies


@pytest.mark.parametrize("seed", range(60))
def test_every_command_is_applied_once_in_whatever_way_the_slots_move(seed):
    cluster = Cluster(seed)
    chosen = [cluster.random.choice(cluster.tags) for _ in range(20)]
    commands = [
        Command(key_of(tag), pack_fcall(b"ff_x", (key_of(tag),), (b"%d" % number,)))
        for number, tag in enumerate(chosen)
    ]
    routing = Routing(
        Step(commands), cluster.topology, Retries(BackendRetry(number_of_retries=500, factor=0))
    )
    while True:
        for send in routing.sends():
            try:
                routing.answered(send, cluster.execute(send))
            except errors.FFError as error:
                routing.failed(send, error)
        for address in list(routing.missing):
            cluster.without_library.discard(address)
            routing.loaded(address)
        if routing.settle() is None:
            break
        if routing.in_doubt:
            cluster.learn()
    assert routing.replies() == [[1, b"%d" % number] for number in range(20)]
    for tag in set(chosen):
        mine = [b"%d" % number for number, each in enumerate(chosen) if each == tag]
        assert sorted(cluster.applied[slot(tag)]) == sorted(mine)

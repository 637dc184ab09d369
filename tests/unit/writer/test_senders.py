"""Writers of a slot whose node is being looked for, in the asyncio shell, over nodes without sockets."""

import asyncio
from types import SimpleNamespace

from ff_fast import BackendConfig
from ff_fast._aio.writers import Senders
from ff_fast.errors import OutcomeUnknown

from ...waiting import wait_until_async
from .core import Shell

SLOT = 7


class Connection:
    closed = False
    writable = True

    def __init__(self):
        self.receivers = []
        self.sent = []

    def send(self, message, calls):
        assert message
        self.receivers += calls
        self.sent += calls


class Node:
    stopped = False

    def __init__(self, port):
        async def connected():
            return self.shared.connection

        self.address = ("node", port)
        self.shared = SimpleNamespace(
            connection=Connection(), connected=connected, watch_soon=lambda: None, closing=False
        )


class Nodes:
    """Those of a cluster, of which *at* has the slot."""

    topology = object()
    stopped = False

    def __init__(self, at):
        self.at = at

    def of(self, slot):
        assert slot == SLOT
        return self.at

    def failed(self, node, error):
        pass

    async def settled(self):
        pass

    def spawn(self, work):
        return asyncio.ensure_future(work)


async def in_flight(node):
    return node.shared.connection.sent


def test_frames_that_are_ready_at_a_node_that_dies_while_their_slot_is_looked_for_go_to_the_next():
    asyncio.run(_moved())


async def _moved():
    old, new = Node(1), Node(2)
    nodes = Nodes(old)
    senders = Senders(nodes, lambda: None, BackendConfig.valkey("node", 1))
    home = senders.home(SLOT)
    writer = Shell(home=home)
    writer.write(b"1")
    await wait_until_async(lambda: in_flight(old))
    connection = old.shared.connection
    # What follows is ready there too, and the slot has moved, as another writer is told.
    connection.writable = False
    for _ in range(300):
        writer.write(b"more")
    sender = home.outbox
    senders.wait(home, sender, OutcomeUnknown())
    assert home.outbox is home.waiting
    assert sender.ready
    nodes.at = new
    connection.closed = True
    for call in connection.sent:
        call.lost()
    sender._on_lost()
    await wait_until_async(lambda: in_flight(new))
    assert not sender.ready

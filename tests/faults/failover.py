"""A primary with a replica: a link between them that can stall, and an address that moves to the replica."""

import contextlib
import os
import signal

import redis

from ff_fast.embedded import EmbeddedServer

from ..conftest import PROMPT, connect_raw
from ..waiting import wait_until
from .chaos import DOWN, ChaosProxy


class Failover:
    """Two servers. Clients connect to :attr:`url`, which leads to the primary, and after a failover to the replica.

    Attributes:
        primary, replica: The servers.
        link: Proxy on the way of the replication.
        front: Proxy of the clients.
    """

    def __init__(self, **config):
        # Every other way of the first synchronisation waits for a timer of one second.
        quick = {"repl_diskless_sync": False, "repl_diskless_load": "on-empty-db"}
        config = {**quick, **PROMPT, **config}
        with contextlib.ExitStack() as stack:
            self.primary = stack.enter_context(EmbeddedServer(debug_command=True, **config))
            self.replica = stack.enter_context(EmbeddedServer(debug_command=True, **config))
            self.link = stack.enter_context(ChaosProxy(self.primary.url))
            self.front = stack.enter_context(ChaosProxy(self.primary.url))
            self._clients = [
                stack.enter_context(connect_raw(server.url))
                for server in (self.primary, self.replica)
            ]
            # The command connects at once; a directive of the configuration would wait for a timer.
            self._clients[1].replicaof(*self.link.address)
            wait_until(self._synchronised)
            self._stack = stack.pop_all()

    @property
    def url(self):
        """Address of whichever server is the primary."""
        return self.front.url

    def _synchronised(self):
        primary, replica = (client.info("replication") for client in self._clients)
        return (
            replica["master_link_status"] == "up"
            and replica["slave_repl_offset"] == primary["master_repl_offset"]
        )

    def replicate(self):
        """Wait until the replica has everything that the primary has."""
        wait_until(self._synchronised)

    def stall(self, slot=None):
        """Replicate what there is, and nothing from here on; the primary does not notice."""
        self.replicate()
        self.link.hold(DOWN)

    def promote(self):
        """Kill the primary, make the replica the primary, and move the address to it."""
        os.kill(self.primary.pid, signal.SIGKILL)
        # What waits on the stalled link must not arrive any more.
        self.link.close()
        self._clients[1].replicaof("NO", "ONE")
        self.front.lead_to(self.replica.url)

    def close(self):
        self._stack.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Past:
    """An earlier state of one execution, to which :meth:`come` takes it back, as the promotion of a late replica does."""

    def __init__(self, raw, eid):
        self._raw = raw
        self._pattern = f"*{eid.rpartition(':')[2]}*"
        self._keys = {key: raw.dump(key) for key in raw.keys(self._pattern)}

    def come(self, *, cut=True):
        """With *cut* the connections of clients end too."""
        with self._raw.pipeline(transaction=True) as pipe:
            for key in self._raw.keys(self._pattern):
                pipe.delete(key)
            for key, value in self._keys.items():
                pipe.restore(key, 0, value)
            pipe.execute()
        if not cut:
            return
        with contextlib.suppress(redis.ConnectionError):
            self._raw.client_kill_filter(_type="normal", skipme=True)

"""Servers that are moved, killed and brought back: a cluster, or a primary with a replica behind one address."""

import contextlib
import os
import signal

import redis

from ff_fast.embedded import EmbeddedCluster, EmbeddedServer

from ...faults.chaos import ChaosProxy
from ...waiting import wait_until
from ..sites import SentinelSite, ask, cut_off, let_follow

PARTITIONS = 256
# What survives a SIGKILL, which is all that a server here dies of.
DURABLE = {"appendonly": True, "appendfsync": "always"}


class ClusterSite:
    """A cluster, with replicas if the scenario needs them."""

    partitions = PARTITIONS

    def __init__(self, *, replicas=0, durable=False):
        self.has_replicas = replicas > 0
        self.cluster = EmbeddedCluster(3, replicas, **(DURABLE if durable else {}))
        self.url = self.cluster.url
        self._fronts = {}

    def put_fronts(self):
        """Put a proxy before each node, which clients are told of in place of the node."""
        for node in self.cluster.nodes:
            front = self._fronts[node] = ChaosProxy("valkey://{}:{}".format(*node.address))
            node.command("CONFIG", "SET", "cluster-announce-port", front.address[1])
        ports = {front.address[1] for front in self._fronts.values()}
        for node in self.cluster.nodes:
            wait_until(lambda node=node: _ports(node) == ports, 30)
        self.url = "valkey://{}/?cluster=true".format(
            ",".join("{}:{}".format(*front.address) for front in self._fronts.values())
        )

    def front_of(self, node):
        return self._fronts[node]

    def heal(self):
        for front in self._fronts.values():
            front.release()
            front.refuse()
            front.listen()
        for node in self.cluster.nodes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(node.pid, signal.SIGCONT)
            if not node.running:
                node.restart()
        for node in self.cluster.nodes:
            let_follow(node)
        self.cluster.wait_until_stable()

    def close(self):
        for front in self._fronts.values():
            front.release()
            front.close()
        self.cluster.stop()


def _ports(node):
    return {owner[1] for slots in node.command("CLUSTER", "SLOTS") for owner in slots[2:3]}


class SentinelsSite(SentinelSite):
    """A primary with a replica under Sentinels, which promote it by themselves."""

    partitions = PARTITIONS
    has_replicas = True

    def cut_off(self):
        primary = self.primary
        (replica,) = (each for each in self.servers if each is not primary)
        cut_off(primary, replica)

    def killed(self):
        """The primary dies, and comes back as a replica when the other one has taken over."""
        killed = self.kill()
        self.wait_for_another(killed)
        let_follow(self.primary)
        killed.restart()
        wait_until(self.replicated, 30)

    def planned(self):
        self.failover()
        wait_until(self.replicated, 30)

    def heal(self):
        pass


class PairSite:
    """A primary and its replica. Clients connect to an address that leads to whichever is the primary."""

    partitions = PARTITIONS
    has_replicas = True

    def __init__(self):
        quick = {"repl_diskless_sync": False, "repl_diskless_load": "on-empty-db"}
        with contextlib.ExitStack() as stack:
            self.primary, self.replica = (
                stack.enter_context(EmbeddedServer(tcp=True, **quick)) for _ in range(2)
            )
            self._front = stack.enter_context(ChaosProxy(self.primary.url))
            self._follow()
            self._stack = stack.pop_all()
        self.url = self._front.url

    def _follow(self):
        host, port = self.primary.url.removeprefix("valkey://").split(":")
        ask(self.replica, "REPLICAOF", host, port)
        wait_until(self._synchronised, 30)

    def _synchronised(self):
        info = ask(self.replica, "INFO", "replication")
        return info.get("master_link_status") == "up"

    def planned(self):
        """``FAILOVER``: the replica has everything before it takes over."""
        ask(self.primary, "FAILOVER")
        wait_until(lambda: self._role(self.replica) == "master", 30)
        self.primary, self.replica = self.replica, self.primary
        self._front.lead_to(self.primary.url)
        wait_until(self._synchronised, 30)

    def _role(self, server):
        with contextlib.suppress(redis.RedisError):
            return ask(server, "INFO", "replication")["role"]

    def cut_off(self):
        cut_off(self.primary, self.replica)

    def killed(self):
        """The primary dies, the replica takes over, and the dead one comes back as a replica."""
        os.kill(self.primary.pid, signal.SIGKILL)
        wait_until(lambda: not self.primary.running)
        ask(self.replica, "REPLICAOF", "NO", "ONE")
        let_follow(self.replica)
        self.primary, self.replica = self.replica, self.primary
        self._front.lead_to(self.primary.url)
        self.replica.restart()
        self._follow()

    def heal(self):
        pass

    def close(self):
        self._stack.close()

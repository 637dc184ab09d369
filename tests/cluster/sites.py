"""Deployments of several servers: a cluster whose links can stall, and a primary with replicas under Sentinels."""

import contextlib
import os
import signal
import tempfile
import urllib.parse
from pathlib import Path

import redis

from ff_fast import embedded
from ff_fast.embedded import EmbeddedCluster, EmbeddedServer

from ..conftest import PROMPT, connect_raw
from ..waiting import wait_until

QUICK = {"repl_diskless_sync": False, "repl_diskless_load": "on-empty-db", **PROMPT}
"""Every other way of the first synchronisation waits for a timer of one second."""

SERVICE = "deployment"
"""Name under which Sentinels know the primary."""


def port_of(url):
    return urllib.parse.urlsplit(url).port


def cluster(primaries=3, replicas=0, **config):
    """An embedded cluster for tests."""
    return EmbeddedCluster(primaries, replicas, debug_command=True, **{**PROMPT, **config})


def ask(server, *command):
    """Send one command to a server over a connection of its own."""
    with connect_raw(server.url) as client:
        return client.execute_command(*command)


def cut_off(primary, replica):
    """Let a replica have what there is, and nothing from here on; the primary goes on."""
    wait_until(lambda: _has_all(primary, replica))
    ask(replica, "CONFIG", "SET", "masteruser", "nobody", "masterauth", "no-such-password")
    ask(primary, "CLIENT", "KILL", "TYPE", "replica")


def let_follow(replica):
    """Undo `cut_off`."""
    ask(replica, "CONFIG", "SET", "masteruser", "", "masterauth", "")


def _has_all(primary, replica):
    offset = _replication(primary)["master_repl_offset"]
    told = _replication(replica)
    return told["master_link_status"] == "up" and told["slave_repl_offset"] >= offset


class ClusterFailover:
    """A cluster of which one primary dies behind a link that has stalled: the face of ``faults.failover.Failover``.

    Attributes:
        cluster: Three primaries with a replica each, or what is given.
    """

    def __init__(self, cluster):
        self.cluster = cluster
        self.primary = self.replica = None

    @property
    def url(self):
        return self.cluster.url

    def stall(self, slot):
        """Replicate what there is in the shard of a slot, and nothing from here on; the primary does not notice."""
        self.primary = self.cluster.node_of(slot)
        (self.replica,) = self.cluster.replicas_of(self.primary)
        cut_off(self.primary, self.replica)

    def promote(self):
        """Kill the primary, and make the replica the primary: it takes over by itself."""
        self.cluster.kill(self.primary)
        self.replica.command("CLUSTER", "FAILOVER", "TAKEOVER")
        wait_until(lambda: _replication(self.replica)["role"] == "master")

    def heal(self):
        """Bring the old primary back as a replica of the new one."""
        if self.replica is not None:
            let_follow(self.replica)
            self.cluster.restart(self.primary)
            self.primary = self.replica = None

    def close(self):
        self.heal()


class Sentinels:
    """Three Sentinels that watch a primary: an instance of `EmbeddedServer` on TCP, with its replicas.

    Attributes:
        servers: The Sentinels.
        url: ``valkey+sentinel://h1,h2,h3/service``.
    """

    def __init__(self, primary_port, replicas, *, down_after_ms=500, count=3, **config):
        self.servers = []
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            # The name of the program makes it a Sentinel.
            program = folder / "valkey-sentinel"
            program.symlink_to(embedded._bundled())
            for _ in range(count):
                server = EmbeddedServer(executable=program, tcp=True, **config)
                self.servers.append(stack.enter_context(server))
            self._clients = [
                stack.enter_context(connect_raw(server.url)) for server in self.servers
            ]
            for i, client in enumerate(self._clients):
                # So that it finds the others soon.
                self._set(client, info=50, ping=50, publish=50)
                client.execute_command(*("SENTINEL MONITOR", SERVICE, "127.0.0.1", primary_port, 1))
                client.execute_command(
                    # One by one, each alone: votes that are split would cost twice the failover-timeout.
                    *(
                        "SENTINEL SET",
                        SERVICE,
                        "down-after-milliseconds",
                        down_after_ms * (1 + 4 * i),
                    ),
                    *("failover-timeout", 2500),
                )
            wait_until(lambda: all(self._knows(each, replicas) for each in self._clients))
            for client in self._clients:
                # What is older than five pings is not trusted, and while the primary is down a Sentinel asks a
                # replica only once a second.
                self._set(client, info=300, ping=300, ask=100)
            self.correct_after(1.6)
            self._stack = stack.pop_all()

    def _knows(self, client, replicas):
        told = client.sentinel_master(SERVICE)
        return (told["num-slaves"], told["num-other-sentinels"]) == (
            replicas,
            len(self.servers) - 1,
        )

    @property
    def url(self):
        hosts = ",".join(f"127.0.0.1:{port_of(server.url)}" for server in self.servers)
        return f"valkey+sentinel://{hosts}/{SERVICE}"

    def correct_after(self, seconds):
        """How long a Sentinel bears a wrong role or a wrong primary of a server before it sets it right.

        Too short a time undoes the promotion that another Sentinel has just begun.
        """
        for client in self._clients:
            self._set(client, publish=int(seconds * 1000 / 4))

    @staticmethod
    def _set(client, **periods):
        """Change periods, in milliseconds, that are a second or more by default."""
        for name, value in periods.items():
            client.execute_command("SENTINEL DEBUG", f"{name}-period", value)

    def primary_ports(self):
        """What each Sentinel that lives says is the primary's port."""
        return [
            int(client.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", SERVICE)[1])
            for client, server in zip(self._clients, self.servers, strict=True)
            if server.running
        ]

    def failover(self):
        """Ask for a planned failover: ``SENTINEL FAILOVER``."""
        try:
            self._clients[0].execute_command("SENTINEL FAILOVER", SERVICE)
        except redis.ResponseError as error:
            # It has not heard from the replica yet, since that became one; or one is under way.
            if not str(error).startswith(("NOGOODSLAVE", "INPROG")):
                raise

    def close(self):
        self._stack.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class SentinelSite:
    """A primary and a replica on TCP, watched by three Sentinels.

    Attributes:
        servers: Both; :attr:`primary` says which one the Sentinels name.
        sentinels: The `Sentinels`.
        url: That of the Sentinels.
    """

    def __init__(self, replicas=1, **config):
        with contextlib.ExitStack() as stack:
            options = {**QUICK, **config}
            self.servers = [
                stack.enter_context(EmbeddedServer(tcp=True, debug_command=True, **options))
                for _ in range(1 + replicas)
            ]
            port = port_of(self.servers[0].url)
            for server in self.servers[1:]:
                with connect_raw(server.url) as client:
                    client.replicaof("127.0.0.1", port)
            wait_until(self.replicated)
            self.sentinels = stack.enter_context(Sentinels(port, replicas))
            self._stack = stack.pop_all()

    @property
    def url(self):
        return self.sentinels.url

    @property
    def primary(self):
        """The server that all Sentinels name, once they agree."""
        ports = wait_until(
            lambda: len(set(self.sentinels.primary_ports())) == 1 and self.sentinels.primary_ports()
        )
        return next(each for each in self.servers if port_of(each.url) == ports[0])

    def replicated(self):
        """Whether every living replica has everything that its primary has."""
        told = [_replication(server) for server in self.servers if server.running]
        offsets = [each["master_repl_offset"] for each in told if each["role"] == "master"]
        return len(offsets) == 1 and all(
            each["master_link_status"] == "up" and each["slave_repl_offset"] == offsets[0]
            for each in told
            if each["role"] == "slave"
        )

    def stall(self, slot=None):
        """Replicate what there is, and nothing from here on; neither the primary nor a Sentinel notices."""
        primary = self.primary
        for server in self.servers:
            if server is not primary:
                cut_off(primary, server)

    def promote(self):
        """Kill the primary, and wait until the Sentinels have promoted the replica."""
        killed = self.kill()
        self.wait_for_another(killed)
        let_follow(self.primary)

    def kill(self):
        """Kill the primary; return it. The Sentinels promote a replica by themselves."""
        killed = self.primary
        os.kill(killed.pid, signal.SIGKILL)
        wait_until(lambda: not killed.running)
        return killed

    def failover(self):
        """A planned failover, until all Sentinels name the other server and it accepts writes."""
        before = self.primary

        def switched():
            # One that finds no good replica is not tried again.
            self.sentinels.failover()
            return self.primary is not before

        wait_until(switched)
        self.wait_for_another(before)

    def wait_for_another(self, before):
        """Wait until all Sentinels name another primary than *before*, and it accepts writes."""
        # After one that does not succeed they wait for twice their failover-timeout.
        wait_until(lambda: self.primary is not before, deadline_s=30)
        wait_until(lambda: _replication(self.primary)["role"] == "master")

    def close(self):
        self._stack.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _replication(server):
    """What ``INFO replication`` says; nothing while a Sentinel cuts the connections of clients."""
    with connect_raw(server.url) as client, contextlib.suppress(redis.ConnectionError):
        return client.info("replication")
    return {"role": None}

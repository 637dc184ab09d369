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
            for client in self._clients:
                # In milliseconds; all are a second or more by default.
                for name in ("info-period", "ping-period", "ask-period", "publish-period"):
                    client.execute_command("SENTINEL DEBUG", name, 50)
                client.execute_command(
                    *("SENTINEL MONITOR", SERVICE, "127.0.0.1", primary_port, count // 2 + 1)
                )
                client.execute_command(
                    *("SENTINEL SET", SERVICE, "down-after-milliseconds", down_after_ms),
                    *("failover-timeout", 2500),
                )
            wait_until(lambda: all(self._knows(each, replicas) for each in self._clients))
            self.correct_after(1.6)
            self._stack = stack.pop_all()

    def _knows(self, client, replicas):
        told = client.execute_command("SENTINEL MASTER", SERVICE)
        told = told if isinstance(told, dict) else dict(zip(told[::2], told[1::2], strict=True))
        told = {_text(key): _text(value) for key, value in told.items()}
        return (
            int(told["num-slaves"]) == replicas
            and int(told["num-other-sentinels"]) == len(self.servers) - 1
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
            client.execute_command("SENTINEL DEBUG", "publish-period", int(seconds * 1000 / 4))

    def primary_ports(self):
        """What each Sentinel that lives says is the primary's port."""
        return [
            int(client.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", SERVICE)[1])
            for client, server in zip(self._clients, self.servers, strict=True)
            if server.running
        ]

    def failover(self):
        """``SENTINEL FAILOVER``: a planned one, without waiting for its end."""
        wait_until(self._failover)

    def _failover(self):
        try:
            return self._clients[0].execute_command("SENTINEL FAILOVER", SERVICE)
        except redis.ResponseError as error:
            # It has not heard from the replica since that became one.
            if "NOGOODSLAVE" not in str(error):
                raise
            return None

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

    def kill(self):
        """Kill the primary; return it. The Sentinels promote a replica by themselves."""
        killed = self.primary
        os.kill(killed.pid, signal.SIGKILL)
        wait_until(lambda: not killed.running)
        return killed

    def failover(self):
        """A planned failover, until all Sentinels name the other server and it accepts writes."""
        before = self.primary
        self.sentinels.failover()
        self.wait_for_another(before)

    def wait_for_another(self, before):
        # Sentinels that vote for two of them try again after twice their failover-timeout.
        wait_until(lambda: self.primary is not before, deadline_s=30)
        wait_until(lambda: _replication(self.primary)["role"] == "master")

    def close(self):
        self._stack.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _replication(server):
    # A Sentinel cuts the connections of clients: each look has its own.
    with connect_raw(server.url) as client:
        return client.info("replication")


def _text(value):
    return value.decode() if isinstance(value, bytes) else value

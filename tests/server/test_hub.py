"""The connection over which all readers of a backend hear of pushes: against a real server, by raw SPUBLISH."""

import uuid

import pytest

from ff_fast import _transport
from ff_fast._core import hub as hub_core
from ff_fast.embedded import EmbeddedServer
from ff_fast.errors import PermissionDenied, Unavailable, UnsupportedServer

from ..conftest import connect_raw
from ..router import node_of
from ..shells import KINDS, Opener, config


class Heard:
    """A listener that notes everything."""

    def __init__(self):
        self.messages = []
        self.doubts = []
        self.errors = []

    def told(self, message):
        self.messages.append(message)

    def doubt(self, subscribed):
        self.doubts.append(subscribed)

    def failed(self, error):
        self.errors.append(error)


@pytest.fixture(params=KINDS)
def connect(request):
    opener = Opener(request.param)
    yield opener
    opener.close()


def channel():
    return f"ff:stream:{{fp:1}}:{uuid.uuid4()}:0:head".encode()


def listened(backend, name, listener=None):
    listener = listener or Heard()
    backend._hub.listen(name, listener)
    backend.wait_until(lambda: listener.doubts[-1:] == [True])
    return listener


def left(backend, name, listener):
    """Let a listener leave. Orders are carried out in turn, and a push may come before."""
    backend._hub.unlisten(name, listener)
    listened(backend, channel())


def readers(raw):
    return [each for each in raw.client_list() if each["name"] == "ff_fast:readers"]


def mine(raw, name):
    """How many connections have subscribed to a channel."""
    return raw.execute_command("PUBSUB", "SHARDNUMSUB", name)[1]


def published(backend, raw, name, listener, message):
    raw.execute_command("SPUBLISH", name, message)
    backend.wait_until(lambda: listener.messages[-1:] == [message])


def test_every_listener_of_a_channel_hears_its_pushes_in_order(connect, server, raw):
    backend = connect(server.url)
    one, other = channel(), channel()
    first, second, apart = (
        listened(backend, one),
        listened(backend, one),
        listened(backend, other),
    )
    with raw.pipeline(transaction=False) as pipe:
        for i in range(500):
            pipe.execute_command("SPUBLISH", one, b"%d" % i)
        pipe.execute_command("SPUBLISH", other, b"apart")
        pipe.execute_command("SPUBLISH", channel(), b"nobody")
        pipe.execute()
    backend.wait_until(lambda: apart.messages)
    assert first.messages == second.messages == [b"%d" % i for i in range(500)]
    assert apart.messages == [b"apart"]
    assert first.doubts == [True]


def test_thousands_of_channels_take_one_connection_and_few_commands(connect, raw, server):
    with EmbeddedServer() as own, connect_raw(own.url) as client:
        backend = connect(own.url)
        heard = {channel(): Heard() for _ in range(3000)}
        for name, listener in heard.items():
            backend._hub.listen(name, listener)
        backend.wait_until(lambda: all(each.doubts for each in heard.values()))
        assert len(readers(client)) == 1
        # What is asked for while a request is on its way goes with the next one.
        assert client.info("commandstats")["cmdstat_ssubscribe"]["calls"] <= 3000 // 5
        for name, listener in list(heard.items())[:10]:
            published(backend, client, name, listener, b"hello")


def test_a_channel_is_unsubscribed_soon_after_its_last_listener_left(
    connect, server, raw, monkeypatch
):
    monkeypatch.setattr(hub_core, "LINGER_S", 0.2)
    backend = connect(server.url)
    name = channel()
    first, second = listened(backend, name), listened(backend, name)
    left(backend, name, first)
    published(backend, raw, name, second, b"one")
    backend._hub.unlisten(name, second)
    back = listened(backend, name)
    assert mine(raw, name) == 1
    published(backend, raw, name, back, b"two")
    assert (first.messages, second.messages) == ([], [b"one"])
    backend._hub.unlisten(name, back)
    backend.wait_until(lambda: mine(raw, name) == 0)
    again = listened(backend, name)
    published(backend, raw, name, again, b"three")
    assert back.messages == [b"two"]


def test_a_killed_connection_is_made_again_and_its_listeners_hear_of_it(connect, raw, server):
    backend = connect(server.url)
    name = channel()
    # An id of a connection is one of its own node.
    raw = node_of(raw, name)
    listener = listened(backend, name)
    for i in range(20):
        listener.doubts.clear()
        raw.client_kill_filter(_id=readers_of(raw, name))
        backend.wait_until(lambda: listener.doubts == [False, True])
        published(backend, raw, name, listener, b"%d" % i)
    assert listener.errors == []


def readers_of(raw, name):
    assert mine(raw, name) == 1
    (found,) = [each["id"] for each in readers(raw) if int(each["ssub"]) > 0]
    return found


def test_a_restarted_server_is_found_again(connect):
    with EmbeddedServer(tcp=True) as own:
        backend = connect(own.url)
        name = channel()
        listener = listened(backend, name)
        own.restart()
        backend.wait_until(lambda: listener.doubts == [True, False, True], 20)
        with connect_raw(own.url) as client:
            published(backend, client, name, listener, b"again")


def test_listeners_fail_with_the_error_of_connecting_when_the_retries_are_used_up(connect):
    with EmbeddedServer(tcp=True) as own:
        backend = connect(config(own.url, retries=2))
        name = channel()
        listener = listened(backend, name)
    backend.wait_until(lambda: listener.errors)
    assert isinstance(listener.errors[0], Unavailable)
    assert listener.doubts == [True, False]
    later = Heard()
    backend._hub.listen(name, later)
    backend.wait_until(lambda: later.errors)


def test_a_closed_backend_fails_its_listeners(connect, server):
    backend = connect(server.url)
    listener = listened(backend, channel())
    backend.close()
    assert isinstance(listener.errors[0], Unavailable)


def test_a_connection_without_channels_is_closed(connect, server, raw, monkeypatch):
    monkeypatch.setattr(_transport, "MAX_IDLE_S", 0.2)
    monkeypatch.setattr(hub_core, "LINGER_S", 0.1)
    with EmbeddedServer() as own, connect_raw(own.url) as client:
        backend = connect(own.url)
        name = channel()
        listener = listened(backend, name)
        assert len(readers(client)) == 1
        backend._hub.unlisten(name, listener)
        backend.wait_until(lambda: not readers(client))
        published(backend, client, name, listened(backend, name), b"back")


@pytest.mark.standalone("it looks inside the hub of one server")
def test_a_subscription_that_the_server_ends_is_made_again(connect, server, raw):
    """As where a slot moves: the server says so without being asked."""
    backend = connect(server.url)
    name = channel()
    listener = listened(backend, name)
    backend._hub._core.received([b"sunsubscribe", name, 0], due=False)
    assert listener.doubts == [True, False]
    backend._hub.listen(channel(), Heard())
    backend.wait_until(lambda: listener.doubts == [True, False, True])


def test_a_server_that_becomes_a_replica_is_left_for_what_is_at_its_address(connect):
    """It keeps the connection, and what its primary does not replicate is not pushed there."""
    with EmbeddedServer() as own, connect_raw(own.url) as client:
        backend = connect(config(own.url, timeout=0.3))
        name = channel()
        listener = listened(backend, name)
        (before,) = readers(client)
        client.replicaof("127.0.0.1", 1)
        backend.wait_until(lambda: listener.doubts == [True, False, True])
        (after,) = readers(client)
        assert after["id"] != before["id"]
        client.replicaof("NO", "ONE")
        published(backend, client, name, listener, b"on")
        assert listener.errors == []


def user(raw, rules):
    name = f"u{uuid.uuid4().hex[:8]}"
    raw.execute_command("ACL", "SETUSER", name, "on", ">pw", "~*", "resetchannels", *rules)
    return name


def test_a_user_without_the_channel_hears_what_to_do(connect, server, raw):
    """And the channels that it may use go on."""
    may = channel()
    name = user(raw, ["+@all", f"&{may.decode()}"])
    backend = connect(server.url.replace("://", f"://{name}:pw@", 1))
    refused, allowed = Heard(), Heard()
    for each, listener in ((channel(), refused), (may, allowed)):
        backend._hub.listen(each, listener)
    backend.wait_until(lambda: refused.errors and allowed.doubts)
    (error,) = refused.errors
    assert isinstance(error, PermissionDenied)
    assert error.denied == "channel"
    assert "ACL" in str(error)
    published(backend, raw, may, allowed, b"hello")


def test_a_user_who_may_not_subscribe_or_name_connections(connect, server, raw):
    name = user(raw, ["+@all", "-ssubscribe", "-client", "allchannels"])
    backend = connect(server.url.replace("://", f"://{name}:pw@", 1))
    listener = Heard()
    backend._hub.listen(channel(), listener)
    backend.wait_until(lambda: listener.errors)
    assert isinstance(listener.errors[0], PermissionDenied)
    assert listener.errors[0].command == "ssubscribe"


def test_a_server_without_sharded_pubsub_is_refused_with_a_sentence(connect):
    with EmbeddedServer(rename_command=("SSUBSCRIBE", "gone")) as own:
        backend = connect(own.url)
        listener = Heard()
        backend._hub.listen(channel(), listener)
        backend.wait_until(lambda: listener.errors)
        (error,) = listener.errors
        assert isinstance(error, UnsupportedServer)
        assert not error.retryable
        assert "sharded pub/sub" in str(error)


def test_a_server_without_resp3_is_refused_with_a_sentence(connect):
    with EmbeddedServer(rename_command=("HELLO", "gone")) as own:
        backend = connect(own.url)
        listener = Heard()
        backend._hub.listen(channel(), listener)
        backend.wait_until(lambda: listener.errors)
        assert isinstance(listener.errors[0], UnsupportedServer)
        assert "RESP3" in str(listener.errors[0])


def test_connections_tell_the_server_who_they_are(connect, server, raw):
    backend = connect(server.url)
    name = channel()
    listened(backend, name)
    backend.create_execution(lane="a")
    found = {each["name"]: each for each in raw.client_list()}
    assert {"ff_fast:calls", "ff_fast:readers"} <= set(found)
    for each in ("ff_fast:calls", "ff_fast:readers"):
        assert found[each]["lib-name"] == "ff_fast"
        assert found[each]["lib-ver"]

"""The channels of one backend and their listeners, without I/O.

A shell owns the connection. It sends what :meth:`HubCore.requests` returns, hands every push to
:meth:`HubCore.received` and every error reply to :meth:`HubCore.refused`, and tells of a loss. In RESP3 a subscription
is answered by pushes alone, one a channel, and by an error reply where it is refused: what the pushes of a request do not
answer, the next reply does.
"""

from __future__ import annotations

import copy
import re
from collections import deque
from typing import TYPE_CHECKING, Protocol, cast

from ff_fast import keys
from ff_fast._core.nodes import no_owner
from ff_fast._core.steps import Command, Retries, Step
from ff_fast._core.topology import Address, address_of
from ff_fast._hot.feed import Feed, Inbox
from ff_fast._hot.resp import pack_command
from ff_fast.errors import (
    FFError,
    InternalFunctionError,
    NotPrimary,
    PermissionDenied,
    Redirected,
    UnsupportedServer,
    from_server_error,
)
from ff_fast.types import BackendRetry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ff_fast._core.topology import Topology

LINGER_S = 1.0
"""How long a channel without listeners stays subscribed, in seconds: a reader that comes back finds it."""

MOST_CHANNELS = 256
"""Most channels of one command, some 20 kB: a subscription costs the server about a microsecond."""

HELLO = Step((Command(b"", pack_command(b"HELLO", b"3")),))
"""Pushes and replies share a connection only in RESP3."""

PING = pack_command(b"HELLO")
"""Asks for a sign of life, and for the role of the server. Unlike PING, every user may send it."""

# How long a subscription may be missing before the topology is looked at again, in seconds.
_LOOK_S = 0.25

ONCE = BackendRetry(number_of_retries=0)
"""Retries of what is tried again elsewhere, or later."""

# How a node refuses what is for a slot, and HELLO never is.
_REFUSAL = re.compile("MOVED |ASK |TRYAGAIN|CLUSTERDOWN")

_NO_SHARDED_PUBSUB = "The server has no sharded pub/sub, over which readers hear of frames; use Valkey 7.2, Redis 7.0 or newer."
_NO_RESP3 = "The server or a proxy in front of it does not speak RESP3, which readers need; connect to Valkey 7.2, Redis 7.0 or newer."


class Listener(Protocol):
    """Who listens to a channel. All methods are called on the loop or the thread of the hub, and must not raise."""

    def told(self, message: bytes, /) -> None:
        """Take a push; pushes come in order."""

    def doubt(self, subscribed: bool, /) -> None:
        """Hear that pushes may have been missed.

        Args:
            subscribed: True: the server has confirmed the subscription, for the first time or again; a read that is
                sent from now on misses nothing. False: the subscription is lost, and is being made again.
        """

    def failed(self, error: FFError, /) -> None:
        """Hear that no subscription can be had. The channel is forgotten."""


class OneChannel(Protocol):
    """What a reader listens to one channel with: an inbox, which shares a feed with the others of its channel."""

    on_wake: Callable[[], object] | None

    @property
    def channel(self) -> bytes:
        """The channel that it listens to."""


class Listeners(Protocol):
    """What a reader listens to several channels with."""

    on_wake: Callable[[], object] | None

    @property
    def listeners(self) -> Sequence[tuple[bytes, Listener]]:
        """The channels, and what listens to each."""


Part = OneChannel | Listeners
"""What a reader attaches."""


class Asked:
    """A request that was sent: a subscription to channels, or the end of one.

    Attributes:
        kind: ``ssubscribe`` or ``sunsubscribe``.
        channels: Those that were not answered yet.
    """

    __slots__ = ("channels", "kind")

    def __init__(self, kind: bytes, channels: Sequence[bytes]) -> None:
        self.kind = kind
        self.channels = dict.fromkeys(channels)

    @property
    def request(self) -> bytes:
        return pack_command(self.kind.upper(), *self.channels)


class _Channel:
    """One channel and its listeners."""

    __slots__ = ("answers", "listeners", "wanted")

    def __init__(self) -> None:
        self.listeners: list[Listener] = []
        # Whether the last request for it was a subscription, and the answers to requests that are still to come.
        self.wanted = False
        self.answers = 0

    @property
    def confirmed(self) -> bool:
        return self.wanted and not self.answers

    def told(self, message: bytes) -> None:
        for listener in tuple(self.listeners):
            listener.told(message)


class _Attached:
    """What readers attach to: channels with listeners, of which the readers of an attempt share one."""

    if TYPE_CHECKING:

        def listen(self, channel: bytes, listener: Listener, now: float) -> None: ...

        def unlisten(self, channel: bytes, listener: Listener, now: float) -> None: ...

    def __init__(self) -> None:
        # One for each attempt that has readers: what is pushed is decoded once.
        self._feeds: dict[bytes, Feed] = {}

    def attach(self, part: Part, now: float) -> None:
        """Let *part* of a reader hear its channel; inboxes of one channel share a feed."""
        if not isinstance(part, Inbox):
            for channel, listener in cast("Listeners", part).listeners:
                self.listen(channel, listener, now)
            return
        channel = cast("OneChannel", part).channel
        feed = self._feeds.get(channel)
        if feed is None:
            feed = self._feeds[channel] = Feed(channel)
            self.listen(channel, feed, now)
        feed.add(part)

    def detach(self, part: Part, now: float) -> None:
        """Let *part* go; does nothing if it is not attached."""
        if not isinstance(part, Inbox):
            for channel, listener in cast("Listeners", part).listeners:
                self.unlisten(channel, listener, now)
            return
        channel = cast("OneChannel", part).channel
        feed = self._feeds.get(channel)
        if feed is not None and feed.remove(part):
            del self._feeds[channel]
            self.unlisten(channel, feed, now)


class HubCore(_Attached):
    """Channels and their listeners, and what has to be asked of the server for them.

    Args:
        by_slot: The server is a node of a cluster: one request has channels of one slot, and what it refuses it refuses
            for that slot.

    Attributes:
        routes: What takes the pushes of each channel that has listeners.
        doubts_role: The server may have become a replica: it is to be asked at once.
    """

    def __init__(self, *, by_slot: bool = False) -> None:
        super().__init__()
        self._by_slot = by_slot
        self.doubts_role = False
        # What the server was when the connection was opened.
        self._role: object = None
        self._channels: dict[bytes, _Channel] = {}
        self.routes: dict[bytes, Callable[[bytes], None]] = {}
        # To be subscribed; alone: after a refusal of several channels at once, which one of them may have caused.
        self._pending: dict[bytes, None] = {}
        self._alone: dict[bytes, None] = {}
        # Without listeners, and when the subscription ends.
        self._left: dict[bytes, float] = {}
        self._asked: deque[Asked] = deque()

    def listen(self, channel: bytes, listener: Listener, now: float = 0.0) -> None:  # noqa: ARG002 - as of several hubs
        """Pass pushes of *channel* to *listener*; it hears first that the server has confirmed the subscription."""
        found = self._channels.get(channel)
        if found is None:
            found = self._channels[channel] = _Channel()
        self._left.pop(channel, None)
        found.listeners.append(listener)
        self._route(channel, found)
        if not found.wanted:
            self._pending[channel] = None
        elif found.confirmed:
            listener.doubt(True)

    def unlisten(self, channel: bytes, listener: Listener, now: float) -> None:
        """Pass nothing more to *listener*; a channel without listeners is unsubscribed soon."""
        found = self._channels.get(channel)
        if found is None or listener not in found.listeners:
            return
        found.listeners.remove(listener)
        self._route(channel, found)
        if found.listeners:
            return
        self._pending.pop(channel, None)
        self._alone.pop(channel, None)
        if found.wanted:
            self._left[channel] = now + LINGER_S
        elif not found.answers:
            del self._channels[channel]

    def _route(self, channel: bytes, found: _Channel) -> None:
        if not found.listeners:
            self.routes.pop(channel, None)
        elif len(found.listeners) == 1:
            self.routes[channel] = found.listeners[0].told
        else:
            self.routes[channel] = found.told

    def confirmed(self, channel: bytes) -> bool:
        """Return whether the server has confirmed the subscription on the connection that is open."""
        found = self._channels.get(channel)
        return found is not None and found.confirmed

    @property
    def empty(self) -> bool:
        """Whether there is no channel, so that no connection is needed."""
        return not self._channels

    @property
    def listening(self) -> bool:
        """Whether any channel has listeners."""
        return len(self._channels) > len(self._left)

    @property
    def waiting(self) -> bool:
        """Whether there is anything to be asked of the server."""
        return bool(self._pending or self._alone)

    def next_end(self) -> float | None:
        """Return when the next subscription without listeners ends, in monotonic time."""
        return next(iter(self._left.values()), None)

    def requests(self, now: float) -> list[Asked | None]:
        """Return the requests to be sent now, in order; None stands for `PING`.

        A node that gives a slot away ends its subscriptions, and refuses to end them again: a push that looks like the
        answer may be followed by a refusal. What is answered before the PING behind belongs to no later request.
        """
        ended = []
        # In the order in which they end.
        for channel, end in self._left.items():
            if end > now:
                break
            ended.append(channel)
        for channel in ended:
            del self._left[channel]
            self._channels[channel].wanted = False
        asked = self._in_pieces(b"sunsubscribe", ended, MOST_CHANNELS)
        last = len(asked)
        for waiting, most in ((self._pending, MOST_CHANNELS), (self._alone, 1)):
            for channel in waiting:
                self._channels[channel].wanted = True
            asked += self._in_pieces(b"ssubscribe", list(waiting), most)
            waiting.clear()
        for each in asked:
            for channel in each.channels:
                self._channels[channel].answers += 1
        self._asked += asked
        return [*asked[:last], None, *asked[last:]] if last and self._by_slot else [*asked]

    def _in_pieces(self, kind: bytes, channels: list[bytes], most: int) -> list[Asked]:
        groups = [channels]
        if self._by_slot:
            by_slot: dict[int, list[bytes]] = {}
            for channel in channels:
                by_slot.setdefault(keys.key_slot(channel), []).append(channel)
            groups = list(by_slot.values())
        return [
            Asked(kind, group[at : at + most])
            for group in groups
            for at in range(0, len(group), most)
        ]

    def received(self, push: Sequence[object], *, due: bool) -> Asked | None:
        """Take a push; return the request that it answers completely.

        Args:
            push: The push.
            due: Whether every reply before the answer to the oldest request has come. Until then no push is that answer.
        """
        kind = push[0]
        if kind == b"smessage":
            _, channel, message = push
            assert isinstance(channel, bytes)
            assert isinstance(message, bytes)
            route = self.routes.get(channel)
            if route is not None:
                route(message)
            return None
        if kind not in (b"ssubscribe", b"sunsubscribe") or not isinstance(push[1], bytes):
            return None
        channel = push[1]
        asked = self._asked[0] if due and self._asked else None
        if asked is None or asked.kind != kind or channel not in asked.channels:
            # The server has ended it: its slot belongs to another node.
            if kind == b"sunsubscribe":
                self._ended(channel)
            return None
        del asked.channels[channel]
        self._answered(channel)
        if asked.channels:
            return None
        return self._asked.popleft()

    def late(self, reply: object) -> bool:
        """Return whether what came in place of the reply to `PING` refuses a request before it: that is still to come."""
        return self._by_slot and isinstance(reply, Exception) and bool(_REFUSAL.match(str(reply)))

    def opened(self, reply: object) -> FFError | None:
        """Take the reply to `HELLO` on a new connection; return an error if the connection is of no use.

        A replica of a cluster confirms subscriptions as well. Pushes come to it over another connection, which may lose
        them while this one stays.
        """
        if isinstance(reply, Exception):
            return subscription_error(str(reply))
        self.doubts_role = False
        self._role = _role_in(reply)
        return NotPrimary() if self._by_slot and self._role == b"replica" else None

    def heard(self, reply: object) -> FFError | None:
        """Take the reply to `PING`; return an error where the connection has to be made again.

        A server that has become a replica keeps the connections of its clients.
        """
        role = _role_in(reply)
        return NotPrimary() if role == b"replica" != self._role else None

    def _answered(self, channel: bytes) -> None:
        found = self._channels[channel]
        found.answers -= 1
        if found.answers:
            return
        if found.wanted:
            for listener in tuple(found.listeners):
                listener.doubt(True)
        elif not found.listeners:
            del self._channels[channel]

    def _ended(self, channel: bytes) -> None:
        self.doubts_role = True
        found = self._channels.get(channel)
        if found is None or not found.confirmed:
            return
        found.wanted = False
        self._left.pop(channel, None)
        if not found.listeners:
            del self._channels[channel]
            return
        self._pending[channel] = None
        for listener in tuple(found.listeners):
            listener.doubt(False)

    def refused(self, reply: object) -> FFError | None:
        """Take an error reply to the oldest request that is not answered completely.

        Returns:
            An error after which the connection has to be made again; None where the refusal was dealt with.
        """
        asked = self._asked.popleft()
        error = subscription_error(str(reply))
        if error.retryable and not self._by_slot:
            return error
        for channel in asked.channels:
            found = self._channels[channel]
            found.answers -= 1
            if found.answers:
                # A later request for the channel decides.
                continue
            if asked.kind == b"sunsubscribe":
                # It stays subscribed; nobody listens.
                if not found.listeners:
                    del self._channels[channel]
            elif len(asked.channels) > 1 and not error.retryable:
                found.wanted = False
                if found.listeners:
                    self._alone[channel] = None
                else:
                    self._left.pop(channel, None)
                    del self._channels[channel]
            else:
                self._fail_one(channel, error)
        return None

    def lost(self) -> None:
        """Hear that the connection is lost; every subscription has to be made again."""
        self._asked.clear()
        self._alone.clear()
        self._left.clear()
        self._pending.clear()
        doubtful: list[Listener] = []
        for channel, found in list(self._channels.items()):
            if found.confirmed:
                doubtful += found.listeners
            found.wanted = False
            found.answers = 0
            if found.listeners:
                self._pending[channel] = None
            else:
                del self._channels[channel]
        for listener in doubtful:
            listener.doubt(False)

    def fail(self, error: FFError) -> None:
        """Forget every channel; its listeners get a copy of *error*."""
        self._asked.clear()
        self._alone.clear()
        self._pending.clear()
        self._left.clear()
        for channel in list(self._channels):
            self._fail_one(channel, error)

    def _fail_one(self, channel: bytes, error: FFError) -> None:
        found = self._channels.pop(channel, None)
        self._left.pop(channel, None)
        self.routes.pop(channel, None)
        self._feeds.pop(channel, None)
        for listener in () if found is None else found.listeners:
            listener.failed(copy.copy(error))


class _Seat:
    """A channel at one node: what listens there.

    The hub of the node may be on another thread than the core. It passes on what is pushed, and notes the rest.

    Attributes:
        confirmed: Whether the node has confirmed the subscription.
    """

    __slots__ = ("address", "confirmed", "core", "entry")

    def __init__(self, core: HubsCore, entry: _Entry, address: Address) -> None:
        self.core = core
        self.entry = entry
        self.address = address
        self.confirmed = False

    def told(self, message: bytes, /) -> None:
        entry = self.entry
        if entry.seat is self:
            for listener in entry.listeners:
                listener.told(message)

    def doubt(self, subscribed: bool, /) -> None:
        # First: who joins meanwhile looks at it.
        self.confirmed = subscribed
        entry = self.entry
        if subscribed:
            # The subscription may be lost before the core has seen it.
            entry.retries.reset()
        if entry.seat is self:
            entry.doubt(subscribed)
            if not subscribed:
                self.core.note(self, None)

    def failed(self, error: FFError, /) -> None:
        if self.confirmed:
            self.doubt(False)
        self.core.note(self, error)


class _Entry:
    """A channel of a cluster.

    Attributes:
        listeners: Replaced, never changed: a hub may go through them on its thread.
        seat: Where it is listened to; None where it is to be, from `due_at` on.
        retries: Those of listening to it, from one confirmation to the next.
        due_at: When the topology is looked at for it, in monotonic time, unless it is confirmed.
    """

    __slots__ = ("channel", "due_at", "listeners", "retries", "seat", "slot")

    def __init__(self, channel: bytes, retries: Retries) -> None:
        self.channel = channel
        self.slot = keys.key_slot(channel)
        self.listeners: tuple[Listener, ...] = ()
        self.seat: _Seat | None = None
        self.retries = retries
        self.due_at = 0.0

    @property
    def confirmed(self) -> bool:
        """Whether the subscription is confirmed where it is."""
        seat = self.seat
        return seat is not None and seat.confirmed

    def doubt(self, subscribed: bool) -> None:
        for listener in self.listeners:
            listener.doubt(subscribed)


class HubsCore(_Attached):
    """The channels of a cluster: at which node each is listened to, and when it moves to another one.

    Each node has a hub, which listens to the channels that it is given and gives one up at the first failure. What follows
    is decided here. A shell calls `settle` when `wake` was called, and when `settle` has said; before, it looks at the topology
    if that is `doubtful`. All methods but `note` are called on one thread.

    Args:
        topology: Which node has which slot.
        retry: Bounds the attempts to listen to a channel, from one confirmation to the next.
        listen, unlisten: Let the hub of a node listen, or no more.
        wake: Asks for `settle` soon, from any thread.
    """

    def __init__(
        self,
        topology: Topology,
        retry: BackendRetry,
        listen: Callable[[Address, bytes, Listener], None],
        unlisten: Callable[[Address, bytes, Listener], None],
        wake: Callable[[], None],
    ) -> None:
        super().__init__()
        self._topology = topology
        self._retry = retry
        self._listen = listen
        self._unlisten = unlisten
        self._wake = wake
        self._entries: dict[bytes, _Entry] = {}
        # Without a confirmed subscription.
        self._unsettled: dict[bytes, _Entry] = {}
        # What hubs have told of: a doubt, or an error.
        self._noted: deque[tuple[_Seat, FFError | None]] = deque()
        self._version = topology.version
        topology.on_learned = wake

    def listen(self, channel: bytes, listener: Listener, now: float) -> None:
        """Pass pushes of *channel* to *listener*; it hears first that a node has confirmed the subscription."""
        entry = self._entries.get(channel)
        if entry is not None:
            entry.listeners = (*entry.listeners, listener)
            if entry.confirmed:
                listener.doubt(True)
            return
        entry = self._entries[channel] = _Entry(channel, Retries(self._retry, retry_timeouts=True))
        entry.listeners = (listener,)
        entry.due_at = now if self._topology.primary(entry.slot) is None else now + _LOOK_S
        self._unsettled[channel] = entry
        self._place(entry)
        self._wake()

    def unlisten(self, channel: bytes, listener: Listener, now: float) -> None:  # noqa: ARG002 - the hub of the node lingers
        """Pass nothing more to *listener*."""
        entry = self._entries.get(channel)
        if entry is None or listener not in entry.listeners:
            return
        left = list(entry.listeners)
        left.remove(listener)
        entry.listeners = tuple(left)
        if not left:
            self._forget(entry)
            self._leave(entry)

    def confirmed(self, channel: bytes) -> bool:
        """Return whether a node has confirmed the subscription, and has not lost it since."""
        entry = self._entries.get(channel)
        return entry is not None and entry.confirmed

    def note(self, seat: _Seat, error: FFError | None) -> None:
        """Take note of what a hub has told, on its thread."""
        self._noted.append((seat, error))
        self._wake()

    def doubtful(self, now: float) -> bool:
        """Return whether to look at the topology: a subscription has failed, or has been missing for some time."""
        return bool(self._noted) or any(each.due_at <= now for each in self._unsettled.values())

    @property
    def changed(self) -> bool:
        """Whether the topology is another one than at the last `settle`."""
        return self._version != self._topology.version

    def settle(self, now: float) -> float | None:
        """Let every channel be listened to at the node that has its slot, as far as is known.

        Returns:
            When to call again, in monotonic time; None if nothing is missing.
        """
        while self._noted:
            seat, error = self._noted.popleft()
            entry = seat.entry
            if entry.seat is seat:
                self._unsettled[entry.channel] = entry
                entry.due_at = now + _LOOK_S
                if error is not None:
                    entry.seat = None
                    self._failed(entry, error, seat.address, now)
        moving = self._unsettled
        if self.changed:
            self._version = self._topology.version
            moving = self._entries
        for entry in list(moving.values()):
            if entry.seat is not None:
                self._place(entry)
            elif entry.due_at <= now and not self._place(entry):
                self._failed(entry, no_owner(), None, now)
        for entry in list(self._unsettled.values()):
            if entry.confirmed:
                del self._unsettled[entry.channel]
            elif entry.due_at <= now:
                entry.due_at = now + _LOOK_S
        return min((each.due_at for each in self._unsettled.values()), default=None)

    def _place(self, entry: _Entry) -> bool:
        """Let the node that has the slot listen to a channel; return whether one is known."""
        owner = self._topology.primary(entry.slot)
        seat = entry.seat
        if owner is None or (seat is not None and seat.address == owner):
            return seat is not None
        self._leave(entry)
        seat = entry.seat = _Seat(self, entry, owner)
        self._unsettled[entry.channel] = entry
        self._listen(owner, entry.channel, seat)
        return True

    def _leave(self, entry: _Entry) -> None:
        seat, entry.seat = entry.seat, None
        if seat is not None:
            self._unlisten(seat.address, entry.channel, seat)
            if seat.confirmed:
                entry.doubt(False)

    def _failed(self, entry: _Entry, error: FFError, at: Address | None, now: float) -> None:
        """Decide what follows a failure to listen: another attempt, or the error."""
        if isinstance(error, Redirected) and not error.ask and at is not None:
            self._topology.moved(error.slot, address_of(error.address, at))
        pause = entry.retries.pause(error)
        if pause is not None:
            entry.due_at = now + pause
            return
        self._forget(entry)
        for listener in entry.listeners:
            listener.failed(copy.copy(error))

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.channel]
        self._unsettled.pop(entry.channel, None)
        self._feeds.pop(entry.channel, None)

    def fail(self, error: FFError) -> None:
        """Forget every channel; its listeners get a copy of *error*."""
        for entry in list(self._entries.values()):
            entry.seat = None
            self._forget(entry)
            for listener in entry.listeners:
                listener.failed(copy.copy(error))


def _role_in(reply: object) -> object:
    """Return the role of the server that a reply to ``HELLO`` tells, in RESP2 or RESP3; None where it tells none."""
    if isinstance(reply, list):
        reply = dict(zip(reply[::2], reply[1::2], strict=False))
    return reply.get(b"role") if isinstance(reply, dict) else None


def subscription_error(message: str) -> FFError:
    """Return the error for a server's refusal of a subscription, or of the protocol that it needs."""
    error = from_server_error(message)
    if message.startswith("NOPROTO"):
        return UnsupportedServer(_NO_RESP3)
    if isinstance(error, InternalFunctionError) and "unknown command" in message.lower():
        return UnsupportedServer(_NO_RESP3 if "hello" in message.lower() else _NO_SHARDED_PUBSUB)
    if isinstance(error, PermissionDenied) and error.denied == "channel":
        named = PermissionDenied(
            "The user may not subscribe to the channel, over which readers hear of frames; add the &ff:* channels of docs/guides/deployment.md"
            " to its ACL."
        )
        named.denied = error.denied
        return named
    return error

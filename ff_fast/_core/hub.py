"""The channels of one backend and their listeners, without I/O.

A shell owns the connection. It sends what :meth:`HubCore.requests` returns, hands every push to
:meth:`HubCore.received` and every error reply to :meth:`HubCore.refused`, and tells of a loss. In RESP3 a subscription
is answered by pushes alone, one a channel, and by an error reply where it is refused: what the pushes of a request do not
answer, the next reply does.
"""

from __future__ import annotations

import copy
from collections import deque
from typing import TYPE_CHECKING, Protocol, cast

from ff_fast._core.steps import Command, Step
from ff_fast._hot.feed import Feed, Inbox
from ff_fast._hot.resp import pack_command
from ff_fast.errors import (
    FFError,
    InternalFunctionError,
    PermissionDenied,
    UnsupportedServer,
    from_server_error,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LINGER_S = 1.0
"""How long a channel without listeners stays subscribed, in seconds: a reader that comes back finds it."""

MOST_CHANNELS = 256
"""Most channels of one command, some 20 kB: a subscription costs the server about a microsecond."""

HELLO = Step((Command(b"", pack_command(b"HELLO", b"3")),))
"""Pushes and replies share a connection only in RESP3."""

PING = pack_command(b"HELLO")
"""Asks for a sign of life. Unlike PING, every user may send it."""

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


class HubCore:
    """Channels and their listeners, and what has to be asked of the server for them.

    Attributes:
        routes: What takes the pushes of each channel that has listeners.
    """

    def __init__(self) -> None:
        self._channels: dict[bytes, _Channel] = {}
        self.routes: dict[bytes, Callable[[bytes], None]] = {}
        # To be subscribed; alone: after a refusal of several channels at once, which one of them may have caused.
        self._pending: dict[bytes, None] = {}
        self._alone: dict[bytes, None] = {}
        # Without listeners, and when the subscription ends.
        self._left: dict[bytes, float] = {}
        self._asked: deque[Asked] = deque()
        # One for each attempt that has readers: what is pushed is decoded once.
        self._feeds: dict[bytes, Feed] = {}

    def attach(self, part: Part) -> None:
        """Let *part* of a reader hear its channel; inboxes of one channel share a feed."""
        if not isinstance(part, Inbox):
            for channel, listener in cast("Listeners", part).listeners:
                self.listen(channel, listener)
            return
        channel = cast("OneChannel", part).channel
        feed = self._feeds.get(channel)
        if feed is None:
            feed = self._feeds[channel] = Feed(channel)
            self.listen(channel, feed)
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

    def listen(self, channel: bytes, listener: Listener) -> None:
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

    def requests(self, now: float) -> list[Asked]:
        """Return the requests to be sent now, in order."""
        asked: list[Asked] = []
        ended = []
        # In the order in which they end.
        for channel, end in self._left.items():
            if end > now:
                break
            ended.append(channel)
        for channel in ended:
            del self._left[channel]
            self._channels[channel].wanted = False
        asked += _in_pieces(b"sunsubscribe", ended, MOST_CHANNELS)
        for waiting, most in ((self._pending, MOST_CHANNELS), (self._alone, 1)):
            for channel in waiting:
                self._channels[channel].wanted = True
            asked += _in_pieces(b"ssubscribe", list(waiting), most)
            waiting.clear()
        for each in asked:
            for channel in each.channels:
                self._channels[channel].answers += 1
        self._asked += asked
        return asked

    def received(self, push: Sequence[object]) -> Asked | None:
        """Take a push; return the request that it answers completely."""
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
        asked = self._asked[0] if self._asked else None
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
        if error.retryable:
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
            elif len(asked.channels) > 1:
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


def _in_pieces(kind: bytes, channels: list[bytes], most: int) -> list[Asked]:
    return [Asked(kind, channels[at : at + most]) for at in range(0, len(channels), most)]


def subscription_error(message: str) -> FFError:
    """Return the error for a server's refusal of a subscription, or of the protocol that it needs."""
    error = from_server_error(message)
    if message.startswith("NOPROTO"):
        return UnsupportedServer(_NO_RESP3)
    if isinstance(error, InternalFunctionError) and "unknown command" in message.lower():
        return UnsupportedServer(_NO_RESP3 if "hello" in message.lower() else _NO_SHARDED_PUBSUB)
    if isinstance(error, PermissionDenied) and error.denied == "channel":
        named = PermissionDenied(
            "The user may not subscribe to the channel, over which readers hear of frames; add the README's &ff:* channels"
            " to its ACL."
        )
        named.denied = error.denied
        return named
    return error

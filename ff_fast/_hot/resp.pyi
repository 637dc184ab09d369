from collections.abc import Callable
from typing import final

def pack_command(*parts: bytes) -> bytes:
    """Return the RESP bytes of one command.

    The exact size is computed first, then all parts are written into one ``bytes`` of this size.

    Args:
        *parts: The command and its arguments, each exactly ``bytes``.

    Raises:
        TypeError: A part is not exactly ``bytes``. The caller encodes numbers and text.

    >>> pack_command(b"PING")
    b'*1\\r\\n$4\\r\\nPING\\r\\n'
    """

def pack_fcall(
    function: bytes, keys: tuple[bytes, ...], argv: tuple[bytes, ...], read_only: bool = False
) -> bytes:
    """Return the RESP bytes of ``FCALL function numkeys *keys *argv``.

    Args:
        function: Name that the Lua library registers, e.g. ``b"ff_append"``.
        keys: Every key that the function uses, each exactly ``bytes``. They share one hash slot
            (``ff_fast.keys``); this is not checked here.
        argv: Second table of the Lua function, each exactly ``bytes``.
        read_only: Send ``FCALL_RO``, which replicas serve too.

    Raises:
        TypeError: An item is not exactly ``bytes``.

    >>> pack_fcall(b"ff_version", (), (b"x",))
    b'*4\\r\\n$5\\r\\nFCALL\\r\\n$10\\r\\nff_version\\r\\n$1\\r\\n0\\r\\n$1\\r\\nx\\r\\n'
    """

def take_reply(gets: Callable[[], object], pushed: type | None = None) -> object:
    """Return the result of *gets*, the method of a ``hiredis.Reader``, without a collection.

    Replies of type *pushed* are skipped: the server sent them unasked.

    A reply of a thousand entries creates two thousand lists. These would start three collections of
    young objects, and now and then one of all objects, which find nothing: the lists are in use. No
    other thread runs while the collector is off.
    """

def take_pushes(
    gets: Callable[[], object], pushed: type, routes: dict[bytes, Callable[[bytes], None]]
) -> object:
    """Hand what is published on channels to their *routes*, and return the first reply that is not.

    *gets* is the method of a ``hiredis.Reader``, *pushed* the type of its pushes. A push on a
    channel without a route is dropped.
    """

@final
class ReplyGuard:
    """Watches the replies of one connection for headers that announce more than any answer has.

    It reads the same bytes as the parser, before the parser: types and lengths alone, and it skips
    the strings. Each call costs a few ns for each element of a reply.
    """

    def accepts(self, data: bytes) -> bool:
        """Take the next bytes of the connection; return whether the parser may get them.

        After False the connection is of no use.
        """

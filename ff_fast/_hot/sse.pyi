from collections.abc import Callable, Container, Iterable
from typing import Any, Literal, final

@final
class Events:
    """Joins the items of batches, in order, to server-sent events.

    Args:
        other: Returns the bytes for an item that is not a frame.
        kind: How a payload becomes data: ``text``, ``json`` or ``base64``.
        ids: Each event has an id.
        types: Each event has the type of its frame, where that is not `default`.
        default: The type that needs no name.
        reserved: Types that other events have; a frame of one gets `frame-` in front of it.
        carry: Bytes at the beginning of a character that the client has not got.
    """

    def __init__(
        self,
        other: Callable[[Any], bytes],
        *,
        kind: Literal["text", "json", "base64"] = "text",
        ids: bool = True,
        types: bool = False,
        default: str = "token",
        reserved: Container[str] = ...,
        carry: bytes = b"",
    ) -> None: ...
    def join(self, items: Iterable[object]) -> bytes:
        """Return the events of a batch."""

def event(
    data: bytes | str,
    *,
    id: str | None = None,  # noqa: A002 - the name of the field
    event: str | None = None,
    retry: int | None = None,
) -> bytes:
    """Return one event.

    Args:
        data: Text or bytes, of any number of lines.
        id: The id; text of one line.
        event: The type of the event; a control character in it becomes a space.
        retry: Milliseconds.
    """

def unfinished_bytes(text: bytes) -> int:
    """Return how many bytes at the end of *text* begin a character that they do not complete."""

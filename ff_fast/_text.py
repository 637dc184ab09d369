"""Text from bytes that were cut anywhere."""

from __future__ import annotations

import codecs

from ff_fast.errors import InvalidInput, InvalidPayload
from ff_fast.types import payload_bytes

_Decoder = codecs.getincrementaldecoder("utf-8")


class TextDecoder:
    """Decodes UTF-8 that comes in pieces which were cut anywhere; holds half a character back until the rest comes.

    For a worker whose model gives bytes, before `write` with ``PatchKind.STRING_APPEND``, which takes whole characters
    only; and for a reader that shows payloads as text. One decoder serves one text. It is ``codecs``'s incremental
    decoder with errors that show no payload.

    >>> text = TextDecoder()
    >>> [text.decode(piece) for piece in (b"za\\xc5", b"\\xbc\\xc3", b"\\xb3\\xc5\\x82\\xc4\\x87")]
    ['za', 'ż', 'ółć']
    >>> text.decode(b"", final=True)
    ''

    Args:
        errors: ``strict`` refuses bytes that are not UTF-8; ``replace`` puts U+FFFD in their place.

    Raises:
        InvalidInput: *errors* is neither.
    """

    __slots__ = ("_decoder",)

    def __init__(self, errors: str = "strict") -> None:
        if errors not in ("strict", "replace"):
            raise InvalidInput("errors must be 'strict' or 'replace'.")
        self._decoder = _Decoder(errors)

    def decode(self, data: bytes | bytearray | memoryview | str, final: bool = False) -> str:
        """Return the text of *data* behind what was held back, without half a character at its end.

        Args:
            data: The next bytes of the text; a ``str`` stands for its UTF-8.
            final: No more bytes follow, so nothing may be left of a character.

        Raises:
            InvalidPayload: The bytes are not UTF-8, or end within a character although they are final. The decoder is
                as it was before the call, so nothing is lost.
            InvalidType: *data* has another type.
        """
        given = payload_bytes(data, "data")
        held = len(self.pending)
        try:
            return self._decoder.decode(given, final)
        except UnicodeDecodeError as error:
            at, cut = error.start, error.reason == "unexpected end of data"
        # Outside the handler: a chained error would show the payload.
        if cut:
            raise InvalidPayload(
                "The text ends within a character; pass the bytes that follow, or reset() to drop the rest."
            )
        raise InvalidPayload(
            f"Byte {max(at - held, 0)} of the {len(given)} given is not UTF-8; write bytes that are no text in "
            "another mode, or use errors='replace'."
        )

    @property
    def pending(self) -> bytes:
        """The bytes that are held back, at most 3."""
        return self._decoder.getstate()[0]

    def reset(self) -> None:
        """Drop what is held back, as behind a `Gap`."""
        self._decoder.reset()

    def __repr__(self) -> str:
        return f"TextDecoder(<{len(self.pending)} bytes pending>)"

from typing import Final, final

SUMMARY_NULL_SENTINEL: Final = "__ff_null__"
MAX_DEPTH: Final = 128
DEFAULT_MAX_BYTES: Final = 16777216

@final
class Document:
    """A JSON object that patches are folded into, exact to the last digit.

    The effect of a patch depends on :meth:`dumps` alone.  So a document may be stored and parsed
    again anywhere in a sequence of patches, and the final bytes are the same.  The cost of a patch
    grows with the patch and the values that it replaces, not with the document.  Arguments are not
    kept.  One caller at a time: there is no lock.

    Args:
        document_json: A stored document: UTF-8, strict JSON, an object at the root, up to
            :data:`MAX_DEPTH` levels deep.  A value that is the sentinel is read as ``null``.
        max_bytes: Largest size in bytes that the document may grow to.  A stored document that is
            already larger is accepted, can shrink and cannot grow.

    Raises:
        Corruption: *document_json* is not such a document.
        InvalidType: *document_json* is not exactly ``bytes``, or *max_bytes* not an ``int``.
        InvalidInput: *max_bytes* is below 2, the size of an empty object.

    >>> document = Document(b'{"title": "Draft", "tags": []}')
    >>> document.merge(b'{"title": null, "usage": {"tokens": 12345678901234567890}}')
    >>> document.append(b"/text", b"Hello")
    >>> document.append(b"/text", b", world")
    >>> document.dumps()
    b'{"tags":[],"usage":{"tokens":12345678901234567890},"text":"Hello, world"}'
    """

    def __init__(self, document_json: bytes = b"{}", *, max_bytes: int = 16777216) -> None: ...
    def merge(self, patch: bytes) -> None:
        """Fold one JSON merge patch (RFC 7396) into the document, all of it or nothing.

        A member that is ``null`` removes, an object merges, anything else replaces.  A value that
        is the string ``__ff_null__`` becomes ``null``, also inside arrays, at any depth.

        Args:
            patch: UTF-8, strict JSON, an object at the root, up to :data:`MAX_DEPTH` levels deep.

        Raises:
            InvalidPatch: *patch* is not such an object, or the document would grow past its limit.
                The document is unchanged.
            InvalidType: *patch* is not exactly ``bytes``.
            MemoryError: The document is unchanged, or it has a part of the patch; then all later
                calls but ``size`` raise ``Corruption``.
            Corruption: An earlier merge ran out of memory half way: load the document again.

        >>> document = Document(b'{"a":{"b":1,"c":2},"d":[1,2]}')
        >>> document.merge(b'{"a":{"b":null},"d":["__ff_null__"],"e":{"f":null}}')
        >>> document.dumps()
        b'{"a":{"c":2},"d":[null],"e":{}}'
        """
    def append(self, pointer: bytes, text: bytes) -> None:
        """Append *text* to the string that *pointer* names, all of it or nothing.

        Object members that are missing on the way are created: objects, and a string at the end
        (so ``/a/0`` creates an *object* with a member ``"0"`` when ``a`` is missing).  ``null`` at
        the end counts as an empty string.  Array items are named by their index and must exist.
        Appending again at the same pointer costs the length of *text* alone, until the next merge.

        An append that makes the whole string ``__ff_null__`` is refused: as ``null`` it would be
        lost to the next append, and as a string readers would see the sentinel.  Send it together
        with the next piece.

        Args:
            pointer: JSON Pointer (RFC 6901), for example ``b"/choices/0/text"``.
            text: UTF-8, any characters; they are escaped where JSON demands it.

        Raises:
            InvalidPatch: *pointer* is malformed, names the root or something that is not a string,
                or leads through a scalar or past the end of an array; *text* is not UTF-8 or would
                complete the sentinel; the document would grow past its limit.  The document is
                unchanged.
            InvalidType: *pointer* or *text* is not exactly ``bytes``.
            Corruption: An earlier merge ran out of memory half way: load the document again.
        """
    def dumps(self) -> bytes:
        """Return the document as exact, compact JSON in UTF-8, of :attr:`size` bytes.

        Numbers are as they were written, members in the order in which they were added.  Non-ASCII
        characters and ``/`` are not escaped.

        Raises:
            Corruption: An earlier merge ran out of memory half way: load the document again.
        """
    @property
    def size(self) -> int:
        """Length of :meth:`dumps` in bytes, known without building it."""
    @property
    def max_bytes(self) -> int:
        """The size in bytes that the document may grow to."""

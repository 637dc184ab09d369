"""The summary document for readers: the stored document with its later patches folded in."""

from __future__ import annotations

from typing import cast

from ff_fast._hot.frames import StreamFrame, decode_run
from ff_fast._hot.merge import Document
from ff_fast.errors import Corruption, InvalidType, SummaryConflict
from ff_fast.types import PatchFormat, PatchKind, SummaryDocument, make_cursor, parse_cursor


def fold(fields: dict[bytes, bytes], attempt_index: int = 0) -> SummaryDocument | None:
    """Return the document stored in the hash *fields* of the summary of an attempt; None if they hold none.

    Raises:
        Corruption: `ff_append` did not write these fields.
    """
    if b"version" not in fields:
        return None
    try:
        version = int(fields[b"version"])
        folded = int(fields.get(b"document_version", b"0"))
        document = Document(fields[b"document"] if folded else b"{}")
        pending = sorted(
            (int(name.split(b":", 2)[1]), name)
            for name in fields
            if name.startswith((b"run:", b"patch:"))
        )
        kind = _kind(fields.get(b"patch_kind", b"json-merge-patch:"))
        for last, name in pending:
            form, _, count, kind_name = name.split(b":", 3)
            patches = [fields[name]] if form == b"patch" else decode_run(fields[name], int(count))
            kind = _kind(kind_name)
            for patch in patches:
                _apply(document, kind, patch)
            if last - int(count) != folded:
                raise ValueError
            folded = last
        if folded != version:
            raise ValueError
        return SummaryDocument(
            document_json=document.dumps(),
            version=version,
            patch_kind=kind,
            last_updated_ms=int(fields[b"last_updated_ms"]),
            first_applied_ms=int(fields[b"first_applied_ms"]),
            cursor=make_cursor(attempt_index, *parse_cursor(fields[b"cursor"].decode())),
        )
    except (ValueError, KeyError):
        raise Corruption(
            "The stored summary does not fold to its version; end the attempt."
        ) from None


def _kind(name: bytes) -> PatchKind:
    wire, _, pointer = name.partition(b":")
    # PatchKind itself refuses any other word.
    wire_text = cast("PatchFormat", wire.decode())
    return PatchKind(wire_text, pointer.decode() if wire == b"string-append" else None)


def _apply(document: Document, kind: PatchKind, patch: bytes) -> None:
    if kind.pointer is None:
        document.merge(patch)
    else:
        document.append(kind.pointer.encode(), patch)


class SummaryView:
    """The summary document of an attempt, kept current from the frames of a tail.

    Start it from `read_summary` and tail from the document's cursor, or start it empty and tail from
    the beginning. Pass every frame to :meth:`apply`; it ignores frames that are not patches. A patch is in
    the document only if its id is: another one of the same version, as after a failover or of another
    attempt, raises.

    Args:
        document: Document to start from; None is the empty document, version 0.
    """

    __slots__ = ("_document", "_place", "version")

    def __init__(self, document: SummaryDocument | None = None) -> None:
        self._document = Document(b"{}" if document is None else document.document_json)
        self.version: int = 0 if document is None else document.version
        # Id of the newest patch in the document; a document that was not read from a server has none.
        self._place: tuple[int, int] = parse_cursor(None if document is None else document.cursor)

    def apply(self, frame: StreamFrame) -> bool:
        """Fold *frame* into the document; return False if it is no patch, or is in the document already.

        Raises:
            SummaryConflict: Patches are missing between the document and the frame, or the frame belongs to
                another document: read the summary again.
        """
        if not isinstance(frame, StreamFrame):
            raise InvalidType(f"apply() takes a StreamFrame, not {type(frame).__name__}.")
        if frame.patch_kind is None or frame.summary_version is None:
            return False
        place = int(frame.stream_id.partition("-")[0]), frame.sequence
        # Ids grow with versions, and the newest version has the newest id. Otherwise the frame has another history.
        version = frame.summary_version
        if version < self.version and (place < self._place or not self._place[0]):
            return False
        if version == self.version and (place == self._place or not self._place[0]):
            return False
        if version != self.version + 1 or place <= self._place:
            raise SummaryConflict(self.version + 1, version)
        _apply(self._document, frame.patch_kind, frame.payload)
        self.version = frame.summary_version
        self._place = place
        return True

    @property
    def document_json(self) -> bytes:
        """The document as compact JSON."""
        return self._document.dumps()

    def __repr__(self) -> str:
        return f"SummaryView(version={self.version}, document_json=<{self._document.size} bytes>)"

"""What a reader of the demo must get, computed from the plan, and its comparison with what it got."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import orjson

from ff_fast._demo.plan import Plan, Write, script, tokens

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ff_fast import PatchKind


class Transcript(NamedTuple):
    """A stream as a reader got it, or as it must get it.

    Attributes:
        tokens: Payloads of the best-effort frames.
        patches: Patch kind and payload of each summary frame.
        events: Payloads of the durable frames.
        sequences: The sequence of every frame, in order of arrival.
        document: The fold of the patches; empty without patches.
        version: The version of the document.
        gaps: A text for each gap, with its number of frames and its reason.
        ends: The reason of each end.
    """

    tokens: list[bytes]
    patches: list[tuple[str, bytes]]
    events: list[bytes]
    sequences: list[int]
    document: bytes
    version: int
    gaps: list[str]
    ends: list[str]


def expected(plan: Plan) -> Transcript:
    """Return the transcript of a reader that loses nothing."""
    sent = [write for due in script(plan) for write in due]
    by_mode: dict[str, list[Write]] = {"best_effort": [], "summary": [], "durable": []}
    for write in sent:
        by_mode[write.mode.wire].append(write)
    patches = [(patch_name(w.mode.patch_kind), w.payload) for w in by_mode["summary"]]
    answer = b"".join(tokens(plan.tokens)).decode()
    document = {"phase": "done", "tokens": plan.tokens, "answer": answer}
    return Transcript(
        tokens=[write.payload for write in by_mode["best_effort"]],
        patches=patches,
        events=[write.payload for write in by_mode["durable"]],
        sequences=list(range(1, len(sent) + 1)),
        document=orjson.dumps(document) if patches else b"",
        version=len(patches),
        gaps=[],
        ends=["attempt_success"],
    )


def patch_name(kind: PatchKind | None) -> str:
    """Return the kind of a patch as text, for comparison; empty without a kind."""
    return "" if kind is None else f"{kind.wire} {kind.pointer or ''}".strip()


class Check(NamedTuple):
    """One comparison: sent, got, and a sentence about the difference or None."""

    name: str
    sent: str
    got: str
    difference: str | None


def compare(want: Transcript, got: Transcript, stored: tuple[bytes, int]) -> list[Check]:
    """Compare a reader's transcript and the document of `read_summary` with the plan, byte for byte.

    Args:
        want: The transcript that the plan demands.
        got: The reader's transcript.
        stored: Document and version of `read_summary`; ``(b"", 0)`` without a document.
    """
    order = None
    if got.sequences != want.sequences:
        at = _first_difference(want.sequences, got.sequences)
        order = (
            f"Sequences must be 1 to {len(want.sequences)}, each once and in order; "
            f"the reader's frame {at + 1} {_place(got.sequences, at, 'has sequence {}')}."
        )
    patches = _frames("summary patches", want.patches, got.patches)
    ends = None
    if got.ends != want.ends:
        ends = f"The stream must end once, with {want.ends[0]}; it ended {_times(got.ends)}."
    gaps = f"The reader got {len(got.gaps)} gap(s), first: {got.gaps[0]}." if got.gaps else None
    return [
        _frames("tokens", want.tokens, got.tokens),
        _frames("tool events", want.events, got.events),
        patches,
        _document("summary, folded", want, (got.document, got.version)),
        _document("summary, stored", want, stored),
        Check("order", _span(want.sequences), _span(got.sequences), order),
        Check("gaps", "0", str(len(got.gaps)), gaps),
        Check("ends", ", ".join(want.ends), ", ".join(got.ends) or "none", ends),
    ]


def _frames(name: str, want: list[Any], got: list[Any]) -> Check:
    difference = None
    if want != got:
        at = _first_difference(want, got)
        if len(want) != len(got):
            difference = f"{len(want)} {name} were sent and {len(got)} arrived"
        else:
            difference = f"The {name} that were sent and that arrived differ"
        difference += f"; the first difference is at number {at + 1}."
    return Check(name, _amount(want), _amount(got), difference)


def _document(name: str, want: Transcript, got: tuple[bytes, int]) -> Check:
    document, version = got
    difference = None
    if version != want.version:
        difference = f"The {name} must be at version {want.version} and is at {version}."
    elif document != want.document:
        at = _first_difference(want.document, document)
        difference = (
            f"The {name} must have {len(want.document)} bytes and has {len(document)};"
            f" the first difference is at byte {at + 1}."
        )
    return Check(name, _version(want.document, want.version), _version(*got), difference)


def _first_difference(want: Sequence[object], got: Sequence[object]) -> int:
    pairs = zip(want, got, strict=False)
    return next(
        (at for at, (one, other) in enumerate(pairs) if one != other), min(len(want), len(got))
    )


def _amount(frames: list[Any]) -> str:
    size = sum(len(frame if isinstance(frame, bytes) else frame[1]) for frame in frames)
    return f"{len(frames)} frames, {size} bytes"


def _version(document: bytes, version: int) -> str:
    return f"version {version}, {len(document)} bytes"


def _span(sequences: list[int]) -> str:
    return f"{sequences[0]} to {sequences[-1]}" if sequences else "none"


def _place(items: list[int], at: int, text: str) -> str:
    return text.format(items[at]) if at < len(items) else "is missing"


def _times(ends: list[str]) -> str:
    return f"{len(ends)} times ({', '.join(ends)})" if ends else "not at all"

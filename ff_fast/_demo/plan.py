"""The frames of the demo, each of which follows from the :class:`Plan` alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import orjson

from ff_fast import BestEffortLiveConfig, PatchKind, StreamMode, data

if TYPE_CHECKING:
    from collections.abc import Iterator

MODES = ("best-effort", "summary", "durable")
MAX_TOKENS = 2_000_000
"""Both the worker and the comparison hold all tokens in memory."""

_TTL_MS = 15_000
_ANSWER = PatchKind.STRING_APPEND("/answer")


class Plan(NamedTuple):
    """The rate and number of tokens, and which of :data:`MODES` the worker writes."""

    rate_hz: float
    tokens: int
    modes: tuple[str, ...] = MODES

    @property
    def live_mode(self) -> StreamMode:
        """The mode of tokens. Its ceiling is twice the K of this rate, so that only age trims a frame."""
        return StreamMode.best_effort_live_with_config(
            BestEffortLiveConfig.with_ttl(_TTL_MS).with_maxlen_ceiling(
                max(16_384, int(self.rate_hz * _TTL_MS / 1000 * 4))
            )
        )


class Write(NamedTuple):
    """One frame of the plan."""

    payload: bytes
    frame_type: str
    mode: StreamMode


def tokens(count: int) -> list[bytes]:
    """Return the first *count* tokens of the demo text, which is repeated as often as needed."""
    # Pieces of words with the blanks before them, like those of a tokenizer; joined they are the text.
    pieces = [piece.encode() for piece in re.findall(r"\s*\S{1,6}|\s+", data.text())]
    whole, rest = divmod(count, len(pieces))
    return pieces * whole + pieces[:rest]


def script(plan: Plan) -> Iterator[list[Write]]:
    """Yield the frames that are due with each token, as an LLM worker would write them.

    Best-effort: the token. Summary: the new text 20 times a second, the number of tokens 4 times a
    second. Durable: a tool event twice a second.
    """
    live, durable = plan.live_mode, StreamMode.durable()
    merge, append = StreamMode.durable_summary(), StreamMode.durable_summary(_ANSWER)
    piece_every = max(round(plan.rate_hz / 20), 1)
    count_every = max(round(plan.rate_hz / 4), 1)
    event_every = max(round(plan.rate_hz / 2), 1)
    piece: list[bytes] = []

    def patch(**members: object) -> Write:
        return Write(orjson.dumps(members), "summary", merge)

    for index, token in enumerate(tokens(plan.tokens)):
        number = index + 1
        last = number == plan.tokens
        due: list[Write] = []
        if "best-effort" in plan.modes:
            due.append(Write(token, "token", live))
        if "summary" in plan.modes:
            if number == 1:
                due.append(patch(phase="answering", tokens=0, answer=""))
            piece.append(token)
            if number % piece_every == 0 or last:
                due.append(Write(b"".join(piece), "answer", append))
                piece.clear()
            if last:
                due.append(patch(tokens=number, phase="done"))
            elif number % count_every == 0:
                due.append(patch(tokens=number))
        if "durable" in plan.modes and (number % event_every == 0 or last):
            event = {
                "event": "finished" if last else "tool_call",
                "call": number // event_every,
                "tool": "dictionary",
                "arguments": {"word": token.decode().strip()},
                "tokens": number,
            }
            due.append(Write(orjson.dumps(event), "tool_event", durable))
        yield due

"""What an execution has to do, as its payload says it, and every frame that it must leave behind.

A frame's payload follows from execution, attempt and sequence, so whoever reads one knows whether it is right.
"""

import hashlib
import json
import uuid
from typing import NamedTuple

from ff_fast import PatchKind, StreamMode, keys

MODES = {
    "durable": StreamMode.durable(),
    "best_effort": StreamMode.best_effort_live(60_000),
    "summary": StreamMode.durable_summary(PatchKind.JSON_MERGE_PATCH),
    "append": StreamMode.durable_summary(PatchKind.STRING_APPEND("/text")),
}
PAUSES = ("suspend", "delay", "children")
ENDS = ("success", "failed")


class Burst(NamedTuple):
    """Frames of one mode and size, and what the worker does after them: one of `PAUSES`, or nothing."""

    frames: int
    mode: str
    size: int
    pace_ms: int = 0
    pause: str = ""


class Job(NamedTuple):
    """What an execution has to do.

    Attributes:
        bursts: Frames, in order. A pause comes after at least one frame, so the length of the stream says which
            pauses are over.
        failures: Number of attempts, from the first, that fail at their last frame.
        end: How it ends if nobody cancels it.
        children: Number of children that a pause of that name creates.
    """

    bursts: tuple[Burst, ...]
    failures: int = 0
    end: str = "success"
    children: int = 0

    def dump(self):
        return json.dumps(self).encode()

    @classmethod
    def load(cls, payload):
        bursts, *rest = json.loads(payload)
        return cls(tuple(Burst(*burst) for burst in bursts), *rest)

    @property
    def length(self):
        """Number of frames of an attempt that is not broken off."""
        return sum(burst.frames for burst in self.bursts)

    def burst_of(self, sequence):
        """The burst that frame *sequence* belongs to, None beyond the last one."""
        for burst in self.bursts:
            if sequence <= burst.frames:
                return burst
            sequence -= burst.frames
        return None

    def is_kept(self, sequence):
        """Whether frame *sequence* is in the log, which is never trimmed while a soak runs."""
        burst = self.burst_of(sequence)
        return burst is not None and burst.mode == "durable"


def frame(eid, attempt, sequence, burst):
    """The payload of one frame."""
    name = f"{eid[-36:]}/{attempt}/{sequence}/"
    filler = hashlib.sha256(name.encode()).hexdigest()
    text = (name + filler * (burst.size // len(filler) + 1))[: max(burst.size, len(name))]
    return (
        json.dumps({"text": text, "last": sequence}).encode()
        if burst.mode == "summary"
        else text.encode()
    )


def child_ids(eid, count):
    """Ids of the children of an execution: the same whichever attempt creates them."""
    tag, parent = keys.slot_tag_of(eid), uuid.UUID(eid[-36:])
    return [f"{tag}:{uuid.uuid5(parent, str(i))}" for i in range(count)]


CHILD = Job((Burst(3, "durable", 64),))


def draw(dice):
    """Draw a job."""
    others = dice.choice((0, 0, 1, 1, 2))
    return Job(
        tuple(_burst(dice, pause=i > 0) for i in range(1 + others)),
        failures=dice.choice((0, 0, 0, 1, 2)),
        end=dice.choice(("success",) * 7 + ("failed",)),
        children=dice.randrange(1, 4),
    )


def _burst(dice, *, pause):
    large = dice.random() < 0.05
    return Burst(
        frames=dice.randrange(1, 8) if large else dice.choice((1, 5, 20, 100, 300)),
        mode=dice.choice(tuple(MODES)),
        size=dice.choice((10_000, 60_000)) if large else dice.choice((0, 40, 40, 200, 1000)),
        pace_ms=dice.choice((0, 0, 1, 5)),
        pause=dice.choice(("", *PAUSES)) if pause else "",
    )

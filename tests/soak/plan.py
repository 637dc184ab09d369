"""The schedule of a soak: it follows from the seed alone."""

import random
from typing import NamedTuple


class Planned(NamedTuple):
    """One fault: seconds from the beginning, its kind, and the seed of its own dice."""

    at: float
    kind: str
    seed: str


def schedule(seed, seconds, weights, every=0.7):
    """Draw faults for *seconds*, one *every* seconds on average, of the kinds that *weights* has."""
    dice = random.Random(seed)
    kinds = sorted(weights)
    planned, at = [], dice.expovariate(1 / every)
    while at < seconds:
        (kind,) = dice.choices(kinds, [weights[kind] for kind in kinds])
        planned.append(Planned(at, kind, f"{seed}/{len(planned)}"))
        at += dice.expovariate(1 / every)
    return planned

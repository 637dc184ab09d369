"""The entry of the demos' processes: ``python -m ff_fast._demo ROLE DESCRIPTOR``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ff_fast._demo import answers, run
from ff_fast._demo.processes import child

if TYPE_CHECKING:
    from collections.abc import Callable

ROLES: dict[str, Callable[..., None]] = {
    "worker": run.work,
    "reader": run.read,
    "chat": answers.work,
}

role, descriptor = sys.argv[1:]
child(descriptor, ROLES[role])

"""The oracles of the tests. They are untyped, so they are imported by name."""

from __future__ import annotations

import importlib
from typing import Any

frames: Any = importlib.import_module("tests.reference_frames")
merge: Any = importlib.import_module("tests.reference_merge")
window: Any = importlib.import_module("tests.reference_window")

"""Stand-ins for packages that `make test` does not install: as much of each as an adapter needs to be imported.

`make test-web` runs the same tests with the packages themselves.
"""

import importlib.util
import re
import sys
import types
from dataclasses import dataclass


def assistant_stream():
    """Put a stand-in in the place of assistant-stream where it is not installed; return whether it is."""
    if importlib.util.find_spec("assistant_stream") is not None:
        return True

    class ResumableStreamError(Exception):
        def __init__(self, code, message):
            super().__init__(message)
            self.code = code

    @dataclass(frozen=True)
    class ResumableStreamEntry:
        cursor: str
        chunk: bytes

    def validate_stream_id(stream_id):
        if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,256}", stream_id):
            raise ResumableStreamError("invalid-id", "invalid")

    package = types.ModuleType("assistant_stream")
    package.__path__ = []
    package.__spec__ = importlib.util.spec_from_loader("assistant_stream", None)
    resumable = types.ModuleType("assistant_stream.resumable")
    resumable.DEFAULT_TTL_MS = 86_400_000
    resumable.ResumableStreamEntry = ResumableStreamEntry
    resumable.ResumableStreamError = ResumableStreamError
    resumable.validate_stream_id = validate_stream_id
    package.resumable = resumable
    sys.modules["assistant_stream"] = package
    sys.modules["assistant_stream.resumable"] = resumable
    return False

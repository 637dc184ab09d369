"""Node, and the packages that `make test-web` installs for it."""

import shutil
from pathlib import Path

NODE_DIR = Path(__file__).parent.parent.parent / "build/web/node"


def program(name):
    """The path of a program that an installed package brings."""
    return str(NODE_DIR / "node_modules/.bin" / name)


def put(name):
    """Copy a script of this directory to where it finds the packages; return its path there."""
    return Path(shutil.copy(Path(__file__).parent / name, NODE_DIR / name))

"""Node, and the packages that `make test-web` installs for it."""

import json
import queue
import shutil
import subprocess
import threading
from pathlib import Path

NODE_DIR = Path(__file__).parent.parent.parent / "build/web/node"


def program(name):
    """The path of a program that an installed package brings."""
    return str(NODE_DIR / "node_modules/.bin" / name)


def put(name):
    """Copy a script of this directory to where it finds the packages; return its path there."""
    return Path(shutil.copy(Path(__file__).parent / name, NODE_DIR / name))


class Client:
    """A script of this directory that runs: each line that it prints is JSON."""

    def __init__(self, script, *arguments):
        self._process = subprocess.Popen(
            ["node", put(script), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines = queue.SimpleQueue()
        self._errors = []
        self._threads = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(
                target=lambda: self._errors.append(self._process.stderr.read()), daemon=True
            ),
        ]
        for thread in self._threads:
            thread.start()

    def _read(self):
        for line in self._process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait(10)
        for thread in self._threads:
            thread.join(10)
        self._process.stdout.close()
        self._process.stderr.close()

    def next(self):
        """What it prints next; None at its end."""
        line = self._lines.get(timeout=30)
        if line is None and self._process.wait(10) != 0:
            self._threads[1].join(10)
            raise AssertionError("".join(self._errors))
        return line

    def until(self, condition):
        """The first line for which *condition* holds."""
        while (line := self.next()) is not None:
            if condition(line):
                return line
        raise AssertionError("The client has ended.")

    def rest(self):
        """All further lines."""
        return list(iter(self.next, None))

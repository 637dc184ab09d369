"""The process of a contender: jobs on standard input, answers on standard output, one JSON line each."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import sys


def main() -> None:
    # Answers get a descriptor of their own: libraries may print to standard output.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        module, _, name = request["job"].partition(":")
        done = getattr(importlib.import_module(module), name)(**request["args"])
        if inspect.iscoroutine(done):
            done = asyncio.run(done)
        print(json.dumps(done), file=answers, flush=True)


if __name__ == "__main__":
    main()

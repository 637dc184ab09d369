"""The process of a contender: jobs in on standard input, answers out, one JSON line each."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import sys


def main() -> None:
    # A library that prints must not end up between two answers.
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

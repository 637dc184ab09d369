"""The process of a contender: jobs on standard input, answers on standard output, one JSON line each.

A job may be an asynchronous generator: a job of several stages. Each value is an answer, after which it waits for the
next line; its event loop runs meanwhile. Its last answer is null. With the argument ``uvloop`` that loop is uvloop's.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def main() -> None:
    # Answers get a descriptor of their own: libraries may print to standard output.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    factory = None
    if sys.argv[1:] == ["uvloop"]:
        factory = importlib.import_module("uvloop").new_event_loop
    while line := sys.stdin.readline():
        request = json.loads(line)
        module, _, name = request["job"].partition(":")
        done = getattr(importlib.import_module(module), name)(**request["args"])
        if inspect.isasyncgen(done):
            done = in_stages(done, answers)
        if inspect.iscoroutine(done):
            with asyncio.Runner(loop_factory=factory) as runner:
                done = runner.run(done)
        print(json.dumps(done), file=answers, flush=True)


async def in_stages(stages: AsyncIterator[object], answers: TextIO) -> None:
    async for answer in stages:
        print(json.dumps(answer), file=answers, flush=True)
        await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    main()

"""``ff-fast server``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ff_fast import InvalidInput, ValkeyBackend, _process
from ff_fast._cli.shared import DONE, LOOK_S, whole
from ff_fast.embedded import EmbeddedServerError

if TYPE_CHECKING:
    import argparse

    from ff_fast._cli.shared import Commands


def add_server(commands: Commands) -> None:
    parser = commands.add(
        server,
        help_text="start a server for development and print its URL, until Ctrl-C",
        description=(
            "Starts a Valkey server of its own with a supervisor, and prints its URL. The server ends with the"
            " command, and so does its data unless --dir keeps it."
        ),
    )
    parser.add_argument(
        "--port", type=whole, metavar="PORT", help="on 127.0.0.1, not 6379 (default: a free one)"
    )
    parser.add_argument("--dir", metavar="DIR", help="keep the data in this directory")
    parser.add_argument("--unix", action="store_true", help="listen on a Unix socket alone")


def server(arguments: argparse.Namespace) -> int:
    # Without a lock, as a signal handler must be.
    stops: list[None] = []
    restore = _process.on_stop_signals(lambda: stops.append(None))
    try:
        with ValkeyBackend.embedded(**_options(arguments)) as backend:
            started = backend._server  # noqa: SLF001
            assert started is not None
            print(started.url, flush=True)
            while not stops:
                if not started.running:
                    raise EmbeddedServerError("The server has ended; start it again.")
                time.sleep(LOOK_S)
    finally:
        restore()
    return DONE


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.unix and arguments.port is not None:
        raise InvalidInput("--unix is a socket, and --port a port: leave one of them out.")
    options: dict[str, Any] = {"tcp": not arguments.unix, "port": arguments.port or None}
    if arguments.dir is not None:
        try:
            Path(arguments.dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"--dir cannot be used: {error.strerror}.") from None
        options |= {"dir": str(Path(arguments.dir).resolve()), "appendonly": True}
    return options

"""Arguments, exit codes and error messages that the commands share."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import re
import sys
import warnings
from typing import TYPE_CHECKING

import orjson

from ff_fast import BackendConfig, DeploymentWarning, InvalidInput, ValkeyBackend

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

URL_VARIABLE = "FF_FAST_URL"
TOKEN_VARIABLE = "FF_FAST_TOKEN"  # noqa: S105 - the name of a variable
MAX_SECONDS = 31_536_000

DONE = 0
FAILED = 1
USAGE = 2


LOOK_S = 0.1
"""Time between two looks at what may have changed, in seconds."""

DRAIN_S = 25.0
"""How long the handlers of a worker have to end after a stop, in seconds."""

END_S = 3.0
"""How long a process may take for its end behind all handlers, in seconds."""


def complain(sentence: str) -> None:
    """Print an error on stderr, most often one line; what it quotes reaches no terminal as a command."""
    print("\n".join(map(one_line, f"ff-fast: {sentence}".split("\n"))), file=sys.stderr)


# -- output -----------------------------------------------------------------------------------------


def write_json(value: object, option: int = 0) -> None:
    out = sys.stdout.buffer
    out.write(_escaped(orjson.dumps(value, option=option)) + b"\n")
    out.flush()


# What JSON may have as it is and a terminal takes for a command: delete, and the controls from U+0080 on.
_CONTROLS = re.compile(rb"\x7f|\xc2[\x80-\x9f]")


def _escaped(text: bytes) -> bytes:
    """Return JSON with its control characters escaped."""
    return _CONTROLS.sub(lambda found: b"\\u%04x" % ord(found[0].decode()), text)


def one_line(value: object) -> str:
    """Return a worker's or caller's text with its control characters escaped."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in str(value))


class Parser(argparse.ArgumentParser):
    """Reports wrong usage in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message} (see {self.prog} --help)")
        raise SystemExit(USAGE)


class Commands:
    """The commands of a parser."""

    def __init__(self, parser: Parser) -> None:
        self._subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        self,
        function: Callable[[argparse.Namespace], int],
        *,
        help_text: str,
        description: str,
    ) -> Parser:
        """Add the command that *function* runs, under the name of the function."""
        parser = self._subparsers.add_parser(
            function.__name__, help=help_text, description=description
        )
        parser.set_defaults(run=function)
        return parser


# -- the server ------------------------------------------------------------------------------------


def add_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        metavar="URL",
        help=f"the server, such as valkey://host:6379; default: ${URL_VARIABLE}, which other users"
        " of the machine cannot see",
    )


def connect(arguments: argparse.Namespace) -> ValkeyBackend:
    """Return a backend of the server that ``--url`` or the environment names."""
    return ValkeyBackend.connect(url_of(arguments))


def look_at(arguments: argparse.Namespace) -> ValkeyBackend:
    """Return a backend for who looks and changes nothing: it does not load the library, not even a newer one."""
    config = BackendConfig.from_url(url_of(arguments))
    with warnings.catch_warnings():
        # The doctor tells of it.
        warnings.simplefilter("ignore", DeploymentWarning)
        return ValkeyBackend.connect(dataclasses.replace(config, load_library=False))


def url_of(arguments: argparse.Namespace) -> str:
    """Return the URL that ``--url`` or the environment names.

    Raises:
        InvalidInput: Neither does.
    """
    url: str | None = arguments.url or os.environ.get(URL_VARIABLE)
    if not url:
        raise InvalidInput(f"Name the server with --url, or in {URL_VARIABLE}.")
    return url


# -- types of arguments ----------------------------------------------------------------------------


def number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = float(text)
            if math.isfinite(value) and low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}")

    return parse


def whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise argparse.ArgumentTypeError("must be a whole number from 0")
    return int(text)


def counted(text: str) -> int:
    count = whole(text)
    if not count:
        raise argparse.ArgumentTypeError("must be a whole number from 1")
    return count


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("must be TAG=VALUE")
    return name, value

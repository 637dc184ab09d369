"""``ff-fast demo``."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import TYPE_CHECKING

from ff_fast import InvalidInput
from ff_fast._cli.shared import DONE, FAILED, URL_VARIABLE, complain, number, whole
from ff_fast._demo.plan import MAX_TOKENS, MODES, Plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ff_fast._cli.shared import Commands


def add_demo(commands: Commands) -> None:
    parser = commands.add(
        demo,
        help_text="stream a text from a worker to a reader and compare every byte",
        description=(
            "A worker process streams a text in three modes at once. A reader process tails it, and"
            " every byte that arrived is compared with what was sent. Where no server is named it runs on"
            " an embedded one, which is removed afterwards. With --web it is a chat in a browser:"
            " reload the page, open it twice, stop the answer, kill the worker."
        ),
    )
    parser.add_argument(
        "--rate",
        type=number(1, 100_000),
        metavar="HZ",
        help="tokens a second (default: 1000; of the chat 40)",
    )
    parser.add_argument(
        "--seconds",
        type=number(0.01, 3600),
        metavar="S",
        help="how long to stream; the text is repeated as often as needed (default: 6; of the chat 60)",
    )
    parser.add_argument(
        "--modes",
        type=_modes,
        default=MODES,
        metavar="MODE,...",
        help=f"only these of {', '.join(MODES)} (default: all)",
    )
    parser.add_argument("--plain", action="store_true", help="plain lines, also on a terminal")
    parser.add_argument(
        "--url",
        metavar="URL",
        help=f"server to stream through; default: ${URL_VARIABLE}, or an embedded one",
    )
    parser.add_argument(
        "--web", action="store_true", help="serve a chat in a browser, until Ctrl-C"
    )
    parser.add_argument(
        "--port",
        type=whole,
        default=8765,
        metavar="PORT",
        help="of the chat, on 127.0.0.1; 0 takes a free one (default: 8765)",
    )


def demo(arguments: argparse.Namespace) -> int:
    # Other commands need neither asyncio nor multiprocessing.
    from ff_fast._demo import run, view  # noqa: PLC0415

    rate_hz = arguments.rate or (40.0 if arguments.web else 1000.0)
    count = max(round(rate_hz * (arguments.seconds or (60.0 if arguments.web else 6.0))), 1)
    if count > MAX_TOKENS:
        raise InvalidInput(
            f"--rate times --seconds is {count} tokens; the demo keeps at most {MAX_TOKENS}."
        )
    if arguments.web:
        return _chat(arguments, rate_hz, count)
    plan = Plan(rate_hz, count, arguments.modes)
    shown = view.choose_view(plain=arguments.plain)
    with _server(arguments.url) as url:
        differences = run.run(url, plan, shown)
    for sentence in differences:
        complain(sentence)
    return FAILED if differences else DONE


def _chat(arguments: argparse.Namespace, rate_hz: float, count: int) -> int:
    # Packages of its own.
    from ff_fast._demo import answers, chat  # noqa: PLC0415

    if arguments.port > 65_535:
        raise InvalidInput("--port is a number up to 65535.")
    with _server(arguments.url) as url:
        chat.serve(url, arguments.port, answers.Answering(rate_hz, count))
    return DONE


@contextlib.contextmanager
def _server(url: str | None) -> Iterator[str]:
    """Give the server that was named, or one of the demo's own."""
    url = url or os.environ.get(URL_VARIABLE)
    if url:
        yield url
        return
    from ff_fast.embedded import EmbeddedServer  # noqa: PLC0415

    with EmbeddedServer() as server:
        yield server.url


def _modes(text: str) -> tuple[str, ...]:
    given = set(text.split(","))
    if not given <= set(MODES):
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(MODES)}, with commas")
    return tuple(mode for mode in MODES if mode in given)

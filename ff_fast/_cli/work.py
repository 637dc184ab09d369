"""``ff-fast worker``: runs handlers of the caller's modules, in this process or in several."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import logging
import os
import select
import sys
import threading
import time
import traceback
from datetime import timedelta
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ff_fast import InvalidInput, ValkeyBackend, Worker, _process, aio
from ff_fast._cli import health
from ff_fast._cli.shared import (
    DONE,
    DRAIN_S,
    END_S,
    FAILED,
    LOOK_S,
    MAX_SECONDS,
    add_url,
    number,
    url_of,
    whole,
)
from ff_fast._core.worker import HAND_BACK_S
from ff_fast._log import LOG

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from ff_fast._cli.shared import Commands

_DRAIN_RELOAD_S = 1.0
# Where the frames of an import are.
_IMPORTING = (
    *(__file__, importlib.__file__),
    *("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>"),
)
_LEVELS = ("debug", "info", "warning", "error")


def add_worker(commands: Commands) -> None:
    parser = commands.add(
        worker,
        help_text="run handlers of your modules, in one process or several",
        description=(
            "Imports each MODULE from the working directory or the path, and runs HANDLER: a function, or an"
            " ff_fast.Worker with several. One function serves all executions that name no handler; several are"
            " called by their names. SIGTERM and Ctrl-C stop the claims; handlers that outlast --drain-timeout, and"
            " all at a second signal, are interrupted, and their executions go to other workers."
        ),
    )
    parser.add_argument("targets", nargs="+", metavar="MODULE:HANDLER", help="such as chat:answer")
    parser.add_argument("--lane", metavar="NAME", help="lane (default: the worker's, or default)")
    parser.add_argument(
        "--concurrency",
        type=_at_least_1,
        metavar="N",
        help="handlers at once in a process (default: the worker's, or 1)",
    )
    parser.add_argument(
        "--workers", type=_at_least_1, default=1, metavar="N", help="processes (default: 1)"
    )
    parser.add_argument(
        "--reload",
        action="store_true",
        help="start again when a Python file below the working directory changes",
    )
    parser.add_argument(
        "--drain-timeout",
        type=number(0, MAX_SECONDS),
        metavar="S",
        help=(
            "seconds that handlers have after a stop (default: the worker's, or"
            f" {DRAIN_S:g}; with --reload {_DRAIN_RELOAD_S:g})"
        ),
    )
    parser.add_argument(
        "--health-port", type=_port, metavar="P", help="serve /live and /ready; 0 takes a free port"
    )
    parser.add_argument(
        "--metrics-port",
        type=_port,
        metavar="P",
        help="serve /metrics for Prometheus; of several processes the first at P, the next at P+1",
    )
    parser.add_argument(
        "--bind",
        default="0.0.0.0",  # noqa: S104 - probes come from outside
        metavar="ADDRESS",
        help="address of these ports (default: 0.0.0.0)",
    )
    parser.add_argument(
        "--until-idle",
        action="store_true",
        help="end when nothing waits, runs or is delayed, as for a retry (with --no-supervise: when nothing waits)",
    )
    parser.add_argument(
        "--no-supervise", action="store_true", help="leave retries, delays and timeouts to others"
    )
    parser.add_argument(
        "--log-level", choices=_LEVELS, default="info", help="of stderr (default: info)"
    )
    parser.add_argument("--parent-fd", type=int, help=argparse.SUPPRESS)
    add_url(parser)


def _at_least_1(text: str) -> int:
    if value := whole(text):
        return value
    raise argparse.ArgumentTypeError("must be at least 1")


def _port(text: str) -> int:
    if (value := whole(text)) <= 65_535:
        return value
    raise argparse.ArgumentTypeError("must be a port, at most 65535")


def worker(arguments: argparse.Namespace) -> int:
    logging.basicConfig(
        level=arguments.log_level.upper(),
        format="%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s",
    )
    if arguments.reload and arguments.drain_timeout is None:
        arguments.drain_timeout = _DRAIN_RELOAD_S
    if arguments.metrics_port is not None:
        health.check_metrics()
    url = url_of(arguments)
    if arguments.parent_fd is None and (arguments.workers > 1 or arguments.reload):
        # Other commands, and most workers, need no processes.
        from ff_fast._cli import processes  # noqa: PLC0415

        return processes.run(arguments, url)
    return Process(arguments, url).run()


# -- what is run -------------------------------------------------------------------------------------


def load(targets: Sequence[str], lane: str | None) -> list[Worker]:
    """Return the workers that ``MODULE:HANDLER`` name; functions without a worker share one.

    Raises:
        InvalidInput: A target cannot be imported, or is no handler; or coroutine and ordinary functions are mixed.
    """
    if "" not in sys.path and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    workers: list[Worker] = []
    functions: list[Any] = []
    for target in targets:
        found = _imported(target)
        if isinstance(found, Worker):
            workers.append(found)
        elif callable(found):
            functions.append(found)
        else:
            raise InvalidInput(f"{target} is neither a function nor an ff_fast.Worker.")
    if functions:
        made = Worker() if lane is None else Worker(lane=lane)
        for function in functions:
            name = None if len(functions) == 1 else getattr(function, "__name__", "")
            made.handler(name)(function)
        workers.append(made)
    if len({each.is_async for each in workers}) > 1:
        raise InvalidInput(
            "The handlers must all be coroutine functions, or all ordinary ones; start a second command for the others."
        )
    return workers


def _imported(target: str) -> object:
    module, colon, path = target.partition(":")
    if os.sep in module:
        name = str(Path(module).with_suffix("")).replace(os.sep, ".")
        raise InvalidInput(f"{module} must be the name of a module, such as {name}.")
    if not (module and colon and path) or module.startswith("."):
        raise InvalidInput(f"{target} must be MODULE:HANDLER.")
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it is the module's
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module}.".startswith(f"{missing}."):
            hint = f"; leave .py out: {missing[:-3]}" if missing.endswith(".py") else " here"
            raise InvalidInput(f"There is no module {missing}{hint}.") from None
        _show_import(error)
        raise InvalidInput(f"{module} cannot be imported: see above.") from None
    try:
        found: object = attrgetter(path)(imported)
    except AttributeError:
        raise InvalidInput(f"{module} has no {path}.") from None
    return found


def _show_import(error: BaseException) -> None:
    """Show an error with the frames of the module alone."""
    where = error.__traceback__
    while where is not None and where.tb_frame.f_code.co_filename in _IMPORTING:
        where = where.tb_next
    traceback.print_exception(error.with_traceback(where))


# -- one process -------------------------------------------------------------------------------------


class Stop:
    """The event that stops all workers of the process; a second signal makes them hurry."""

    def __init__(self) -> None:
        self.hurried = False
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True

    def signalled(self) -> None:
        """Take a signal; called in its handler."""
        self.hurried = self._set
        self._set = True


class Process:
    """One process of workers.

    Args:
        arguments: Those of the command.
        url: The server.
    """

    def __init__(self, arguments: argparse.Namespace, url: str) -> None:
        self._arguments = arguments
        self._url = url
        self._stop = Stop()
        self._backend: Any = None
        self._drain_s = 0.0
        self._errors: list[BaseException] = []
        self._over = threading.Event()
        self._pulse: health.Pulse | None = None

    def run(self) -> int:
        parent = _parent_of(self._arguments.parent_fd)
        threading.Thread(
            target=self._mind, args=(parent,), name="ff-fast worker", daemon=True
        ).start()
        with contextlib.ExitStack() as ends:
            ends.callback(self._over.set)
            try:
                workers = load(self._arguments.targets, self._arguments.lane)
                ends.callback(_process.on_stop_signals(self._stop.signalled, twice=True))
            except (_process.Terminated, KeyboardInterrupt):
                # An import may take long, and nothing is claimed yet.
                return DONE
            self._run(workers)
        if self._errors:
            raise self._errors[0]
        return DONE

    def _run(self, workers: list[Worker]) -> None:
        self._drain_s = max(map(self._drain_of, workers))
        endpoints = self._serve()
        if workers[0].is_async:
            asyncio.run(self._run_async(workers, endpoints))
        else:
            self._run_sync(workers, endpoints)

    def why_not_live(self) -> str:
        """Return why the process is to be ended, as one word; empty if it is alive."""
        return "blocked" if self._pulse is not None and self._pulse.stuck else ""

    def why_not_ready(self) -> str:
        """Return why the process is not ready, as one word; empty if it is."""
        if self._stop.is_set():
            return "stopping"
        reached = None if self._backend is None else self._backend._attending.reached  # noqa: SLF001
        if reached is None:
            return "starting"
        return "" if reached else "unreachable"

    def _serve(self) -> health.Endpoints:
        arguments, endpoints = self._arguments, health.Endpoints()
        ports = []
        if arguments.health_port is not None:
            endpoints.live, endpoints.ready = self.why_not_live, self.why_not_ready
            ports.append(("health", arguments.health_port))
        if (
            arguments.metrics_port is not None
            and arguments.metrics_port not in dict(ports).values()
        ):
            ports.append(("metrics", arguments.metrics_port))
        for what, port in ports:
            served = health.serve(endpoints, arguments.bind, port)
            LOG.info("Serving %s on port %d", what, served)
        return endpoints

    def _begin(self, backend: Any, endpoints: health.Endpoints) -> None:  # noqa: ANN401
        self._backend = backend
        if self._arguments.metrics_port is not None:
            endpoints.metrics = health.prometheus(backend)

    def _drain_of(self, each: Worker) -> float:
        """Return how many seconds the handlers of a worker have after a stop."""
        for given in (self._arguments.drain_timeout, each._options.get("drain_timeout")):  # noqa: SLF001
            if given is not None:
                return given.total_seconds() if isinstance(given, timedelta) else float(given)
        return DRAIN_S

    def _options(self, each: Worker) -> dict[str, Any]:
        arguments = self._arguments
        options = {"stop": self._stop, "drain_timeout": self._drain_of(each)}
        if arguments.until_idle:
            options["until_idle"] = True
        if arguments.no_supervise:
            options["supervise"] = False
        for name in ("lane", "concurrency"):
            if getattr(arguments, name) is not None:
                options[name] = getattr(arguments, name)
        return options

    def _run_sync(self, workers: list[Worker], endpoints: health.Endpoints) -> None:
        with ValkeyBackend.connect(self._url) as backend:
            self._begin(backend, endpoints)

            def one(each: Worker) -> None:
                try:
                    backend.run_worker(each, **self._options(each))
                except BaseException as error:  # noqa: BLE001 - raised again by run()
                    self._failed(error)

            threads = [threading.Thread(target=one, args=(each,)) for each in workers[1:]]
            for thread in threads:
                thread.daemon = True
                thread.start()
            one(workers[0])
            for thread in threads:
                while thread.is_alive():
                    thread.join(LOOK_S)

    async def _run_async(self, workers: list[Worker], endpoints: health.Endpoints) -> None:
        self._pulse = health.Pulse(LOOK_S)
        async with aio.ValkeyBackend.connect(self._url) as backend:
            self._begin(backend, endpoints)

            async def one(each: Worker) -> None:
                try:
                    await backend.run_worker(each, **self._options(each))
                except Exception as error:  # noqa: BLE001 - raised again by run()
                    self._failed(error)

            await asyncio.gather(*map(one, workers))

    def _failed(self, error: BaseException) -> None:
        self._errors.append(error)
        self._stop.set()

    def _mind(self, parent: socket.socket | None) -> None:
        """Mind that the loop goes round, tell the parent whether the process is ready, and end what does not end.

        Where the parent is gone, stop.
        """
        told: tuple[str, float] | None = None
        until = float("inf")
        while not self._over.is_set():
            why, stop, now = self.why_not_ready(), self._stop, time.monotonic()
            if self._pulse is not None:
                self._pulse.look()
            if stop.is_set():
                until = min(until, now + self._drain_s + HAND_BACK_S + END_S)
            if stop.hurried:
                until = min(until, now + HAND_BACK_S + END_S)
            if now > until:
                LOG.error(
                    "The process is ended, as a handler or a lifespan does not end; executions that it has go on when their"
                    " leases lapse."
                )
                logging.shutdown()
                os._exit(FAILED)
            if parent is None:
                time.sleep(LOOK_S)
                continue
            try:
                if (why, self._drain_s) != told:
                    told = why, self._drain_s
                    parent.sendall(f"{self._drain_s} {why}\n".encode())
                gone = bool(select.select([parent], [], [], LOOK_S)[0]) and not parent.recv(64)
            except OSError:
                gone = True
            if gone:
                parent.close()
                parent = None
                LOG.warning("The process that started this one has gone.")
                self._stop.set()


def _parent_of(number: int | None) -> socket.socket | None:
    if number is None:
        return None
    import socket  # noqa: PLC0415

    try:
        connected = socket.socket(fileno=number)
    except OSError:
        raise InvalidInput("--parent-fd is for the processes of --workers.") from None
    connected.setblocking(True)
    return connected

"""From a stream to a browser: responses that resume, for any web framework.

With Starlette, and so with FastAPI (extra ``web``)::

    @app.get("/streams/{execution_id}")
    async def stream(request: Request, execution_id: str):
        return StreamResponse(backend, execution_id, request)

A browser reads it with ``new EventSource("/streams/...")``, which comes again by itself after a lost connection, and gets
every character once; :data:`CLIENT_JS`, which :func:`client_script` serves, also survives sleep and what the window has lost.
:func:`events` and :func:`iter_events` are iterators of bytes for every other framework, and need no package.

What goes over the wire is a :class:`Framing`: :class:`EventFraming` unless another one is passed. :mod:`ff_fast.web.ai_sdk` and
:mod:`ff_fast.web.ag_ui` have those of front ends.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ff_fast.web.chunk_log import ChunkWriter
from ff_fast.web.framing import DataFraming, EventFraming, Framing, Item, Passthrough, event
from ff_fast.web.reading import BlockingChunks, Chunks, end_responses, events, iter_events
from ff_fast.web.script import CLIENT_JS
from ff_fast.web.tickets import check_token, stream_token

if TYPE_CHECKING:
    from ff_fast.web.response import (
        StreamResponse,
        client_script,
        error_response,
        stop_response,
    )

# Names that need Starlette.
_RESPONSES = ("StreamResponse", "client_script", "error_response", "stop_response")

__all__ = [
    "CLIENT_JS",
    "BlockingChunks",
    "ChunkWriter",
    "Chunks",
    "DataFraming",
    "EventFraming",
    "Framing",
    "Item",
    "Passthrough",
    "StreamResponse",
    "check_token",
    "client_script",
    "end_responses",
    "error_response",
    "event",
    "events",
    "iter_events",
    "stop_response",
    "stream_token",
]


def __getattr__(name: str) -> Any:
    if name in _RESPONSES:
        return getattr(import_module("ff_fast.web.response"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

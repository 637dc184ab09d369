"""`ff_append` and `ff_open_writer` on real engines, called as any client may call them."""

import contextlib

import pytest

import ff_fast

from ...router import Router
from ..streams import Listener, Stream, server_ms


@pytest.fixture(scope="module")
def backends():
    opened = {}
    yield opened
    for backend in opened.values():
        backend.close()


@pytest.fixture
def backend(engine, backends):
    if engine.url not in backends:
        backends[engine.url] = ff_fast.ValkeyBackend.connect(engine.url)
    return backends[engine.url]


@pytest.fixture
def unopened(raw, backend, lane):
    return Stream(raw, backend, lane)


@pytest.fixture
def stream(unopened):
    unopened.open()
    return unopened


@pytest.fixture
def streams(raw, backend, lane):
    """Makes streams of attempts of their own, which one call may name: in a cluster they are in one slot."""

    def make(count):
        made = []
        for _ in range(count):
            beside = made[0] if made and isinstance(raw, Router) else None
            made.append(opened(Stream(raw, backend, lane, beside=beside)))
        return made

    return make


def opened(stream):
    stream.open()
    return stream


@pytest.fixture
def listen(raw):
    """Subscribes to the channels of attempts."""
    with contextlib.ExitStack() as stack:

        def subscribe(*channels):
            listener = Listener(raw, *channels)
            stack.callback(listener.close)
            return listener

        yield subscribe


@pytest.fixture
def next_ms(raw, wait_until):
    """Wait until the server's clock shows another millisecond."""

    def wait():
        now = server_ms(raw)
        wait_until(lambda: server_ms(raw) > now)

    return wait

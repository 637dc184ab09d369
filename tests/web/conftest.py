"""Applications over a real server, and the clients that read them."""

import contextlib

import pytest

from ff_fast import aio
from tests.web import browser, sites


@pytest.fixture
def backend_of(server):
    """`async with backend_of() as backend`: a backend of the asyncio shell."""
    return lambda: aio.ValkeyBackend.connect(server.url)


@pytest.fixture
def site(server):
    """`site(routes)`: a function that makes routes of a backend, served by uvicorn on a thread; closed at last."""
    with contextlib.ExitStack() as stack:
        yield lambda routes, **options: stack.enter_context(
            sites.Site(server.url, routes, **options)
        )


@pytest.fixture(scope="session")
def driver():
    """Headless Chromium; tests use tabs of their own."""
    driver = browser.start()
    yield driver
    driver.quit()

"""The stepped clock itself: what the other tests believe that the server sees."""

import time

import pytest

from ..clock import SteppedServer
from ..conftest import ENGINES, PROMPT, connect_raw, second_engine
from ..waiting import wait_until


@pytest.fixture(params=ENGINES)
def stepped(request):
    executable = second_engine() if request.param == "redis_server" else None
    with SteppedServer(executable=executable, **PROMPT) as running:
        yield running


def test_the_servers_clock_goes_where_it_is_stepped_and_streams_see_it(stepped):
    def seen():
        seconds, micros = raw.time()
        return seconds + micros / 1e6 - time.time()

    with connect_raw(stepped.url) as raw:
        assert abs(seen()) < 30
        for step, offset in ((-3600, -3600), (-1.5, -3601.5), (7200, 3598.5)):
            stepped.step_clock(step)
            wait_until(lambda offset=offset: abs(seen() - offset) < 1)
            assert stepped.clock_offset_s == offset
        # Ids of a stream never go back.
        first = raw.xadd("stream", {"a": "b"})
        stepped.step_clock(-7200)
        wait_until(lambda: seen() < 0)
        assert int(raw.xadd("stream", {"a": "b"}).split(b"-")[0]) == int(first.split(b"-")[0])

"""OpenAI's own client reads responses from a web application whose worker is another process."""

import asyncio
import contextlib
import uuid

import pytest
from starlette.routing import Mount

import ff_fast
from ff_fast import keys, web
from ff_fast.web import openai_responses
from tests.waiting import wait_until
from tests.web.producers import producer, text_of

pytestmark = pytest.mark.web

COUNT = 400
KEY = b"k" * 32


@pytest.fixture
def name():
    return f"resp_{uuid.uuid4().hex}"


@pytest.fixture
def api(site):
    """`api(**options)`: a client of an application with the routes of the API, whose key permits all."""
    import openai

    clients = []

    def made(key="unused", **options):
        served = site(
            lambda backend: [
                Mount(
                    "/v1",
                    routes=openai_responses.routes(backend, backend.execution_id_for, **options),
                )
            ]
        )
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)
        clients.append(client)
        return client

    yield made
    for client in clients:
        client.close()


def deltas(events):
    return "".join(each.delta for each in events if each.type == "response.output_text.delta")


def test_a_stream_that_is_cut_again_and_again_is_read_once(server, api, name):
    client = api()
    events = []
    with producer("response", server.url, name, COUNT):
        cuts = 0
        while not events or events[-1].type != "response.completed":
            last = {"starting_after": events[-1].sequence_number} if events else {}
            with client.responses.retrieve(name, stream=True, **last) as stream:
                for index, each in enumerate(stream):
                    events.append(each)
                    if index == 90:
                        cuts += 1
                        break
    assert cuts >= 4
    assert [each.sequence_number for each in events] == list(range(COUNT + 8))
    assert deltas(events) == text_of(COUNT)
    assert events[-1].response.output_text == text_of(COUNT)
    # As OpenAI's own, it can be streamed again, and retrieved as a whole.
    with client.responses.retrieve(name, stream=True) as stream:
        assert [each.to_dict() for each in stream] == [each.to_dict() for each in events]
    assert client.responses.retrieve(name).output_text == text_of(COUNT)


def test_the_accumulating_helper_understands_the_events(server, api, name):
    client = api()
    with producer("response", server.url, name, COUNT):
        with client.responses.stream(response_id=name) as stream:
            final = stream.get_final_response()
        with client.responses.stream(response_id=name, starting_after=COUNT) as stream:
            rest = list(stream)
    assert final.output_text == text_of(COUNT)
    assert final.status == "completed"
    assert [each.sequence_number for each in rest] == list(range(COUNT + 1, COUNT + 8))


def test_the_asynchronous_client_reads_the_same(server, api, name):
    import openai

    url = api().base_url

    async def read():
        async with openai.AsyncOpenAI(base_url=url, api_key="unused") as client:
            stream = await client.responses.retrieve(name, stream=True)
            async with stream:
                return [each async for each in stream]

    with producer("response", server.url, name, COUNT):
        events = asyncio.run(read())
    assert deltas(events) == text_of(COUNT)


def test_a_cancellation_ends_the_worker_and_the_stream(server, api, name):
    client = api()
    events = []
    with producer("response", server.url, name, 100_000) as process:
        with client.responses.retrieve(name, stream=True) as stream:
            for each in stream:
                events.append(each)
                if len(events) == 50:
                    assert client.responses.cancel(name).status == "cancelled"
        wait_until(lambda: process.poll() is not None, 10)
    assert (events[-1].type, events[-1].response.status) == ("response.failed", "cancelled")
    assert [each.sequence_number for each in events] == list(range(len(events)))
    whole = client.responses.retrieve(name)
    assert (whole.status, whole.output_text) == ("cancelled", deltas(events))
    assert client.responses.cancel(name).status == "cancelled"


def test_a_worker_that_is_killed_and_its_successor_are_never_mixed(server, api, name):
    import openai

    client = api()
    events = []
    with (
        contextlib.ExitStack() as successor,
        producer("response", server.url, name, 100_000) as process,
    ):
        with client.responses.retrieve(name, stream=True) as stream:
            for each in stream:
                events.append(each)
                if len(events) == 50:
                    process.kill()
                    wait_until_lapsed(server, name)
                    successor.enter_context(producer("response", server.url, name, COUNT))
        assert (events[-1].type, events[-1].code) == ("error", openai_responses.RESTARTED)
        assert [each.sequence_number for each in events] == list(range(len(events)))
        with pytest.raises(openai.BadRequestError) as raised:
            client.responses.retrieve(name, stream=True, starting_after=20)
        assert raised.value.code == openai_responses.RESTARTED
        # The number of the error is the place before the first event of the successor.
        with client.responses.retrieve(
            name, stream=True, starting_after=events[-1].sequence_number
        ) as stream:
            after = list(stream)
        with client.responses.retrieve(name, stream=True) as stream:
            anew = list(stream)
    assert deltas(anew) == text_of(COUNT)
    assert [each.to_dict() for each in after] == [each.to_dict() for each in anew]
    assert anew[0].sequence_number == len(events)


def wait_until_lapsed(server, name):
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        eid = backend.execution_id_for(name)
        wait_until(lambda: backend.describe_stream(eid).lease_left == 0)


def test_errors_are_those_of_the_client(server, api, name):
    import openai

    client = api()
    with pytest.raises(openai.NotFoundError, match="execution") as raised:
        client.responses.retrieve(name)
    assert raised.value.type == "invalid_request_error"
    with producer("response", server.url, name, 3):
        pass
    with pytest.raises(openai.BadRequestError, match="starting_after") as raised:
        client.responses.retrieve(name, stream=True, starting_after=-1)
    assert raised.value.code == "invalid_value"


def test_a_signed_token_is_the_key_of_a_client(server, api, name):
    import openai

    eid = keys.execution_id_for(name, num_partitions=256)
    client = api(web.stream_token(KEY, eid), token_key=KEY)
    with producer("response", server.url, name, 3):
        pass
    assert client.responses.retrieve(name).output_text == text_of(3)
    with pytest.raises(openai.PermissionDeniedError):
        client.responses.cancel(name)

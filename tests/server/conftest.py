"""What holds for every call that a test of this folder makes."""

import pytest

from ff_fast import _library
from ff_fast._core import ops


@pytest.fixture(autouse=True)
def refusals_are_declared(monkeypatch):
    """A function refuses with the codes of its header and no others."""
    headers, answer = _library.headers(), ops.Op.answer

    def checked(op, reply):
        if isinstance(reply, list) and reply[:1] == [0]:
            name = op.function.decode()
            assert reply[1].decode() in headers[name].errors, f"{name}: {reply[1]}"
        return answer(op, reply)

    monkeypatch.setattr(ops.Op, "answer", checked)

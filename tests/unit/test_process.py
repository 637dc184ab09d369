"""The end of the interpreter: what it asks of the objects that have work left."""

import signal
import weakref

import pytest

from ff_fast import _process, cli


class Ending:
    def __init__(self, said, name, *, finishes=True):
        self._said = said
        self._name = name
        self._begun = False
        self._finishes = finishes

    def _finish_soon(self):
        self._said.append(f"{self._name} begins")
        self._begun = True

    def _finished(self):
        return self._begun and self._finishes

    def _warn_of_losses(self):
        self._said.append(f"{self._name} warns")


@pytest.mark.parametrize("finishes", [True, False])
def test_all_begin_before_one_is_waited_for_and_warn_when_time_is_up(monkeypatch, finishes):
    said = []
    clients = [Ending(said, "a", finishes=finishes), Ending(said, "b")]
    monkeypatch.setattr(_process, "_ending", weakref.WeakSet(clients))
    monkeypatch.setattr(_process, "EXIT_S", 0.01)
    _process._tell_of_exit()
    assert sorted(said[:2]) == ["a begins", "b begins"]
    assert sorted(said[2:]) == ["a warns", "b warns"]


def test_a_worker_of_the_command_line_ends_in_order_at_its_first_signal():
    with cli._terminable():
        # It would end the command at once, as it does where no worker runs.
        assert _process._only_interrupts(signal.getsignal(signal.SIGTERM))

"""The soak itself: a few seconds of it, and what its parts decide without a server."""

import random

import pytest

from ..soak import job, plan, run
from ..soak.__main__ import main
from ..soak.faults import FAULTS

WEIGHTS = {name: fault.weight for name, fault in FAULTS.items()}


KINDS = ("all_connections_cut", "a_worker_killed", "functions_flushed")


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_short_soak_finds_nothing(monkeypatch):
    monkeypatch.setattr(run, "WARM_S", 0.2)
    monkeypatch.setattr(run, "SETTLED_S", 0.5)
    settings = run.Settings(seconds=1.2, seed=19, kinds=KINDS, every=0.4, workers=3)
    report = run.run(settings)
    assert report.text().endswith("\n0 violations"), report.text()
    assert report.account.injected.keys() == {*KINDS, "calls cancelled"}


def test_a_command_that_names_no_kind_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "luck"])
    assert "luck" in capsys.readouterr().err


def test_a_seed_repeats_the_schedule_and_every_kind_is_drawn():
    first = plan.schedule(7, 3_600, WEIGHTS)
    assert first == plan.schedule(7, 3_600, WEIGHTS)
    assert first != plan.schedule(8, 3_600, WEIGHTS)
    assert {planned.kind for planned in first} == FAULTS.keys()
    assert all(0 < planned.at < 3_600 for planned in first)


def test_a_job_is_its_payload_and_names_every_frame():
    dice = random.Random(1)
    for _ in range(200):
        drawn = job.draw(dice)
        assert job.Job.load(drawn.dump()) == drawn
        assert drawn.length == sum(burst.frames for burst in drawn.bursts)
        assert drawn.burst_of(1) == drawn.bursts[0]
        assert drawn.burst_of(drawn.length) == drawn.bursts[-1]
        assert drawn.burst_of(drawn.length + 1) is None

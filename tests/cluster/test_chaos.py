"""A few seconds of each kind of chaos in both shells; `make chaos` has the minutes."""

import pytest

from ..shells import KINDS
from .chaos.__main__ import main
from .chaos.run import Settings, run
from .chaos.scenarios import SCENARIOS

pytestmark = pytest.mark.long
# Long enough for two faults of each kind.
SECONDS, EVERY = 4.0, 2.0


@pytest.mark.timeout(240)
@pytest.mark.parametrize("shell", KINDS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_streams_are_whole_or_their_loss_is_told_while(scenario, shell):
    settings = Settings(scenario, shell, SECONDS, streams=24, length=60, seed=10, every=EVERY)
    report = run(settings)
    assert report.text().endswith("\n0 violations"), report.text()
    assert report.faults > 1


def test_a_command_that_names_no_scenario_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "luck"])
    assert "luck" in capsys.readouterr().err

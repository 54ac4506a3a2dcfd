"""Models of many architectures, trained for two iterations and exported: three ways to one log-probability agree."""

import pytest
from architectures import DEFAULT, REFUSED, TESTED, run

from dynamo_lightning.errors import RunError, UserError


def check(name, folder):
    result = run(name, folder)  # an export that differs from the trained policy raises
    assert result["sampled"] < 1e-3 and result["own"] < 1e-3
    assert result["moved"] > 1e-5


@pytest.mark.parametrize("name", DEFAULT)
def test_sampled_scored_and_own_log_probabilities_agree(name, tmp_path):
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TESTED if name not in DEFAULT])
def test_they_agree_in_every_listed_architecture(name, tmp_path):
    check(name, tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_agree_is_refused_and_an_option_is_named(name, tmp_path):
    with pytest.raises((UserError, RunError), match=r"model\.(policy|sampling|generator)"):
        run(name, tmp_path, export=False)

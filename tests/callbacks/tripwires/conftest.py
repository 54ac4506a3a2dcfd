"""Short runs of the embedded policy through the command line."""

import warnings
from pathlib import Path

import pytest
import torch
import yaml
from short_runs import first_rows, healthy_settings, reward_function  # noqa: F401  # a fixture

from dynamo_lightning.cli import main


@pytest.fixture(autouse=True)
def one_thread():
    """As fast for so small a policy, and steady on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def settings():
    """A healthy run of 12 small iterations, as a config's values."""
    return healthy_settings()


@pytest.fixture
def fit(settings, tmp_path, monkeypatch):
    """Runs `fit` on the settings in an empty folder; gives the first row of each tripwire that went off."""

    def run(*arguments, name="run"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        Path("config.yaml").write_text(yaml.safe_dump(settings))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main(["fit", "--config", "config.yaml", *arguments])
        return first_rows(folder)

    return run

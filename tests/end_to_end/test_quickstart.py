"""What the README promises of the quickstart."""

import json
import re
from pathlib import Path

import pytest
from logged import column

from dynamo_lightning.cli import main


@pytest.mark.slow
def test_quickstart_keeps_its_promises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = main(["fit", "--config", "quickstart.yaml", "--trainer.enable_progress_bar=false"])
    summary = json.loads(Path("runs/quickstart/version_0/summary.json").read_text())
    before, after = (summary[when]["val/arithmetic/pass@1"] for when in ("before", "after"))
    assert after - before >= 0.20
    assert summary["final"]["alloc/predicted_variance_ratio"] < 0.9
    per_epoch = len(cli.datamodule.train_dataloader())
    sizes = zip(column("quickstart", "alloc/n_min"), column("quickstart", "alloc/n_max"), strict=True)
    unequal = [smallest < largest for smallest, largest in sizes][per_epoch:]
    assert sum(unequal) > 0.9 * len(unequal)
    for factor in ("mod/beta_comp_mean", "mod/beta_stab_mean"):
        assert len(set(column("quickstart", factor))) > 10
    assert Path("runs/quickstart/version_0/curves.png").stat().st_size > 10_000


def test_every_command_in_the_readme_names_an_option_that_exists(capsys):
    """Commands are taken from the README and parsed; nothing is run."""
    readme = Path(__file__).parents[2] / "README.md"
    if not readme.exists():
        pytest.skip("the README does not come with an installed package")
    commands = re.findall(r"^python -m dynamo_lightning (fit .*?)(?:#.*)?$", readme.read_text(), re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        arguments = [*command.split(), "--print_config"] if "print_config" not in command else command.split()
        with pytest.raises(SystemExit) as finished:
            main([argument for argument in arguments if argument != "--help"])
        assert finished.value.code in (0, None), command
        assert "prompts_per_batch" in capsys.readouterr().out

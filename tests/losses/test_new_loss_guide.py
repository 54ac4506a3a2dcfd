"""The loss of docs/new_loss.md is what the page says: complete, one file, and at home in a run."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import yaml

from dynamo_lightning.cli import DynamoCLI, main
from dynamo_lightning.losses.policy_loss import LossInputs, PolicyLoss
from dynamo_lightning.losses.token_statistics import TokenStatistics

PAGE = Path(__file__).parents[2] / "docs" / "new_loss.md"


@pytest.fixture(scope="module")
def code():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return block


@pytest.fixture(scope="module")
def folder(code, tmp_path_factory):
    path = tmp_path_factory.mktemp("guide")
    (path / "sapo.py").write_text(code)
    return path


@pytest.fixture(scope="module")
def sapo(folder):
    spec = importlib.util.spec_from_file_location("sapo", folder / "sapo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SAPO


def test_a_new_loss_is_a_file_of_about_40_lines(code):
    assert len(code.splitlines()) <= 45


def test_the_example_by_hand(sapo):
    ratio = torch.tensor([1.0, 2.0, 2.0], requires_grad=True)
    objective, metrics = sapo(positive_temperature=1.0, negative_temperature=2.0)(ratio, torch.tensor([3.0, 3.0, -3.0]))
    gate = torch.sigmoid(torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(objective.detach(), torch.tensor([12.0, 12.0, -6.0]) * gate)
    objective.sum().backward()
    torch.testing.assert_close(ratio.grad, torch.tensor([3.0, 3.0, -3.0]) * 4 * gate * (1 - gate))
    assert metrics["sapo/held_back_mean"].tolist() == pytest.approx([0.0, 0.213552, 0.580026], abs=1e-5)


def test_the_example_is_reinforce_at_the_sampling_policy(sapo):
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([2.0, -1.0])
    inputs = LossInputs(logprobs.detach(), advantages, torch.ones(2), None)
    statistics = TokenStatistics(logprobs, torch.zeros(2), torch.zeros(2))
    PolicyLoss(modulation=None, surrogate=sapo())(statistics, inputs, 2)[0].backward()
    torch.testing.assert_close(-logprobs.grad, advantages)


def test_the_example_refuses_impossible_options(sapo):
    with pytest.raises(ValueError, match="must be positive"):
        sapo(negative_temperature=0.0)


def test_the_yaml_of_the_page_chooses_it_in_a_run(folder, monkeypatch, tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DynamoCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(DynamoCLI, "_run_subcommand", lambda self, subcommand: None)
    Path("mine.yaml").write_text(yaml.safe_dump(yaml.safe_load(block)))
    config = main(["fit", "--config", "quickstart.yaml", "--config", "mine.yaml"]).config["fit"]
    assert config.model.loss.surrogate.class_path == "sapo.SAPO"
    assert config.model.loss.surrogate.init_args.negative_temperature == 1.05


def test_the_page_names_every_part_that_comes_with_the_library():
    import dynamo_lightning.losses as package
    from dynamo_lightning.losses.advantages import Advantage
    from dynamo_lightning.losses.modulation import Modulation
    from dynamo_lightning.losses.penalty import Penalty
    from dynamo_lightning.losses.surrogate import Surrogate

    for path in Path(package.__file__).parent.glob("*.py"):
        importlib.import_module(f"dynamo_lightning.losses.{path.stem}")

    def subclasses(base):
        return {c for child in base.__subclasses__() for c in ({child} | subclasses(child))}

    page = PAGE.read_text()
    for base in (Advantage, Modulation, Surrogate, Penalty):
        names = {c.__name__ for c in subclasses(base) if c.__module__.startswith("dynamo_lightning.losses.")}
        missing = {name for name in names if not name.startswith("LazyInstance") and f"`{name}`" not in page}
        assert not missing

"""Rollouts of older weights: with stand-ins for servers whose responses depend on seed and weights, and without."""

import csv
from pathlib import Path

import fake_vllm_server
import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from dynamo_lightning.allocation import LogitFilter
from dynamo_lightning.allocation.dynamic_sampling import DynamicSamplingConfig
from dynamo_lightning.callbacks import IterationCheckpoint
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.engines.engine import SamplingConfig
from dynamo_lightning.engines.transformers import TransformersEngine
from dynamo_lightning.engines.vllm.server import VLLMServerEngine
from dynamo_lightning.errors import UserError
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.policy.loading import PolicyConfig, load_policy
from dynamo_lightning.rewards import FunctionReward
from dynamo_lightning.rewards.scorer import ScoringConfig
from dynamo_lightning.rollout.in_flight import RolloutsInFlight
from dynamo_lightning.types import Outcome, Score


@pytest.fixture
def server(tiny_policy):
    server = fake_vllm_server.FakeServer(load_policy(tiny_policy, PolicyConfig()))
    server.depends_on_weights = True
    yield server
    server.die()


@pytest.fixture
def fit(server, tiny_policy, prompt_file, tmp_path, monkeypatch):
    """Runs two epochs of three iterations into a folder; gives the module."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward.py").write_text(
        "def f(prompt, response, answer):\n    return float(sum(map(ord, response[:1])) % 2)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)

    def fit(folder, max_staleness=1, ckpt_path=None, engine=None, data_options=None, **options):
        seed_everything(0)
        source = PromptSource(prompt_file, template="{prompt}")
        sizes = {"prompts_per_batch": 4, "rollouts_per_prompt": 4} | (data_options or {})
        data = RolloutDataModule(source, [source], tokenizer_name=tiny_policy, **sizes)
        module = PolicyModule(
            tiny_policy,
            generator=engine or VLLMServerEngine([server.url], "weights", patience=2.0),
            sampling=SamplingConfig(max_response_length=6, logp_tolerance=100.0),  # servers make up log-probabilities
            reward=FunctionReward("reward.f"),
            scoring=ScoringConfig(num_workers=1, time_limit=60.0),
            max_staleness=max_staleness,
            **options,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        )
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=2,
            check_val_every_n_epoch=1,
            log_every_n_steps=1,
            logger=CSVLogger(folder),
            callbacks=[IterationCheckpoint(dirpath=folder, every_n_iterations=1, save_top_k=-1)],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return module

    return fit


def staleness(folder):
    with open(next(Path(folder).rglob("metrics.csv"))) as file:
        return [float(row["sampling/staleness"]) for row in csv.DictReader(file) if row.get("sampling/staleness")]


def assert_same_policy(first, second):
    for one, other in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_batches_after_an_epochs_first_are_one_step_old_and_resume_is_exact(fit):
    whole = fit("whole")
    assert staleness("whole") == [0, 1, 1, 0, 1, 1]
    for checkpoint in ("iteration=000002.ckpt", "iteration=000003.ckpt", "iteration=000004.ckpt"):
        resumed = fit(f"resumed-{checkpoint}", ckpt_path=f"whole/{checkpoint}")
        assert_same_policy(whole, resumed)
        assert staleness(f"resumed-{checkpoint}") == staleness("whole")[int(checkpoint[10:16]) :]


def test_the_engine_of_the_policy_itself_samples_the_same_data_and_resumes_exactly(fit):
    """Batch t + S is sampled with the weights that iteration t begins with, S being 2; an epoch has 3 batches."""
    whole = fit("own", max_staleness=2, engine=TransformersEngine())
    assert staleness("own") == [0, 1, 2, 0, 1, 2]
    resumed = fit("own-resumed", max_staleness=2, engine=TransformersEngine(), ckpt_path="own/iteration=000001.ckpt")
    assert_same_policy(whole, resumed)
    assert staleness("own-resumed") == [1, 2, 0, 1, 2]


def test_a_pilot_on_servers_gives_what_it_gives_with_parts_sampled_in_one_go(fit, monkeypatch):
    pilot = {"rollouts_per_prompt": 8, "pilot": 2, "pilot_baseline": "cross"}
    concurrent = fit("concurrent", max_staleness=0, data_options=pilot)
    monkeypatch.setattr(VLLMServerEngine, "works_ahead", False)
    assert_same_policy(concurrent, fit("in-one-go", max_staleness=0, data_options=pilot))


def test_plans_by_hidden_states_read_unseen_prompts_and_resume_exactly(fit, monkeypatch):
    asked = []
    read = PolicyModule.read_hidden_states
    monkeypatch.setattr(
        PolicyModule, "read_hidden_states", lambda self, prompts: asked.append(len(prompts)) or read(self, prompts)
    )
    options = {"estimator": LogitFilter(features=["hidden_state"])}
    whole = fit("states", max_staleness=0, engine=TransformersEngine(), data_options=options)
    assert asked == [4, 4, 4], "each of twelve prompts once, in the first of two epochs"
    with open(next(Path("states").rglob("metrics.csv"))) as file:
        seconds = [float(row.get("timing_s/hidden_states") or 0) for row in csv.DictReader(file) if row.get("reward")]
    assert [value > 0 for value in seconds] == [True] * 3 + [False] * 3
    resumed = fit(
        "states-resumed",
        max_staleness=0,
        engine=TransformersEngine(),
        ckpt_path="states/iteration=000002.ckpt",
        data_options={"estimator": LogitFilter(features=["hidden_state"])},
    )
    assert asked[3:] == [4]
    assert_same_policy(whole, resumed)
    with pytest.raises(UserError, match=r"max_staleness=1 does not go with data.estimator.features=\['hidden_state'\]"):
        fit("stale", data_options={"estimator": LogitFilter(features=["hidden_state"])})


@pytest.mark.slow
def test_without_it_rollouts_come_from_the_weights_that_learn(fit):
    synchronous, ahead = fit("synchronous", max_staleness=0), fit("ahead")
    pairs = zip(synchronous.policy.parameters(), ahead.policy.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)
    with open(next(Path("synchronous").rglob("metrics.csv"))) as file:
        assert "sampling/staleness" not in next(csv.reader(file))


def test_upcoming_batches_come_as_they_were_planned_also_after_a_resume(tiny_policy, prompt_file):
    def make():
        data = RolloutDataModule(
            PromptSource(prompt_file, template="{prompt}"), prompts_per_batch=3, tokenizer_name=tiny_policy
        )
        data.setup("fit")
        return data

    data = make()
    stream = iter(data.train_dataloader())
    first = next(stream)
    planned = data.upcoming(2)
    assert [batch.iteration for batch in planned] == [1, 2]
    half = [
        Outcome(prompt_id, i, Score(float(i % 2), {}), 3, False) for plan in first.plans for prompt_id, i in plan.keys
    ]
    data.observe(first, half)  # later plans differ from now on
    assert [batch.plans for batch in data.upcoming(2)] == [batch.plans for batch in planned]
    saved = data.state_dict()
    assert next(stream).plans == planned[0].plans
    assert len(data.upcoming(9)) == 2, "an epoch has four batches"
    resumed = make()
    resumed.load_state_dict(saved)
    again = iter(resumed.train_dataloader())
    assert [next(again).plans for _ in range(2)] == [batch.plans for batch in planned]
    for batch in again:
        assert batch.iteration == 3
    assert resumed.upcoming(2) == []


def test_what_goes_together_with_no_staleness_is_refused(tiny_policy):
    with pytest.raises(UserError, match=r"model\.max_staleness must not be negative, got -1"):
        PolicyModule(tiny_policy, max_staleness=-1)
    with pytest.raises(UserError, match=r"model\.max_staleness=1 does not go with model\.dynamic_sampling"):
        PolicyModule(tiny_policy, max_staleness=1, dynamic_sampling=DynamicSamplingConfig())


def test_the_old_option_says_its_new_name(tiny_policy, monkeypatch):
    monkeypatch.setattr("dynamo_lightning.engines.renamed._warned", set())
    with pytest.warns(FutureWarning, match=r"model\.one_step_off is now model\.max_staleness=1"):
        assert PolicyModule(tiny_policy, one_step_off=True).source.max_staleness == 1


def test_rollouts_that_version_0_1_sampled_ahead_are_sampled_anew_with_a_word():
    in_flight = RolloutsInFlight()
    with pytest.warns(UserWarning, match=r"version 0\.1 sampled ahead .* sampled anew"):
        in_flight.load_checkpoint({"rollouts_ahead": {"iteration": 3}})
    assert in_flight.state_dict() == {}

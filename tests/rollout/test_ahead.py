"""One step off, with stand-ins for servers whose responses depend on seed and weights."""

import csv
from pathlib import Path

import fake_vllm_server
import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from dynamo_lightning.allocation.dynamic_sampling import DynamicSamplingConfig
from dynamo_lightning.callbacks import IterationCheckpoint
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.engines.engine import SamplingConfig
from dynamo_lightning.engines.vllm.server import VLLMServerEngine
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.policy.loading import PolicyConfig, load_policy
from dynamo_lightning.rewards import FunctionReward
from dynamo_lightning.rewards.scorer import ScoringConfig


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
    (tmp_path / "reward.py").write_text("def f(prompt, response, answer):\n    return float(ord(response[:1]) % 2)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)

    def fit(folder, one_step_off=True, ckpt_path=None):
        seed_everything(0)
        source = PromptSource(prompt_file, template="{prompt}")
        data = RolloutDataModule(
            source, [source], prompts_per_batch=4, rollouts_per_prompt=4, tokenizer_name=tiny_policy
        )
        module = PolicyModule(
            tiny_policy,
            generator=VLLMServerEngine([server.url], "weights", patience=2.0),
            sampling=SamplingConfig(max_response_length=6),
            reward=FunctionReward("reward.f"),
            scoring=ScoringConfig(num_workers=1, time_limit=60.0),
            one_step_off=one_step_off,
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


@pytest.mark.slow
def test_without_it_rollouts_come_from_the_weights_that_learn(fit):
    synchronous, ahead = fit("synchronous", one_step_off=False), fit("ahead")
    pairs = zip(synchronous.policy.parameters(), ahead.policy.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)
    with open(next(Path("synchronous").rglob("metrics.csv"))) as file:
        assert "sampling/staleness" not in next(csv.reader(file))


def test_the_next_batch_is_the_one_that_comes(tiny_policy, prompt_file):
    data = RolloutDataModule(
        PromptSource(prompt_file, template="{prompt}"), prompts_per_batch=5, tokenizer_name=tiny_policy
    )
    data.setup("fit")
    stream = data.train_dataloader()
    for epoch in range(2):
        ahead = None
        for number, batch in enumerate(stream):
            if number:
                assert (ahead.prompts, ahead.group_sizes, ahead.iteration) == (
                    batch.prompts, batch.group_sizes, batch.iteration,
                )  # fmt: skip
            ahead = data.peek()
            assert batch.iteration == 3 * epoch + number
        assert ahead is None


def test_what_cannot_be_sampled_ahead_is_refused(tiny_policy):
    with pytest.raises(ValueError, match=r"model\.one_step_off=true needs a generator .*VLLMServerEngine"):
        PolicyModule(tiny_policy, one_step_off=True)
    with pytest.raises(ValueError, match=r"does not go with model\.dynamic_sampling"):
        PolicyModule(
            tiny_policy,
            generator=VLLMServerEngine(["http://a"]),
            one_step_off=True,
            dynamic_sampling=DynamicSamplingConfig(),
        )

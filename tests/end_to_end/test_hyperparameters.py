"""Checkpoints build the modules again that wrote them."""

import functools
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from dynamo_lightning.allocation import ArcsineKalman
from dynamo_lightning.cli import main
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.engines.engine import SamplingConfig
from dynamo_lightning.losses.gspo import GSPO
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.rewards import LengthPenalty, MathReward, WeightedReward
from dynamo_lightning.runs.csv_log import AppendingCSVLogger


def save(module, data, folder, **options):
    """A checkpoint after one iteration."""
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=1, enable_progress_bar=False,
        enable_model_summary=False, logger=AppendingCSVLogger(folder), enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "x.ckpt")
    return str(folder / "x.ckpt")


def test_modules_built_by_hand_are_built_again(tiny_policy, prompt_file, tmp_path):
    reward = WeightedReward([MathReward(require_boxed=True), LengthPenalty(free_length=3)], weights=[1.0, 0.5])
    module = PolicyModule(
        tiny_policy,
        sampling=SamplingConfig(max_response_length=5),
        reward=reward,
        loss=PolicyLoss(surrogate=GSPO(), kl_coefficient=0.25),
        optimizer=functools.partial(torch.optim.SGD, lr=0.125),
        pass_at_k=[1, 2],
    )
    source = PromptSource(prompt_file, template="{prompt}")
    data = RolloutDataModule(
        train=source, val=[source], tokenizer_name=tiny_policy, estimator=ArcsineKalman(), prompts_per_batch=4,
        rollouts_per_prompt=4, eval_rollouts_per_prompt=2,
    )  # fmt: skip
    path = save(module, data, tmp_path)
    torch.load(path, weights_only=True)
    again = PolicyModule.load_from_checkpoint(path)
    assert again.sampling.max_response_length == 5
    assert [type(part) for part in again.reward.rewards] == [MathReward, LengthPenalty]
    assert (again.reward.rewards[0].require_boxed, again.reward.weights) == (True, [1.0, 0.5])
    assert (type(again.loss.surrogate), again.loss.kl_coefficient, again.pass_at_k) == (GSPO, 0.25, [1, 2])
    assert again.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.125
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    data_again = RolloutDataModule.load_from_checkpoint(path)
    assert (data_again.prompts_per_batch, data_again.sources) == (4, data.sources)
    assert type(data_again.statistics.estimator) is ArcsineKalman
    assert len(data_again.statistics) == 4
    logged = yaml.safe_load(next(tmp_path.rglob("hparams.yaml")).read_text())
    assert logged["loss"]["surrogate"]["class_path"] == "dynamo_lightning.losses.gspo.GSPO"
    assert logged["prompts_per_batch"] == 4


def test_what_a_checkpoint_cannot_hold_is_said_on_load(tiny_policy, prompt_file, tmp_path):
    module = PolicyModule(
        tiny_policy, sampling=SamplingConfig(max_response_length=4), optimizer=lambda p: torch.optim.SGD(p, lr=0.5)
    )
    source = PromptSource(prompt_file, template="{prompt}")
    data = RolloutDataModule(train=source, tokenizer_name=tiny_policy, prompts_per_batch=2, rollouts_per_prompt=2)
    path = save(module, data, tmp_path, limit_val_batches=0)
    with pytest.warns(UserWarning, match=r"does not hold optimizer=.*<lambda> of .*test_hyperparameters\.py, line \d+"):
        PolicyModule.load_from_checkpoint(path)


def test_a_checkpoint_of_the_command_line_builds_its_modules(config):
    main(["fit", "--config", config, "--trainer.max_epochs=1", "--model.loss.surrogate=gspo", "--data.pilot=2"])
    module = PolicyModule.load_from_checkpoint("checkpoints/last.ckpt")
    assert (type(module.loss.surrogate), module.sampling.max_response_length) == (GSPO, 6)
    assert module.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.01
    data = RolloutDataModule.load_from_checkpoint("checkpoints/last.ckpt")
    assert (data.pilot, data.prompts_per_batch) == (2, 4)
    assert data.state_dict()["stream"]["iteration"] == 3


def test_a_checkpoints_hyperparameters_do_not_override_the_options(config):
    main(["fit", "--config", config, "--trainer.max_epochs=1"])
    cli = main(["test", "--config", config, "--ckpt_path=checkpoints/last.ckpt", "--model.eval_temperature=0.5"])
    assert cli.model.eval_temperature == 0.5


def test_a_checkpoint_of_version_0_1_goes_on(config):
    main(["fit", "--config", config, "--trainer.max_epochs=1"])
    checkpoint = torch.load("checkpoints/last.ckpt", weights_only=True)
    for name in ("hyper_parameters", "datamodule_hyper_parameters", "hparams_name", "datamodule_hparams_name"):
        checkpoint.pop(name, None)
    for name in ("counts", "recent"):
        checkpoint["callbacks"]["RunReport"].pop(name)
    checkpoint["RolloutDataModule"].pop("prompts")
    Path("old").mkdir()
    torch.save(checkpoint, "old/last.ckpt")
    cli = main(["fit", "--config", config, "--ckpt_path=old/last.ckpt", "--name=new", "--trainer.callbacks=null"])
    assert cli.trainer.global_step == 6

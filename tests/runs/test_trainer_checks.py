"""Trainer settings that cannot work end in one error that names ours; those that can, do what Lightning says."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner

from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.engines.engine import SamplingConfig
from dynamo_lightning.errors import UserError
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.rewards import MathReward


class BatchRecorder(L.Callback):
    """Keeps the prompts of every batch."""

    def __init__(self):
        self.prompts = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.prompts.append([prompt.text for prompt in batch.prompts])


@pytest.fixture
def parts(tiny_policy, prompt_file):
    module = PolicyModule(tiny_policy, sampling=SamplingConfig(max_response_length=2), reward=MathReward())
    source = PromptSource(prompt_file, template="{prompt}")
    data = RolloutDataModule(source, tokenizer_name=tiny_policy, prompts_per_batch=4, rollouts_per_prompt=2)
    return module, data


def make_trainer(**settings):
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **settings}
    return L.Trainer(accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False, **settings)


def test_a_data_loader_is_refused(parts):
    with pytest.raises(UserError, match=r"PolicyModule was given a DataLoader, .*RolloutDataModule"):
        make_trainer().fit(parts[0], torch.utils.data.DataLoader([1, 2]))


def test_a_foreign_data_module_is_refused(parts):
    class Foreign(L.LightningDataModule):
        def train_dataloader(self):
            return [1]

    with pytest.raises(UserError, match="PolicyModule was given a Foreign"):
        make_trainer().fit(parts[0], datamodule=Foreign())


@pytest.mark.parametrize("finder", ["callback", "tuner"])
def test_the_learning_rate_finder_is_refused(parts, finder):
    with pytest.raises(UserError, match=r"LearningRateFinder .*set optimizer\.lr by hand"):
        if finder == "callback":
            make_trainer(callbacks=[LearningRateFinder()]).fit(*parts)
        else:
            Tuner(make_trainer()).lr_find(parts[0], datamodule=parts[1])


def test_the_batch_size_finder_is_refused(parts):
    with pytest.raises(UserError, match=r"BatchSizeFinder .*set data\.prompts_per_batch by hand"):
        Tuner(make_trainer()).scale_batch_size(parts[0], datamodule=parts[1])


def test_a_compiled_module_is_refused_and_the_option_is_named(parts):
    with pytest.raises(UserError, match=r"use model\.policy\.compile=true"):
        make_trainer().fit(torch.compile(parts[0]), parts[1])


@pytest.mark.parametrize(("settings", "reached"), [({}, 3), ({"limit_train_batches": 2}, 2)])
def test_a_validation_interval_that_no_epoch_reaches_is_refused(parts, settings, reached):
    message = rf"trainer\.val_check_interval=7 is more than the {reached} RL iterations of an epoch"
    with pytest.raises(UserError, match=message):
        make_trainer(val_check_interval=7, **settings).fit(*parts)


def test_overfit_batches_repeats_the_same_batch(parts):
    recorder = BatchRecorder()
    make_trainer(overfit_batches=1, max_epochs=3, callbacks=[recorder]).fit(*parts)
    assert len(recorder.prompts) == 3
    assert recorder.prompts[0] == recorder.prompts[1] == recorder.prompts[2]


def test_a_share_of_overfit_batches_repeats_the_same_batches(parts):
    recorder = BatchRecorder()
    make_trainer(overfit_batches=0.67, max_epochs=2, callbacks=[recorder]).fit(*parts)
    assert len(recorder.prompts) == 4
    assert recorder.prompts[:2] == recorder.prompts[2:]
    assert recorder.prompts[0] != recorder.prompts[1]


def test_another_data_set_on_a_resume_is_said(parts, tmp_path, recwarn):
    _, data = parts
    data.setup("fit")
    state = data.state_dict()
    data.load_state_dict(state)
    assert not [w for w in recwarn if "other prompts" in str(w.message)]
    path = tmp_path / "other.jsonl"
    path.write_text('{"prompt": "5+5=", "answer": "10"}\n')
    other = RolloutDataModule(PromptSource(str(path), template="{prompt}"), tokenizer_name=data.tokenizer_name)
    other.setup("fit")
    with pytest.warns(UserWarning, match="trained on 12 other prompts than these 1"):
        other.load_state_dict(state)

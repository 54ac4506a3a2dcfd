"""Options are values: a default instance is shared by every module of the process."""

from dataclasses import FrozenInstanceError, fields

import pytest

from dynamo_lightning.evaluation.benchmarks import EvaluationConfig
from dynamo_lightning.losses.engine_mismatch import EngineMismatch
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.policy.loading import PolicyConfig
from dynamo_lightning.policy.lora import LoraConfig
from dynamo_lightning.update.config import UpdateConfig


@pytest.mark.parametrize(
    "options", [PolicyLoss, EngineMismatch, UpdateConfig, EvaluationConfig, PolicyConfig, LoraConfig]
)
def test_options_cannot_be_changed_in_place(options):
    instance = options()
    with pytest.raises(FrozenInstanceError):
        setattr(instance, fields(instance)[0].name, None)


def test_the_defaults_of_a_module_cannot_be_changed_in_place():
    module = PolicyModule()
    for name in ("loss", "update_config", "policy_config", "evaluation"):
        options = getattr(module, name)
        with pytest.raises(FrozenInstanceError):
            setattr(options, fields(options)[0].name, None)

import functools
import inspect
from pathlib import Path

import pytest
import torch

from dynamo_lightning.allocation import AllocationRule, VarianceEstimator
from dynamo_lightning.engines.engine import Engine
from dynamo_lightning.losses.advantages import Advantage
from dynamo_lightning.losses.modulation import DynamoModulation, Modulation
from dynamo_lightning.losses.penalty import Penalty
from dynamo_lightning.losses.surrogate import Surrogate
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.rewards import FunctionReward, MathReward, Reward
from dynamo_lightning.runs.class_names import class_choices
from dynamo_lightning.runs.hyperparameters import NotExpressibleError, describe, eager


@pytest.mark.parametrize(
    "base", [Surrogate, Advantage, Modulation, Penalty, Engine, AllocationRule, VarianceEstimator, Reward]
)
def test_every_choice_of_the_library_is_expressed_and_built_again(base):
    for name, path in class_choices(base).items():
        module, _, attribute = path.rpartition(".")
        chosen = getattr(__import__(module, fromlist=[attribute]), attribute)
        parameters = inspect.signature(chosen).parameters.values() if chosen.__init__ is not object.__init__ else ()
        if any(parameter.default is parameter.empty for parameter in parameters):
            continue
        plain = describe(chosen())
        assert plain["class_path"].endswith(name)
        assert describe(chosen(**plain["init_args"])) == plain


def test_arguments_are_read_off_an_object():
    assert describe(DynamoModulation(normaliser="quantile", quantile=0.75))["init_args"]["quantile"] == 0.75
    assert describe(FunctionReward("math.hypot")) == {
        "class_path": "dynamo_lightning.rewards.reward.FunctionReward",
        "init_args": {"function": "math.hypot", "keep_special_tokens": False},
    }
    assert describe(functools.partial(torch.optim.SGD, lr=0.5)) == {
        "class_path": "torch.optim.sgd.SGD", "init_args": {"lr": 0.5},
    }  # fmt: skip
    assert describe({"a": (1, Path("x"), None)}) == {"a": [1, "x", None]}


def test_what_is_not_plain_is_named_with_its_place():
    with pytest.raises(NotExpressibleError, match=r"<lambda> of .*test_hyperparameters\.py, line \d+"):
        describe(lambda: 1)


def test_a_module_keeps_its_arguments_and_notes_what_it_cannot():
    module = PolicyModule(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    assert list(module.hparams["_left_out"]) == ["optimizer"]
    assert module.hparams["loss"]["surrogate"]["class_path"].endswith(".ClippedSurrogate")
    assert "optimizer" not in module.hparams
    assert "_left_out" not in PolicyModule().hparams


def test_the_default_reward_can_be_sent_to_another_process():
    import pickle

    module = PolicyModule()
    assert type(pickle.loads(pickle.dumps(module.reward))) is MathReward
    assert eager(module.reward) is module.reward

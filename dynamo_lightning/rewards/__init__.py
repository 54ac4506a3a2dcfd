"""Rewards: what a response is worth, and the process pool that computes it.

The scorer is imported from `dynamo_lightning.rewards.scorer`, not from here: it knows the records of the loop and with
them torch, while everything below also loads in the pool's workers, which should start fast and stay small.
"""

from dynamo_lightning.rewards.combined import DatasetReward, WeightedReward, as_reward
from dynamo_lightning.rewards.endpoint import HttpReward
from dynamo_lightning.rewards.group import GroupFunctionReward, GroupReward
from dynamo_lightning.rewards.judge import JudgeReward
from dynamo_lightning.rewards.math import MathReward
from dynamo_lightning.rewards.reward import FunctionReward, Reward
from dynamo_lightning.rewards.shaping import FormatReward, LengthPenalty, OverlongShaping

__all__ = [
    "DatasetReward",
    "FormatReward",
    "FunctionReward",
    "GroupFunctionReward",
    "GroupReward",
    "HttpReward",
    "JudgeReward",
    "LengthPenalty",
    "MathReward",
    "OverlongShaping",
    "Reward",
    "WeightedReward",
    "as_reward",
]

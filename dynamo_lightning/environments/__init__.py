"""Environments: what answers the policy in a conversation."""

from dynamo_lightning.environments.environment import Environment, Response, Step
from dynamo_lightning.environments.single_turn import SingleTurn

__all__ = ["Environment", "Response", "SingleTurn", "Step"]

"""The environment of verifiable rewards: one response, which the reward function scores."""

from __future__ import annotations

from typing_extensions import override

from dynamo_lightning.environments.environment import Environment, Response, Step


class SingleTurn(Environment):
    """Ends each conversation with its first response; `model.reward` scores it."""

    @override
    def step(self, response: Response) -> Step:
        return Step()

"""Rollouts as flat arrays and back: what is sent to other ranks and kept in checkpoints."""

import numpy as np
import pytest

from dynamo_lightning.rollout.arrays import RolloutArrays
from dynamo_lightning.types import Rollout, Turn


@pytest.fixture
def rollouts(make_prompt):
    return [
        Rollout(make_prompt(2**62 + 1), 3, [7, 8], [-0.5, -1.0], "4", "truncated"),
        Rollout(
            make_prompt(5),
            0,
            [1, 2, 3, 4],
            [-0.1, -0.2],
            "é\n\udcff",
            "finished",
            [True, False, False, True],
            (Turn(0, 1, 4), Turn(3, 4, 6)),
            0.0,
            "",
            np.arange(6, dtype=np.float32).reshape(2, 3),
        ),
        Rollout(make_prompt(5), 1, [9], [-2.0], "", "failed", failure="it broke"),
    ]


@pytest.mark.parametrize("chosen", [(), (0,), (1,), (0, 1, 2), (2, 1)])
def test_every_field_comes_back(rollouts, chosen):
    own = [rollouts[i] for i in chosen]
    prompts = {rollout.prompt.prompt_id: rollout.prompt for rollout in rollouts}
    arrays = RolloutArrays.of(own)
    assert arrays.rollouts(prompts) == own
    assert arrays.keys() == [rollout.key for rollout in own]
    assert RolloutArrays.from_state_dict(arrays.state_dict()).rollouts(prompts) == own


def test_sizes_say_where_each_rollout_is_in_every_array(rollouts):
    arrays = RolloutArrays.of(rollouts)
    for name, sizes in arrays.sizes().items():
        assert sizes.sum() == len(getattr(arrays, name))
    assert arrays.sizes()["token_ids"].tolist() == [2, 4, 1]
    assert arrays.sizes()["logprobs"].tolist() == [2, 2, 1]


def test_rollouts_differ_by_any_field(rollouts):
    first = rollouts[0]
    for other in (
        Rollout(first.prompt, 3, [7, 9], [-0.5, -1.0], "4", "truncated"),
        Rollout(first.prompt, 3, [7, 8], [-0.5, -1.5], "4", "truncated"),
        Rollout(first.prompt, 3, [7, 8], [-0.5, -1.0], "4", "finished"),
        Rollout(first.prompt, 3, [7, 8], [-0.5], "4", "truncated", [True, False]),
    ):
        assert first != other
    assert first == Rollout(first.prompt, 3, (7, 8), (-0.5, -1.0), "4", "truncated")

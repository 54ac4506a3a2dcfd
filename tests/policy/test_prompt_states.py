"""Hidden states at the end of prompts, and training that plans with them."""

import pytest
import torch

from dynamo_lightning.policy.loading import PolicyConfig, load_policy
from dynamo_lightning.policy.prompt_states import prompt_states

LENGTHS = (3, 9, 1, 5, 2)


@pytest.mark.parametrize("max_tokens", [11, 64])
def test_states_are_those_of_the_last_layer_at_each_prompts_last_token(tiny_policy, make_prompt, max_tokens):
    policy = load_policy(tiny_policy, PolicyConfig()).eval()
    prompts = [make_prompt(n, tuple(range(5 + n, 5 + n + length))) for n, length in enumerate(LENGTHS)]
    found = prompt_states(policy, prompts, max_tokens)
    for row, prompt in zip(found, prompts, strict=True):
        with torch.no_grad():
            alone = policy(torch.tensor([prompt.token_ids]), output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(torch.from_numpy(row), alone, atol=1e-5, rtol=1e-5)

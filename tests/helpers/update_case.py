"""A module with a tiny policy, and rollouts of random tokens, for tests of scoring and of updates."""

from types import SimpleNamespace

import torch

from dynamo_lightning.engines.engine import SamplingConfig
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.types import Collected, Outcome, Rollout, Score
from dynamo_lightning.update.config import UpdateConfig
from dynamo_lightning.update.join import join
from dynamo_lightning.update.scoring import scoring_pass
from dynamo_lightning.update.steps import accumulate_gradient

REWARDS = [[1.0, 0.0, 0.0], [1.0, 1.0], [0.0, 1.0, 1.0, 0.0, 1.0], [0.0, 0.0]]
SHUFFLED = [5, 1, 0, 11, 3, 2, 4, 10, 9, 8, 7, 6]


def make_module(tiny_policy, loss=None, dtype=torch.float64, **updates):
    """As in a fit, without its trainer."""
    module = PolicyModule(
        tiny_policy,
        loss=loss or PolicyLoss(),
        sampling=SamplingConfig(max_response_length=12),
        updates=UpdateConfig(**updates),
    )
    module.configure_model()
    module.policy.to(dtype)
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(model=None))
    module.manual_backward = lambda loss: loss.backward()
    return module


def make_rollouts(make_prompt, make_batch, rewards=REWARDS, iteration=0):
    """A batch, the outcomes with the given rewards, a list for each prompt, and the rollouts."""

    def tokens(low, high, *key):
        generator = torch.Generator().manual_seed(sum((k + 1) * 1000**i for i, k in enumerate(key)))
        length = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(3, 60, (length,), generator=generator).tolist())

    prompts = [make_prompt(i, tokens(2, 9, i)) for i in range(len(rewards))]
    batch = make_batch(prompts, [len(group) for group in rewards], iteration=iteration)
    rollouts, outcomes = [], []
    for prompt, group in zip(prompts, rewards, strict=True):
        for index, reward in enumerate(group):
            response = tokens(1, 12, prompt.prompt_id, index)
            rollouts.append(Rollout(prompt, index, response, (0.0,) * len(response), "", False))
            outcomes.append(Outcome(prompt.prompt_id, index, Score(reward, {}), len(response), False))
    return batch, outcomes, rollouts


def assign(module, parts, outcomes, rollouts):
    """The rollouts with their advantages."""
    collected = Collected(tuple(parts), tuple(rollouts), tuple(outcomes), rollouts[0], 0, {})
    return join(collected, module.loss.advantage)


def make_scored(module, make_prompt, make_batch, order=None, iteration=3):
    """Rollouts of the rewards above with their advantages, in the given order."""
    batch, outcomes, rollouts = make_rollouts(make_prompt, make_batch, iteration=iteration)
    return assign(module, [batch], outcomes, [rollouts[i] for i in order] if order else rollouts)


def score(module, batch, separate_engine=False):
    """What is known before the first update."""
    return scoring_pass(module.policy, None, batch, module.loss, module.update_config, 1.0, separate_engine)


def learn(module, experience, chosen=None):
    """The gradient of an update from the chosen groups, or from all, and its metrics."""
    module.policy.zero_grad()
    everything = torch.ones(len(experience.batch.group_sizes), dtype=torch.bool)
    metrics = accumulate_gradient(module, experience, everything if chosen is None else chosen)
    return flat_gradient(module), {name: float(metric) for name, metric in metrics.items()}


def flat_gradient(module):
    """Of all parameters end to end; 0 where there is none."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.policy.parameters()]
    return torch.cat([part.flatten() for part in parts])

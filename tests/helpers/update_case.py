"""A tiny policy with its updater, and rollouts of random tokens, for tests of updates; no trainer."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from dynamo_lightning.allocation.groups import make_groups
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.policy.loading import PolicyConfig, load_policy
from dynamo_lightning.types import Collected, Outcome, Rollout, Score
from dynamo_lightning.update.config import UpdateConfig
from dynamo_lightning.update.join import join
from dynamo_lightning.update.plan import plan_step
from dynamo_lightning.update.settings import UpdateSettings
from dynamo_lightning.update.steps import TrainedPolicy, accumulate_gradient
from dynamo_lightning.update.updater import PolicyUpdater

REWARDS = [[1.0, 0.0, 0.0], [1.0, 1.0], [0.0, 1.0, 1.0, 0.0, 1.0], [0.0, 0.0]]
SHUFFLED = [5, 1, 0, 11, 3, 2, 4, 10, 9, 8, 7, 6]


@dataclass
class Case:
    """A policy, and the options it is trained with."""

    policy: Any
    settings: UpdateSettings

    @property
    def loss(self):
        return self.settings.loss

    @property
    def update_config(self):
        return self.settings.config

    @property
    def updater(self):
        return PolicyUpdater(self.settings)

    def trained(self, lr=0.1, **parts):
        """The policy with plain gradient descent."""
        return TrainedPolicy(self.policy, torch.optim.SGD(self.policy.parameters(), lr=lr), **parts)

    def to(self, device):
        self.policy.to(device)
        return self


def make_module(tiny_policy, loss=None, dtype=torch.float64, **updates):
    """A policy as it is in a fit."""
    policy = load_policy(tiny_policy, PolicyConfig()).to(dtype)
    return Case(policy, UpdateSettings(loss or PolicyLoss(), 12, UpdateConfig(**updates)))


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
            rollouts.append(Rollout(prompt, index, response, (0.0,) * len(response), ""))
            outcomes.append(Outcome(prompt.prompt_id, index, Score(reward, {}), len(response), False))
    return batch, outcomes, rollouts


def assign(module, parts, outcomes, rollouts):
    """The rollouts with their advantages."""
    groups = make_groups([plan for part in parts for plan in part.plans], rollouts, outcomes)
    collected = Collected(parts[0].iteration, groups, rollouts[0], 0, {})
    return join(collected, module.loss.advantage)


def make_joined(module, make_prompt, make_batch, order=None, iteration=3):
    """Rollouts of the rewards above with their advantages, in the given order."""
    batch, outcomes, rollouts = make_rollouts(make_prompt, make_batch, iteration=iteration)
    return assign(module, [batch], outcomes, [rollouts[i] for i in order] if order else rollouts)


def prepare(module, batch, separate_engine=False):
    """What is known before the first update."""
    settings = replace(module.settings, uses_external_engine=separate_engine)
    return PolicyUpdater(settings).prepare(module.policy, batch)


def learn(module, experience, chosen=None):
    """The gradient of an update from the chosen groups, or from all, and its metrics."""
    module.policy.zero_grad()
    batch = experience.batch
    everything = torch.ones(len(batch.group_sizes), dtype=torch.bool)
    step = plan_step(batch, module.loss, everything if chosen is None else chosen, module.policy.device)
    metrics, _ = accumulate_gradient(module.trained(), experience, step, module.settings)
    return flat_gradient(module), {name: float(metric) for name, metric in metrics.items()}


def flat_gradient(module):
    """Of all parameters end to end; 0 where there is none."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.policy.parameters()]
    return torch.cat([part.flatten() for part in parts])

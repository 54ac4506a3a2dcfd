"""Denominators of an optimizer step against slow sums in float64, and what is independent of the layout."""

import pytest
import torch
from update_case import REWARDS, assign, flat_gradient, learn, make_joined, make_module, make_rollouts, prepare

from dynamo_lightning.losses.advantages import GRPO, RLOO, WReinforce
from dynamo_lightning.losses.covariance import ClipCov, KLCov
from dynamo_lightning.losses.fork_tokens import ForkTokens
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.losses.surrogate import ClippedSurrogate, UnclippedSurrogate
from dynamo_lightning.losses.weights import counted_groups
from dynamo_lightning.update.logprobs import token_keys


def response_logits(module, rollout):
    """Logits before each response token, from the plain model."""
    sequence = torch.tensor([(*rollout.prompt.token_ids, *rollout.token_ids)])
    return module.policy(sequence).logits[0, len(rollout.prompt.token_ids) - 1 : -1]


def token_logprobs(module, rollout):
    logprobs = torch.log_softmax(response_logits(module, rollout), -1)
    return logprobs.gather(1, torch.tensor(rollout.token_ids, dtype=torch.int64)[:, None])[:, 0]


def slow_gradient(module, rollouts, weight_of):
    """Gradient of `−Σ weight · log π(a)`, rollout by rollout; `weight_of` gives a rollout's token weights."""
    module.policy.zero_grad()
    for rollout in rollouts:
        (-(torch.as_tensor(weight_of(rollout)) * token_logprobs(module, rollout)).sum()).backward()
    return flat_gradient(module)


def leave_one_out(rewards, index):
    others = [r for i, r in enumerate(rewards) if i != index]
    return rewards[index] - sum(others) / len(others) if others else 0.0


# The second prompt keeps one rollout, the third none; the fourth has equal rewards and counts all the same.
LEFT = [[1.0, 0.0, 0.0], [1.0], [], [0.0, 0.0], [1.0, 0.0]]


def partly_dropped(module, make_prompt, make_batch):
    rewards = [[1.0, 0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    batch, outcomes, rollouts = make_rollouts(make_prompt, make_batch, rewards)
    kept = [o for o in outcomes if o.sample_index < len(LEFT[o.prompt_id])]
    return assign(module, [batch], kept, rollouts)


@pytest.mark.parametrize("aggregation", ["prompt_mean", "sequence_mean", "token_mean"])
def test_a_group_that_lost_all_but_one_is_in_no_denominator(tiny_policy, make_prompt, make_batch, aggregation):
    loss = PolicyLoss(
        advantage=RLOO(), modulation=None, aggregation=aggregation, length_normalisation="response_length"
    )
    module = make_module(tiny_policy, loss)
    batch = partly_dropped(module, make_prompt, make_batch)
    ours, _ = learn(module, prepare(module, batch))
    groups_of_two = [0, 3, 4]
    rollouts = [r for r in batch.rollouts if r.prompt.prompt_id in groups_of_two]
    denominators = {
        "prompt_mean": lambda r: len(groups_of_two) * len(LEFT[r.prompt.prompt_id]) * len(r.token_ids),
        "sequence_mean": lambda r: len(rollouts) * len(r.token_ids),
        "token_mean": lambda r: sum(len(other.token_ids) for other in rollouts),
    }
    plain = slow_gradient(
        module,
        rollouts,
        lambda r: leave_one_out(LEFT[r.prompt.prompt_id], r.sample_index) / denominators[aggregation](r),
    )
    torch.testing.assert_close(ours, plain, atol=1e-7, rtol=1e-5)


def test_single_rollouts_count_where_no_comparison_is_made(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy, PolicyLoss(advantage=WReinforce(), modulation=None))
    batch = partly_dropped(module, make_prompt, make_batch)
    ours, _ = learn(module, prepare(module, batch))

    def weight(rollout):
        group = LEFT[rollout.prompt.prompt_id]
        return (0.1 if group[rollout.sample_index] else -1.0) / (4 * len(group) * 12)

    torch.testing.assert_close(ours, slow_gradient(module, batch.rollouts, weight), atol=1e-7, rtol=1e-5)


def test_each_mini_batch_counts_its_own_groups(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy, PolicyLoss(modulation=None))
    batch = partly_dropped(module, make_prompt, make_batch)
    ours, _ = learn(module, prepare(module, batch), torch.tensor([True, True, False, False, False]))
    plain = slow_gradient(
        module,
        [r for r in batch.rollouts if r.prompt.prompt_id == 0],
        lambda r: leave_one_out(LEFT[0], r.sample_index) / (1 * 3 * 12),
    )
    torch.testing.assert_close(ours, plain, atol=1e-7, rtol=1e-5)


def test_groups_that_count_by_hand():
    sizes = torch.tensor([0, 1, 2, 3])
    assert counted_groups(sizes, needs_others=True).tolist() == [False, False, True, True]
    assert counted_groups(sizes, needs_others=False).tolist() == [False, True, True, True]
    # Only an entropy or KL term is left: something has to be divided by.
    assert counted_groups(sizes[:2], needs_others=True).tolist() == [False, True]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("chosen", [[True] * 4, [True, False, True, False]])
def test_fork_tokens_are_divided_by_the_kept_tokens(tiny_policy, make_prompt, make_batch, aggregation, chosen):
    loss = PolicyLoss(
        advantage=GRPO(), modulation=ForkTokens(0.3), aggregation=aggregation, length_normalisation="response_length"
    )
    module = make_module(tiny_policy, loss)
    batch = make_joined(module, make_prompt, make_batch)
    ours, _ = learn(module, prepare(module, batch), torch.tensor(chosen))
    entropies = {}
    for rollout in batch.rollouts:
        logprobs = torch.log_softmax(response_logits(module, rollout), -1).detach()
        entropies[rollout.key] = -(logprobs.exp() * logprobs).sum(-1)
    everything = torch.cat(list(entropies.values())).sort(descending=True).values
    threshold = everything[-(-3 * len(everything) // 10) - 1]
    kept = {key: entropy >= threshold - 1e-12 for key, entropy in entropies.items()}
    rollouts = [r for r in batch.rollouts if chosen[r.prompt.prompt_id]]
    num_kept = sum(int(kept[r.key].sum()) for r in rollouts)

    def weight(rollout):
        group = torch.tensor(REWARDS[rollout.prompt.prompt_id], dtype=torch.float64)
        spread = group.std() if len(set(group.tolist())) > 1 else 1.0
        advantage = (group[rollout.sample_index] - group.mean()) / (spread + 1e-6)
        own = max(int(kept[rollout.key].sum()), 1)
        return advantage * kept[rollout.key] / (num_kept if aggregation == "token_mean" else len(rollouts) * own)

    torch.testing.assert_close(ours, slow_gradient(module, rollouts, weight), atol=1e-6, rtol=1e-4)


def test_the_first_update_of_kl_cov_does_not_depend_on_rounding(tiny_policy, make_prompt, make_batch):
    """In float32 the log ratio of the first update is rounding noise, another one in every layout."""
    loss = PolicyLoss(
        advantage=GRPO(), modulation=None, penalty=KLCov(penalised_share=0.2), surrogate=UnclippedSurrogate(),
        aggregation="token_mean",
    )  # fmt: skip
    found = []
    for layout in ({}, {"max_tokens_per_micro_batch": 24}, {"max_logits_bytes": 5000}):
        module = make_module(tiny_policy, loss, torch.float32, num_mini_batches=2, **layout)
        batch = make_joined(module, make_prompt, make_batch)
        experience = prepare(module, batch)
        noise = 1e-6 * torch.randn(len(experience.old_logprobs), generator=torch.Generator().manual_seed(len(found)))
        experience.old_logprobs.add_(noise)
        found.append(learn(module, experience)[0])
    for other in found[1:]:
        assert (other - found[0]).norm() < 2e-3 * found[0].norm()


def moved(module):
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in module.policy.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_clip_cov_leaves_out_what_the_surrogate_clips_by_now(tiny_policy, make_prompt, make_batch):
    """The gradient of a later step against a slow selection: in the band, not clipped, the smallest random numbers."""
    clip_cov = ClipCov(clipped_share=0.15, covariance_low=0.01)
    loss = PolicyLoss(
        advantage=GRPO(), modulation=clip_cov, surrogate=ClippedSurrogate(0.02, 0.02), aggregation="token_mean"
    )
    module = make_module(tiny_policy, loss, num_epochs=2)
    batch = make_joined(module, make_prompt, make_batch)
    experience = prepare(module, batch)
    moved(module)
    ours, _ = learn(module, experience)

    keys = token_keys(batch, torch.device("cpu"))
    advantages = batch.advantages[batch.token_rollouts].double()
    old = experience.old_logprobs
    new = torch.cat([token_logprobs(module, r).detach() for r in batch.rollouts])
    covariance = (advantages - advantages.mean()) * (old - old.mean())
    ratio = (new - old).exp()
    is_clipped = ((advantages > 0) & (ratio > 1.02)) | ((advantages < 0) & (ratio < 0.98))
    in_band = (covariance > 0.01) & (covariance < 5)
    number = max(1, int(0.15 * len(keys)))
    first = sorted(in_band.nonzero()[:, 0].tolist(), key=lambda i: int(keys[i]))[:number]
    assert is_clipped[first].any()  # otherwise nothing is tested
    unclipped = sorted((in_band & ~is_clipped).nonzero()[:, 0].tolist(), key=lambda i: int(keys[i]))
    left_out = torch.zeros(len(keys), dtype=torch.bool)
    left_out[unclipped[:number]] = True
    assert int(left_out.sum()) == number
    weights = torch.where(is_clipped | left_out, 0.0, advantages * ratio) / len(keys)
    parts = dict(zip([r.key for r in batch.rollouts], weights.split(batch.response_lengths.tolist()), strict=True))
    torch.testing.assert_close(
        ours, slow_gradient(module, batch.rollouts, lambda r: parts[r.key]), atol=1e-6, rtol=1e-4
    )

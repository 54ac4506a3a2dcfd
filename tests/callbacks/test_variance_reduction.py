from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dynamo_lightning.callbacks import VarianceReductionMonitor, variance_reduction
from dynamo_lightning.callbacks.variance_reduction import measured_split, measured_variances, variance_ratios
from dynamo_lightning.distributed import derive_seed, run_seed
from dynamo_lightning.engines.engine import SamplingConfig
from dynamo_lightning.measure.moments import kernel_moments
from dynamo_lightning.measure.scores import head_scores
from dynamo_lightning.policy.loading import PolicyConfig, load_policy
from dynamo_lightning.update.config import UpdateConfig


def test_ratios_by_hand(make_record):
    # groups of 2 and 4: one right of 2 → a = 1·1/(2·1) = 1/2; one right of 4 → a = 1·3/(4·3) = 1/4; mean size 3
    record = make_record(rewards=[(1, 0), (1, 0, 0, 0)], variances=[0.25, 0.09])
    ratios = variance_ratios(record)
    assert ratios["alloc/realised_variance_ratio"] == pytest.approx((0.5 / 1 + 0.25 / 3) / ((0.5 + 0.25) / 2))
    assert ratios["alloc/predicted_variance_ratio"] == pytest.approx((0.25 / 1 + 0.09 / 3) / ((0.25 + 0.09) / 2))
    # √a = 0.5, 0.3: mean 0.4, SD 0.1
    assert ratios["alloc/best_variance_ratio"] == pytest.approx(1 / (1 + (0.1 / 0.4) ** 2))


def test_equal_groups_have_ratio_one(make_record):
    ratios = variance_ratios(make_record(rewards=[(1, 0, 0), (1, 1, 0)], variances=[0.2, 0.1]))
    assert ratios["alloc/predicted_variance_ratio"] == pytest.approx(1)
    assert ratios["alloc/realised_variance_ratio"] == pytest.approx(1)


def test_groups_left_with_fewer_than_two_rollouts_are_left_out(make_record):
    whole = make_record(rewards=[(1, 0), (1, 0, 0, 0)])
    with_lost = make_record(rewards=[(1, 0), (1, 0, 0, 0), (1,), ()], group_sizes=[2, 4, 5, 5], variances=[0.25] * 4)
    name = "alloc/realised_variance_ratio"
    assert variance_ratios(with_lost)[name] == variance_ratios(whole)[name]


def test_success_is_reaching_the_threshold(make_record):
    record = make_record(rewards=[(0.8, 0.7), (0.9, 0.1, 0.1, 0.1)])
    strict = make_record(rewards=[(1, 0), (1, 0, 0, 0)])
    name = "alloc/realised_variance_ratio"
    assert variance_ratios(record, success_threshold=0.8)[name] == variance_ratios(strict)[name]


@pytest.mark.parametrize(("own", "expected"), [(None, 0.8), (0.3, 0.3)])
def test_success_is_what_the_data_module_says_unless_told_otherwise(own, expected):
    monitor = VarianceReductionMonitor(success_threshold=own)
    monitor.setup(SimpleNamespace(datamodule=SimpleNamespace(success_threshold=0.8)), None, "fit")
    assert monitor.success_threshold == expected


def test_undefined_ratio_is_not_logged(train, make_record):
    def script(iteration):
        return make_record(iteration, rewards=[(1, 1), (0, 0)])

    logged = train([VarianceReductionMonitor()], script=script, epoch_length=2).logged
    assert "alloc/realised_variance_ratio" not in logged
    assert logged["alloc/predicted_variance_ratio"] == [1, 1]


def test_predicted_ratio_is_in_the_progress_bar(train, make_record):
    trainer = train([VarianceReductionMonitor()], epoch_length=1).trainer
    assert trainer.progress_bar_metrics == {"alloc/predicted_variance_ratio": 1.0}


# --- measured ---------------------------------------------------------------------------------------------------------


def scores_of(record, vector_of):
    return {o.key: np.asarray(vector_of(o), dtype=float) for o in record.outcomes}


def test_measured_variances_are_those_of_the_groups_own_moments(make_record):
    record = make_record(rewards=[(1, 0, 0, 1), (1, 0), (1, 0, 1, 0, 0, 0, 1, 1), (1,)], variances=[0.25] * 4)
    rng = np.random.default_rng(0)
    scores = scores_of(record, lambda o: rng.standard_normal(3))
    own, equal = measured_variances(record, scores, [0, 1, 2])
    mean_size = (4 + 2 + 8) / 3  # the group of one has no leave-one-out gradient

    def moments(prompt_id):
        outcomes = [o for o in record.outcomes if o.prompt_id == prompt_id]
        return kernel_moments([o.score.reward for o in outcomes], [scores[o.key] for o in outcomes])

    pair = ((scores[1, 0] - scores[1, 1]) ** 2).sum() / 4  # ‖h‖² of the only pair
    assert own == pytest.approx(moments(0).variance(4) + pair / (2 - 1) + moments(2).variance(8))
    expected = moments(0).variance(mean_size) + pair / (mean_size - 1) + moments(2).variance(mean_size)
    assert equal == pytest.approx(expected)


def test_measured_ratio_finds_a_prompt_whose_gradient_varies_more_than_its_reward_tells(make_record):
    # Both prompts are right half of the time, but the second one's scores are ten times as long: its many rollouts pay.
    record = make_record(rewards=[(1, 0) * 2, (1, 0) * 6], variances=[0.25, 0.25])
    rng = np.random.default_rng(0)
    scores = scores_of(record, lambda o: rng.standard_normal(50) * (1, 10)[o.prompt_id])
    own, equal = measured_variances(record, scores, [0, 1])
    assert variance_ratios(record)["alloc/predicted_variance_ratio"] > 1
    assert own / equal < 0.8


@pytest.fixture
def script(make_record):
    """Groups of 2, 4, 6 and 12; responses differ, or nothing would vary."""

    def script(iteration):
        rng = np.random.default_rng(iteration)
        record = make_record(iteration, rewards=[tuple(rng.integers(2, size=n).tolist()) for n in (2, 4, 6, 12)])
        rollouts = tuple(replace(r, token_ids=tuple(rng.integers(5, 60, size=3).tolist())) for r in record.rollouts)
        return replace(record, rollouts=rollouts)

    return script


@pytest.fixture
def play(script, scripted, tiny_policy, train, monkeypatch):
    """Train on the script with a module that has a policy."""
    monkeypatch.setattr(scripted.Module, "policy", load_policy(tiny_policy, PolicyConfig()).train(), raising=False)
    monkeypatch.setattr(scripted.Module, "update_config", UpdateConfig(max_tokens_per_micro_batch=64), raising=False)
    monkeypatch.setattr(scripted.Module, "sampling", SamplingConfig(temperature=0.9), raising=False)

    def run(monitor, **options):
        return train([monitor], **{"script": script, **options})

    return run


def test_the_ratio_is_measured_every_so_many_iterations_at_a_stated_cost(play):
    result = play(VarianceReductionMonitor(measure_every=2, num_projections=8), epoch_length=5)
    seconds = result.logged["alloc/measure_seconds"]
    assert [value > 0 for value in seconds] == [False, True, False, True, False]
    ratios = result.logged["alloc/measured_variance_ratio"]
    assert len(ratios) == 4, "from the first measurement on"
    assert ratios[0] == ratios[1] != ratios[2] == ratios[3]
    assert result.module.policy.training, "the policy is left as it was"


def test_nothing_is_measured_by_default(play):
    assert not [name for name in play(VarianceReductionMonitor(), epoch_length=2).logged if "measure" in name]


def test_at_most_so_many_prompts_go_through_the_policy(play, monkeypatch):
    seen = []

    def spy(policy, rollouts, *args, **options):
        seen.append({rollout.prompt.prompt_id for rollout in rollouts})
        return head_scores(policy, rollouts, *args, **options)

    monkeypatch.setattr(variance_reduction, "head_scores", spy)
    play(VarianceReductionMonitor(measure_every=1, num_measured_prompts=2, num_projections=4), epoch_length=6)
    assert [len(prompts) for prompts in seen] == [2] * 6
    assert len(set().union(*seen)) == 4, "another sample each time"


def test_the_logged_ratio_is_that_of_the_pooled_sums(play):
    monitor = VarianceReductionMonitor(measure_every=1, num_projections=8, num_pooled=2)
    last = play(monitor, epoch_length=4).logged["alloc/measured_variance_ratio"][-1]
    measurements = monitor.state_dict()["measurements"]
    assert len(measurements) == 2
    assert last == pytest.approx(sum(own for own, _ in measurements) / sum(equal for _, equal in measurements))


def test_pooled_measurements_survive_a_checkpoint():
    first, second = VarianceReductionMonitor(), VarianceReductionMonitor()
    first.load_state_dict({"measurements": [[1.0, 2.0], [3.0, 4.0]]})
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == {"measurements": [[1.0, 2.0], [3.0, 4.0]]}


@pytest.mark.parametrize("option", ["num_measured_prompts", "num_projections", "num_pooled"])
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        VarianceReductionMonitor(**{option: 0})
    with pytest.raises(ValueError, match="measure_every must be at least 0, got -1"):
        VarianceReductionMonitor(measure_every=-1)


def test_a_pilot_cannot_be_measured(train, scripted, monkeypatch):
    monkeypatch.setattr(scripted.Data, "pilot", 4, raising=False)
    with pytest.raises(ValueError, match=r"data\.pilot=4 makes two"):
        train([VarianceReductionMonitor(measure_every=1)])


def test_ranks_that_share_the_rollouts_measure_what_one_measures(play, script, monkeypatch):
    def monitor():
        return VarianceReductionMonitor(measure_every=1, num_measured_prompts=3, num_projections=8)

    alone = monitor()
    result = play(alone, epoch_length=1)
    record, everything = script(0), {}
    # The last rank has none of the rollouts; each sees at least what the ranks before it gathered.
    for rollouts in (record.rollouts[:1], record.rollouts[1:], ()):
        rank = monitor()

        def gather(items):
            everything.update(items)
            return list(everything.items())

        monkeypatch.setattr(variance_reduction, "gather_objects", gather)
        share = replace(record, rollouts=tuple(rollouts))
        if len(rollouts) == 1:  # the others have not gathered yet
            rank._scores(
                result.trainer, result.module, share, {p.prompt_id for p in record.batch.prompts}, seed_of(share)
            )
        else:
            rank.measure(result.trainer, result.module, share)
            assert rank.state_dict()["measurements"] == [
                pytest.approx(pair, rel=1e-4) for pair in alone.state_dict()["measurements"]
            ]


def seed_of(record):
    return derive_seed(run_seed(), "measure", record.batch.iteration)


def with_advantages(record, advantage_of):
    """The record as if its rollouts had been trained on with these advantages."""
    rewards = {outcome.key: outcome.score.reward for outcome in record.outcomes}
    advantages = torch.tensor([advantage_of(rewards[rollout.key]) for rollout in record.rollouts])
    return replace(record, trained=SimpleNamespace(rollouts=record.rollouts, advantages=advantages))


def test_split_of_the_used_advantage_by_hand(make_record):
    record = make_record(rewards=[(1, 0, 0, 1), (1, 0, 0, 0)], variances=[0.25] * 2)
    record = with_advantages(record, lambda reward: reward - 0.5)
    rng = np.random.default_rng(0)
    scores = scores_of(record, lambda o: rng.standard_normal(3))
    split = measured_split(record, scores, [0, 1])
    own, equal = measured_variances(record, scores, [0, 1])
    assert (split.placed, split.equal) == pytest.approx((own, equal))
    expected = sum(
        np.var([(o.score.reward - 0.5) * scores[o.key] for o in record.outcomes if o.prompt_id == i], axis=0, ddof=1)
        .sum() / 4
        for i in (0, 1)
    )  # fmt: skip
    assert split.used == pytest.approx(expected)


def test_split_and_noise_scale_are_logged_for_unbiased_advantages(play, script, scripted, monkeypatch):
    def trained(iteration):
        return with_advantages(script(iteration), lambda reward: reward - 0.25)

    loss = SimpleNamespace(advantage=SimpleNamespace(is_unbiased=True))
    monkeypatch.setattr(scripted.Module, "loss", loss, raising=False)
    monitor = VarianceReductionMonitor(measure_every=1, num_projections=8)
    logged = play(monitor, epoch_length=4, script=trained).logged
    assert len(logged["alloc/total_variance_ratio"]) == len(logged["alloc/baseline_variance_ratio"]) == 4
    assert len(monitor.state_dict()["splits"]) == 4
    other = VarianceReductionMonitor()
    other.load_state_dict(monitor.state_dict())
    assert other.state_dict() == monitor.state_dict()
    loss.advantage.is_unbiased = False
    logged = play(VarianceReductionMonitor(measure_every=1, num_projections=8), epoch_length=2, script=trained).logged
    assert not {name for name in logged if "total" in name or "baseline" in name}

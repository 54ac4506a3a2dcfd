"""The numbers that tripwires judge, against values computed by hand."""

import math
from dataclasses import replace

import pytest
import torch

from dynamo_lightning.callbacks.tripwires.observe import Context, identical_pairs, length_products, observe, surprise
from dynamo_lightning.callbacks.tripwires.stream_watch import StreamWatch
from dynamo_lightning.types import Outcome, Score


def test_groups_with_equal_rewards_are_solved_or_hopeless(make_record):
    record = make_record(rewards=[(1.0, 1.0), (0.0, 0.0), (0.0, 0.0), (1.0, 0.0)])
    seen = observe(record, Context())
    assert (seen.frac_solved, seen.frac_hopeless, seen.reward) == (0.25, 0.5, 0.375)
    assert observe(record, Context(success_threshold=0.0)).frac_solved == 0.75
    assert math.isnan(observe(record, Context(equal_rewards_give_zero=False)).frac_solved)


def test_partial_rewards_below_the_threshold_are_not_hopeless(make_record):
    seen = observe(make_record(rewards=[(0.1, 0.2), (0.3, 0.3)]), Context())
    assert (seen.frac_solved, seen.frac_hopeless) == (0.0, 0.5)


def test_values_that_are_not_finite_are_counted(make_record):
    record = make_record(
        rewards=[(math.nan, 1.0)], entropy=math.inf, gradient_norms=(1.0, math.nan), metrics={"loss": math.nan}
    )
    assert observe(record, Context()).num_not_finite == 4
    assert observe(make_record(), Context()).num_not_finite == 0


def test_the_push_difference_is_preferred_and_older_weights_are_not_compared(make_record):
    sampled = {"sampling/sampling_logp_difference/mean": 0.02}
    pushed = {"sampling/push_logp_difference": 0.01}
    stale = {"sampling/staleness": 4.0}
    assert observe(make_record(metrics=sampled), Context()).logp_difference == 0.02
    assert observe(make_record(metrics=sampled | pushed | stale), Context()).logp_difference == 0.01
    assert math.isnan(observe(make_record(metrics=sampled | stale), Context()).logp_difference)
    assert math.isnan(observe(make_record(metrics=sampled), Context(samples_from_policy=False)).logp_difference)


def test_equal_group_sizes_are_no_allocation_at_its_bounds(make_record):
    bounds = {"alloc/frac_at_min": 1.0, "alloc/frac_at_max": 0.0, "alloc/n_min": 4.0}
    assert math.isnan(observe(make_record(metrics=bounds | {"alloc/n_max": 4.0}), Context()).frac_at_min)
    assert observe(make_record(metrics=bounds | {"alloc/n_max": 8.0}), Context()).frac_at_min == 1.0


def test_lengths_and_rewards_are_compared_within_groups():
    def outcome(prompt_id, index, reward, length):
        return Outcome(prompt_id, index, Score(reward, {}), length, False)

    # Rewards ±½ and lengths ±1 about the group's means; the second group has equal rewards and says nothing.
    outcomes = [outcome(0, 0, 1.0, 12), outcome(0, 1, 0.0, 10), outcome(1, 0, 1.0, 50), outcome(1, 1, 1.0, 10)]
    assert length_products(outcomes) == (2.0, 1.0, 0.5, 2.0)


def test_identical_pairs_are_compared_with_their_probability():
    # Of three responses two are equal. Probabilities ½, ½, ¼: (3 − 1)/2 · (½ + ½ + ¼) = 1.25 pairs are expected.
    logprobs = [math.log(0.5), math.log(0.5), math.log(0.25)]
    pairs, identical, expected = identical_pairs([7, 7, 7, 8], [1, 1, 2, 1], [*logprobs, -1.0])
    assert (pairs, identical, expected) == (3.0, 1.0, pytest.approx(1.25))


def test_samples_of_a_distribution_repeat_as_often_as_expected():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.5, 0.3, 0.1, 0.05, 0.05])
    tokens = torch.multinomial(probabilities, 4000, replacement=True)
    pairs, identical, expected = identical_pairs(
        [i // 8 for i in range(4000)], tokens.tolist(), probabilities.log()[tokens].tolist()
    )
    assert identical / pairs == pytest.approx(float((probabilities**2).sum()), abs=0.02)
    assert expected / pairs == pytest.approx(identical / pairs, abs=0.02)


def test_surprise_is_the_excess_over_the_entropy(make_record):
    rollouts = make_record(rewards=[(1.0,)]).rollouts  # three tokens of −1 nat
    assert surprise(rollouts, torch.tensor([0.5, 1.5, 0.0])) == (1.0, 1.5, 2.0)  # excess ½, −½ and 1
    assert surprise(rollouts, None) == (0.0, 0.0, 0.0)


def test_entropies_that_are_known_in_part_are_no_sample(make_record):
    rollouts = make_record(rewards=[(1.0,)]).rollouts
    assert surprise(rollouts, torch.tensor([0.5, 1.5, math.nan])) == (0.0, 0.0, 0.0)


def test_rollouts_that_dynamic_sampling_chose_are_no_sample(make_record):
    record = make_record(rewards=[(1.0, 0.0)])
    record = replace(record, token_values={"entropy": torch.full((6,), 0.5)})
    assert observe(record, Context()).surprise == (3.0, 1.5, 3.0)
    assert observe(record, Context(trains_on_all=False)).surprise == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("temperature", "goes_beyond"), [(1.0, False), (1.3, True)])
def test_surprise_tells_the_temperature_of_samples(temperature, goes_beyond):
    torch.manual_seed(0)
    logprobs = torch.randn(20_000, 20).log_softmax(-1)
    tokens = torch.multinomial((logprobs / temperature).softmax(-1), 1)[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    excess = -logprobs[torch.arange(len(tokens)), tokens] - entropy
    assert (abs(float(excess.sum())) > 6 * float((excess**2).sum().sqrt())) == goes_beyond


def test_failed_rewards_are_counted_with_those_that_were_dropped(make_record):
    metrics = {"rewards/frac_timeout": 0.25, "rewards/frac_crash": 0.125, "rewards/math/mean": 0.5}
    seen = observe(make_record(metrics=metrics), Context())
    assert seen.frac_failed == 0.375 and seen.components == {"math": 0.5}
    record = make_record()
    failed = replace(record.outcomes[0], score=Score(0.0, {}, failure="timeout"))
    assert observe(replace(record, outcomes=(failed, *record.outcomes[1:])), Context()).frac_failed == 0.25


def begin(watch, iteration, prompt_ids, place):
    found = watch.begin(iteration, prompt_ids, place, num_batches=4)
    watch.end(place)
    return found


def test_a_stream_in_order_repeats_and_skips_nothing():
    watch = StreamWatch()
    for iteration in range(8):  # two passes of 16 prompts; the second begins as the first did
        epoch, number = divmod(iteration, 4)
        ids = range(4 * number, 4 * number + 4)
        assert begin(watch, iteration, ids, (epoch, 4 * number + 4)) == (0, 0)


def test_iterations_that_are_counted_again_or_left_out():
    watch = StreamWatch()
    begin(watch, 6, range(4), None)
    assert begin(watch, 6, range(4, 8), None) == (4, 0)
    assert begin(watch, 9, range(8, 12), None) == (0, 8)


def test_places_that_are_behind_or_ahead():
    watch = StreamWatch()
    begin(watch, 0, range(4), (1, 4))
    assert begin(watch, 1, range(2, 6), (1, 6)) == (2, 0)
    assert begin(watch, 2, range(8, 12), (1, 12)) == (0, 2)
    assert begin(watch, 3, range(20, 24), (0, 16)) == (4, 0)  # an earlier pass
    watch.end((0, 20))  # four further ones were taken by dynamic sampling
    assert begin(watch, 4, range(30, 34), (0, 24)) == (0, 0)


def test_a_batch_of_the_same_prompts_in_any_order_within_a_pass():
    watch = StreamWatch()
    begin(watch, 0, [1, 2, 3], None)
    begin(watch, 1, [4, 5, 6], None)
    assert begin(watch, 2, [3, 1, 2], None) == (3, 0)
    assert watch.begin(3, [4, 5, 6], None, num_batches=3) == (0, 0)  # a pass of three batches: chance
    again = StreamWatch()
    again.load_state_dict(watch.state_dict())
    assert begin(again, 4, [5, 6, 4], None) == (3, 0)

import pytest

from dynamo_lightning.allocation.dynamic_sampling import DynamicSampling, DynamicSamplingConfig
from dynamo_lightning.types import Outcome, Score


@pytest.fixture
def make_round(make_prompt, make_batch):
    """A batch of prompts with the given rewards, and their outcomes: responses of 10 tokens."""

    def make(rewards, first_id):
        prompts = [make_prompt(first_id + i) for i in range(len(rewards))]
        batch = make_batch(prompts, [len(group) for group in rewards], iteration=5)
        outcomes = [
            Outcome(prompt.prompt_id, index, Score(reward, {"math": float(reward > 0)}), 10, False)
            for prompt, group in zip(prompts, rewards, strict=True)
            for index, reward in enumerate(group)
        ]
        return batch, outcomes

    return make


def test_groups_of_equal_rewards_are_replaced_until_enough_teach(make_round):
    sampling = DynamicSampling(3, DynamicSamplingConfig())
    sampling.add(*make_round([[1, 0], [1, 1], [0, 0]], 0))
    assert (sampling.kept, sampling.num_missing) == ((0,), 2)
    sampling.add(*make_round([[0, 0], [0, 1]], 10))
    assert (sampling.kept, sampling.num_missing) == ((0, 11), 1)
    sampling.add(*make_round([[1, 0, 0]], 20))
    assert (sampling.kept, sampling.num_missing) == ((0, 11, 20), 0)
    assert sampling.metrics() == {"dynamic_sampling/rounds": 3.0, "dynamic_sampling/frac_kept": 3 / 6}


def test_retries_are_bounded_and_what_was_found_is_kept(make_round):
    sampling = DynamicSampling(2, DynamicSamplingConfig(max_rounds=2))
    sampling.add(*make_round([[1, 0], [1, 1]], 0))
    assert sampling.num_missing == 1
    sampling.add(*make_round([[0, 0]], 10))
    assert (sampling.kept, sampling.num_missing) == ((0,), 0)


def test_without_any_group_that_teaches_the_first_round_is_kept(make_round):
    sampling = DynamicSampling(2, DynamicSamplingConfig(max_rounds=2))
    sampling.add(*make_round([[0, 0], [1, 1]], 0))
    sampling.add(*make_round([[0, 0], [0, 0]], 10))
    assert sampling.kept == (0, 1)


def test_more_than_wanted_is_cut_in_the_order_of_sampling(make_round):
    sampling = DynamicSampling(1, DynamicSamplingConfig())
    sampling.add(*make_round([[1, 1], [0, 1], [1, 0]], 0))
    assert sampling.kept == (1,)


def test_shaping_does_not_make_a_group_of_right_answers_teach(make_round):
    rewards = [[1.0, 0.5], [1.0, -0.5]]  # both right, one of them long; one right and one wrong
    total = DynamicSampling(2, DynamicSamplingConfig())
    total.add(*make_round(rewards, 0))
    assert total.kept == (0, 1)
    by_answer = DynamicSampling(2, DynamicSamplingConfig(component="math"))
    by_answer.add(*make_round(rewards, 0))
    assert by_answer.kept == (1,)


def test_an_unknown_component_is_an_error_that_names_those_there_are(make_round):
    with pytest.raises(ValueError, match=r"'maths' is no reward of this run: \['math'\]"):
        DynamicSampling(1, DynamicSamplingConfig(component="maths")).add(*make_round([[1, 0]], 0))


def test_a_failed_reward_counts_with_its_total(make_prompt, make_batch):
    outcomes = [Outcome(0, 0, Score(1.0, {"math": 1.0}), 4, False), Outcome(0, 1, Score(0.0, {}, "crash"), 4, False)]
    sampling = DynamicSampling(1, DynamicSamplingConfig(component="math"))
    sampling.add(make_batch([make_prompt(0)], [2]), outcomes)
    assert sampling.num_missing == 0


def test_chosen_prompts_keep_their_groups(make_round):
    search = DynamicSampling(2, DynamicSamplingConfig())
    rounds = [make_round([[1, 0], [1, 1, 1]], 0), make_round([[0, 1, 1, 0]], 10)]
    for batch, outcomes in rounds:
        search.add(batch, outcomes)
    chosen = search.choose([plan for batch, _ in rounds for plan in batch.plans])
    assert [(plan.prompt.prompt_id, plan.size) for plan in chosen] == [(0, 2), (10, 4)]
    assert [(plan.first_sample_index, plan.share) for plan in chosen] == [(0, 1.0), (0, 1.0)]


def test_at_least_one_round_is_needed():
    with pytest.raises(ValueError, match="max_rounds must be at least 1, got 0"):
        DynamicSamplingConfig(max_rounds=0)

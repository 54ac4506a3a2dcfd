import pytest
import torch

from dynamo_lightning.allocation.estimators import BetaPosterior
from dynamo_lightning.allocation.rules import UniformRule
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.types import Outcome, Score


def make_data(tiny_policy, prompt_file, **settings):
    source = PromptSource(prompt_file, template="{prompt}")
    settings = {"prompts_per_batch": 4, "rollouts_per_prompt": 8, **settings}
    data = RolloutDataModule(train=source, val=[source], tokenizer_name=tiny_policy, **settings)
    data.setup("fit")
    return data


def outcomes_of(batch, successes):
    """Outcomes with the given number of successes for each prompt."""
    return [
        Outcome(prompt.prompt_id, index, Score(float(index < successes[prompt.answer]), {}), 3, False)
        for prompt, size in zip(batch.prompts, batch.group_sizes, strict=True)
        for index in range(size)
    ]


def run_epoch(data, rate):
    batches = []
    for batch in data.train_dataloader():
        successes = {p.answer: rate(p, n) for p, n in zip(batch.prompts, batch.group_sizes, strict=True)}
        data.observe(batch, outcomes_of(batch, successes))
        batches.append(batch)
    return batches


def test_unseen_prompts_share_the_budget_equally(tiny_policy, prompt_file):
    for batch in make_data(tiny_policy, prompt_file).train_dataloader():
        assert batch.group_sizes == (8,) * len(batch.prompts)
        assert all(plan.unseen for plan in batch.plans)


def test_budget_moves_to_uncertain_prompts_and_stays_exact(tiny_policy, prompt_file):
    data = make_data(tiny_policy, prompt_file, prompts_per_batch=5)
    run_epoch(data, lambda p, n: n // 2 if p.answer == "2" else 0)
    for batch in run_epoch(data, lambda p, n: 0):
        assert sum(batch.group_sizes) == 8 * len(batch.prompts)
        sizes = {p.answer: n for p, n in zip(batch.prompts, batch.group_sizes, strict=True)}
        if "2" in sizes and len(sizes) > 1:
            assert sizes["2"] > max(n for answer, n in sizes.items() if answer != "2")
        assert min(sizes.values()) >= data.min_rollouts
        assert max(sizes.values()) <= data.max_rollouts


def test_uniform_rule_ignores_the_statistics(tiny_policy, prompt_file):
    data = make_data(tiny_policy, prompt_file, rule=UniformRule())
    run_epoch(data, lambda p, n: n // 2 if p.answer == "2" else 0)
    assert all(set(batch.group_sizes) == {8} for batch in run_epoch(data, lambda p, n: 0))


def test_a_restored_data_module_goes_on_exactly(tiny_policy, prompt_file, tmp_path):
    def play(data, num_batches):
        seen = []
        while len(seen) < num_batches:
            for batch in data.train_dataloader():
                seen.append((batch.iteration, [p.prompt_id for p in batch.prompts], batch.group_sizes))
                data.observe(batch, outcomes_of(batch, {p.answer: p.prompt_id % 3 for p in batch.prompts}))
                if len(seen) == num_batches:
                    break
        return seen

    whole = play(make_data(tiny_policy, prompt_file, prompts_per_batch=5), 8)
    first = make_data(tiny_policy, prompt_file, prompts_per_batch=5)
    start = play(first, 4)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make_data(tiny_policy, prompt_file, prompts_per_batch=5)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert start + play(second, 4) == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_rollouts": 9}, r"data\.rollouts_per_prompt.*data\.min_rollouts.*9"),
        ({"max_rollouts": 7}, r"data\.max_rollouts.*7"),
        ({"min_rollouts": 1}, r"data\.min_rollouts.*1"),
        ({"prompts_per_batch": 0}, r"data\.prompts_per_batch must be at least 1, got 0"),
        ({"eval_rollouts_per_prompt": 0}, r"data\.eval_rollouts_per_prompt must be at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_loaded(settings, message):
    with pytest.raises(ValueError, match=message):
        RolloutDataModule(**{"rollouts_per_prompt": 8, **settings})


def test_a_stage_without_prompts_names_its_option():
    with pytest.raises(ValueError, match=r"test needs prompts: set data\.test"):
        RolloutDataModule().setup("test")


def test_a_bad_reference_answer_is_found_before_training(tiny_policy, prompt_file):
    def check(answer):
        if answer == "3":
            raise ValueError(f"answer {answer!r} does not parse")

    with pytest.raises(ValueError, match=r"data set sums, line 4 of .*'0\+3=': answer '3' does not"):
        make_data(tiny_policy, prompt_file).check_answers(check)


def test_evaluation_gives_every_prompt_once_in_order(tiny_policy, prompt_file):
    data = make_data(tiny_policy, prompt_file, eval_prompts_per_batch=5, eval_rollouts_per_prompt=3)
    (loader,) = data.val_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert [p.question for batch in batches for p in batch.prompts][:5] == ["0+0=", "0+1=", "0+2=", "0+3=", "1+0="]
    assert all(set(batch.group_sizes) == {3} for batch in batches)


def test_a_pilot_comes_first_and_the_rest_follows_what_it_showed(tiny_policy, prompt_file):
    data = make_data(tiny_policy, prompt_file, prompts_per_batch=12, rollouts_per_prompt=10, pilot=4)
    batch = next(iter(data.train_dataloader()))
    parts = data.parts(batch)
    pilot = next(parts)
    assert set(pilot.group_sizes) == {4}
    data.observe(pilot, outcomes_of(pilot, {p.answer: 2 if p.answer == "2" else 0 for p in pilot.prompts}))
    commit = next(parts)
    assert next(parts, None) is None
    assert sum(pilot.group_sizes) + sum(commit.group_sizes) == 10 * 12
    assert {plan.first_sample_index for plan in commit.plans} == {4}
    sizes = {p.answer: n for p, n in zip(commit.prompts, commit.group_sizes, strict=True)}
    assert sizes["2"] == max(sizes.values()) > min(sizes.values()) >= 2
    # The mixing weights are fixed before the pilot: all prompts were unseen then, so all weigh the same.
    assert len({plan.share for plan in pilot.plans}) == 1
    assert [a.share + b.share for a, b in zip(pilot.plans, commit.plans, strict=True)] == pytest.approx([1.0] * 12)


def test_token_cost_gives_short_responses_more_rollouts(tiny_policy, prompt_file):
    data = make_data(tiny_policy, prompt_file, prompts_per_batch=12, cost="tokens", max_rollouts=64)
    batch = next(iter(data.train_dataloader()))
    assert set(batch.group_sizes) == {8}  # no length is known yet
    outcomes = [
        Outcome(p.prompt_id, index, Score(float(index % 2), {}), 4 if p.answer == "2" else 40, False)
        for p in batch.prompts
        for index in range(8)
    ]
    data.observe(batch, outcomes)
    later = next(iter(data.train_dataloader()))
    sizes = {p.answer: n for p, n in zip(later.prompts, later.group_sizes, strict=True)}
    assert sizes["2"] == max(sizes.values()) > 8
    assert sum(n * (4 if answer == "2" else 40) for answer, n in sizes.items()) <= 8 * sum(
        4 if p.answer == "2" else 40 for p in batch.prompts
    )


def test_skipping_prompts_needs_the_users_consent(tiny_policy, prompt_file):
    with pytest.raises(ValueError, match=r"data\.accept_skip_bias"):
        RolloutDataModule(rollouts_per_prompt=8, min_rollouts=0)
    data = make_data(
        tiny_policy, prompt_file, prompts_per_batch=12, rollouts_per_prompt=3, min_rollouts=0, accept_skip_bias=True,
        estimator=BetaPosterior(half_life=1000),
    )  # fmt: skip
    for _ in range(30):
        (batch,) = run_epoch(data, lambda p, n: n // 2 if p.answer == "2" else 0)
    assert min(batch.group_sizes) == 0
    assert 1 not in batch.group_sizes
    assert sum(batch.group_sizes) == 3 * 12

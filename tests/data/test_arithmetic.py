"""The embedded task and its policy."""

import json
import re

import numpy as np
import pytest

from dynamo_lightning.allocation.variance import best_variance_ratio
from dynamo_lightning.data.arithmetic import (
    all_problems,
    exact_success_rates,
    noisy_demonstrations,
    split_problems,
    write_task,
)
from dynamo_lightning.policy.embedded import local_path
from dynamo_lightning.policy.loading import PolicyConfig, load_policy
from dynamo_lightning.rewards import MathReward

MODEL = "embedded:arithmetic-qwen3"


def test_answers_are_right():
    for problem in all_problems(seed=0):
        a, b = (int(number) for number in re.findall(r"\d+", problem.prompt))
        results = {"sum": a + b, "difference": a - b, "product": a * b, "long_product": a * b}
        assert problem.answer == str(results[problem.kind]), problem


def test_splits_are_large_enough_and_disjoint():
    train, test = split_problems(seed=0)
    assert len(train) >= 1000 and len(test) >= 500
    assert not {problem.prompt for problem in train} & {problem.prompt for problem in test}
    assert len({problem.prompt for problem in train + test}) == len(train) + len(test)


def test_shipped_files_are_what_the_module_writes(tmp_path):
    write_task(str(tmp_path), num_demonstrations=10)
    for name in ("train.jsonl", "test.jsonl"):
        with open(local_path(f"embedded:arithmetic/{name}")) as shipped:
            assert shipped.read() == (tmp_path / name).read_text()
    written = (tmp_path / "arithmetic-qwen3" / "tokenizer.json").read_text()
    with open(local_path(f"{MODEL}/tokenizer.json")) as shipped:
        assert json.load(shipped)["model"] == json.loads(written)["model"]


def test_demonstrations_are_noisy_where_they_should_be():
    answers = {problem.prompt: problem for problem in all_problems(seed=0)}
    right, total = {}, {}
    for prompt, response in noisy_demonstrations(20_000, seed=0):
        kind = answers[prompt].kind if prompt in answers else "long_product"
        total[kind] = total.get(kind, 0) + 1
        if prompt in answers:
            right[kind] = right.get(kind, 0) + (response == f"\\boxed{{{answers[prompt].answer}}}")
    assert right["sum"] == total["sum"]
    for kind in ("difference", "product"):
        assert right[kind] / total[kind] == pytest.approx(0.45 + 0.55 * 0.05, abs=0.05)


def test_the_policy_is_small():
    policy = load_policy(MODEL, PolicyConfig())
    assert sum(parameter.numel() for parameter in policy.parameters()) <= 2_000_000


def test_the_policy_leaves_room_for_reinforcement_learning_and_for_allocation():
    """The gate before any claim: pass@1 from 25 to 45 %, and a best possible variance ratio of at most 0.65."""
    rates = np.array(exact_success_rates(split_problems(seed=0)[1], MODEL))
    assert 0.25 <= rates.mean() <= 0.45
    assert best_variance_ratio(rates * (1 - rates)) <= 0.65
    assert min(rates) <= 0.005 and max(rates) >= 0.995


def test_the_reward_takes_the_demonstrated_form():
    assert MathReward()("6*8=", "\\boxed{48}", "48") == 1.0
    assert MathReward()("6*8=", "\\boxed{47}", "48") == 0.0
    assert MathReward()("2-9=", "\\boxed{-7}", "-7") == 1.0

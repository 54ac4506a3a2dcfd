"""The exact variance of leave-one-out gradients, against enumeration; projected scores, against autograd."""

import importlib.util
import json
import sys
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch

from dynamo_lightning.losses.advantages import RLOO
from dynamo_lightning.measure.moments import group_variances, kernel_moments, leave_one_out_gradient
from dynamo_lightning.measure.scores import HeadProjection, head_scores, parameter_scores, project_head_scores
from dynamo_lightning.policy.loading import PolicyConfig, load_policy
from dynamo_lightning.update.config import UpdateConfig

# A prompt with four possible responses: their probabilities, rewards and scores, so that the mean score is 0.
PROBABILITIES = np.array([0.4, 0.3, 0.2, 0.1])
REWARDS = np.array([1.0, 0.0, 0.0, 1.0])
SCORES = np.array([[1.0, 0.5], [-1.0, 0.3], [0.0, -1.0], [-1.0, -0.9]])


def kernel(first, second):
    return (REWARDS[first] - REWARDS[second]) * (SCORES[first] - SCORES[second]) / 2


def expectation(function, num_rollouts):
    """Mean of a function of independent rollouts, over everything that they can be."""
    total = 0.0
    for responses in product(range(4), repeat=num_rollouts):
        total = total + PROBABILITIES[list(responses)].prod() * function(list(responses))
    return total


def exact_moments():
    same = expectation(lambda x: kernel(x[0], x[1]) @ kernel(x[0], x[1]), 2)
    overlapping = expectation(lambda x: kernel(x[0], x[1]) @ kernel(x[0], x[2]), 3)
    disjoint = expectation(lambda x: kernel(x[0], x[1]) @ kernel(x[2], x[3]), 4)
    return same, overlapping, disjoint


def test_the_example_has_a_gradient():
    gradient = expectation(lambda x: REWARDS[x[0]] * SCORES[x[0]], 1)
    assert PROBABILITIES @ SCORES == pytest.approx(0)
    assert exact_moments()[2] == pytest.approx(gradient @ gradient) and gradient @ gradient > 0.01


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_leave_one_out_gradient_is_unbiased_and_its_variance_is_the_formula_s(size):
    def gradient(responses):
        return leave_one_out_gradient(REWARDS[responses], SCORES[responses])

    mean = expectation(gradient, size)
    assert mean == pytest.approx(expectation(lambda x: REWARDS[x[0]] * SCORES[x[0]], 1))
    variance = expectation(lambda x: (gradient(x) - mean) @ (gradient(x) - mean), size)
    same, overlapping, disjoint = exact_moments()
    zeta1, zeta2 = overlapping - disjoint, same - disjoint
    assert variance == pytest.approx((4 * (size - 2) * zeta1 + 2 * zeta2) / (size * (size - 1)))


def test_leave_one_out_gradient_is_that_of_the_library_s_advantages():
    responses = [0, 1, 1, 3, 2]
    advantages = RLOO()(torch.tensor(REWARDS[responses]), torch.zeros(5, dtype=torch.int64)).numpy()
    expected = (advantages[:, None] * SCORES[responses]).mean(0)
    assert leave_one_out_gradient(REWARDS[responses], SCORES[responses]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [4, 5])
def test_estimated_moments_are_unbiased(size):
    def moments(responses):
        found = kernel_moments(REWARDS[responses], SCORES[responses])
        return np.array([found.same, found.overlapping, found.disjoint])

    assert expectation(moments, size) == pytest.approx(np.array(exact_moments()))


def test_estimated_moments_are_means_over_pairs_of_pairs():
    rng = np.random.default_rng(0)
    rewards, scores = rng.random(6), rng.standard_normal((6, 3))
    h = (rewards[:, None] - rewards)[..., None] * (scores[:, None] - scores) / 2
    found = kernel_moments(rewards, scores)
    assert found.same == pytest.approx(np.mean([h[i, j] @ h[i, j] for i, j in permutations(range(6), 2)]))
    assert found.overlapping == pytest.approx(np.mean([h[i, j] @ h[i, k] for i, j, k in permutations(range(6), 3)]))
    assert found.disjoint == pytest.approx(np.mean([h[i, j] @ h[k, m] for i, j, k, m in permutations(range(6), 4)]))


def test_counts_stand_for_repeated_rollouts():
    responses, counts = [0, 1, 2, 3], [3, 2, 1, 2]
    repeated = np.repeat(responses, counts)
    folded = kernel_moments(REWARDS[responses], SCORES[responses], counts)
    spread = kernel_moments(REWARDS[repeated], SCORES[repeated])
    for name in ("same", "overlapping", "disjoint"):
        assert getattr(folded, name) == pytest.approx(getattr(spread, name))
    assert leave_one_out_gradient(REWARDS[responses], SCORES[responses], counts) == pytest.approx(
        leave_one_out_gradient(REWARDS[repeated], SCORES[repeated])
    )


def test_equal_rewards_have_no_variance():
    moments = kernel_moments(np.ones(5), np.random.default_rng(0).standard_normal((5, 3)))
    assert (moments.same, moments.overlapping, moments.disjoint) == (0, 0, 0)


def test_independent_rewards_and_scores_give_the_allocation_s_own_model():
    # All four combinations of reward and score, equally likely: a/(n − 1) with a = p(1 − p) tr Cov(s).
    moments = kernel_moments([0, 0, 1, 1], [[-1.0], [1.0], [-1.0], [1.0]], counts=[10**6] * 4)
    for size in (2, 5, 17):
        assert moments.variance(size) == pytest.approx(0.25 / (size - 1), rel=1e-4)


@pytest.mark.parametrize("size", [2, 3])
def test_groups_of_two_and_three_have_at_least_their_variance(size):
    same, _, disjoint = exact_moments()
    estimate = expectation(lambda x: group_variances(REWARDS[x], SCORES[x], [2])[0], size)
    assert estimate == pytest.approx(same)
    assert same - disjoint <= estimate


def test_too_few_rollouts_are_refused():
    with pytest.raises(ValueError, match="3 rollouts are too few, at least 4"):
        kernel_moments([1, 0, 1], np.zeros((3, 1)))
    with pytest.raises(ValueError, match="1 rollouts are too few, at least 2"):
        leave_one_out_gradient([1], np.zeros((1, 1)))
    with pytest.raises(ValueError, match="differ in length"):
        kernel_moments([1, 0, 1, 0], np.zeros((3, 1)))
    with pytest.raises(ValueError, match="group of 1 rollouts"):
        kernel_moments(REWARDS, SCORES).variance(1)


# --- projected scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_bias", [False, True])
def test_projected_head_scores_are_autograd_s(softcap, has_bias):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4), torch.randn(7, 4, requires_grad=True)
    bias, targets = torch.randn(7) if has_bias else None, torch.tensor([0, 3, 6, 3, 1])
    projection = HeadProjection.draw(7, 4, num_projections=9, seed=1)
    # Memory for chunks of two tokens.
    options = {"head_bias": bias, "temperature": 0.7, "softcap": softcap, "max_logits_bytes": 2 * 16 * 7}
    projected = project_head_scores(hidden, weight.detach(), targets, projection, **options)
    for token in range(5):
        logits = torch.nn.functional.linear(hidden[token], weight, bias)
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        logprob = torch.log_softmax(logits / 0.7, -1)[targets[token]]
        (gradient,) = torch.autograd.grad(logprob, weight)
        expected = torch.einsum("vh,vk,hk->k", gradient, projection.vocab, projection.hidden)
        torch.testing.assert_close(projected[token], expected)


def test_projections_keep_squared_lengths_on_average():
    gradient = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    projection = HeadProjection.draw(7, 4, num_projections=20_000, seed=2)
    projected = torch.einsum("vh,vk,hk->k", gradient, projection.vocab, projection.hidden)
    assert float(projected.square().sum()) == pytest.approx(float(gradient.square().sum()), rel=0.05)


@pytest.fixture(scope="module")
def policy(tiny_policy):
    return load_policy(tiny_policy, PolicyConfig(attn_implementation="eager")).eval()


@pytest.fixture(scope="module")
def rollouts(make_prompt, make_rollout):
    prompts = [make_prompt(0, (5, 6, 7)), make_prompt(1, (8, 9))]
    return [make_rollout(prompts[i % 2], i // 2, tokens) for i, tokens in enumerate([(4, 1), (9, 9, 9, 1), (3,), (7,)])]


def gradient_of(policy, rollout, temperature):
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
    logprobs = torch.log_softmax(policy(input_ids=ids).logits[0, :-1] / temperature, -1)
    start = len(rollout.prompt.token_ids) - 1
    logprob = logprobs[start:].gather(-1, ids[0, start + 1 :, None]).sum()
    return dict(
        zip(dict(policy.named_parameters()), torch.autograd.grad(logprob, list(policy.parameters())), strict=True)
    )


def test_sketched_scores_keep_inner_products_of_whole_gradients(policy, rollouts):
    gradients = [torch.cat([g.flatten() for g in gradient_of(policy, rollout, 0.8).values()]) for rollout in rollouts]
    whole = torch.stack(gradients)
    sketched = parameter_scores(policy, rollouts, temperature=0.8, num_dimensions=50_000, seed=0, batch_size=3)
    torch.testing.assert_close(sketched @ sketched.T, whole @ whole.T, rtol=0.02, atol=0.02 * float(whole.norm() ** 2))


def test_head_scores_do_not_depend_on_micro_batches(policy, rollouts):
    options = {"temperature": 0.8, "num_projections": 6, "seed": 3}
    large = head_scores(policy, rollouts, rollouts[0], UpdateConfig(), **options)
    small = head_scores(policy, rollouts, rollouts[0], UpdateConfig(max_tokens_per_micro_batch=7), **options)
    torch.testing.assert_close(large, small, rtol=1e-4, atol=1e-5)
    assert head_scores(policy, [], rollouts[0], UpdateConfig(), **options).shape == (0, 6)


def test_a_head_score_is_the_sum_over_its_rollout_s_tokens(policy, rollouts):
    from dynamo_lightning.policy.forward import head_inputs
    from dynamo_lightning.policy.packing import make_micro_batch

    scores = head_scores(policy, rollouts, rollouts[0], UpdateConfig(), temperature=1.0, num_projections=6, seed=3)
    weight = policy.get_output_embeddings().weight.detach()
    projection = HeadProjection.draw(*weight.shape, num_projections=6, seed=3)
    for index in range(len(rollouts)):
        alone = make_micro_batch(rollouts, [index], torch.device("cpu"))
        hidden = head_inputs(policy, alone)[0].detach()
        expected = project_head_scores(hidden, weight, alone.targets, projection).sum(0)
        torch.testing.assert_close(scores[index], expected, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_not_linear_is_refused(policy, rollouts, monkeypatch):
    monkeypatch.setattr(policy, "get_output_embeddings", lambda: None)
    with pytest.raises(ValueError, match="NoneType, not a linear layer"):
        head_scores(policy, rollouts, rollouts[0], UpdateConfig(), temperature=1.0, num_projections=2, seed=0)


# --- the benchmark ----------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
MODES = ("rloo+prompt_mean", "grpo+prompt_mean", "paper_code")
ARMS = (
    "uniform",
    "beta_posterior",
    "arcsine_kalman",
    "paper_bernoulli",
    "filter",
    "filter_followers",
    "score_ratio",
    "oracle",
    "oracle_gradient",
    "random_matched",
)
BASELINES = (
    "optimal_baseline",
    "optimal_baseline_history",
    "optimal_baseline_uniform",
    "history_uniform",
    "history_oracle",
)
"""In mode `rloo+prompt_mean` only."""


@pytest.fixture(scope="module")
def benchmark():
    path = ROOT / "benchmarks" / "gradient_variance.py"
    spec = importlib.util.spec_from_file_location("benchmark_gradient_variance", path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up, and so do the scorer's workers.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_benchmark_makes_such_a_table(benchmark, capsys, tmp_path):
    benchmark.main(["--quick", "--json", str(tmp_path / "new" / "table.json")])
    rows = json.loads((tmp_path / "new" / "table.json").read_text())
    assert [(row["mode"], row["arm"]) for row in rows] == [
        (mode, arm) for mode in MODES for arm in (*ARMS, *(BASELINES if mode == MODES[0] else ()))
    ]
    for row in rows:
        assert set(row) == {"mode", "arm", "ratio", "low", "high", "bias_low", "bias_high"}
        assert row["low"] <= row["ratio"] <= row["high"] and row["bias_low"] <= row["bias_high"]
    printed = capsys.readouterr().out
    assert "mean group 8, sizes [2, 24]" in printed and "mean group 16, sizes [2, 64]" in printed


def test_batches_have_the_variance_of_the_formula_and_no_bias(benchmark, make_prompt, make_rollout):
    rng = np.random.default_rng(0)
    references = []
    for number in range(3):
        responses = [make_rollout(make_prompt(number), i, (1,) * (1 + i % 3)) for i in range(40)]
        index, rewards = rng.integers(40, size=200), (rng.random(40) < 0.4).astype(float)
        scores = rng.standard_normal((40, 8)).astype(np.float32) + rewards[:, None].astype(np.float32)
        references.append(benchmark.Reference(responses, index, rewards, scores))
    scale = benchmark.Scale(num_prompts=3, num_references=200, num_batches=2000)
    sizes = dict.fromkeys(benchmark.ARMS, np.array([4, 4, 4])) | {"oracle": np.array([2, 3, 7])}
    result = benchmark.Measurement(0, 16, np.zeros(3), {}, [], [])
    benchmark.measure_batches(result, references, sizes, scale, np.random.default_rng(1))
    for arm in ("uniform", "oracle"):
        exact = (
            sum(
                reference.moments(reference.scores).variance(size)
                for reference, size in zip(references, sizes[arm], strict=True)
            )
            / (3 * benchmark.MAX_RESPONSE_LENGTH) ** 2
        )
        # Draws without replacement from 200 vary less, by at most 7 of 200.
        assert result.deviations["rloo+prompt_mean", arm].mean() == pytest.approx(exact, rel=0.1)
        assert abs(result.squared_bias["rloo+prompt_mean", arm]) < 0.05**2
    assert result.squared_bias["paper_code", "uniform"] == 0
    assert result.squared_bias["paper_code", "oracle"] > 0.05**2, "prompts silently weigh n_i"


def test_batches_of_weighted_baselines_have_less_variance_and_no_bias(benchmark, make_prompt, make_rollout):
    """Right responses have small scores here; a prior at the optimum is better still."""
    rng = np.random.default_rng(0)
    references = []
    for number in range(3):
        responses = [make_rollout(make_prompt(number), i, (1,)) for i in range(40)]
        index, rewards = rng.integers(40, size=200), (rng.random(40) < 0.5).astype(float)
        scores = (rng.standard_normal((40, 8)) * np.where(rewards > 0, 0.3, 2.0)[:, None]).astype(np.float32)
        scores -= np.bincount(index, minlength=40) @ scores / 200
        norms = (scores.astype(np.float64) ** 2).sum(1)
        best = np.average(rewards[index], weights=norms[index])
        references.append(benchmark.Reference(responses, index, rewards, scores, norms=norms, prior=(best, 1e6)))
    scale = benchmark.Scale(num_prompts=3, num_references=200, num_batches=1000)
    sizes = dict.fromkeys((*benchmark.ARMS, *benchmark.BASELINE_ARMS), np.array([6, 6, 6]))
    result = benchmark.Measurement(0, 16, np.zeros(3), {}, [], [])
    benchmark.measure_batches(result, references, sizes, scale, np.random.default_rng(1))
    mode = "rloo+prompt_mean"
    uniform, weighted, history = (
        result.deviations[mode, arm].mean() for arm in ("uniform", "optimal_baseline_uniform", "history_uniform")
    )
    assert history < weighted < uniform
    for arm in benchmark.BASELINE_ARMS:
        assert result.squared_bias[mode, arm] < 0.1**2
    assert ("grpo+prompt_mean", "history_uniform") not in result.deviations


def test_estimates_are_those_of_all_outcomes_an_iteration_at_a_time(benchmark, make_prompt):
    from dynamo_lightning.allocation import LogitFilter, PromptStatistics

    prompts = tuple(make_prompt(number) for number in range(2))
    ids = np.array([prompt.prompt_id for prompt in prompts])
    rollouts = {
        "iteration": np.array([0, 0, 0, 3, 3, 3]),
        "prompt_id": ids[[0, 1, 0, 1, 1, 1]],
        "reward": np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]),
        "score_norm": np.ones(6),
    }
    checkpoint = benchmark.Checkpoint(0, 1, {}, prompts, (), 4, rollouts)
    statistics = PromptStatistics(LogitFilter())
    statistics.observe(ids, [1, 0], [2, 1], 0)
    statistics.observe(ids[1:], [2], [3], 3)
    expected = statistics.estimate(ids, 4).bernoulli_variance
    np.testing.assert_allclose(checkpoint.estimate(LogitFilter()).bernoulli_variance, expected)


def test_what_is_kept_is_not_made_again(benchmark, tmp_path):
    made = []

    def make():
        made.append(1)
        return {"value": len(made)}

    assert [benchmark.kept(tmp_path / "kept", "name", make) for _ in range(2)] == [{"value": 1}] * 2
    assert benchmark.kept(None, "name", make) == {"value": 2}


@pytest.fixture
def tables(benchmark):
    return sys.modules["variance_tables"]


def test_a_ratio_s_interval_is_paired(tables):
    rng = np.random.default_rng(0)
    uniform = [rng.lognormal(sigma=2, size=50) for _ in range(6)]
    halved = [values / 2 for values in uniform]
    assert tables.ratio_to_uniform(halved, uniform, 200) == pytest.approx((0.5, 0.5, 0.5))
    ratio, low, high = tables.ratio_to_uniform([rng.permutation(values) for values in uniform], uniform, 200)
    assert ratio == pytest.approx(1) and low < 0.8 and high > 1.2


def test_bias_is_the_signed_root_of_its_mean_square(tables):
    assert tables.relative_bias([0.04, 0.04], 100) == pytest.approx((0.2, 0.2, 0.2))
    assert tables.relative_bias([-0.0004] * 3, 100) == pytest.approx((-0.02, -0.02, -0.02))


def test_a_difference_is_that_of_the_ratios(tables):
    rng = np.random.default_rng(0)
    uniform = [rng.lognormal(size=50) for _ in range(6)]
    arm, other = [0.75 * values for values in uniform], [0.5 * values for values in uniform]
    assert tables.difference_to(arm, other, uniform, 200) == pytest.approx((0.25, 0.25, 0.25))

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dynamo_lightning.losses.covariance import ClipCov, KLCov, choose_tokens, token_covariance
from dynamo_lightning.losses.modulation_inputs import ModulationInputs
from dynamo_lightning.losses.token_statistics import TokenStatistics


def alone(values):
    """What is gathered where there is one rank."""
    return values


def statistics_of(logprobs):
    return TokenStatistics(logprobs, torch.zeros_like(logprobs), torch.zeros_like(logprobs))


# Means are −2 and 1: covariances (A − 1)(log π + 2) are 2, 0, 3, 0, 1, −6.
LOGPROBS = torch.tensor([-1.0, -2.0, -5.0, -2.0, -1.0, -1.0])
ADVANTAGES = torch.tensor([3.0, 6.0, 0.0, 0.0, 2.0, -5.0])
KEYS = torch.tensor([5, 1, 2, 3, 4, 0])


def test_covariance_by_hand():
    logprobs, advantages = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([1.0, -1.0, 0.0])
    assert token_covariance(logprobs, advantages, alone).tolist() == [1.0, 1.0, 0.0]
    covariance = token_covariance(LOGPROBS, ADVANTAGES, alone)
    assert covariance.tolist() == pytest.approx([2.0, 0.0, 3.0, 0.0, 1.0, -6.0])
    assert float(covariance.mean()) == pytest.approx(
        float(torch.cov(torch.stack([LOGPROBS, ADVANTAGES]), correction=0)[0, 1])
    )


def test_the_candidates_with_the_smallest_keys_are_chosen():
    candidates = torch.tensor([True, False, True, True, False, False])
    assert choose_tokens(candidates, 2, KEYS, alone).tolist() == [False, False, True, True, False, False]
    assert choose_tokens(candidates, 0, KEYS, alone).any().item() is False
    assert torch.equal(choose_tokens(candidates, 9, KEYS, alone), candidates)


def test_clip_cov_takes_the_gradient_from_tokens_in_the_band_alone():
    clip_cov = ClipCov(clipped_share=0.2, covariance_low=1.5, covariance_high=5.0)  # one of six tokens
    modulated = clip_cov(ModulationInputs(statistics_of(LOGPROBS), ADVANTAGES, token_keys=lambda: KEYS))
    # Tokens 0 and 2 are in the band, token 2 has the smaller key.
    assert modulated.advantages.tolist() == [3.0, 6.0, 0.0, 0.0, 2.0, -5.0]
    assert modulated.indicators["mod/frac_clip_cov"].tolist() == [0, 0, 1, 0, 0, 0]
    modulated = clip_cov(ModulationInputs(statistics_of(LOGPROBS), ADVANTAGES, token_keys=lambda: -KEYS + 5))
    assert modulated.advantages.tolist() == [0.0, 6.0, 0.0, 0.0, 2.0, -5.0]


def test_clip_cov_without_a_token_in_the_band_changes_nothing():
    modulated = ClipCov(covariance_low=50.0, covariance_high=60.0)(
        ModulationInputs(statistics_of(LOGPROBS), ADVANTAGES, token_keys=lambda: KEYS)
    )
    assert torch.equal(modulated.advantages, ADVANTAGES)


def test_kl_cov_marks_the_largest_covariances():
    marks = KLCov(penalised_share=0.34).token_selection(
        ModulationInputs(statistics_of(LOGPROBS), ADVANTAGES, token_keys=lambda: KEYS)
    )
    assert marks.tolist() == [1, 0, 1, 0, 0, 0]
    assert (
        KLCov(penalised_share=1e-6)
        .token_selection(ModulationInputs(statistics_of(LOGPROBS), ADVANTAGES, token_keys=lambda: KEYS))
        .sum()
        == 1
    )


def test_kl_cov_marks_its_share_also_where_all_covariances_are_equal():
    marks = KLCov(penalised_share=0.5).token_selection(
        ModulationInputs(statistics_of(LOGPROBS), torch.zeros(6), token_keys=lambda: KEYS)
    )
    assert marks.tolist() == [0, 1, 1, 0, 0, 1]


def test_kl_cov_by_hand():
    log_ratio = torch.tensor([0.1, -0.2, 0.3], requires_grad=True)
    penalty, metrics = KLCov(coefficient=2.0)(log_ratio, torch.tensor([1.0, 1.0, 0.0]))
    # 2 (√(x² + 10⁻⁶) − 10⁻³), and its slope 2 x / √(x² + 10⁻⁶)
    expected = torch.tensor([2 * (0.010001**0.5 - 0.001), 2 * (0.040001**0.5 - 0.001), 0.0])
    torch.testing.assert_close(penalty.detach(), expected)
    assert metrics["kl_cov"] is penalty
    penalty.sum().backward()
    assert log_ratio.grad.tolist() == pytest.approx([0.2 / 0.010001**0.5, -0.4 / 0.040001**0.5, 0.0], rel=1e-5)


def test_kl_cov_has_no_slope_at_the_sampling_policy():
    log_ratio = torch.zeros(1, requires_grad=True)
    KLCov()(log_ratio, torch.ones(1))[0].sum().backward()
    assert log_ratio.grad.item() == 0.0


def test_rounding_noise_of_the_log_ratio_does_not_decide_the_slope_of_kl_cov():
    noise = torch.tensor([1e-6, -1e-6, 3e-7], requires_grad=True)
    KLCov()(noise, torch.ones(3))[0].sum().backward()
    assert noise.grad.abs().max() <= 1.01e-3
    far = torch.tensor([0.05, -0.05], requires_grad=True)
    KLCov()(far, torch.ones(2))[0].sum().backward()
    assert far.grad.tolist() == pytest.approx([1.0, -1.0], abs=3e-4)


def test_clip_cov_replaces_tokens_that_the_surrogate_clips_by_the_next_in_line():
    clip_cov = ClipCov(clipped_share=0.34, covariance_low=0.5, covariance_high=5.0)  # two of six tokens
    modulated = clip_cov(ModulationInputs(statistics_of(LOGPROBS), ADVANTAGES, token_keys=lambda: KEYS))
    # Tokens 0, 2 and 4 are in the band, with keys 5, 2 and 4.
    assert modulated.indicators["mod/frac_clip_cov"].tolist() == [0, 0, 1, 0, 1, 0]

    def later(is_clipped, in_step):
        found = clip_cov.at_later_step(
            ModulationInputs(statistics_of(LOGPROBS), ADVANTAGES, token_keys=lambda: KEYS),
            modulated,
            is_clipped=torch.tensor(is_clipped),
            in_step=torch.tensor(in_step),
        )
        return found.tolist()

    everything, nothing = [True] * 6, [False] * 6
    assert later(nothing, everything) == [3.0, 6.0, 0.0, 0.0, 0.0, -5.0] == modulated.advantages.tolist()
    assert later([False] * 4 + [True, False], everything) == [0.0, 6.0, 0.0, 0.0, 2.0, -5.0]
    # A token outside the step is no replacement.
    assert later([False] * 4 + [True, False], [False] + [True] * 5) == [3.0, 6.0, 0.0, 0.0, 2.0, -5.0]


def on_two_ranks(function, cut):
    """Runs `function(rows, gather)` in two threads, one for each part of the rows; gather waits for both."""
    barrier, shared = threading.Barrier(2, timeout=20), {}

    def run(rank, rows):
        def gather(values):
            shared[rank] = values
            barrier.wait()
            everything = torch.cat([shared[0], shared[1]])
            barrier.wait()
            return everything

        return function(rows, gather)

    with ThreadPoolExecutor(2) as pool:
        return torch.cat(list(pool.map(run, (0, 1), (slice(0, cut), slice(cut, None)))))


@pytest.mark.parametrize("cut", [0, 1, 37, 200])
def test_chosen_tokens_do_not_depend_on_how_tokens_are_spread_over_ranks(cut):
    generator = torch.Generator().manual_seed(0)
    logprobs, advantages = torch.randn(200, generator=generator), torch.randn(200, generator=generator)
    keys = torch.randint(2**62, (200,), generator=generator)

    def clip_cov(rows, gather):
        modulation = ClipCov(clipped_share=0.05, covariance_low=0.2, covariance_high=3.0)
        return modulation(
            ModulationInputs(statistics_of(logprobs[rows]), advantages[rows], gather, token_keys=lambda: keys[rows])
        ).advantages

    def clip_cov_later(rows, gather):
        modulation = ClipCov(clipped_share=0.05, covariance_low=0.2, covariance_high=3.0)
        inputs = ModulationInputs(statistics_of(logprobs[rows]), advantages[rows], gather, lambda: keys[rows])
        is_clipped = (torch.arange(200) % 3 == 0)[rows]
        everything = torch.ones_like(is_clipped)
        return modulation.at_later_step(inputs, modulation(inputs), is_clipped=is_clipped, in_step=everything)

    def kl_cov(rows, gather):
        penalty = KLCov(penalised_share=0.1)
        return penalty.token_selection(
            ModulationInputs(statistics_of(logprobs[rows]), advantages[rows], gather, lambda: keys[rows])
        )

    for function, number in ((clip_cov, 10), (clip_cov_later, 10), (kl_cov, 20)):
        whole = function(slice(None), alone)
        assert int((whole == 0).sum()) == (200 - number if function is kl_cov else number)
        assert torch.equal(on_two_ranks(function, cut), whole)


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        (ClipCov, {"clipped_share": 0.0}),
        (ClipCov, {"covariance_low": 5.0}),
        (KLCov, {"penalised_share": 2.0}),
        (KLCov, {"smoothing": 0.0}),
    ],
)
def test_impossible_settings_are_refused(part, settings):
    with pytest.raises(ValueError, match=r"(Clip|KL)-Cov needs"):
        part(**settings)

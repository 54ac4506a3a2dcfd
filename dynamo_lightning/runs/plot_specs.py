"""Plots of metrics over iterations: what each shows, if a run has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LinePlot:
    """Content of a plot of metrics over iterations shows, if a run has them."""

    name: str
    section: str
    subject: str
    """Begins the title."""
    caption: str
    y_title: str
    lines: Mapping[str, str]
    """Legend by metric name."""
    smooth: bool = True
    """Drawn faint with a rolling mean on top."""
    reference: float | None = None
    """A horizontal line."""
    logarithmic: bool = False
    """The vertical axis is logarithmic."""
    only_if_not_zero: bool = False
    """Left out where nothing ever happened."""


LINE_PLOTS = (
    LinePlot(
        name="reward",
        section="Results",
        subject="Training reward",
        caption=(
            "Mean reward of each iteration; over prompts, it is comparable between runs whose group sizes differ. "
            "A point opens the iteration's rollouts."
        ),
        y_title="mean reward",
        lines={"reward_prompt_mean": "over prompts", "reward": "over rollouts"},
    ),
    LinePlot(
        name="entropy",
        section="Stability",
        subject="Policy entropy",
        caption=(
            "Mean entropy of the policy over response tokens; crosses are spikes, far from the median of the"
            " iterations before."
        ),
        y_title="nats",
        lines={"entropy": "entropy"},
    ),
    LinePlot(
        name="gradient",
        section="Stability",
        subject="Gradient norm",
        caption="Norm of the gradient before clipping, on a logarithmic axis.",
        y_title="gradient norm",
        lines={"grad_norm": "gradient norm"},
        logarithmic=True,
    ),
    LinePlot(
        name="clipping",
        section="Stability",
        subject="Clipped tokens",
        caption="Share of the response tokens whose importance ratio was clipped.",
        y_title="share of tokens",
        lines={
            "clip_ratio/region_mean": "either side",
            "clip_ratio/low_mean": "below",
            "clip_ratio/high_mean": "above",
        },
        only_if_not_zero=True,
    ),
    LinePlot(
        name="mismatch",
        section="Stability",
        subject="Difference between sampling and training",
        caption=(
            "Mean and largest absolute difference of a token's log-probability between the engine that "
            "sampled it and the policy that is trained, on a logarithmic axis."
        ),
        y_title="nats",
        lines={"sampling/sampling_logp_difference/mean": "mean", "sampling/sampling_logp_difference/max": "largest"},
        logarithmic=True,
    ),
    LinePlot(
        name="importance",
        section="Stability",
        subject="Importance weights of sampling",
        caption=(
            "Mean, largest and smallest ratio of the policy's probability of a token to that of the engine that "
            "sampled it, before the cut, on a logarithmic axis."
        ),
        y_title="ratio",
        lines={
            "sampling/importance_sampling_ratio/mean": "mean",
            "sampling/importance_sampling_ratio/max": "largest",
            "sampling/importance_sampling_ratio/min": "smallest",
        },
        logarithmic=True,
        reference=1.0,
    ),
    LinePlot(
        name="staleness",
        section="Stability",
        subject="Age of the weights that sampled",
        caption="Optimizer steps between the weights that sampled the rollouts and those that they train.",
        y_title="optimizer steps",
        lines={"sampling/staleness": "age"},
        smooth=False,
    ),
    LinePlot(
        name="entropy-change",
        section="Stability",
        subject="Entropy change by an update",
        caption="Mean token entropy of some rollouts after the update, less that before it.",
        y_title="nats",
        lines={"probe/entropy_change": "change"},
        reference=0.0,
    ),
    LinePlot(
        name="variance",
        section="Allocation",
        subject="Gradient variance relative to equal groups",
        caption=(
            "Below 1 is a gain; predicted before the rollouts, realised by their rewards, measured on their "
            "gradients, and the best that any allocation could reach."
        ),
        y_title="ratio",
        lines={
            "alloc/predicted_variance_ratio": "predicted",
            "alloc/realised_variance_ratio": "realised",
            "alloc/measured_variance_ratio": "measured",
            "alloc/best_variance_ratio": "best possible",
        },
        reference=1.0,
    ),
    LinePlot(
        name="variance-parts",
        section="Allocation",
        subject="Gradient variance of the advantages used",
        caption=(
            "Measured on the rollouts' gradients, relative to leave-one-out advantages and equal groups: all of it, "
            "and what baselines, sizes of known prompts and sizes of new prompts change; below 1 is a gain."
        ),
        y_title="ratio",
        lines={
            "alloc/total_variance_ratio": "all",
            "alloc/baseline_variance_ratio": "baselines",
            "alloc/placing_variance_ratio": "known prompts",
            "alloc/cold_start_variance_ratio": "new prompts",
        },
        reference=1.0,
    ),
    LinePlot(
        name="sizes",
        section="Allocation",
        subject="Rollouts per prompt",
        caption="Largest, mean and smallest group of each iteration.",
        y_title="rollouts",
        lines={"alloc/n_max": "largest", "alloc/n_mean": "mean", "alloc/n_min": "smallest"},
        smooth=False,
    ),
    LinePlot(
        name="shares",
        section="Allocation",
        subject="Share of groups",
        caption=(
            "Share of the groups in which all, some or none of the rollouts succeeded; only mixed groups "
            "have a gradient."
        ),
        y_title="share of groups",
        lines={"groups/frac_solved": "solved", "groups/frac_mixed": "mixed", "groups/frac_hopeless": "hopeless"},
    ),
    LinePlot(
        name="shares-cost",
        section="Allocation",
        subject="Share of tokens by kind of group",
        caption="Share of the response tokens that each kind of group cost.",
        y_title="share of tokens",
        lines={
            "groups/token_frac_solved": "solved",
            "groups/token_frac_mixed": "mixed",
            "groups/token_frac_hopeless": "hopeless",
        },
    ),
    LinePlot(
        name="no-signal",
        section="Allocation",
        subject="Groups whose rewards are all equal",
        caption="Share of the groups without any difference between their rewards: their advantages are 0.",
        y_title="share of groups",
        lines={"frac_reward_zero_std": "all equal"},
    ),
    LinePlot(
        name="factors",
        section="Modulation",
        subject="Advantage factors",
        caption="Mean factors by which the modulation changes the tokens' advantages.",
        y_title="factor",
        lines={
            "mod/beta_comp_mean": "compensation",
            "mod/beta_stab_mean": "stabilisation",
            "mod/beta_budget_mean": "entropy budget",
            "mod/steer_weight_mean": "STEER weight",
            "mod/entropy_bonus_mean": "entropy bonus",
        },
    ),
    LinePlot(
        name="damped",
        section="Modulation",
        subject="Tokens that the modulation touches",
        caption="Share of the response tokens that are damped or selected.",
        y_title="share of tokens",
        lines={
            "mod/frac_damped": "damped",
            "mod/frac_fork_tokens": "fork tokens",
            "mod/frac_clip_cov": "Clip-Cov",
            "mod/frac_in_band": "in the band",
        },
    ),
    LinePlot(
        name="lengths",
        section="Responses",
        subject="Response length",
        caption="Longest, mean and shortest response of each iteration.",
        y_title="tokens",
        lines={
            "completions/mean_length": "mean",
            "completions/max_length": "longest",
            "completions/min_length": "shortest",
        },
        smooth=False,
    ),
    LinePlot(
        name="truncated",
        section="Responses",
        subject="Responses cut off by the length limit",
        caption="Share of the responses that the length limit ended.",
        y_title="share of responses",
        lines={"completions/clipped_ratio": "cut off"},
        only_if_not_zero=True,
    ),
    LinePlot(
        name="failures",
        section="Responses",
        subject="Rewards that failed",
        caption="Share of the rollouts whose reward timed out or crashed.",
        y_title="share of rollouts",
        lines={"rewards/frac_timeout": "timed out", "rewards/frac_crash": "crashed"},
        only_if_not_zero=True,
    ),
    LinePlot(
        name="throughput",
        section="Cost",
        subject="Throughput",
        caption="Prompt and response tokens per second and process.",
        y_title="tokens per second",
        lines={"perf/throughput": "tokens per second"},
    ),
    LinePlot(
        name="memory",
        section="Cost",
        subject="Peak memory",
        caption="Largest memory use so far.",
        y_title="GB",
        lines={"perf/peak_memory": "peak memory"},
        smooth=False,
    ),
)

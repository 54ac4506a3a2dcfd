"""Measures of rewards: groups without a signal, failures, rewards that disagree with each other or follow length."""

from __future__ import annotations

import math
from statistics import fmean, stdev

from dynamo_lightning.callbacks.tripwires.observation import History
from dynamo_lightning.callbacks.tripwires.policy import LOWER_RATE
from dynamo_lightning.callbacks.tripwires.tripwire import Measurement

WINDOW = 10
"""Iterations that shares are averaged over: one unlucky batch says nothing."""
MIN_ROLLOUTS = 100
"""Rollouts that a correlation needs; its standard error is below 0.1 then."""
NUM_ERRORS = 4.0
"""Standard errors by which two means must differ."""


def all_solved(history: History) -> Measurement | None:
    """Share of groups whose responses are all correct: they have advantages of 0 and cost what others cost."""
    solved = history.last("frac_solved", WINDOW)
    if not solved:
        return None
    return Measurement(
        fmean(solved),
        f"in the last {WINDOW} iterations the responses of {fmean(solved):.0%} of the groups were all correct, which "
        "gives advantages of 0: the policy solves these prompts. Train on harder ones (data.train); a reward that "
        "always pays (model.reward) looks the same",
    )


def all_hopeless(history: History) -> Measurement | None:
    """Share of groups whose responses are all incorrect with equal rewards: nothing can be learned from them."""
    hopeless = history.last("frac_hopeless", WINDOW)
    if not hopeless:
        return None
    return Measurement(
        fmean(hopeless),
        f"in the last {WINDOW} iterations the responses of {fmean(hopeless):.0%} of the groups were all incorrect, "
        "which gives advantages of 0. Look at some responses (rollouts.jsonl): the prompts may be too hard "
        "(data.train), the template wrong (data.template), responses cut off (model.sampling.max_response_length), or "
        "correct answers not recognized (model.reward); a learning rate that ruined the policy (optimizer) looks the "
        "same",
    )


def no_signal(history: History) -> Measurement | None:
    """Share of groups with equal rewards, some kinds all correct and some all incorrect: none in between."""
    solved, hopeless = history.last("frac_solved", WINDOW), history.last("frac_hopeless", WINDOW)
    if not solved or not hopeless:
        return None
    shares = fmean(solved), fmean(hopeless)
    is_mixture = max(shares) < 0.95  # else `all_solved` or `all_hopeless` says it
    return Measurement(
        sum(shares) if is_mixture else 0.0,
        f"in the last {WINDOW} iterations {shares[0]:.0%} of the groups were all correct and {shares[1]:.0%} all "
        "incorrect, and equal rewards give advantages of 0. Train on prompts of medium difficulty (data.train), or "
        "raise data.rollouts_per_prompt",
    )


def reward_failures(history: History) -> Measurement | None:
    """Share of rewards that timed out or crashed; above `model.scoring.max_failure_share` the run has ended."""
    failed = history.last("frac_failed", 5)
    if not failed:
        return None
    return Measurement(
        fmean(failed),
        f"{fmean(failed):.1%} of the rewards of the last 5 iterations timed out or crashed and count as "
        "model.scoring.failure_score: raise model.scoring.time_limit or model.scoring.num_workers if they are slow, "
        "mend model.reward if they crash; the log has the first message of each iteration",
    )


def reward_follows_length(history: History) -> Measurement | None:
    """Correlation of reward and response length within groups: a reward that pays length is learned before accuracy.

    Pearson's r of deviations from the group's means, over all groups with differing rewards of the window.
    """
    recent = [observation.length_products for observation in history.recent[-WINDOW:]]
    if len(recent) < 3:
        return None
    count, product, rewards, lengths = (math.fsum(column) for column in zip(*recent, strict=True))
    if count < MIN_ROLLOUTS or rewards <= 0:
        return None
    correlation = product / math.sqrt(rewards * lengths) if lengths > 0 else 0.0
    return Measurement(
        correlation,
        f"rewards of one prompt's responses follow their length (r = {correlation:.2f} over {count:.0f} rollouts): the "
        "policy learns to write more, not to be right. Read long and short responses (rollouts.jsonl), and change "
        "model.reward",
    )


def rewards_disagree(history: History) -> Measurement | None:
    """Fall of one named reward while the total rises: the policy exploits one at the expense of another.

    The first and the last third of the recent iterations are compared; both changes must exceed 4 standard errors.
    """
    third = len(history.recent) // 3
    if third < 7 or len(history.newest.components) < 2:
        return None
    early, late = history.recent[:third], history.recent[-third:]
    rise = _change([o.reward for o in early], [o.reward for o in late])
    changes = {
        name: _change(*([o.components.get(name, math.nan) for o in part] for part in (early, late)))
        for name in history.newest.components
    }
    falls = {name: -change for name, change in changes.items() if change < 0}
    if not rise > 0 or not falls:
        return Measurement(0.0, "")
    name = max(falls, key=lambda key: falls[key])
    return Measurement(
        falls[name],
        f"the reward rose by {rise:.3f} within {len(history.recent)} iterations while rewards/{name}/mean fell by "
        f"{falls[name]:.3f}: one reward is exploited at the expense of another. Read responses (rollouts.jsonl); "
        "change the weights of model.reward, or what it pays for",
    )


def reward_falls(history: History) -> Measurement | None:
    """Fall of the training reward below its best ten iterations of the last thirty, relative to them.

    It must exceed 4 standard errors too: the best of several means is high by chance.
    """
    rewards = [observation.reward for observation in history.recent]
    if len(rewards) < 2 * WINDOW or not all(map(math.isfinite, rewards)):
        return None
    late = rewards[-WINDOW:]
    earlier = (rewards[start : start + WINDOW] for start in range(len(rewards) - 2 * WINDOW + 1))
    best = max(earlier, key=fmean)
    fall = -_change(best, late)
    return Measurement(
        fall / abs(fmean(best)) if fall > 0 and fmean(best) else 0.0,
        f"the reward fell from {fmean(best):.3f} to {fmean(late):.3f} within {len(rewards)} iterations. "
        f"{LOWER_RATE}; if data.train became harder on purpose, leave this tripwire out",
    )


def held_out_falls(history: History) -> Measurement | None:
    """Fall of a held-out success rate below the interval of an earlier validation while the training reward rose."""
    if len(history.validations) < 2:
        return None
    newest = history.validations[-1]
    found = Measurement(0.0, "")
    at_first = history.at_first("reward")
    for earlier in history.validations[:-1]:
        before_training = fmean(at_first) if at_first else math.nan
        reward = before_training if math.isnan(earlier.reward) else earlier.reward
        if not newest.reward - reward > 0.01:
            continue
        for name, (value, _, high) in newest.estimates.items():
            before, low, _ = earlier.estimates.get(name, (math.nan,) * 3)
            if high < low and before - value > found.value:
                found = Measurement(
                    before - value,
                    f"{name} fell from {before:.3f} (after {earlier.iteration} iterations) to {value:.3f}, intervals "
                    f"apart, while the training reward rose from {reward:.3f} to {newest.reward:.3f}: the "
                    "reward is exploited, or the policy overfits. Read responses (rollouts.jsonl); change "
                    "model.reward, more data.train, an earlier checkpoint",
                )
    return found


def _change(early: list[float], late: list[float]) -> float:
    """Difference of two means if it exceeds 4 standard errors, else 0; NaN values give 0."""
    if not all(map(math.isfinite, (*early, *late))):
        return 0.0
    difference = fmean(late) - fmean(early)
    error = math.sqrt(stdev(early) ** 2 / len(early) + stdev(late) ** 2 / len(late))
    return difference if abs(difference) > NUM_ERRORS * error else 0.0

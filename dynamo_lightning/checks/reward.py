"""The reward of responses whose reward is known: a reference answer's, an empty one's, another row's."""

from __future__ import annotations

from dynamo_lightning.checks.case import CheckCase
from dynamo_lightning.checks.result import CheckResult
from dynamo_lightning.environments import SingleTurn
from dynamo_lightning.rewards.reward import describe_reward
from dynamo_lightning.types import Prompt, Score

FORMATS = (
    "We work it out step by step and check the result.\n\nThe answer is \\boxed{{{}}}.",
    "We work it out step by step.\n</think>\n\nThe answer is \\boxed{{{}}}.",
    "<think>\nWe work it out step by step.\n</think>\n<answer>{}</answer>",
    "We work it out step by step.\n#### {}",
    "{}",
)
"""Responses in the formats that rewards of mathematics look for; the answer goes into the braces."""


def check_reward(case: CheckCase) -> CheckResult:
    """Rewards of reference answers in a realistic response, of empty responses, and of other rows' answers."""
    name, threshold = describe_reward(case.model.reward), case.datamodule.success_threshold
    if type(case.model.collector.runner.environment) is not SingleTurn:
        return CheckResult("reward", "ok", "the environment answers responses: made-up ones cannot be scored")
    if case.scores and all(score.failure is not None for score in case.scores):
        return CheckResult("reward", "warning", f"{name} failed for the policy's own responses, see the next line")
    prompts = list(case.prompts)
    count = len(prompts)
    written = [(prompt, text.format(prompt.answer)) for text in FORMATS for prompt in prompts]
    others = [(prompt, other) for prompt in prompts if (other := other_answer(prompt, prompts)) is not None]
    foreign = [(prompt, text.format(answer)) for text in FORMATS for prompt, answer in others]
    asked = [*written, *((prompt, "") for prompt in prompts), *foreign]
    scores = case.score_texts([prompt for prompt, _ in asked], [text for _, text in asked])
    pays = [score.failure is None and score.reward >= threshold for score in scores]
    failed = [score for score in scores if score.failure is not None]
    gold = [any(pays[row : len(written) : count]) for row in range(count)]
    empty = pays[len(written) : len(written) + count]
    paid_others = pays[len(written) + count :]
    wrong = [any(paid_others[row :: len(others)]) for row in range(len(others))]
    sampled = share_paid(case.scores, threshold)
    numbers = {
        "gold": sum(gold) / count,
        "empty": sum(empty) / count,
        "other_row": sum(wrong) / max(1, len(wrong)),
        "sampled": sampled,
        "prompts": count,
        "failed": len(failed),
    }
    message = (
        f"{name}: {sum(gold)} of {count} reference answers, {sum(empty)} of {count} empty responses and {sum(wrong)} "
        f"of {len(wrong)} other rows' answers get at least data.success_threshold={threshold:g}; "
        f"{sampled:.0%} of the policy's own"
    )
    if len(failed) == len(scores):
        return CheckResult("reward", "error", f"{name} failed for every response: {failed[0].message}", numbers)
    if all(empty) or (wrong and all(wrong)):
        return CheckResult("reward", "error", f"{message}: it always pays, see model.reward", numbers)
    if not any(gold) and not sampled:
        return CheckResult(
            "reward",
            "error",
            f"{message}: it never pays; compare model.reward with data.train's answer column, such as "
            f"{prompts[0].answer[:40]!r}",
            numbers,
        )
    if not all(gold) or any(empty) or any(wrong):
        return CheckResult("reward", "warning", f"{message}: see model.reward and the answers of the data set", numbers)
    return CheckResult("reward", "ok", message, numbers)


def other_answer(prompt: Prompt, prompts: list[Prompt]) -> str | None:
    """The answer of another row, if one differs from all of the prompt's own."""
    own = {prompt.answer, *prompt.answers}
    same = (p.answer for p in prompts if p.source == prompt.source)
    return next((answer for answer in same if answer not in own), None)


def share_paid(scores: tuple[Score, ...], threshold: float) -> float:
    """Share of scores that count as success."""
    return sum(score.failure is None and score.reward >= threshold for score in scores) / max(1, len(scores))

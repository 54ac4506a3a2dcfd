"""One prompt as the policy reads it, and the format in which a response has to give its answer."""

from __future__ import annotations

import re

from dynamo_lightning.checks.case import CheckCase
from dynamo_lightning.checks.result import CheckResult
from dynamo_lightning.rewards.math import MathReward
from dynamo_lightning.rewards.maths.finals import after_thinking, find_final_answer
from dynamo_lightning.rewards.reward import leaves

LONGEST_SHOWN = 600
_FORMAT = re.compile(r"boxed|answer|####", re.IGNORECASE)


def check_prompt(case: CheckCase) -> CheckResult:
    """The first prompt with its special tokens, and the token that it ends with."""
    prompt, tokenizer = case.prompts[0], case.model.tokenizer
    shown = str(tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False))
    if len(shown) > LONGEST_SHOWN:
        shown = f"{shown[: LONGEST_SHOWN // 2]} […] {shown[-LONGEST_SHOWN // 2 :]}"
    last = str(tokenizer.convert_ids_to_tokens(prompt.token_ids[-1]))
    numbers = {"prompt": shown, "last_token": last, "num_tokens": len(prompt.token_ids), "dataset": prompt.source}
    if prompt.token_ids[-1] in case.stop_rule.token_ids:
        return CheckResult(
            "prompt",
            "error",
            f"the prompt {shown!r} ends with {last!r}, which ends responses: set data.template to a text that ends "
            "where a response begins",
            numbers,
        )
    return CheckResult(
        "prompt", "ok", f"{len(prompt.token_ids)} tokens of {prompt.source}, the last is {last!r}: {shown!r}", numbers
    )


def check_answer_format(case: CheckCase) -> CheckResult:
    """Share of sampled responses with an answer that `MathReward` can find, and a prompt that asks for one."""
    rewards = [reward for reward in leaves(case.model.reward) if isinstance(reward, MathReward)]
    if not rewards:
        return CheckResult("format", "ok", "the reward is no MathReward: which format it wants is not known")
    reward = rewards[0]
    found = sum(
        find_final_answer(after_thinking(rollout.text, reward.thinking, rollout.prompt.question), reward.require_boxed)
        is not None
        for rollout in case.rollouts
    )
    total, asks = len(case.rollouts), _FORMAT.search(case.prompts[0].text) is not None
    numbers = {"with_answer": found, "responses": total, "prompt_asks": asks}
    message = f"{found} of {total} sampled responses have an answer that MathReward finds"
    if found > total // 4:
        return CheckResult("format", "ok", message, numbers)
    box = r"\boxed{}"
    remedy = (
        "" if asks else f", and the prompt does not ask for one: add to data.template that the answer goes into {box}"
    )
    if found or asks:
        return CheckResult(
            "format", "warning", message + (remedy or ": raise model.sampling.max_response_length"), numbers
        )
    return CheckResult("format", "error", message + remedy, numbers)

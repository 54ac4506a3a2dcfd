"""End of responses: the tokens that end one, and responses that end by themselves."""

from __future__ import annotations

from collections.abc import Iterable

from dynamo_lightning.checks.case import CheckCase
from dynamo_lightning.checks.result import CheckResult, Level

_ANSWER = "some answer"


def check_stopping(case: CheckCase) -> CheckResult:
    """Tokens and strings that end a response, and the share of responses that the length limit ended."""
    rule, sampling, tokenizer = case.stop_rule, case.model.sampling, case.model.tokenizer
    stops = [str(tokenizer.convert_ids_to_tokens(token)) for token in rule.token_ids]
    named = ", ".join(map(repr, [*stops, *rule.strings])) or "nothing"
    truncated = sum(rollout.truncated for rollout in case.rollouts)
    total = len(case.rollouts)
    numbers = {"stops": [*stops, *rule.strings], "truncated": truncated, "responses": total}
    message = (
        f"{named} ends a response; {truncated} of {total} were cut off at "
        f"model.sampling.max_response_length={sampling.max_response_length}"
    )
    end = end_of_turn(case)
    if end is not None and end not in rule.token_ids and not rule.strings:
        token = str(tokenizer.convert_ids_to_tokens(end))
        return CheckResult(
            "stopping",
            "error",
            f"{message}, but the chat template ends turns with {token!r}: add it to model.sampling.stop_strings",
            {**numbers, "end_of_turn": token},
        )
    if truncated == total:
        often = most_frequent_special(case)
        likely = f"; the responses contain {often!r}, which may be their end" if often else ""
        return CheckResult(
            "stopping",
            "error" if often else "warning",
            f"{message}{likely}: give the token that ends responses in model.sampling.stop_token_ids or stop_strings, "
            "or raise model.sampling.max_response_length",
            numbers,
        )
    level: Level = "warning" if truncated > total / 2 else "ok"
    remedy = ": raise model.sampling.max_response_length" if level == "warning" else ""
    return CheckResult("stopping", level, message + remedy, numbers)


def end_of_turn(case: CheckCase) -> int | None:
    """The special token that the chat template writes behind a response; `None` without a template or such a token."""
    tokenizer = case.model.tokenizer
    sources = [source for group in case.datamodule.sources.values() for source in group]
    if tokenizer.chat_template is None or any(s.template or case.datamodule.template for s in sources):
        return None
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template's own error: prompts were rendered, so it only refuses this conversation
        return None
    ids = tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"]
    return first_special(ids, tokenizer.all_special_ids)


def first_special(token_ids: Iterable[int], special_ids: Iterable[int]) -> int | None:
    """The first special token among some tokens."""
    special = set(special_ids)
    return next((token for token in token_ids if token in special), None)


def most_frequent_special(case: CheckCase) -> str | None:
    """A special token that is in most responses although it does not end them."""
    tokenizer = case.model.tokenizer
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    counts = {
        token: sum(token in rollout.response_ids for rollout in case.rollouts)
        for token in special - set(case.stop_rule.token_ids)
    }
    token = max(counts, key=lambda key: counts[key], default=None)
    if token is None or counts[token] <= len(case.rollouts) / 2:
        return None
    return str(tokenizer.convert_ids_to_tokens(token))

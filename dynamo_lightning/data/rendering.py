"""From problems to what the policy reads: templates, and special tokens that come once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dynamo_lightning.data.problems import Messages, Problem, question_of
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "x"


def tokenize(
    problems: list[Problem], source: PromptSource, tokenizer: PreTrainedTokenizerBase, option: str
) -> Iterator[tuple[Problem, str, list[int]]]:
    """Yield each problem with its text and token ids; a thousand at a time, for fast tokenizers run in parallel.

    A text template gets the tokenizer's special tokens at its beginning, unless it spells them itself, and never those
    at its end: some tokenizers append the end of sequence, after which a policy has nothing to say.

    Raises:
        UserError: If a template refuses a problem, or a chat template leaves no room for a response.
    """
    if source.template is None and problems:
        check_generation_prompt(problems[0], source, tokenizer, option)
    special_tokens = SpecialTokens(tokenizer, added=source.template is not None)
    for start in range(0, len(problems), 1000):
        chunk = problems[start : start + 1000]
        texts = [render(problem, source, tokenizer, option) for problem in chunk]
        encoded = tokenizer(texts, add_special_tokens=source.template is not None, return_attention_mask=False)
        token_ids = [special_tokens.once(ids) for ids in encoded["input_ids"]]
        yield from zip(chunk, texts, token_ids, strict=True)


class SpecialTokens:
    """Special tokens that a tokenizer puts around a text, to have each of them once.

    Args:
        tokenizer: The policy's.
        added: Whether it was asked to add special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, added: bool) -> None:
        plain = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
        whole = list(tokenizer(_PROBE, add_special_tokens=added)["input_ids"])
        starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
        start = starts[0] if starts else 0
        num_appended = len(whole) - start - len(plain) if starts else 0
        # Tokenizers that are told to append the end of sequence may do so even when asked for no special tokens.
        while len(whole) - num_appended > 1 and whole[len(whole) - num_appended - 1] == tokenizer.eos_token_id:
            num_appended += 1
        self._prefix, self._num_appended = whole[:start], num_appended
        self._bos = tokenizer.bos_token_id

    def once(self, token_ids: list[int]) -> list[int]:
        """The tokens without those that were appended, and without a beginning that the text has already."""
        ids = token_ids[: len(token_ids) - self._num_appended]
        prefix = len(self._prefix)
        if prefix and ids[:prefix] == self._prefix and ids[prefix : 2 * prefix] == self._prefix:
            ids = ids[prefix:]
        while self._bos is not None and ids[:2] == [self._bos, self._bos]:
            ids = ids[1:]
        return ids


def render(problem: Problem, source: PromptSource, tokenizer: PreTrainedTokenizerBase, option: str) -> str:
    """Return what the policy reads."""
    prompt = problem.prompt
    if source.template is not None:
        if not isinstance(prompt, str) and [message["role"] for message in prompt] != ["user"]:
            raise UserError(
                f"{option}.template={source.template!r} has a place for one message, but {problem.place} has "
                f"{len(prompt)}: use null, the tokenizer's chat template"
            )
        # One pass, for the problem may contain the words `{system_prompt}`; no str.format, for LaTeX is full of braces.
        values = {"{prompt}": question_of(prompt), "{system_prompt}": source.system_prompt or ""}
        return re.sub(r"\{prompt\}|\{system_prompt\}", lambda match: values[match[0]], source.template)
    return _apply_chat_template(messages_of(prompt, source), source, tokenizer, f"{option}.template", problem)


def messages_of(prompt: str | Messages, source: PromptSource) -> Messages:
    """The chat messages of a problem, with the source's system prompt in front."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if source.system_prompt is not None:
        others = [message for message in messages if message["role"] != "system"]
        messages = [{"role": "system", "content": source.system_prompt}, *others]
    return messages


def _apply_chat_template(
    messages: Messages, source: PromptSource, tokenizer: PreTrainedTokenizerBase, option: str, problem: Problem
) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **source.chat_template_kwargs
        )
    except TemplateError as error:
        raise UserError(f"{option}: the tokenizer's chat template refuses {problem.place}: {error}") from error
    assert isinstance(text, str)
    return text


def check_generation_prompt(
    problem: Problem, source: PromptSource, tokenizer: PreTrainedTokenizerBase, option: str
) -> None:
    """Find out if the chat template begins the response, as it does for a conversation that has one.

    Some templates ignore `add_generation_prompt`. That is right where nothing stands before a response (`[/INST]`), and
    wrong where they write a header before it: the policy would have to write the header itself.

    Raises:
        UserError: If the header is missing, or the prompt ends with the end of sequence.
    """
    messages = messages_of(problem.prompt, source)
    text = _apply_chat_template(messages, source, tokenizer, f"{option}.template", problem)
    remedy = f"give {option}.template a text with {{prompt}} in it that ends where a response begins"
    eos = tokenizer.eos_token
    if isinstance(eos, str) and text.rstrip().endswith(eos):
        raise UserError(
            f"{option}.template: the tokenizer's chat template ends prompts with the end of sequence {eos!r}, though "
            f"add_generation_prompt is true: {remedy}"
        )
    answered = _try_chat_template([*messages, {"role": "assistant", "content": _ANSWER}], source, tokenizer)
    without = _try_chat_template(messages, source, tokenizer)
    if without != text or answered is None or _ANSWER not in answered or not answered.startswith(text.rstrip()):
        return
    header = answered[len(text.rstrip()) : answered.index(_ANSWER)].strip()
    if header:
        raise UserError(
            f"{option}.template: the tokenizer's chat template ignores add_generation_prompt, so prompts lack "
            f"{header!r}, which it writes before a response: {remedy}"
        )


_ANSWER = "some answer"


def _try_chat_template(messages: Messages, source: PromptSource, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A conversation as the template writes it without a generation prompt; None if it refuses."""
    from jinja2 import TemplateError

    try:
        text: Any = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=False, **source.chat_template_kwargs
        )
    except (TemplateError, ValueError, TypeError, KeyError):  # whatever a template does with such a conversation
        return None
    return str(text)

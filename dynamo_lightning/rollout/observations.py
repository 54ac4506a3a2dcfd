"""Observations as tokens: only what is new is tokenised, never what the policy sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dynamo_lightning.environments.environment import Message
from dynamo_lightning.errors import UserError
from dynamo_lightning.types import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER = "some question", "some answer"


def observation_tokens(
    tokenizer: PreTrainedTokenizerBase,
    observation: str | Sequence[Message],
    last_token: int,
    name: str,
) -> IntArray:
    """Tokens between one response and the next.

    Messages become what the chat template writes between an assistant's message and the next one: with what ends the
    assistant's message (unless the policy has said so itself) and what begins the next response. A text is tokenised as
    it is.

    Args:
        tokenizer: The policy's.
        observation: Text or messages.
        last_token: The last one that the policy sampled.
        name: Of the environment, for messages.

    Returns:
        `[num_tokens]`.

    Raises:
        UserError: If the chat template does not render a conversation like this.
    """
    is_text = isinstance(observation, str)
    text = observation if isinstance(observation, str) else between_responses(tokenizer, observation, name)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not is_text and ids[:1] == [last_token]:
        ids = ids[1:]
    return np.array(ids, dtype=np.int32)


def between_responses(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], name: str) -> str:
    """Text that the chat template writes behind an assistant's message when these messages follow.

    Raises:
        UserError: Naming `name`, if the template refuses them or rewrites the message before.
    """
    from jinja2 import TemplateError

    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            f"{name} returned messages, but the tokenizer has no chat template: return the text that the policy is to "
            "read instead"
        )
    before = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        whole = tokenizer.apply_chat_template(
            [*before, *map(dict, messages)], tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{name} returned messages that the tokenizer's chat template refuses: {error}") from error
    assert isinstance(whole, str)
    _, found, rest = whole.partition(_ANSWER)
    if not found:
        raise UserError(
            f"{name} returned messages, but the tokenizer's chat template leaves out earlier responses: return the "
            "text that the policy is to read instead"
        )
    return rest

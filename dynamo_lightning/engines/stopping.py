"""End of a response: a stop token, or the token that completes a stop string; otherwise it is truncated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_lightning.errors import UserError
from dynamo_lightning.policy.loading import eos_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class StopConfig:
    """Ends of a response besides the end-of-sequence tokens of tokenizer and generation config."""

    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check the values."""
        if not all(isinstance(string, str) and string for string in self.strings):
            raise UserError(f"model.sampling.stop_strings must not have an empty string, got {list(self.strings)}")
        if min(self.token_ids, default=0) < 0:
            raise UserError(f"model.sampling.stop_token_ids must not be negative, got {list(self.token_ids)}")


@dataclass(frozen=True)
class StopRule:
    """Tokens and strings that end a response, for one tokenizer."""

    token_ids: tuple[int, ...]
    """Sorted."""
    strings: tuple[str, ...]

    def response_length(self, tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
        """Tokens up to and with the first that ends the response; `None` if none does.

        A stop string counts as soon as the decoded tokens contain it, special tokens included: the token that completes
        it may hold more text than that.
        """
        by_token = next((index + 1 for index, token in enumerate(tokens) if token in self.token_ids), None)
        longest = len(tokens) if by_token is None else by_token
        if not self.strings or not self._stops(tokens[:longest], tokenizer):
            return by_token
        low, high = 1, longest
        while low < high:  # a longer beginning contains what a shorter one does
            middle = (low + high) // 2
            low, high = (low, middle) if self._stops(tokens[:middle], tokenizer) else (middle + 1, high)
        return low

    def _stops(self, tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
        text = str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return any(string in text for string in self.strings)


def stop_rule(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: StopConfig) -> StopRule:
    """The rule of a policy: its end-of-sequence tokens and what the configuration adds.

    A string that is a token of its own, such as `<|im_end|>`, counts as that token, which engines look for themselves.

    Raises:
        UserError: If a token id is not in the vocabulary.
    """
    vocab_size = int(policy.config.get_text_config().vocab_size)
    if max(config.token_ids, default=0) >= vocab_size:
        raise UserError(
            f"model.sampling.stop_token_ids={list(config.token_ids)}: the model has {vocab_size} tokens, from 0 on"
        )
    added = tokenizer.get_added_vocab() if config.strings else {}
    own_tokens = [added[string] for string in config.strings if string in added]
    ids = {*eos_token_ids(policy, tokenizer), *config.token_ids, *own_tokens}
    return StopRule(tuple(sorted(ids)), tuple(string for string in config.strings if string not in added))

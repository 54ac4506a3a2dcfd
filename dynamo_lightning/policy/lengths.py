"""The longest sequence that a model can be given: its table of positions, or what its rotary positions allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynamo_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LENGTH_DEPENDENT_ROPE = ("longrope", "dynamic", "su")
"""Kinds of RoPE whose frequencies change for the whole batch as soon as one of its sequences exceeds a length."""


@dataclass(frozen=True)
class LengthLimit:
    """Tokens that a prompt and its response may have together."""

    num_tokens: int
    reason: str
    """Where the number comes from, for a message."""


def length_limit(config: PretrainedConfig) -> LengthLimit | None:
    """The limit of a model by its configuration; `None` if it has none (recurrent layers, ALiBi).

    `max_position_embeddings` counts as it is, for tables of learned positions as for RoPE. Scaled RoPE reaches
    `factor` times the original limit where the configuration does not say so itself. RoPE whose frequencies depend on
    the longest sequence of a call is used up to its original limit only: beyond it a sequence's log-probabilities
    depend on its neighbours, and differ between sampling token by token and a pass over the whole sequence.
    """
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return None
    limits = [rope_limit(settings, longest, text) for settings in rope_settings(text)]
    depending = [limit for limit in limits if limit.reason]
    if depending:
        return min(depending, key=lambda limit: limit.num_tokens)
    scaled = max([limit.num_tokens for limit in limits], default=longest)
    return LengthLimit(scaled, f"max_position_embeddings={longest}" + (f", scaled to {scaled}" * (scaled > longest)))


def rope_settings(text: Any) -> list[dict[str, Any]]:
    """Settings of each kind of RoPE in a model; one, or one for each type of layer."""
    settings = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    parts = [part for part in settings.values() if isinstance(part, dict)]
    return parts or ([settings] if settings else [])


def rope_limit(settings: dict[str, Any], longest: int, text: Any) -> LengthLimit:
    """The limit of one kind of RoPE; with a reason if its frequencies depend on the longest sequence."""
    kind = settings.get("rope_type", settings.get("type", "default"))
    original = settings.get("original_max_position_embeddings") or getattr(
        text, "original_max_position_embeddings", None
    )
    if kind in LENGTH_DEPENDENT_ROPE:
        limit = int(original or longest)
        return LengthLimit(limit, f"{kind} RoPE changes with the longest sequence beyond {limit} tokens")
    if kind in ("linear", "yarn"):
        return LengthLimit(max(longest, int(float(settings.get("factor") or 1.0) * (original or longest))), "")
    return LengthLimit(longest, "")


def check_lengths(config: PretrainedConfig, longest_prompt: int, max_response_length: int) -> None:
    """Check that the longest prompt and a response of the longest length fit into the model.

    Raises:
        UserError: With the numbers and the options.
    """
    limit = length_limit(config)
    if limit is None or longest_prompt + max_response_length <= limit.num_tokens:
        return
    room = limit.num_tokens - longest_prompt
    raise UserError(
        f"the longest prompt has {longest_prompt} tokens, which with model.sampling.max_response_length="
        f"{max_response_length} makes {longest_prompt + max_response_length}, but the model takes {limit.num_tokens} "
        f"({limit.reason}): set model.sampling.max_response_length"
        + (f" to at most {room}" if room > 0 else "")
        + ", lower data.max_prompt_length, or choose a model for longer sequences"
    )

"""A data set and how prompts are made of it: the options under `data.train`, `data.val` and the like."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dynamo_lightning.data.rows import LOCAL_SUFFIXES
from dynamo_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOXED = "boxed"
"""The `answer_pattern` that stands for the last complete `\\boxed{…}`: no regular expression matches its braces."""


@dataclass
class PromptSource:
    """A data set and how to make prompts of it."""

    path: str
    """Hub id; local file (`.jsonl`, `.json`, `.csv`, `.tsv`, all also `.gz`; `.parquet`), folder, or pattern such as
    `data/*.jsonl`; or `embedded:` and a file inside the package."""
    name: str | None = None
    """Name in metrics and part of every prompt's id; null takes the file's stem, the last part of the hub id, or the
    folder's name."""
    subset: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a folder or hub data set; of these and of files also a slice of the rows, such as `train[:1000]`,
    `train[:-100]`, `train[-10%:]`."""
    weight: float = 1.0
    """How often each prompt comes in an epoch, on average, if `data.train` is a list. 2 is twice, 0.5 half of the
    prompts, drawn anew for each epoch."""
    held_out: float = 0.0
    """Share of the problems to hold out, from 0 to below 1. A hash of the problem decides: the same problems in every
    run, file and order of rows, so two data sets with the same share and different `part` have no problem in common."""
    part: Literal["train", "held_out"] = "train"
    """Which of the two parts that `held_out` makes this data set is."""
    prompt_column: str = "prompt"
    """Column with the problem: a string, or a list of chat messages; dots lead into nested columns."""
    answer_column: str = "answer"
    """Column with the reference answer; dots lead into nested columns, as in `reward_model.ground_truth`. A list holds
    several answers, each of them right."""
    prompt_pattern: str | None = None
    """Regular expression whose first group is the problem within its column, for data sets that wrap it in
    instructions; null takes all of it."""
    answer_pattern: str | None = None
    """Regular expression whose first group, where it matches last, is the answer within its column, as `#### (.+)` in
    GSM8K; `boxed` is the last `\\boxed{…}`, as in MATH's solutions; null takes all of it."""
    conflicting_answers: Literal["refuse", "drop"] = "refuse"
    """Treatment of a prompt that several rows answer differently: refuse the data set, or leave the prompt out and
    count it."""
    template: str | None = None
    """Text around the problem, with `{prompt}` in its place and, if wanted, `{system_prompt}`; other braces stand for
    themselves. Or the name of one: `plain`, `qwen2.5-math`, `qwen3`, `qwen3-no-thinking`, `llama3`. Null takes
    `data.template`, and if that is null, too, the tokenizer's chat template. Only with a text does the tokenizer add
    special tokens, such as the beginning of sequence: a chat template has its own."""
    system_prompt: str | None = None
    """System message put before the problem; it replaces one that the row has."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, such as `enable_thinking: false`."""
    max_prompts: int | None = None
    """Take only the first so many different prompts (before prompts that are too long are left out)."""

    @property
    def label(self) -> str:
        """`name`, or what stands for it."""
        if self.name:
            return self.name
        file = Path(self.path)
        if any(mark in file.name for mark in "*?["):  # a pattern: the last folder that has none
            plain = [part for part in file.parts[:-1] if not any(mark in part for mark in "*?[") and part not in "./~"]
            return plain[-1] if plain else "data"
        name = file.name.removesuffix(".gz")
        return Path(name).stem if Path(name).suffix in LOCAL_SUFFIXES else name


def check_settings(source: PromptSource, tokenizer: PreTrainedTokenizerBase, option: str) -> None:
    """Raise a ValueError if settings contradict each other or the tokenizer."""
    if source.max_prompts is not None and source.max_prompts < 1:
        raise UserError(f"{option}.max_prompts={source.max_prompts} must be at least 1, or null for all")
    if not (source.weight > 0 and math.isfinite(source.weight)):
        raise UserError(f"{option}.weight={source.weight} must be above 0; leave the data set out instead of 0")
    if not 0 <= source.held_out < 1:
        raise UserError(f"{option}.held_out={source.held_out} must be from 0 to below 1")
    if source.part == "held_out" and not source.held_out:
        raise UserError(f"{option}.part: held_out needs {option}.held_out, the share to hold out, such as 0.1")
    for name, pattern in (("prompt_pattern", source.prompt_pattern), ("answer_pattern", source.answer_pattern)):
        if pattern is not None and (name, pattern) != ("answer_pattern", BOXED):
            _check_pattern(pattern, f"{option}.{name}={pattern!r}")
    if source.template is None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"{option}.template is null, which takes the tokenizer's chat template, but {tokenizer.name_or_path!r} "
                "has none: give a text with {prompt} in it"
            )
        fixed = {"conversation", "tokenize", "add_generation_prompt"} & source.chat_template_kwargs.keys()
        if fixed:
            raise UserError(f"{option}.chat_template_kwargs may not set {', '.join(sorted(fixed))}")
        return
    if (source.system_prompt is None) == ("{system_prompt}" in source.template):
        raise UserError(
            f"{option}.template={source.template!r} and {option}.system_prompt={source.system_prompt!r}: "
            "give a system prompt and its place {system_prompt}, or neither"
        )
    if source.chat_template_kwargs:
        raise UserError(f"{option}.chat_template_kwargs={source.chat_template_kwargs} needs {option}.template: null")


def _check_pattern(pattern: str, option: str) -> None:
    """Raise a ValueError if a pattern is no regular expression with a group."""
    try:
        num_groups = re.compile(pattern).groups
    except re.error as error:
        raise UserError(f"{option} is no regular expression: {error}") from None
    if not num_groups:
        raise UserError(f"{option} has no group: put what to take in parentheses")

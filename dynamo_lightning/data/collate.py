"""Prompts with their responses side by side in a batch, for supervised fine-tuning and exact success rates."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100
"""Label of tokens that are not trained on: prompts and padding."""


def collate(rows: list[tuple[list[int], list[int]]], pad_token_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` of the sequences, padded on the right, `[num_rows, longest]` each."""
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        input_ids[row, :length] = torch.tensor(prompt + response)
        attention_mask[row, :length] = 1
        labels[row, len(prompt) : length] = torch.tensor(response)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

"""GSPO: the importance ratio of the whole response, not of its tokens (arXiv 2507.18071)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from dynamo_lightning.losses.surrogate import ClippedSurrogate


class GSPO(ClippedSurrogate):
    """Clips with the length-normalised ratio of the sequence, `s_i = exp(mean_t log r_it)` (arXiv 2507.18071).

    `min(s_i A, clip(s_i, 1 − ε_low, 1 + ε_high) A)`. In the paper's token-level form, `s_it = sg[s_i] ·
    r_it / sg[r_it]`, each token has its own gradient, the same as the sequence's when all its advantages are equal, and
    advantages may differ between tokens. Meant for `aggregation: sequence_mean` (or `prompt_mean`) with
    `length_normalisation: response_length`. The ratio of a mean hardly leaves 1, hence the narrow bounds.

    Args:
        sequence_clip_low: ε_low.
        sequence_clip_high: ε_high.
    """

    # Named apart from `clip_low` and `clip_high`: where only the class changes, the command line carries options of
    # the same name over from the class before, and bounds a thousand times too wide would go unnoticed.
    def __init__(self, sequence_clip_low: float = 3e-4, sequence_clip_high: float = 4e-4) -> None:
        super().__init__(sequence_clip_low, sequence_clip_high, dual_clip=None)
        self.sequence_clip_low = sequence_clip_low
        self.sequence_clip_high = sequence_clip_high

    @override
    def importance_ratio(self, log_ratio: Tensor, sequence_indices: Tensor | None) -> Tensor:
        assert sequence_indices is not None
        values = log_ratio.detach()
        num_sequences = int(sequence_indices.max()) + 1 if len(sequence_indices) else 0
        totals = values.new_zeros(num_sequences).index_add_(0, sequence_indices, values)
        lengths = values.new_zeros(num_sequences).index_add_(0, sequence_indices, torch.ones_like(values))
        mean = (totals / lengths.clamp(min=1.0))[sequence_indices]
        return (mean + (log_ratio - values)).exp()

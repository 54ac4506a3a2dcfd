"""Plans in a checkpoint: batches whose rollouts are begun, but not trained on yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamo_lightning.types import GroupPlan, Prompt, PromptBatch

COLUMNS = ("size", "share", "first_sample_index", "success_rate", "bernoulli_variance", "unseen")


def batch_state(batch: PromptBatch) -> dict[str, Any]:
    """The batch as primitives; prompts by their ids."""
    columns = {name: [getattr(plan, name) for plan in batch.plans] for name in COLUMNS}
    return {"iteration": batch.iteration, "prompt_ids": [prompt.prompt_id for prompt in batch.prompts], **columns}


def batch_of_state(state: Mapping[str, Any], prompts: Mapping[int, Prompt]) -> PromptBatch | None:
    """The batch again.

    Args:
        state: What `batch_state` gave.
        prompts: By prompt id.

    Returns:
        `None` if one of its prompts is not there any more.
    """
    if not set(state["prompt_ids"]) <= set(prompts):
        return None
    rows = zip(state["prompt_ids"], *(state[name] for name in COLUMNS), strict=True)
    plans = [GroupPlan(prompts[row[0]], **dict(zip(COLUMNS, row[1:], strict=True))) for row in rows]
    return PromptBatch(state["iteration"], plans)

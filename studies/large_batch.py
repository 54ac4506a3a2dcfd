"""Does it matter with larger batches too? 128 rollouts per RL iteration, eight times those of the others.

As `studies/several_epochs.py`, with 16 prompts × 8 rollouts of nearly all arithmetic prompts, two epochs at most.
3e-4 was the better one of 1e-4 and 3e-4 on the pilot seeds; 6e-4 was not run, nor 1e-4 for `defaults`.
"""

from studies.design import Arm, Study
from studies.several_epochs import STUDY as SMALL_BATCH
from studies.tasks import several_epochs

_SAME = {arm.name: arm.options for arm in SMALL_BATCH.arms}
_SHARED = several_epochs(
    "arithmetic", max_prompts=1088, max_epochs=2, prompts_per_batch=16, rollouts_per_prompt=8, target=0.5
)
_SHARED["trainer"]["val_check_interval"] = 5

STUDY = Study(
    name="large_batch",
    frozen_on="2026-11-25",
    shared=_SHARED,
    arms=tuple(
        Arm(name, _SAME[name], learning_rate=3e-4)
        for name in ("grpo", "rloo", "dynamo", "history", "history_rule", "defaults")
    ),
    reference="grpo",
    learning_rates=(3e-4, 1e-4, 6e-4),
    pilot_seeds=(0, 1),
    seeds=tuple(range(2, 5)),
    metric="val/arithmetic/pass@1",
    target=0.5,
    limit=136,
)

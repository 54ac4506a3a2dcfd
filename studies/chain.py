"""Does the same hold on longer responses, with a frontier that moves? 128 chains for up to 8 epochs, 16 rollouts.

As `studies/several_epochs.py`, on the chain task: responses of 20 to 50 tokens, success that falls with length. Of the
pilots, 1e-4 and 8e-4 were run on one seed and by one or two arms only, and 4e-4 on one seed by the first three.
"""

from studies.design import Arm, Study
from studies.several_epochs import STUDY as ARITHMETIC
from studies.tasks import several_epochs

_SAME = {arm.name: arm.options for arm in ARITHMETIC.arms}

# Fewest generated tokens on the pilot seeds, fixed on 2026-11-25 at 17:11, before the first main run; and main seeds.
_ARMS = (
    ("grpo", 2e-4, 10),
    ("rloo", 2e-4, 10),
    ("dynamo", 2e-4, 5),
    ("history", 4e-4, 10),
    ("history_rule", 4e-4, 5),
    ("defaults", 4e-4, 10),
)

STUDY = Study(
    name="chain",
    frozen_on="2026-11-25",
    shared=several_epochs(
        "chain", max_prompts=128, max_epochs=8, prompts_per_batch=4, rollouts_per_prompt=4, target=0.6
    ),
    arms=tuple(Arm(name, _SAME[name], learning_rate=rate, num_seeds=seeds) for name, rate, seeds in _ARMS),
    reference="grpo",
    learning_rates=(2e-4, 4e-4, 8e-4, 1e-4),
    pilot_seeds=(0, 1),
    seeds=tuple(range(2, 12)),
    metric="val/chain/pass@1",
    target=0.6,
    limit=256,
)

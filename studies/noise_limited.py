"""Does less gradient variance save tokens where noise limits learning? 16 rollouts per RL iteration, embedded policy.

One epoch over 1,100 prompts is 275 iterations, and a run ends there. Every prompt is then visited once: statistics of
prompts cannot tell them apart, so that arms which only allocate (`filter`, `history_rule`) have the groups of the arm
without allocation, unless there is a pilot. They are in the design to show that, and come last.

With 4 rollouts per prompt a pilot cannot move anything either: pilot and commit need 2 rollouts each. So the pilot has
2 prompts × 8 rollouts, and equal groups of that shape as its control.
"""

from studies.design import Arm, Study
from studies.tasks import several_epochs

_TWO_BY_EIGHT = ("--data.prompts_per_batch=2", "--data.rollouts_per_prompt=8", "--data.max_rollouts=14")
_HISTORY = (
    "--model.loss.advantage=OptimalBaseline",
    "--model.loss.advantage.half_life=34",  # iterations: 0.98 per iteration, as in the pilot study
    "--model.loss.advantage.population_rollouts=4",
)

_SHARED = several_epochs(
    "arithmetic", max_prompts=1100, max_epochs=1, prompts_per_batch=4, rollouts_per_prompt=4, target=0.5
)
_SHARED["data"]["estimator"]["init_args"]["half_life"] = 200

STUDY = Study(
    name="noise_limited",
    frozen_on="2026-11-25",
    shared=_SHARED,
    arms=(
        Arm("equal", ("--model.loss.advantage=RLOO",), "equal groups, leave-one-out"),
        Arm("weighted", ("--model.loss.advantage=OptimalBaseline",), "equal groups, weighted leave-one-out"),
        Arm("history", _HISTORY, "equal groups; rewards of earlier iterations as the baseline's prior"),
        Arm("equal_2x8", (*_TWO_BY_EIGHT, "--model.loss.advantage=RLOO"), "2 prompts × 8 rollouts: control of pilot"),
        Arm(
            "pilot_2x8",
            (
                *_TWO_BY_EIGHT,
                "--model.loss.advantage=RLOO",
                "--data.estimator=LogitFilter",
                "--data.rule=RLOORule",
                "--data.pilot=4",
                "--data.min_rollouts=6",
                "--data.pilot_baseline=cross",
            ),
            "2 prompts × 8 rollouts on average, a pilot of 4, cross baselines",
        ),
        Arm(
            "filter",
            ("--model.loss.advantage=RLOO", "--data.estimator=LogitFilter", "--data.rule=RLOORule"),
            "allocation by LogitFilter: equal groups in the first epoch",
        ),
        Arm(
            "history_rule",
            (
                *_HISTORY,
                "--data.estimator=LogitFilter",
                "--data.rule=OptimalBaselineRule",
                "--data.rule.baseline=history",
                "--data.min_rollouts=1",
            ),
            "as history, with its allocation rule: equal groups in the first epoch",
        ),
    ),
    reference="equal",
    learning_rates=(1e-4, 2e-4, 5e-5, 4e-4),
    seeds=tuple(range(10)),
    metric="val/arithmetic/pass@1",
    target=0.5,
    limit=275,
)

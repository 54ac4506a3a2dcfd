"""Which part of DynaMO saves tokens? 128 arithmetic prompts for up to 8 epochs, 16 rollouts per RL iteration.

A prompt comes back after 32 iterations, so that statistics of prompts tell them apart from the second epoch on. Every
arm has three learning rates on two pilot seeds; its main runs, on other seeds, have the rate that needed the fewest
generated tokens there. 5e-5, where no arm reached the target, was run on one pilot seed by the first five arms only;
`defaults` was added after the pilots and has the rate of `history_modulation`.
"""

import dataclasses

from studies.design import Arm, Study
from studies.tasks import GRPO, HISTORY, MODULATION, RLOO, several_epochs

_FILTER = ("--data.estimator=LogitFilter",)

_RATES = {  # fewest generated tokens on the pilot seeds; fixed on 2026-11-25 at 17:06, before the first main run
    "grpo": 1e-4,
    "rloo": 2e-4,
    "dynamo": 1e-4,
    "history": 2e-4,
    "defaults": 2e-4,
    "beta": 2e-4,
    "filter": 2e-4,
    "random_matched": 1e-4,
    "weighted": 1e-4,
    "modulation": 1e-4,
    "history_modulation": 2e-4,
    "history_rule": 2e-4,
    "paper_code": 1e-4,
    "dapo": 2e-4,
    "knapsack": 2e-4,
    "reinforce_ada": 1e-4,
}

STUDY = Study(
    name="several_epochs",
    frozen_on="2026-11-25",
    shared=several_epochs(
        "arithmetic", max_prompts=128, max_epochs=8, prompts_per_batch=4, rollouts_per_prompt=4, target=0.5
    ),
    arms=tuple(
        dataclasses.replace(arm, learning_rate=_RATES[arm.name])
        for arm in (
            Arm("grpo", GRPO, "equal groups, advantages divided by the group's standard deviation"),
            Arm("rloo", RLOO, "equal groups, leave-one-out"),
            Arm("dynamo", (*RLOO, *MODULATION, "--data.rule=RLOORule"), "leave-one-out, allocation and modulation"),
            Arm("history", HISTORY, "equal groups, baseline with earlier rewards"),
            Arm(
                "history_rule",
                (
                    *HISTORY,
                    *_FILTER,
                    "--data.rule=OptimalBaselineRule",
                    "--data.rule.baseline=history",
                    "--data.min_rollouts=1",
                ),
                "overlays/optimal_baseline.yaml with LogitFilter, without modulation",
            ),
            Arm("defaults", (*HISTORY, *MODULATION, "--data.rule=RLOORule"), "history, allocation and modulation"),
            Arm("beta", (*RLOO, "--data.rule=RLOORule"), "allocation by BetaPosterior, leave-one-out", num_seeds=3),
            Arm("filter", (*RLOO, *_FILTER, "--data.rule=RLOORule"), "allocation by LogitFilter", num_seeds=3),
            Arm(
                "random_matched",
                (
                    *RLOO,
                    "--data.estimator=studies.controls.PermutedBetaPosterior",
                    "--data.estimator.half_life=100",
                    "--data.rule=RLOORule",
                ),
                "as beta, with its weights permuted over the batch's prompts",
                num_seeds=3,
            ),
            Arm("weighted", ("--model.loss.advantage=OptimalBaseline",), "weighted leave-one-out", num_seeds=3),
            Arm("modulation", (*RLOO, *MODULATION), "equal groups, modulation", num_seeds=3),
            Arm("history_modulation", (*HISTORY, *MODULATION), "history with modulation", num_seeds=3),
            Arm("paper_code", ("--config=overlays/paper_code.yaml",), "as the authors' code trains", num_seeds=3),
            Arm("dapo", (*GRPO, "--model.dynamic_sampling.max_rounds=10"), "dynamic sampling", num_seeds=3),
            Arm("knapsack", (*GRPO, "--data.rule=SignalRule"), "Knapsack-RL's value of a group", num_seeds=3),
            Arm("reinforce_ada", (*GRPO, "--data.rule=ReinforceAdaRule"), "sizes of sequential stopping", num_seeds=3),
        )
    ),
    reference="grpo",
    learning_rates=(1e-4, 2e-4, 5e-5),
    pilot_seeds=(0, 1),
    seeds=tuple(range(2, 12)),
    metric="val/arithmetic/pass@1",
    target=0.5,
    limit=256,
)

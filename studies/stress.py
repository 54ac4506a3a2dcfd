"""What keeps a run stable? Eight updates per batch of rollouts at three times the quickstart's learning rate.

40 RL iterations of 16 prompts × 8 rollouts on the arithmetic task; all arms have equal budgets, seeds and order of
prompts. Controls tell modulation from a smaller step: `scalar` multiplies all advantages by the mean factor, `shuffled`
puts the factors on other tokens, `rate_cut` is leave-one-out at 0.9 of the rate. In the end 128 held-out prompts are
answered 32 times.
"""

from studies.design import Arm, Study
from studies.tasks import GRPO, HISTORY, MODULATION, RLOO, several_epochs

_RATE = 3e-4

_SHARED = several_epochs(
    "arithmetic", max_prompts=640, max_epochs=1, prompts_per_batch=16, rollouts_per_prompt=8, target=None
)
_SHARED["trainer"]["val_check_interval"] = 40
_SHARED["model"]["updates"]["num_mini_batches"] = 8
_SHARED["model"]["pass_at_k"] = [1, 32]
_SHARED["data"]["val"][0]["max_prompts"] = 128
_SHARED["data"]["eval_rollouts_per_prompt"] = 32

STUDY = Study(
    name="stress",
    frozen_on="2026-11-25",
    shared=_SHARED,
    arms=(
        Arm("grpo", GRPO, "equal groups, advantages divided by the standard deviation", _RATE),
        Arm("rloo", RLOO, "equal groups, leave-one-out", _RATE),
        Arm("modulation", (*RLOO, *MODULATION), "leave-one-out with DynaMO's modulation", _RATE),
        Arm(
            "compensation",
            (*RLOO, *MODULATION, "--model.loss.modulation.stabilisation_alpha=0"),
            "one half of it: gradient compensation",
            _RATE,
        ),
        Arm(
            "stabilisation",
            (*RLOO, *MODULATION, "--model.loss.modulation.compensation_alpha=0"),
            "the other half: damping of large entropy changes",
            _RATE,
        ),
        Arm("scalar", (*RLOO, "--model.loss.modulation=studies.controls.ScalarModulation"), "control", _RATE),
        Arm("shuffled", (*RLOO, "--model.loss.modulation=studies.controls.ShuffledModulation"), "control", _RATE),
        Arm("rate_cut", RLOO, "control: leave-one-out at 0.9 of the rate", 0.9 * _RATE),
        Arm(
            "entropy_budget",
            (
                *RLOO,
                "--model.loss.modulation=EntropyBudget",
                "--model.loss.modulation.budget=0.001",
                "--model.loss.modulation.probe_every=4",
                "--model.loss.modulation.probe_rollouts=64",
            ),
            "as overlays/entropy_budget.yaml",
            _RATE,
        ),
        Arm("history", HISTORY, "baseline with earlier rewards", _RATE),
        Arm("history_modulation", (*HISTORY, *MODULATION), "the same with DynaMO's modulation", _RATE),
    ),
    reference="grpo",
    learning_rates=(_RATE, 0.9 * _RATE),
    seeds=tuple(range(5)),
    metric="val/arithmetic/pass@1",
    target=None,
    limit=40,
    final_metrics=(
        "val/arithmetic/pass@1",
        "val/arithmetic/pass@32",
        "stability/entropy_spikes",
        "stability/entropy_change_max",
        "stability/log_grad_norm_sd",
        "stability/grad_norm_p99_over_p50",
    ),
)

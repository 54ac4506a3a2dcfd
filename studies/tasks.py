"""Options that runs of several studies share: methods, and the tasks that come with the library."""

from __future__ import annotations

from typing import Any

GRPO = ("--model.loss.advantage=GRPO",)
RLOO = ("--model.loss.advantage=RLOO",)
HISTORY = (
    "--model.loss.advantage=OptimalBaseline",
    "--model.loss.advantage.half_life=100",  # as in overlays/optimal_baseline.yaml
    "--model.loss.advantage.population_rollouts=4",
)
MODULATION = ("--model.loss.modulation=DynamoModulation",)

TASKS: dict[str, dict[str, Any]] = {
    "arithmetic": {
        "model_name": "embedded:arithmetic-qwen3",
        "reward": {"class_path": "dynamo_lightning.rewards.MathReward", "init_args": {"answer_kind": "number"}},
        "max_response_length": 20,
        "max_prompt_length": 64,
        "held_out": 516,
    },
    "chain": {
        "model_name": "embedded:chain-qwen3",
        "reward": "dynamo_lightning.data.chain.ChainReward",
        "max_response_length": 52,
        "max_prompt_length": 42,
        "held_out": 512,
    },
}


def several_epochs(
    task: str,
    *,
    max_prompts: int,
    max_epochs: int,
    prompts_per_batch: int,
    rollouts_per_prompt: int,
    target: float | None,
) -> dict[str, Any]:
    """Options of `fit`: the first prompts of a task's training file, for several epochs or until the target.

    Both files are in random order, so that the first prompts are a random sample.

    Args:
        task: One of `TASKS`.
        max_prompts: Training prompts.
        max_epochs: Passes over them, at most.
        prompts_per_batch: Of an RL iteration.
        rollouts_per_prompt: Mean group size.
        target: Held-out pass@1 that ends a run, so that nothing after it is paid for; `None` for no such end.
    """
    chosen = TASKS[task]
    source = {"name": task, "template": "{prompt}"}
    return {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": max_epochs,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "val_check_interval": 10,
            # With a target only the tokens to it count: no other callback is paid for. Else the defaults, for their
            # metrics.
            **({} if target is None else {"callbacks": [_stop_at(task, target)]}),
        },
        "model": {
            "model_name": chosen["model_name"],
            "generator": {
                "class_path": "dynamo_lightning.engines.transformers.TransformersEngine",
                "init_args": {"batch_size": chosen["held_out"]},
            },
            "sampling": {"max_response_length": chosen["max_response_length"], "temperature": 1.0},
            "reward": chosen["reward"],
            "updates": {"max_tokens_per_micro_batch": 2048},
            "pass_at_k": [1],
            "loss": {"advantage": "RLOO", "modulation": None},
        },
        "data": {
            "train": {"path": f"embedded:{task}/train.jsonl", "max_prompts": max_prompts, **source},
            "val": [{"path": f"embedded:{task}/test.jsonl", **source}],
            "max_prompt_length": chosen["max_prompt_length"],
            "prompts_per_batch": prompts_per_batch,
            "rollouts_per_prompt": rollouts_per_prompt,
            "min_rollouts": 2,
            "max_rollouts": 3 * rollouts_per_prompt,
            "rule": "UniformRule",
            "estimator": {"class_path": "BetaPosterior", "init_args": {"half_life": 100}},
            # One answer to every held-out prompt.
            "eval_prompts_per_batch": chosen["held_out"],
            "eval_rollouts_per_prompt": 1,
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4, "weight_decay": 0.0}},
        "lr_scheduler": {
            "class_path": "torch.optim.lr_scheduler.LinearLR",
            "init_args": {"start_factor": 0.1, "total_iters": 10},
        },
    }


def _stop_at(task: str, target: float) -> dict[str, Any]:
    """The callback that ends a run at its target."""
    return {
        "class_path": "lightning.pytorch.callbacks.EarlyStopping",
        "init_args": {
            "monitor": f"val/{task}/pass@1",
            "mode": "max",
            "stopping_threshold": target - 1e-4,  # the threshold itself does not stop it
            "patience": 1000,
            "check_on_train_epoch_end": False,
        },
    }

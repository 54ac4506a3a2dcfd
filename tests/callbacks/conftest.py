"""A Lightning module that plays back a script of iterations instead of running a policy."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from dynamo_lightning.types import GroupPlan, IterationRecord, Outcome, Prompt, PromptBatch, Rollout, Score


def make_record(
    iteration=0,
    rewards=((1.0, 0.0), (0.0, 0.0)),
    variances=None,
    group_sizes=None,
    entropy=1.0,
    gradient_norms=(1.0,),
    num_tokens=100,
    metrics=None,
):
    """`rewards` holds what came back of each prompt's group; the other lists default to what fits it."""
    prompts = tuple(
        Prompt(i, f"question {i}", f"prompt {i}", (1, 2), f"answer {i}", "toy") for i in range(len(rewards))
    )
    group_sizes = tuple(group_sizes or map(len, rewards))
    variances = tuple(variances or [0.25] * len(rewards))
    plans = [
        GroupPlan(prompt, size, bernoulli_variance=variance, unseen=False)
        for prompt, size, variance in zip(prompts, group_sizes, variances, strict=True)
    ]
    batch = PromptBatch(iteration, plans)
    outcomes = tuple(
        Outcome(p, s, Score(r, {"correct": r}), 3, False)
        for p, group in enumerate(rewards)
        for s, r in enumerate(group)
    )
    rollouts = tuple(
        Rollout(
            prompts[o.prompt_id],
            o.sample_index,
            (5, 6, 7),
            (-1.0,) * 3,
            f"response {o.prompt_id}.{o.sample_index}",
        )
        for o in outcomes
    )
    seconds = {"generate": 0.4, "reward": 0.1, "logprobs": 0.2, "update": 0.3}
    return IterationRecord(
        batch=batch,
        outcomes=outcomes,
        rollouts=rollouts,
        entropy=entropy,
        gradient_norms=gradient_norms,
        num_tokens=num_tokens,
        factors={},
        seconds=seconds,
        metrics=metrics or {},
    )


class Stream:
    """A sized iterable that goes on where it stopped, as the data module's does."""

    def __init__(self, length):
        self.length = length
        self.position = 0

    def __len__(self):
        return self.length

    def __iter__(self):
        for _ in range(self.position % self.length, self.length):
            self.position += 1
            yield torch.tensor(self.position - 1)


class ScriptedData(LightningDataModule):
    def __init__(self, epoch_length):
        super().__init__()
        self.stream = Stream(epoch_length)

    def train_dataloader(self):
        return self.stream

    def val_dataloader(self):
        return [0.25, 0.75]

    def predict_dataloader(self):
        return [0, 1]

    def state_dict(self):
        return {"position": self.stream.position}

    def load_state_dict(self, state_dict):
        self.stream.position = state_dict["position"]


class ScriptedModule(LightningModule):
    """Iteration `i` returns the record `script(i)`, and steps the optimizer once per gradient norm in it."""

    def __init__(self, script):
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(1, 1)
        self.script = script
        self.seen = []
        self.validated = []

    def training_step(self, batch, batch_idx):
        iteration = int(batch)
        self.seen.append(iteration)
        record = self.script(iteration)
        for _ in record.gradient_norms:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = self.layer(torch.ones(1, self.layer.in_features)).sum()
            self.manual_backward(loss)
            optimizer.step()
        self.log_dict(dict(record.metrics), on_step=True, on_epoch=False)
        return {"loss": torch.tensor(0.0), "record": record}

    def validation_step(self, batch, batch_idx):
        value = float(batch) + len(self.seen)
        self.log("val/toy/pass@1", value, batch_size=1)
        self.log("val/toy/pass@1_low", value - 0.1, batch_size=1)
        self.log("val/toy/pass@1_high", value + 0.1, batch_size=1)

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            self.validated.append(self.seen[-1] + 1 if self.seen else None)

    def predict_step(self, batch, batch_idx):
        return [{"question": f"q{int(batch)}", "response": "é\n2", "reward": 1.0}] * 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder, callbacks, script=make_record, epoch_length=4, ckpt_path=None, version=0, loggers=(), **options):
    """Fits the script; returns trainer, module and every value that reached the logger, by name."""
    logger = CSVLogger(folder, name="run", version=version)
    defaults = dict(
        max_epochs=1,
        limit_val_batches=0,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer = Trainer(logger=[logger, *loggers] if loggers else logger, callbacks=callbacks, **(defaults | options))
    module = ScriptedModule(script)
    logged = {}
    write = logger.log_metrics

    def keep(metrics, step=None):
        for name, value in metrics.items():
            logged.setdefault(name, []).append(value)
        write(metrics, step)

    logger.log_metrics = keep
    trainer.fit(module, datamodule=ScriptedData(epoch_length), ckpt_path=ckpt_path)
    return SimpleNamespace(trainer=trainer, module=module, logged=logged, folder=logger.log_dir)


@pytest.fixture(name="make_record")
def _make_record():
    return make_record


@pytest.fixture(name="train")
def _train(tmp_path):
    def run(callbacks, **options):
        return train(tmp_path, callbacks, **options)

    run.folder = tmp_path / "run" / "version_0"
    return run


@pytest.fixture(name="scripted")
def _scripted():
    return SimpleNamespace(Module=ScriptedModule, Data=ScriptedData)

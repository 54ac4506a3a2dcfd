import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from dynamo_lightning.runs.step_metrics import log_step_metrics

METRICS = [
    {"a": 1.0, "b": 0.1},
    {"a": 2.0, "b": 0.2, "new": 1e-9},
    {"b": 0.3},  # the first metric of the call before is not logged
    {"a": float("nan"), "b": float("inf"), "new": 4},
    {"b": -0.5, "a": 5.0},  # another order; the second epoch begins
    {"a": 6.0},
    {},
    {"new": 7.0, "a": 1 / 3},
]


class Module(LightningModule):
    """Logs the metrics of an iteration in its step and in a hook, in one of two ways."""

    def __init__(self, log):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.log_them, self.seen = log, []

    def training_step(self, batch, batch_idx):
        self.log_them(self, METRICS[int(batch)])
        return torch.zeros(())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log_them(self, {f"hook/{name}": value for name, value in METRICS[int(batch)].items()})
        self.seen.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})

    def train_dataloader(self):
        start = 4 * self.trainer.current_epoch
        return torch.utils.data.DataLoader(range(start, start + 4))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, log, precision):
    logger, rows = CSVLogger(folder), []
    logger.log_metrics = lambda metrics, step=None: rows.append((step, dict(metrics)))
    module = Module(log)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=logger,
        precision=precision,
        log_every_n_steps=1,
        reload_dataloaders_every_n_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module)
    return rows, module.seen, trainer.progress_bar_metrics


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_loggers_and_callbacks_get_what_lightning_would_give_them(precision, tmp_path):
    def by_lightning(module, metrics):
        for name, value in metrics.items():
            module.log(name, value, on_step=True, on_epoch=False, prog_bar=name == "a")

    def ours(module, metrics):
        log_step_metrics(module, metrics, shown=("a",))

    expected, found = fit(tmp_path, by_lightning, precision), fit(tmp_path, ours, precision)
    assert repr(found) == repr(expected)  # NaN is not equal to itself
    assert len(found[0]) == 8 and "hook/b" in found[1][0] and "a" in found[2]


def test_without_a_trainer_it_warns_as_lightning_does():
    with pytest.warns(UserWarning, match="not registered on the model yet"):
        log_step_metrics(Module(log_step_metrics), {"a": 1.0, "b": 2.0})

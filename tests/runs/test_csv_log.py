import csv

import lightning as L
import torch

from dynamo_lightning.runs.csv_log import AppendingCSVLogger, MetricsFile


def rows(folder, name="metrics.csv"):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def test_training_and_validation_of_one_step_are_one_row(tmp_path):
    file = MetricsFile(str(tmp_path))
    file.log_metrics({"reward": torch.tensor(0.5)}, 0)
    file.log_metrics({"val": 1.0}, 0)
    file.log_metrics({"reward": 0.25}, 1)
    assert rows(tmp_path) == [
        {"reward": "0.5", "step": "0", "val": "1.0"},
        {"reward": "0.25", "step": "1", "val": ""},
    ]


def test_every_row_is_on_disk_at_once(tmp_path):
    file = MetricsFile(str(tmp_path))
    for step in range(3):
        file.log_metrics({"reward": step}, step)
        assert len(rows(tmp_path)) == step + 1
    file.log_metrics({"reward": 7}, 2)
    file.log_metrics({"reward": 8}, 3)
    assert [row["reward"] for row in rows(tmp_path)] == ["0", "1", "7", "8"]


def test_a_resumed_run_appends_and_a_new_column_destroys_no_row(tmp_path):
    first = MetricsFile(str(tmp_path))
    for step in range(3):
        first.log_metrics({"reward": step}, step)
    MetricsFile(str(tmp_path)).log_metrics({"reward": 3, "kl": 0.1}, 3)
    assert [(row["step"], row["reward"], row["kl"]) for row in rows(tmp_path)] == [
        ("0", "0", ""), ("1", "1", ""), ("2", "2", ""), ("3", "3", "0.1"),
    ]  # fmt: skip
    assert not list(tmp_path.glob("*superseded*"))


def test_rows_after_the_checkpoint_are_superseded_and_kept_aside(tmp_path):
    first = MetricsFile(str(tmp_path))
    for step in range(5):
        first.log_metrics({"reward": step}, step)
    resumed = MetricsFile(str(tmp_path))
    resumed.log_metrics({"reward": 20}, 2)
    resumed.log_metrics({"reward": 30}, 3)
    assert [(row["step"], row["reward"]) for row in rows(tmp_path)] == [
        ("0", "0"),
        ("1", "1"),
        ("2", "20"),
        ("3", "30"),
    ]
    assert [row["step"] for row in rows(tmp_path, "metrics.superseded-1.csv")] == ["3", "4"]


def test_a_torn_last_row_and_the_double_rows_of_lightnings_logger_are_mended(tmp_path):
    (tmp_path / "metrics.csv").write_text("reward,step,val\n0.5,0,\n,0,0.75\n0.25,1,\n0.1")
    MetricsFile(str(tmp_path)).log_metrics({"reward": 0.3}, 2)
    assert rows(tmp_path) == [
        {"reward": "0.5", "step": "0", "val": "0.75"},
        {"reward": "0.25", "step": "1", "val": ""},
        {"reward": "0.3", "step": "2", "val": ""},
    ]


def test_it_works_with_lightnings_trainer(tmp_path):
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch).sum()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for _ in range(2):  # the second fit starts at step 0 again
        logger = AppendingCSVLogger(tmp_path, name="run", version=0, prefix="a")
        trainer = L.Trainer(
            max_epochs=1, logger=logger, log_every_n_steps=1, accelerator="cpu", enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(3, 1)))
        assert [row["step"] for row in rows(tmp_path / "run/version_0")] == ["0", "1", "2"]
        assert "a-loss" in rows(tmp_path / "run/version_0")[0]
    assert len(rows(tmp_path / "run/version_0", "metrics.superseded-1.csv")) == 2

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from dynamo_lightning.callbacks import KeyPlots
from dynamo_lightning.callbacks.key_plots import custom_scalars
from dynamo_lightning.errors import UserError


def test_layout_names_only_metrics_that_there_are():
    names = {"alloc/n_max", "alloc/n_mean", "reward", "val/a/pass@1", "val/a/pass@1_low", "val/a/pass@1_high", "val/b"}
    assert custom_scalars(names) == {
        "Results": {"a/pass@1": ["Margin", ["val/a/pass@1", "val/a/pass@1_low", "val/a/pass@1_high"]]},
        "Allocation": {"Rollouts per prompt": ["Multiline", ["alloc/n_max", "alloc/n_mean"]]},
    }


def test_tensorboard_gets_the_layout_with_the_validation_and_a_picture_every_n_iterations(train, make_record, tmp_path):
    logger = TensorBoardLogger(tmp_path / "tensorboard")
    train(
        [KeyPlots(every_n_iterations=2)],
        script=lambda i: make_record(i, metrics={"alloc/n_max": 3.0, "alloc/n_min": 1.0}),
        epoch_length=3,
        max_epochs=2,
        loggers=[logger],
        limit_val_batches=1.0,
    )
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "tensors": 0}).Reload()
    assert [image.step for image in events.Images("groups")] == [0, 2, 4]
    layouts = [e.tensor_proto.string_val[0] for e in events.Tensors("custom_scalars__config__")]
    layout = layout_pb2.Layout.FromString(layouts[-1])
    titles = {category.title: [chart.title for chart in category.chart] for category in layout.category}
    assert titles == {"Results": ["toy/pass@1"], "Allocation": ["Rollouts per prompt"]}


def test_wandb_gets_the_picture_as_an_image(make_record):
    calls = []
    logger = SimpleNamespace(log_image=lambda **options: calls.append(options))
    columns = {"sizes": [2, 4], "successes": [1, 4], "expected": [0.5, 0.9]}
    KeyPlots()._draw(SimpleNamespace(loggers=[logger]), columns, step=7)
    assert calls[0]["key"] == "groups" and calls[0]["step"] == 7
    (points,) = calls[0]["images"][0].axes[0].collections
    assert points.get_offsets().tolist() == [[0.5, 2.0], [0.9, 4.0]] and points.get_array().tolist() == [0.5, 1.0]


def test_an_interval_below_one_is_refused():
    with pytest.raises(UserError, match=r"KeyPlots\.every_n_iterations must be at least 1, got 0"):
        KeyPlots(every_n_iterations=0)


def script(i, make_record):
    return make_record(i, metrics={"alloc/n_max": 3.0 + i, "alloc/n_min": 1.0, "reward": 0.5})


@pytest.fixture
def wandb_logger(tmp_path, monkeypatch):
    """Weights & Biases without a network; the test skips where it is not installed."""
    wandb = pytest.importorskip("wandb", reason="W&B is optional")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(offline=True, save_dir=tmp_path / "wandb", project="test")
    yield logger
    wandb.finish()


def charts(logger):
    """Rows of every chart that was sent, the last ones last, by title."""
    folder = Path(logger.experiment.dir, "media/table/key_plots")
    found = {}
    for path in sorted(folder.rglob("*.table.json"), key=lambda path: path.stat().st_mtime_ns):
        table = json.loads(path.read_text())
        assert table["columns"] == ["step", "lineKey", "lineVal"]
        found.setdefault(str(path.relative_to(folder)).split("_table_")[0], []).append(table["data"])
    return found


def test_wandb_gets_line_plots_of_several_curves_and_sends_few_of_them(train, make_record, wandb_logger):
    first = KeyPlots(every_n_iterations=3)
    train(
        [first],
        script=lambda i: script(i, make_record),
        epoch_length=4,
        max_epochs=2,
        loggers=[wandb_logger],
        limit_val_batches=1.0,
    )
    sent = charts(wandb_logger)
    # after 3 and 6 of the 8 iterations and at the end; validations are after 4 and 8
    assert {name: len(tables) for name, tables in sent.items()} == {"Rollouts per prompt": 3, "toy/pass@1": 2}
    last = sent["Rollouts per prompt"][-1]
    assert [row for row in last if row[1] == "largest"] == [[i + 1.0, "largest", 3.0 + i] for i in range(8)]
    assert sent["toy/pass@1"][-1][:2] == [[4.0, "value", 4.5], [8.0, "value", 8.5]]
    second = KeyPlots(every_n_iterations=3)
    second.load_state_dict(first.state_dict())
    assert second.curves.points("alloc/n_max") == first.curves.points("alloc/n_max")


def test_runs_without_wandb_keep_no_curves(train, make_record):
    callback = KeyPlots()
    train([callback], script=lambda i: script(i, make_record))
    assert callback.state_dict() == {} and not callback.curves.names

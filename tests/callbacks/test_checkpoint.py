import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from dynamo_lightning.callbacks import IterationCheckpoint
from dynamo_lightning.callbacks.checkpoint import publish


def names(run):
    return sorted(os.listdir(f"{run.folder}/checkpoints"))


def numbered(*iterations):
    return [f"iteration={iteration:06d}.ckpt" for iteration in iterations]


def load(run, name):
    return torch.load(f"{run.folder}/checkpoints/{name}", weights_only=True)


def test_newest_two_are_kept_with_last_pointing_to_the_newest(train):
    run = train([IterationCheckpoint(every_n_iterations=2)], epoch_length=7)
    assert names(run) == [*numbered(6, 7), "last.ckpt"]  # 7: the end of training is always saved
    assert os.readlink(f"{run.folder}/checkpoints/last.ckpt") == "iteration=000007.ckpt"
    assert load(run, "last.ckpt")["ScriptedData"] == {"position": 7}


def test_iterations_are_counted_whatever_the_number_of_optimizer_steps(train, make_record):
    def script(iteration):
        return replace(make_record(iteration), gradient_norms=(1.0,) * [3, 0, 0, 2][iteration])

    run = train([IterationCheckpoint(every_n_iterations=1, save_top_k=-1)], script=script)
    assert names(run) == [*numbered(1, 2, 3, 4), "last.ckpt"]
    saved = [load(run, name) for name in numbered(1, 2, 3, 4)]
    assert [checkpoint["global_step"] for checkpoint in saved] == [3, 3, 3, 5]
    assert [checkpoint["ScriptedData"]["position"] for checkpoint in saved] == [1, 2, 3, 4]


def test_resumed_run_goes_on_and_deletes_what_an_uninterrupted_one_would(train, tmp_path):
    class Kill(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch == 5:
                raise RuntimeError("killed")

    folder = str(tmp_path / "kept")
    with pytest.raises(RuntimeError, match="killed"):
        train([IterationCheckpoint(every_n_iterations=2, dirpath=folder), Kill()], epoch_length=8)
    assert sorted(os.listdir(folder)) == [*numbered(2, 4), "last.ckpt"]
    second = train(
        [IterationCheckpoint(every_n_iterations=2, dirpath=folder)], epoch_length=8, ckpt_path=f"{folder}/last.ckpt"
    )
    assert second.module.seen == [4, 5, 6, 7]
    assert second.trainer.global_step == 8
    assert sorted(os.listdir(folder)) == [*numbered(6, 8), "last.ckpt"]


@pytest.mark.parametrize("at", [1, 2, 3, 4, 6])
def test_resumed_run_validates_where_an_uninterrupted_one_does(train, at):
    options = dict(epoch_length=4, max_epochs=2, val_check_interval=2, limit_val_batches=1.0, num_sanity_val_steps=0)
    whole = train([IterationCheckpoint(every_n_iterations=1, save_top_k=-1)], **options)
    assert whole.module.validated == [2, 4, 6, 8]
    path = f"{whole.folder}/checkpoints/{numbered(at)[0]}"
    rest = train([IterationCheckpoint(every_n_iterations=1)], version=1, ckpt_path=path, **options)
    assert rest.module.seen == list(range(at, 8))
    assert len(rest.module.validated) == len([iteration for iteration in whole.module.validated if iteration > at])


def test_stopped_run_saves_its_last_iteration_and_can_be_prolonged(train):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch == 2

    first = train([IterationCheckpoint(every_n_iterations=None), Stop()], epoch_length=6)
    assert names(first) == [*numbered(3), "last.ckpt"]
    path = f"{first.folder}/checkpoints/last.ckpt"
    assert train([IterationCheckpoint()], epoch_length=6, version=1, ckpt_path=path).module.seen == [3, 4, 5]

    limited = train([IterationCheckpoint(every_n_iterations=None)], epoch_length=6, version=2, max_steps=2)
    path = f"{limited.folder}/checkpoints/last.ckpt"
    assert train([IterationCheckpoint()], epoch_length=6, version=3, ckpt_path=path).module.seen == [2, 3, 4, 5]

    finished = train([IterationCheckpoint()], epoch_length=2, version=4)
    path = f"{finished.folder}/checkpoints/last.ckpt"
    assert train([], epoch_length=2, version=5, ckpt_path=path, max_epochs=2).module.seen == [2, 3]


def test_time_interval_saves_between_the_counted_iterations(train):
    hourly = train([IterationCheckpoint(None, timedelta(hours=1))], epoch_length=4)
    assert names(hourly) == [*numbered(4), "last.ckpt"]
    always = train([IterationCheckpoint(100, timedelta(0), save_top_k=-1)], epoch_length=4, version=1)
    assert names(always) == [*numbered(1, 2, 3, 4), "last.ckpt"]


def test_best_is_kept_by_a_validation_metric_while_last_is_the_newest(train):
    checkpoint = IterationCheckpoint(every_n_iterations=1, save_top_k=1, monitor="val/toy/pass@1", mode="min")
    run = train([checkpoint], epoch_length=3, limit_val_batches=1.0, val_check_interval=1)
    assert names(run) == [*numbered(1), "last.ckpt"]  # the script's metric rises
    assert load(run, "last.ckpt")["ScriptedData"] == {"position": 3}
    assert checkpoint.best_model_score == pytest.approx(1.5)


def test_copy_of_last_and_no_numbered_files_on_demand(train):
    run = train([IterationCheckpoint(every_n_iterations=1, save_last=True, save_top_k=1)], epoch_length=2)
    assert names(run) == [*numbered(2), "last.ckpt"] and not os.path.islink(f"{run.folder}/checkpoints/last.ckpt")
    run = train([IterationCheckpoint(every_n_iterations=1, save_top_k=0)], epoch_length=2, version=1)
    assert names(run) == ["last.ckpt"]
    assert load(run, "last.ckpt")["ScriptedData"] == {"position": 2}


@pytest.mark.parametrize("moment", ["write", "publish", "link"])
def test_kill_while_saving_leaves_the_previous_checkpoint_usable(train, monkeypatch, moment):
    """At iteration 4, with a single checkpoint kept: the hardest case, for the old one must be deleted."""
    if moment == "write":

        def half(self, checkpoint, path, storage_options=None):
            if checkpoint["ScriptedData"]["position"] == 4:
                Path(path).write_bytes(b"half a checkpoint")
                raise KeyboardInterrupt
            torch.save(checkpoint, path)

        monkeypatch.setattr("lightning.fabric.plugins.io.torch_io.TorchCheckpointIO.save_checkpoint", half)
        Path(f"{train.folder}/checkpoints").mkdir(parents=True)
    else:
        suffix = {"publish": "iteration=000004.ckpt", "link": "last.ckpt"}[moment]

        def killed(source, target):
            if target.name == suffix and (moment == "publish" or "000004" in os.readlink(source)):
                raise KeyboardInterrupt
            publish(source, target)

        monkeypatch.setattr("dynamo_lightning.callbacks.checkpoint.publish", killed)
    with pytest.raises(SystemExit):
        train([IterationCheckpoint(every_n_iterations=2, save_top_k=1)], epoch_length=6)
    monkeypatch.undo()
    path = f"{train.folder}/checkpoints/last.ckpt"
    assert torch.load(path, weights_only=True)["ScriptedData"] == {"position": 2}
    resumed = train([IterationCheckpoint(every_n_iterations=2, save_top_k=1)], epoch_length=6, ckpt_path=path)
    assert resumed.module.seen == [2, 3, 4, 5]
    assert not [name for name in names(resumed) if name.endswith(".partial")]


def test_folders_are_exchanged_and_never_both_missing(tmp_path):
    """Sharded checkpoints are folders."""
    old, new = tmp_path / "x.ckpt", tmp_path / "x.ckpt.partial"
    for folder, content in ((old, "old"), (new, "new")):
        folder.mkdir()
        (folder / "shard").write_text(content)
    publish(new, old)
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]
    assert (old / "shard").read_text() == "new"


def test_impossible_interval_is_refused_with_the_number():
    with pytest.raises(ValueError, match="got 0"):
        IterationCheckpoint(every_n_iterations=0)

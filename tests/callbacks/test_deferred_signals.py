import csv
import signal

import pytest
import torch
from lightning.pytorch import Callback

from dynamo_lightning.callbacks import IterationCheckpoint
from dynamo_lightning.callbacks.deferred_signals import DeferredSignals


class Interrupt(Callback):
    """Raises a signal in the middle of an iteration."""

    def __init__(self, iteration, number, times=1):
        self.iteration, self.number, self.times = iteration, number, times

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch == self.iteration:
            for _ in range(self.times):
                signal.raise_signal(self.number)


def test_ctrl_c_finishes_the_iteration_saves_it_and_logs_its_metrics(train, make_record, capsys):
    def script(iteration):
        return make_record(iteration, metrics={"reward": float(iteration)})

    with pytest.raises(SystemExit) as ended:
        train([IterationCheckpoint(every_n_iterations=10), Interrupt(2, signal.SIGINT)], script=script, epoch_length=6)
    assert ended.value.code == 1
    path = f"{train.folder}/checkpoints/last.ckpt"
    assert torch.load(path, weights_only=True)["ScriptedData"] == {"position": 3}
    with (train.folder / "metrics.csv").open() as file:
        assert [(row["step"], row["reward"]) for row in csv.DictReader(file)] == [
            ("0", "0.0"),
            ("1", "1.0"),
            ("2", "2.0"),
        ]
    assert "Ctrl-C: the running iteration is finished and saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is not None
    resumed = train([IterationCheckpoint()], script=script, epoch_length=6, version=1, ckpt_path=path)
    assert resumed.module.seen == [3, 4, 5]


def test_a_second_ctrl_c_ends_at_once(train):
    with pytest.raises(SystemExit):
        train([IterationCheckpoint(every_n_iterations=10), Interrupt(2, signal.SIGINT, times=2)], epoch_length=6)
    assert not (train.folder / "checkpoints/last.ckpt").exists()


def test_signals_are_told_apart():
    signals = DeferredSignals()
    assert signals.must_stop(torch.device("cpu")) == 0
    signals._note(signal.SIGINT, None)
    assert signals.must_stop(torch.device("cpu")) == signal.SIGINT
    signals._note(signal.SIGTERM, None)
    assert signals.must_stop(torch.device("cpu")) == signal.SIGTERM, "the machine is taken away"
    with pytest.raises(KeyboardInterrupt):
        signals._note(signal.SIGINT, None)


@pytest.fixture(autouse=True)
def handlers():
    """The test runner's own Ctrl-C afterwards: Lightning ignores it once it has caught one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)

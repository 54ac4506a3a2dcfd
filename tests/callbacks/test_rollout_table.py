import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from dynamo_lightning.callbacks import PredictionWriter, RolloutTable


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_table_holds_first_rollouts_of_first_prompts_every_n_iterations(train, make_record):
    def script(iteration):
        return make_record(iteration, rewards=[(1.0, 0.0, 1.0), (0.0, 1.0), (1.0, 1.0)])

    run = train([RolloutTable(every_n_iterations=2, rollouts_per_prompt=2)], script=script, epoch_length=4)
    rows = lines(f"{run.folder}/rollouts.jsonl")
    shown = [(row["iteration"], row["prompt_id"], row["sample_index"], row["reward"]) for row in rows]
    first = [(1, 0, 0, 1.0), (1, 0, 1, 0.0), (1, 1, 0, 0.0), (1, 1, 1, 1.0)]
    assert shown == first + [(3, *row[1:]) for row in first]
    assert rows[1]["prompt"] == "prompt 0" and rows[1]["response"] == "response 0.1" and rows[1]["answer"] == "answer 0"


def test_dropped_rollouts_are_not_shown(make_record):
    from dynamo_lightning.callbacks.rollout_table import rollout_rows

    whole = make_record(rewards=[(1.0, 0.0)])
    partial = SimpleNamespace(batch=whole.batch, rollouts=whole.rollouts, outcomes=whole.outcomes[1:])
    assert [row["sample_index"] for row in rollout_rows(partial, 2, 2)] == [1]


@pytest.mark.parametrize("ability", ["table", "text"])
def test_loggers_get_cut_texts_by_their_ability(ability, make_record):
    calls = []
    logger = SimpleNamespace(
        table=SimpleNamespace(log_table=lambda **options: calls.append(options)),
        text=SimpleNamespace(experiment=SimpleNamespace(add_text=lambda *values: calls.append(values))),
    ).__dict__[ability]
    row = dict(prompt="p" * 50, response="line 1\nline 2", answer="2", reward=1.0, response_length=3)
    RolloutTable(max_characters=10)._log(SimpleNamespace(loggers=[logger]), [row], step=7)
    if ability == "table":
        assert calls[0]["data"] == [["p" * 10, "line 1\nlin", "2", "1.0", "3"]] and calls[0]["step"] == 7
    else:
        tag, text, step = calls[0]
        assert tag == "rollouts" and step == 7 and "\n    line 1\n    lin\n" in text and "p" * 11 not in text


def test_predictions_are_written_line_by_line(scripted, make_record, tmp_path):
    trainer = Trainer(logger=CSVLogger(tmp_path), callbacks=[PredictionWriter()], enable_progress_bar=False)
    trainer.predict(scripted.Module(make_record), datamodule=scripted.Data(1))
    rows = lines(f"{trainer.log_dir}/predictions.jsonl")
    assert [row["question"] for row in rows] == ["q0", "q0", "q1", "q1"]
    assert rows[0]["response"] == "é\n2"


def test_interrupted_predict_leaves_finished_batches(scripted, make_record, tmp_path):
    class Failing(scripted.Module):
        def predict_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("out of memory")
            return super().predict_step(batch, batch_idx)

    trainer = Trainer(logger=CSVLogger(tmp_path), callbacks=[PredictionWriter()], enable_progress_bar=False)
    with pytest.raises(RuntimeError):
        trainer.predict(Failing(make_record), datamodule=scripted.Data(1))
    assert len(lines(f"{trainer.log_dir}/predictions.jsonl")) == 2

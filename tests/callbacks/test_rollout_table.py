import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from dynamo_lightning.callbacks import PredictionWriter, RolloutTable
from dynamo_lightning.callbacks.rollout_table import rollout_rows
from dynamo_lightning.runs.json_lines import read_rows, set_aside


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


def test_rows_hold_the_values_of_the_first_tokens_of_each_rollout(make_record):
    whole = make_record(rewards=[(1.0, 0.0), (1.0, 1.0)])
    advantage = torch.arange(12.0) / 3
    entropy = torch.tensor([0.5, math.nan, 0.25] + [math.nan] * 9)
    record = replace(whole, token_values={"advantage": advantage, "entropy": entropy}, factors={"factor": advantage})
    tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
    first, second, third = rollout_rows(record, 2, 64, max_token_values=2, tokenizer=tokenizer)[:3]
    assert first["tokens"] == second["tokens"] == ["<5>", "<6>"]
    assert first["token_values"] == {"advantage": [0.0, 0.3333], "entropy": [0.5, None], "factor": [0.0, 0.3333]}
    assert second["token_values"] == {"advantage": [1.0, 1.333], "factor": [1.0, 1.333]}
    assert third["token_values"]["advantage"] == [2.0, 2.333]
    assert "tokens" not in rollout_rows(record, 2, 64, max_token_values=0, tokenizer=tokenizer)[0]


def test_what_an_environment_said_has_no_values(make_record):
    whole = make_record(rewards=[(1.0, 0.0)])
    first, second = whole.rollouts
    said = replace(first, token_ids=[5, 8, 9, 6, 7], loss_mask=[True, False, False, True, True], turns=())
    values = {"advantage": torch.arange(6.0)}  # of three response tokens each
    record = replace(whole, rollouts=(said, second), token_values=values)
    rows = rollout_rows(record, 1, 64, 4, SimpleNamespace(decode=lambda ids: str(ids[0])))
    assert rows[0]["tokens"] == ["5", "8", "9", "6"] and rows[0]["token_values"]["advantage"] == [0.0, None, None, 1.0]
    assert rows[1]["token_values"]["advantage"] == [3.0, 4.0, 5.0]


def test_dropped_rollouts_have_no_values_of_tokens(make_record):
    whole = make_record(rewards=[(1.0, 0.0)])
    record = replace(whole, outcomes=whole.outcomes[1:], token_values={"advantage": torch.tensor([1.0, 2.0, 3.0])})
    (row,) = rollout_rows(record, 1, 64, 512, SimpleNamespace(decode=str))
    assert row["sample_index"] == 1 and row["token_values"] == {"advantage": [1.0, 2.0, 3.0]}


def test_a_group_that_lies_on_several_ranks_is_written_whole(train, make_record, monkeypatch):
    def gather(rows):
        return [*rows[::-1], dict(rows[0], sample_index=9)]

    monkeypatch.setattr("dynamo_lightning.callbacks.rollout_table.gather_objects", gather)
    run = train([RolloutTable(num_prompts=1)], script=lambda i: make_record(i, rewards=[(1.0, 0.0)]), epoch_length=1)
    assert [row["sample_index"] for row in lines(f"{run.folder}/rollouts.jsonl")] == [0, 1, 9]


def test_a_response_with_a_line_separator_is_one_row_for_a_resumed_run(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text(json.dumps({"iteration": 1, "response": "a\u2028b\x85c"}, ensure_ascii=False) + "\n{torn", "utf-8")
    set_aside(path, 1)
    assert [row["response"] for row in read_rows(path)] == ["a\u2028b\x85c"]

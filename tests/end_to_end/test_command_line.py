import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from logged import column

from dynamo_lightning.cli import main
from dynamo_lightning.data.templates import resolve_template
from dynamo_lightning.policy.loading import load_tokenizer
from dynamo_lightning.warm_start import Demonstrations, load_demonstrations


def run(*args):
    """Run the command line in this process."""
    return main(list(args))


def test_fit_trains_and_reports(config, summary, capsys):
    cli = run("fit", "--config", config)
    result = summary()
    assert result["status"] == "finished"
    assert result["iterations"] == 6
    assert result["before"].keys() == result["after"].keys() == {
        "val/sums/pass@1", "val/sums/pass@1_low", "val/sums/pass@1_high",
        "val/sums/reward", "val/sums/reward_low", "val/sums/reward_high",
    }  # fmt: skip
    assert {"generate", "reward", "logprobs", "update", "validation"} <= result["seconds"].keys()
    assert cli.trainer.global_step == 6
    printed = capsys.readouterr().out
    for command in ("fit", "test", "export"):
        assert f"python -m dynamo_lightning {command} --config" in printed


def test_training_raises_the_reward(config, summary):
    run("fit", "--config", config, "--trainer.max_epochs=10", "--data.eval_rollouts_per_prompt=8")
    before, after = (summary()[when]["val/sums/pass@1"] for when in ("before", "after"))
    assert after > before + 0.3


def test_logged_metrics_have_the_fields_names(config):
    cli = run("fit", "--config", config)
    expected = {
        "reward", "reward_std", "frac_reward_zero_std", "rewards/f/mean", "rewards/f/std", "completions/mean_length",
        "completions/min_length", "completions/max_length", "completions/clipped_ratio", "entropy", "policy_loss",
        "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "grad_norm", "timing_s/generate",
        "timing_s/reward", "timing_s/logprobs", "timing_s/update", "alloc/n_mean", "alloc/n_min", "alloc/n_max",
        "alloc/budget", "alloc/frac_at_min", "alloc/frac_at_max", "alloc/frac_unseen", "alloc/p_hat_mean",
        "mod/beta_comp_mean", "mod/beta_stab_mean", "mod/frac_damped",
    }  # fmt: skip
    assert expected <= cli.trainer.callback_metrics.keys()


def test_export_gives_a_folder_with_equal_logits(config):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cli = run("fit", "--config", config)
    run("export", "--config", config, "--ckpt_path=checkpoints/last.ckpt", "--output_dir=exported")
    exported = AutoModelForCausalLM.from_pretrained("exported").eval()
    tokens = AutoTokenizer.from_pretrained("exported")("1+2=", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(exported(tokens).logits, cli.model.policy.eval()(tokens).logits, atol=0, rtol=0)


def test_export_in_another_type_and_never_over_a_folder_in_use(config):
    from safetensors.torch import load_file

    run("fit", "--config", config, "--trainer.max_epochs=1")
    arguments = ("export", "--config", config, "--ckpt_path=checkpoints/last.ckpt", "--output_dir=exported")
    run(*arguments, "--dtype=bfloat16")
    assert {value.dtype for value in load_file("exported/model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(SystemExit, match="output_dir exported is there already and not an empty folder"):
        run(*arguments)


def test_test_and_predict_take_a_checkpoint(config):
    run("fit", "--config", config, "--trainer.max_epochs=1")
    cli = run("test", "--config", config, "--ckpt_path=checkpoints/last.ckpt")
    assert 0 <= cli.trainer.callback_metrics["test/sums/pass@1"] <= 1
    writer = '--trainer.callbacks+={"class_path": "dynamo_lightning.callbacks.PredictionWriter"}'
    cli = run("predict", "--config", config, "--ckpt_path=checkpoints/last.ckpt", writer)
    rows = [json.loads(line) for line in Path(cli.trainer.log_dir, "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert {"question", "answer", "response", "reward", "prompt_id", "sample_index"} <= rows[0].keys()


def test_validate_alone(config):
    assert "val/sums/pass@1" in run("validate", "--config", config).trainer.callback_metrics


def test_warm_start_learns_demonstrations(config, capsys):
    rows = [{"prompt": f"{a}+1=", "response": "\\boxed{7}"} for a in range(8)]
    Path("demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        "warm_start", "--config", config, "--demonstrations.path=demonstrations.jsonl", "--output_dir=warm",
        "--demonstrations.batch_size=8", "--trainer.callbacks=null", "--trainer.logger=false",
        "--trainer.enable_checkpointing=false", "--trainer.max_epochs=60", "--lr_scheduler=null",
    )  # fmt: skip
    cli = run("predict", "--config", config, "--model.model_name=warm", "--model.sampling.max_response_length=12")
    responses = [row["response"] for batch in cli.trainer.predict_loop.predictions for row in batch]
    assert responses.count("\\boxed{7}") > len(responses) / 2
    assert not Path("warm", "config.yaml").exists()
    printed = capsys.readouterr().out
    assert "training begins, 60 steps" in printed and "step 1/60  loss " in printed and "step 60/60  loss " in printed


@pytest.mark.parametrize("template", ["plain", r"\boxed{} {prompt}"])
def test_demonstrations_have_the_templates_of_reinforcement_learning(tiny_policy, tmp_path, template):
    path = tmp_path / "demonstrations.jsonl"
    path.write_text('{"prompt": "1+1=", "response": "2"}\n')
    tokenizer = load_tokenizer(tiny_policy)
    [(prompt_ids, _)] = load_demonstrations(Demonstrations(str(path), template=template), tokenizer)
    assert prompt_ids == tokenizer(resolve_template(template).replace("{prompt}", "1+1=")).input_ids
    with pytest.raises(ValueError, match=r"demonstrations\.template='What\?' has no \{prompt\}"):
        load_demonstrations(Demonstrations(str(path), template="What?"), tokenizer)


def test_the_tokenizer_is_loaded_as_the_policy_is(config):
    options = ("--model.policy.revision=abc", "--model.policy.trust_remote_code=true")  # of no effect on a folder
    cli = run("validate", "--config", config, *options)
    assert (cli.datamodule.tokenizer_config.revision, cli.datamodule.tokenizer_config.trust_remote_code) == (
        "abc",
        True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.train.path=missing.jsonl"], r"data\.train.*missing\.jsonl"),
        (
            ["--data.train.answer_column=solution"],
            r"data\.train\.answer_column.*'solution'; its columns: prompt, answer",
        ),
        (["--data.min_rollouts=5"], r"data\.min_rollouts"),
        (["--data.rule=NoSuchRule"], "NoSuchRule"),
        (["--model.loss.kl_coeficient=1"], "kl_coeficient"),
        (["--data.prompts_per_batc=1"], "prompts_per_batc"),
        (["--data.max_prompt_length=2"], r"data\.max_prompt_length"),
        (["--data.train.template=null"], "chat template"),
        (["--trainer.gradient_clip_val=1.0"], r"model\.gradient_clip_val"),
        (["--trainer.accumulate_grad_batches=2"], r"model\.updates\.max_tokens_per_micro_batch"),
        (["--model.updates.max_tokens_per_micro_batch=3"], r"model\.updates\.max_tokens_per_micro_batch is 3"),
        (
            ["--model.updates.max_tokens_per_micro_batch=9"],
            r"have 10 tokens together, but .*max_tokens_per_micro_batch is 9",
        ),
        (["--ckpt_path=last"], r"ckpt_path=last would be looked for in the new log folder.*last\.ckpt"),
        (
            ["--model.loss.advantage=WReinforce", "--data.success_threshold=0.9"],
            r"takes rewards from 0\.5 on as right, data\.success_threshold=0\.9",
        ),
        (["--model.pass_at_k=[1,4]"], r"data\.eval_rollouts_per_prompt is 2"),
        (["--model.model_name=./nowhere"], r"model\.model_name: there is no folder"),
        (["--model.reward.function=reward.nothing"], r"reward\.nothing"),
        (["--ckpt_path=nowhere.ckpt"], r"nowhere\.ckpt"),
        (["--lr_scheduler=ReduceLROnPlateau"], "ReduceLROnPlateau"),
        (["--model.scoring.max_failure_share=2"], r"model\.scoring\.max_failure_share"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option(config, arguments, message, capsys):
    with pytest.raises(SystemExit, match=f"(?s)^error: .*{message}") as exit_:
        run("fit", "--config", config, "--trainer.logger=false", *arguments)
    assert exit_.value.code != 0
    assert not Path("checkpoints").exists()


def test_empty_data_and_rows_without_answer_are_refused(config):
    Path("empty.jsonl").touch()
    with pytest.raises(SystemExit, match=r"error: .*empty\.jsonl"):
        run("fit", "--config", config, "--data.train.path=empty.jsonl")
    Path("hole.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer": null}\n')
    with pytest.raises(SystemExit, match=r"error: .*line 2 of 'hole\.jsonl'"):
        run("fit", "--config", config, "--data.train.path=hole.jsonl")


def test_an_unparsable_answer_is_found_before_training(config):
    Path("bad.jsonl").write_text('{"prompt": "1+1=", "answer": "\\\\frac{1}{"}\n')
    with pytest.raises(SystemExit, match=r"error: data set bad, line 1 of 'bad\.jsonl', .*'1\+1='"):
        run(
            "fit",
            "--config",
            config,
            "--data.train.path=bad.jsonl",
            "--model.reward=dynamo_lightning.rewards.MathReward",
        )


def test_a_checkpoint_of_another_policy_is_refused_in_one_line(config):
    run("fit", "--config", config, "--trainer.max_epochs=1")
    other = "--model.model_name=embedded:arithmetic-qwen3"
    with pytest.raises(SystemExit, match=r"error: ckpt_path: the checkpoint is of another policy than model\.model_n"):
        run("fit", "--config", config, "--ckpt_path=checkpoints/last.ckpt", other)


def test_too_many_failed_rewards_stop_the_run(config):
    Path("reward.py").write_text("def f(prompt, response, answer):\n    raise OSError('the disk is gone')\n")
    with pytest.raises(SystemExit, match=r"(?s)model\.scoring\.max_failure_share.*the disk is gone"):
        run("fit", "--config", config)


def test_help_and_documented_config():
    """One process for each: what a new user types first."""
    command = [sys.executable, "-m", "dynamo_lightning"]
    for subcommand in ("warm_start", "export"):
        help_text = subprocess.run([*command, subcommand, "--help"], capture_output=True, text=True, check=True).stdout
        assert "--output_dir" in help_text
    printed = subprocess.run(
        [*command, "fit", "--config", "quickstart.yaml", "--print_config=comments"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "# Mean group size" in printed
    assert "# Longer prompts are left out" in printed


def test_starting_up_imports_no_engine_and_no_data_library():
    code = (
        "import sys, dynamo_lightning.cli; print([m for m in ('vllm', 'datasets', 'math_verify') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.pilot=2"],
        ["--data.cost=tokens"],
        ["--data.min_rollouts=0", "--data.accept_skip_bias=true"],
        ["--data.rule=SignalRule"],
        ["--data.estimator=ArcsineKalman"],
        ["--data.estimator=LogitFilter", "--data.pilot=2"],
        ["--data.estimator=LogitFilter", "--data.estimator.features=[length,dataset]", "--data.pilot=2"],
        ["--data.rule=ProportionalRule", "--data.estimator=PaperBernoulli"],
    ],
)
def test_every_way_to_allocate_trains(config, summary, arguments):
    cli = run("fit", "--config", config, *arguments)
    assert summary()["status"] == "finished"
    assert cli.trainer.global_step > 0


def test_dynamic_sampling_replaces_groups_that_teach_nothing(config, summary):
    cli = run("fit", "--config", config, "--model.dynamic_sampling.max_rounds=3", "--data.prompts_per_batch=3")
    assert summary()["status"] == "finished"
    assert summary()["after"].keys() == summary()["before"].keys()
    rounds = column("dynamo", "dynamic_sampling/rounds")
    assert max(rounds) > 1
    stream = cli.datamodule.state_dict()["stream"]
    assert stream["iteration"] == len(rounds) == 8
    assert stream["epoch"] > 1, "replacements come out of the same pass"


def test_rewards_see_the_length_in_tokens(config, summary):
    Path("reward.py").write_text(
        "def f(prompt, response, answer, response_length, max_response_length):\n"
        "    assert max_response_length == 6\n"
        "    return response_length / max_response_length\n"
    )
    run("fit", "--config", config)
    lengths, budgets = column("dynamo", "completions/mean_length"), column("dynamo", "alloc/budget")
    assert len(lengths) <= 10
    mean_length = sum(length * budget for length, budget in zip(lengths, budgets, strict=True)) / sum(budgets)
    assert summary()["final"]["reward"] == pytest.approx(mean_length / 6)


def test_a_run_on_solved_prompts_says_that_it_learned_nothing(config, summary, capsys, caplog):
    Path("reward.py").write_text("def f(prompt, response, answer):\n    return 1.0\n")
    with warnings.catch_warnings(record=True) as caught, caplog.at_level("INFO"):
        warnings.simplefilter("always")
        run(
            "fit", "--config", config, "--trainer.num_sanity_val_steps=-1",
            "--trainer.callbacks+=dynamo_lightning.callbacks.ProgressLines", "--trainer.callbacks.every_n_seconds=0",
            "--trainer.callbacks+=dynamo_lightning.callbacks.LearningSignalMonitor", "--trainer.callbacks.patience=2",
        )  # fmt: skip
    messages = [str(warning.message) for warning in caught]
    assert any("no group had a learning signal in 2 iterations in a row" in message for message in messages)
    assert not any("lr_scheduler.step" in message for message in messages)
    assert "nothing was learned" in caplog.text
    assert summary()["after"]["val/sums/reward"] == 1.0
    counts = summary()["counts"]
    assert len(counts["after"]["sums"]) == 12 and counts["before"]["sums"].keys() == counts["after"]["sums"].keys()
    assert set(map(tuple, counts["after"]["sums"].values())) == {(2, 2)}
    out = capsys.readouterr().out
    assert "iteration 1/6  reward 1.000" in out and "validation before training: batch" in out

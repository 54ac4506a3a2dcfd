"""`check`: a healthy set-up has no complaint, and set-ups broken in one place are named by the check of that place."""

import json

import pytest
from hot_engines import HidesIt, Hot

from dynamo_lightning.checks.result import CheckResult, worst
from dynamo_lightning.cli import main
from dynamo_lightning.engines.transformers import TransformersEngine

NAMES = [
    "allocation", "prompt", "format", "stopping", "reward", "scoring", "engine", "packing", "checkpoint", "time",
    "memory",
]  # fmt: skip


class HotEngine(Hot, TransformersEngine):
    factor = 2.0


class HotEngineThatHidesIt(HidesIt, HotEngine):
    pass


def test_a_healthy_set_up_is_ok_and_leaves_no_file(check):
    results, code = check()
    assert code == 0
    assert list(results) == NAMES
    assert {name: result["level"] for name, result in results.items()} == dict.fromkeys(NAMES, "ok")
    reward = results["reward"]["numbers"]
    assert (reward["gold"], reward["empty"], reward["other_row"]) == (1.0, 0.0, 0.0)
    assert results["prompt"]["numbers"]["last_token"] and results["scoring"]["numbers"]["per_second"] > 0
    assert results["stopping"]["numbers"]["stops"] == ["<eos>"]
    assert results["checkpoint"]["numbers"]["bytes"] > 100_000
    seconds = results["time"]["numbers"]
    assert seconds["batch_rollouts"] == 64 and seconds["measured_rollouts"] == 16
    assert seconds["total"] == pytest.approx(
        sum(seconds["measured"].get(name, 0) * 4 for name in ("generate", "reward", "logprobs", "update"))
        + seconds["measured"]["sync"]
    )


@pytest.mark.slow
def test_a_reward_that_never_pays_is_an_error(check, reward_function):
    reward_function("return 0.0")
    results, code = check()
    assert code == 1 and results["reward"]["level"] == "error" and "never pays" in results["reward"]["message"]


def test_a_reward_that_always_pays_is_an_error(check, reward_function):
    reward_function("return 1.0")
    results, code = check()
    assert code == 1 and results["reward"]["level"] == "error" and "always pays" in results["reward"]["message"]


@pytest.mark.slow
def test_a_template_without_an_answer_format_is_an_error(check, settings, tiny_policy):
    # An untrained policy writes no box by itself, and nothing in the prompt asks for one.
    settings["model"]["model_name"] = tiny_policy
    settings["model"]["reward"]["init_args"] = {"require_boxed": True}
    results, code = check()
    assert code == 1 and results["format"]["level"] == "error" and "data.template" in results["format"]["message"]


def test_a_wrong_end_of_sequence_token_is_an_error(check, settings, embedded_policy_that_ends_with):
    settings["model"]["model_name"] = embedded_policy_that_ends_with("<unk>")
    results, code = check()
    assert code == 1 and results["stopping"]["level"] == "error"
    assert "'<eos>'" in results["stopping"]["message"] and "stop_token_ids" in results["stopping"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [HotEngine, HotEngineThatHidesIt])
def test_an_engine_at_another_temperature_is_an_error(check, settings, engine, monkeypatch):
    settings["model"]["generator"] = {"class_path": f"{__name__}.{engine.__name__}"}
    results, code = check()
    assert code == 1 and results["engine"]["level"] == "error" and "temperature" in results["engine"]["message"]


@pytest.mark.slow
def test_rewards_that_run_out_of_time_are_an_error(check, settings, reward_function):
    reward_function("time.sleep(60)")
    settings["model"]["scoring"]["time_limit"] = 0.5
    results, code = check()
    assert code == 1 and results["scoring"]["level"] == "error"
    assert "model.scoring.time_limit=0.5" in results["scoring"]["message"]


@pytest.mark.slow
def test_a_run_of_one_epoch_is_a_warning_and_the_exit_code_is_0(check, settings):
    settings["trainer"]["max_epochs"] = 1
    results, code = check()
    assert code == 0 and results["allocation"]["level"] == "warning"
    assert "data.pilot" in results["allocation"]["message"]


@pytest.mark.slow
def test_a_mistake_in_the_set_up_is_an_error_of_the_report(check, settings):
    settings["model"]["updates"]["max_tokens_per_micro_batch"] = 8
    results, code = check()
    assert code == 1 and "max_tokens_per_micro_batch is 8" in results["set-up"]["message"]


@pytest.mark.slow
def test_success_rates_of_an_earlier_run_bound_the_allocation(check, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    # One prompt in two is solved or hopeless, the other at 1/2: the best ratio is (½·½)²/(½·¼) = 1/2.
    rows = [{"iteration": 1, "prompt_ids": [1, 2], "sizes": [8, 8], "successes": [8, 4]}]
    (run / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 2, "pro')
    results, code = check(f"--run={run}")
    assert code == 0
    assert results["allocation"]["numbers"]["best_ratio"] == pytest.approx(0.5, abs=0.12)


@pytest.mark.slow
def test_a_folder_without_groups_is_named(check, tmp_path):
    results, code = check(f"--run={tmp_path}")
    assert code == 1 and "groups.jsonl" in results["allocation"]["message"]


@pytest.mark.slow
def test_lines_are_printed_one_for_each_check(settings, tmp_path, monkeypatch, capsys):
    import yaml

    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    main(["check", "--config", "config.yaml"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("ok ")] == NAMES


def test_the_worst_level_decides():
    ok, warning, error = (CheckResult("x", level, "") for level in ("ok", "warning", "error"))
    assert worst([]) == "ok" and worst([ok, warning]) == "warning" and worst([warning, error, ok]) == "error"

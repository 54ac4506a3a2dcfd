"""Real short runs, broken in one place each: a tripwire or an error that ends the run names the place."""

import json
from pathlib import Path

import pytest
from broken_engines import CopyEngine, OldWeightsEngine
from hot_engines import HidesIt, Hot

from dynamo_lightning.data.stream import PromptStream


class HotEngine(Hot, CopyEngine):
    factor = 1.3


class HotEngineThatHidesIt(HidesIt, HotEngine):
    pass


class OneSeedEngine(CopyEngine):
    """Gives every second request of a prompt the random numbers of the one before."""

    def generate(self, policy, tokenizer, requests, **options):
        paired = [
            type(request)(**{**vars(request), "seed": requests[index - index % 2].seed})
            for index, request in enumerate(requests)
        ]
        return super().generate(policy, tokenizer, paired, **options)


def begins_anew(stream):
    """A stream that forgets where it was."""
    return dict.fromkeys(stream, 0)


def keeps_the_number_only(stream):
    """A stream that goes on counting iterations, but begins its pass over the data anew."""
    return {**stream, "position": 0, "step": 0}


def leaves_out_16(stream):
    """A stream that goes on too far ahead."""
    return {**stream, "position": stream["position"] + 16}


def engine(settings, kind, **sampling):
    settings["model"]["generator"] = {"class_path": f"{kind.__module__}.{kind.__name__}"}
    settings["model"]["sampling"].update(sampling)


def with_checkpoints(settings):
    checkpoints = {"every_n_iterations": 1, "dirpath": "checkpoints"}
    settings["trainer"]["callbacks"].append(
        {"class_path": "dynamo_lightning.callbacks.IterationCheckpoint", "init_args": checkpoints}
    )
    settings["data"]["rollouts_per_prompt"] = 4


def test_a_reward_that_never_pays_leaves_all_groups_hopeless(fit, reward_function):
    reward_function("return 0.0")
    found = fit()
    assert list(found) == ["all_hopeless"]
    assert found["all_hopeless"]["iteration"] == 10 and found["all_hopeless"]["value"] == 1.0
    assert "model.reward" in found["all_hopeless"]["message"]


@pytest.mark.slow
def test_a_reward_that_always_pays_leaves_all_groups_solved(fit, reward_function):
    reward_function("return 1.0")
    found = fit()
    assert list(found) == ["all_solved"] and "model.reward" in found["all_solved"]["message"]


def test_a_reward_that_pays_length_is_named(fit, reward_function):
    reward_function("return len(response) / 20")
    found = fit()
    assert list(found) == ["reward_follows_length"] and found["reward_follows_length"]["value"] > 0.9


def test_tripwires_that_are_added_on_the_command_line_replace_the_default_ones(fit, reward_function):
    reward_function("return 1.0")
    added = "--trainer.callbacks+=dynamo_lightning.callbacks.Tripwires"
    with pytest.raises(SystemExit, match=r"tripwire all_solved \(Tripwires\.stop_on\) ends the run at iteration 10"):
        fit(added, "--trainer.callbacks.stop_on=[all_solved]")


def test_an_unknown_tripwire_is_one_line_on_the_command_line(fit):
    added = "--trainer.callbacks+=dynamo_lightning.callbacks.Tripwires"
    with pytest.raises(
        SystemExit, match=r"Tripwires\.stop_on: there is no tripwire 'all_solvd', did you mean all_solved"
    ):
        fit(added, "--trainer.callbacks.stop_on=[all_solvd]")


def test_an_engine_that_keeps_old_weights_is_named(fit, settings):
    engine(settings, OldWeightsEngine, logp_tolerance=1.0)
    found = fit()
    assert next(iter(found)) == "old_weights" and found["old_weights"]["level"] == "error"
    assert found["old_weights"]["iteration"] <= 8


@pytest.mark.slow
def test_an_engine_at_another_temperature_is_named(fit, settings):
    engine(settings, HotEngine, logp_tolerance=1.0)
    found = fit()
    assert "engine_mismatch" in found and "temperature" in found["engine_mismatch"]["message"]


def test_an_engine_that_hides_another_temperature_is_named(fit, settings):
    engine(settings, HotEngineThatHidesIt)
    found = fit()
    assert list(found) == ["wrong_distribution"] and "unlikelier" in found["wrong_distribution"]["message"]


@pytest.mark.slow
def test_an_engine_that_repeats_its_random_numbers_is_named(fit, settings):
    engine(settings, OneSeedEngine)
    found = fit()
    assert "duplicates" in found


@pytest.mark.slow
def test_a_copy_of_the_policy_as_engine_is_healthy(fit, settings):
    engine(settings, CopyEngine)
    assert fit() == {}


def test_in_full_precision_old_weights_end_the_run(fit, settings):
    engine(settings, OldWeightsEngine)
    with pytest.raises(SystemExit, match=r"model\.sampling\.logp_tolerance"):
        fit()


@pytest.mark.parametrize(
    ("restored", "name", "iteration"),
    [
        (begins_anew, "repeated_prompts", 1),
        pytest.param(keeps_the_number_only, "repeated_prompts", 4, marks=pytest.mark.slow),
        pytest.param(leaves_out_16, "skipped_prompts", 4, marks=pytest.mark.slow),
    ],
)
def test_a_stream_that_loses_its_place_in_a_resume_is_named(fit, settings, restored, name, iteration, monkeypatch):
    with_checkpoints(settings)
    assert fit("--trainer.max_steps=3") == {}
    resume = ("--trainer.max_steps=5", "--ckpt_path=checkpoints/last.ckpt")
    load = PromptStream.load_state_dict

    def load_another_place(self, state):
        load(self, restored(state))

    with monkeypatch.context() as patch:
        patch.setattr(PromptStream, "load_state_dict", load_another_place)
        found = fit(*resume)
    assert list(found) == [name] and found[name]["iteration"] == iteration
    assert found[name]["value"] == (16 if name == "skipped_prompts" else 8)


@pytest.mark.slow
def test_a_resume_that_goes_on_where_it_was_is_healthy(fit, settings):
    with_checkpoints(settings)
    assert fit("--trainer.max_steps=3") == {}
    assert fit("--trainer.max_steps=5", "--ckpt_path=checkpoints/last.ckpt") == {}
    assert fit("--trainer.max_epochs=2", "--trainer.limit_train_batches=8", "--ckpt_path=checkpoints/last.ckpt") == {}


def train_on(settings, rows):
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings["data"]["train"] = {"path": str(Path("prompts.jsonl").resolve()), "template": "{prompt}"}


@pytest.mark.slow
def test_prompts_that_are_all_solved_are_named(fit, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_on(settings, [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(1, 6) for b in range(1, 7)])
    settings["trainer"].update(max_epochs=3, limit_train_batches=4)
    settings["model"]["sampling"]["temperature"] = 0.05
    assert list(fit()) == ["all_solved"]


@pytest.mark.slow
def test_prompts_that_are_all_hopeless_are_named(fit, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_on(settings, [{"prompt": f"{a}+{b}=", "answer": str(1000 + a)} for a in range(9) for b in range(9)])
    settings["trainer"].update(max_epochs=2, limit_train_batches=10)
    assert list(fit()) == ["all_hopeless"]


@pytest.mark.slow
def test_a_learning_rate_100_times_too_high_is_named(fit, settings):
    settings["optimizer"]["init_args"]["lr"] = 1e-2
    settings["trainer"]["limit_train_batches"] = 25
    found = fit()
    assert "reward_falls" in found and "optimizer.init_args.lr" in found["reward_falls"]["message"]


def test_rewards_that_crash_now_and_then_are_named(fit, settings, reward_function):
    reward_function("return 1 / (len(response) - 9)")
    settings["model"]["scoring"]["max_failure_share"] = 1.0
    settings["trainer"]["limit_train_batches"] = 6
    found = fit()
    assert found["reward_failures"]["iteration"] == 5 and "model.reward" in found["reward_failures"]["message"]


@pytest.mark.slow
def test_a_reward_pool_that_times_out_is_named(fit, settings, reward_function):
    reward_function("return time.sleep(3600 * (len(response) == 9)) or 0.0")
    settings["model"]["scoring"].update(max_failure_share=1.0, time_limit=0.2, num_workers=2)
    settings["trainer"]["limit_train_batches"] = 6
    settings["data"].update(prompts_per_batch=4, rollouts_per_prompt=2)
    found = fit()
    assert "model.scoring.time_limit" in found["reward_failures"]["message"]


def test_with_the_default_share_a_reward_pool_that_times_out_ends_the_run(fit, settings, reward_function):
    reward_function("return time.sleep(3600) or 0.0")
    settings["model"]["scoring"]["time_limit"] = 0.2
    with pytest.raises(SystemExit, match=r"model\.scoring\.time_limit=0\.2"):
        fit()

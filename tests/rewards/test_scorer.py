import math
import multiprocessing
import os
import pickle
import signal
import time

import pytest
from jsonargparse import ArgumentParser

from dynamo_lightning.rewards import FunctionReward, MathReward, Reward, WeightedReward
from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig, check_failure_share
from dynamo_lightning.types import Prompt, Rollout, Score

TIME_LIMIT = 1.0


def make_rollout(text, answer="5", **columns):
    return Rollout(Prompt(0, "2 + 3", "", (1,), answer, columns=columns), 0, (1,), (-0.5,), text)


def worker_pids():
    return {child.pid for child in multiprocessing.active_children() if child.name == "pebble_pool_worker"}


@pytest.fixture(scope="module")
def scorer():
    config = ScoringConfig(num_workers=2, time_limit=TIME_LIMIT, failure_score=-1.0, memory_limit_gb=1.0)
    with RewardScorer(FunctionReward("hostile_rewards.obey"), config) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def math_scorer():
    reward = WeightedReward([MathReward(), FunctionReward("hostile_rewards.torch_is_imported")], [1.0, 0.0])
    with RewardScorer(reward, ScoringConfig(num_workers=1, time_limit=TIME_LIMIT, failure_score="drop")) as scorer:
        yield scorer


def test_no_rollouts_give_no_scores_and_start_no_worker():
    with RewardScorer(MathReward(), ScoringConfig()) as scorer:
        before = worker_pids()
        assert scorer.score([]) == []
        assert worker_pids() == before


def test_scores_keep_the_order_of_rollouts(scorer):
    scores = scorer.score([make_rollout(str(i)) for i in range(1000)])
    assert scores == [Score(float(i), {"obey": float(i)}) for i in range(1000)]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("raise", r"^KeyError: 'no such unit' \(.*hostile_rewards.py:\d+\)$"),
        ("raise_base_exception", "KeyboardInterrupt"),
        ("sys_exit", "SystemExit: 3"),
        ("os_exit", "exit code 7"),
        ("segfault", r"signal 11 \(Segmentation fault"),
        ("allocate", "MemoryError"),
        ("nan", "must be a finite number, got nan of type float"),
        ("inf", "must be a finite number, got inf of type float"),
        ("none", r"^no reward applies: obey returned None$"),
        ("string", "must be a finite number, got 'seven' of type str"),
    ],
)
def test_crash_is_reported_and_leaves_the_others_alone(scorer, command, message):
    scores = scorer.score([make_rollout(text) for text in ["1", "2", command, "3"]])
    assert [score.reward for score in scores] == [1.0, 2.0, -1.0, 3.0]
    assert [score.failure for score in scores] == [None, None, "crash", None]
    assert scores[2].components == {}
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(scores[2].message)


@pytest.mark.parametrize("command", ["sleep 600", "hold_gil"])
def test_overrun_is_a_timeout_and_leaves_the_others_of_its_chunk_alone(scorer, command):
    texts = [command if i == 37 else str(i) for i in range(100)]
    start = time.monotonic()
    scores = scorer.score([make_rollout(text) for text in texts])
    assert time.monotonic() - start < 10.0
    assert [i for i, score in enumerate(scores) if score.failure == "timeout"] == [37]
    assert scores[37].message == "no reward within model.scoring.time_limit=1 seconds"
    assert scores[37].reward == -1.0 and scores[37].components == {}
    assert [score.reward for score in scores if score.failure is None] == [float(i) for i in range(100) if i != 37]


def test_caches_are_freed_before_they_use_up_the_memory():
    from hostile_rewards import Hoarder

    with RewardScorer(Hoarder(), ScoringConfig(num_workers=1, memory_limit_gb=0.5)) as scorer:
        scores = scorer.score([make_rollout("1")] * 20)
    assert [score.failure for score in scores] == [None] * 20


def test_time_limit_is_for_each_rollout_not_for_a_chunk(scorer):
    scores = scorer.score([make_rollout("sleep 0.3")] * 12)
    assert [score.failure for score in scores] == [None] * 12


def test_workers_ignore_ctrl_c(scorer):
    pids = {int(score.reward) for score in scorer.score([make_rollout("pid")] * 50)}
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    assert scorer.score([make_rollout("1")])[0].reward == 1.0
    assert pids <= worker_pids()


def test_idle_workers_that_die_are_replaced(scorer):
    scorer.score([make_rollout("1")])
    for pid in worker_pids():
        os.kill(pid, signal.SIGKILL)
    assert scorer.score([make_rollout("2")])[0].reward == 2.0
    time.sleep(0.3)
    assert scorer.score([make_rollout("3")])[0].reward == 3.0


def test_closed_scorer_ends_its_workers_and_starts_again(scorer):
    pid = int(scorer.score([make_rollout("pid")])[0].reward)
    scorer.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    scorer.close()
    assert scorer.score([make_rollout("4")])[0].reward == 4.0


def wait_for(path):
    deadline = time.monotonic() + 60.0
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_submitted_is_scored_at_once_and_only_once(tmp_path):
    rollouts = [make_rollout(str(tmp_path / name)) for name in "abc"]
    with RewardScorer(FunctionReward("hostile_rewards.append_line"), ScoringConfig(num_workers=1)) as scorer:
        scorer.submit(rollouts[:2])
        wait_for(tmp_path / "a")
        assert not (tmp_path / "c").exists()
        assert scorer.score(rollouts[::-1]) == [Score(1.0, {"append_line": 1.0})] * 3
        assert [(tmp_path / name).read_text() for name in "abc"] == ["scored\n"] * 3
        scorer.score(rollouts[:1])
    assert (tmp_path / "a").read_text() == "scored\n" * 2, "asked again, not remembered"


def test_a_closed_scorer_gives_up_what_was_submitted(scorer):
    scorer.score([make_rollout("1")])
    for _ in range(3):
        scorer.submit([make_rollout("sleep 0.9")] * 50)
    scorer.close()
    scorer.submit([make_rollout("2")])
    start = time.monotonic()
    assert scorer.score([make_rollout("3")])[0].reward == 3.0
    assert time.monotonic() - start < 20.0  # what was given up would have taken 67


def test_worker_that_scores_mathematics_does_not_import_torch(math_scorer):
    scores = math_scorer.score([make_rollout(r"\boxed{5}"), make_rollout("6", difficulty=3)])
    assert [score.reward for score in scores] == [1.0, 0.0]
    assert [dict(score.components) for score in scores] == [
        {"math": 1.0, "torch_is_imported": 0.0},
        {"math": 0.0, "torch_is_imported": 0.0},
    ]


def test_power_tower_is_wrong_at_once(math_scorer):
    scores = math_scorer.score([make_rollout(r"\boxed{5}"), make_rollout(r"\boxed{9^{9^{9^{9}}} + x}", "9^x")])
    assert [(score.reward, score.failure) for score in scores] == [(1.0, None), (0.0, None)]


def test_unparsable_reference_answer_is_a_crash_that_quotes_it(math_scorer):
    (score,) = math_scorer.score([make_rollout(r"\boxed{5}", answer="???")])
    assert score.failure == "crash"
    assert math.isnan(score.reward), "failure_score is drop"
    assert "Error: the reference answer '???' cannot be parsed" in score.message


class UnloadableReward(Reward):
    """Pickles well, but fails in the worker; this module cannot be imported there anyway."""

    def __call__(self, prompt, response, answer, **columns):
        return 1.0

    def __reduce__(self):
        return pickle.loads, (b"not a pickle",)


def test_reward_that_cannot_be_set_up_is_reported_by_every_rollout():
    with RewardScorer(UnloadableReward(), ScoringConfig(num_workers=1)) as scorer:
        scores = scorer.score([make_rollout("1"), make_rollout("2")])
    assert [score.failure for score in scores] == ["crash", "crash"]
    assert "the reward could not be set up: _pickle.UnpicklingError" in scores[0].message


class DeadlyReward(UnloadableReward):
    def __reduce__(self):
        return os._exit, (1,)


def test_workers_that_never_start_are_an_error_not_an_endless_loop():
    with RewardScorer(DeadlyReward(), ScoringConfig(num_workers=2)) as scorer:
        with pytest.raises(RuntimeError, match="ended 3 times in a row before they scored anything"):
            scorer.score([make_rollout("1")] * 20)
        scorer.submit([make_rollout("1")])
        with pytest.raises(RuntimeError, match="ended 3 times in a row before they scored anything"):
            scorer.score([make_rollout("2")])


def test_options_are_parsed_from_text():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--scoring", type=ScoringConfig)
    config = parser.parse_args(["--scoring.failure_score=drop", "--scoring.memory_limit_gb=null"])
    assert parser.instantiate_classes(config).scoring == ScoringConfig(failure_score="drop", memory_limit_gb=None)
    assert parser.parse_args(["--scoring.failure_score=-1"]).scoring.failure_score == -1.0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_workers", 0),
        ("time_limit", 0.0),
        ("max_failure_share", 1.5),
        ("failure_score", math.nan),
        ("memory_limit_gb", -1.0),
    ],
)
def test_impossible_option_is_an_error_with_its_name_and_value(option, value):
    with pytest.raises(ValueError, match=rf"model\.scoring\.{option} must be .*got {value}"):
        ScoringConfig(**{option: value})


FINE = Score(1.0, {"math": 1.0})
FAILED = [Score(0.0, {}, "crash", f"error {i}") for i in range(4)] + [Score(0.0, {}, "timeout", "too slow")]


def test_failures_up_to_the_share_pass():
    check_failure_share([FINE] * 19 + FAILED[:1], 0.05)
    check_failure_share([FINE], 0.0)
    check_failure_share([], 0.0)
    check_failure_share(FAILED, 1.0)


def test_failures_above_the_share_stop_training_and_say_why():
    with pytest.raises(RuntimeError) as error:
        check_failure_share([FINE] * 95 + FAILED, 0.04)
    message = str(error.value)
    assert "5 of 100 rollouts failed (timeout: 1, crash: 4), a share of 0.050" in message
    assert "model.scoring.max_failure_share=0.04" in message
    assert message.endswith("first messages:\n  error 0\n  error 1\n  error 2")

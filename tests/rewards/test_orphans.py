import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRAINING = """
import multiprocessing, sys
from dynamo_lightning.rewards import FunctionReward
from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig
from dynamo_lightning.types import Prompt, Rollout

def rollout(text):
    return Rollout(Prompt(0, "", "", (1,), ""), 0, (1,), (0.0,), text)

scorer = RewardScorer(FunctionReward("hostile_rewards.obey"), ScoringConfig(num_workers=2, time_limit=2.0))
scorer.score([rollout("1")] * 20)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
if sys.argv[1] == "wait":
    scorer.score([rollout("hold_gil")])
"""


def start_training(mode):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, mode], env=environment, stdout=subprocess.PIPE, text=True
    )
    return process, [int(pid) for pid in process.stdout.readline().split()]


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # nobody may be there to bury the orphan


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_do_not_outlive_a_killed_training_even_in_c_code():
    training, pids = start_training("wait")
    assert len(pids) == 2
    time.sleep(0.5)  # one worker is now deep in a regular expression, the other one idle
    assert all(is_running(pid) for pid in pids)
    os.kill(training.pid, signal.SIGKILL)
    training.wait()
    deadline = time.monotonic() + 8.0
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in pids)


def test_training_that_forgets_to_close_the_scorer_still_ends():
    training, pids = start_training("end")
    assert training.wait(timeout=10.0) == 0
    assert not any(is_running(pid) for pid in pids)

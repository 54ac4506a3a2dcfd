"""Extension of vLLM's worker processes; an engine is started with it as its worker extension class."""

from __future__ import annotations

from typing import Any

from dynamo_lightning.engines.vllm.weights import checksum

WORKER_EXTENSION = "dynamo_lightning.engines.vllm.worker.WeightSyncExtension"
"""For `worker_extension_cls`, or `--worker-extension-cls` of a server."""


class WeightSyncExtension:
    """Methods that a vLLM worker gets in addition, callable by name."""

    model_runner: Any
    """The worker's own."""

    def repack_tied_head(self) -> bool:
        """Pack a tied vocabulary head again, after a reload on a CPU.

        There the head's product uses a packed copy of the weights. A reload writes to the embedding that the head
        shares, but leaves that copy as it was (vLLM 0.32: log-probabilities were off by 1.4).

        Returns:
            True if there was a packed head.
        """
        from vllm.platforms import current_platform

        model = self.model_runner.get_model()
        head = getattr(model, "lm_head", None)
        if not current_platform.is_cpu() or head is None or not model.config.tie_word_embeddings:
            return False
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
        return True

    mend_tied_head = repack_tied_head
    """Name of 0.1, for a trainer of that version."""

    def weight_checksums(self) -> dict[str, Any]:
        """Checksums of the parameters that the worker holds in readable form, and how its layers are fused.

        On a CPU most layers keep a packed copy only, which cannot be read: log-probabilities must speak for them. A few
        parameters may be kept in another type than the model's: they have lost their bits.

        Returns:
            `checksums`, decimal strings by parameter name (JSON has no large integers), and `packed`.
        """
        model, dtype = self.model_runner.get_model(), self.model_runner.model_config.dtype
        readable = {name: value for name, value in model.named_parameters() if value.numel() and value.dtype == dtype}
        return {
            "checksums": {name: str(checksum(value)) for name, value in readable.items()},
            "packed": dict(getattr(model, "packed_modules_mapping", None) or {}),
        }

    def describe_model(self) -> dict[str, Any]:
        """Sizes, type and log-probabilities of the served model."""
        from vllm.platforms import current_platform

        config = self.model_runner.model_config
        return {
            **describe_architecture(config.hf_config),
            "dtype": str(config.dtype).removeprefix("torch."),
            "logprobs_mode": str(config.logprobs_mode),
            "max_model_len": int(config.max_model_len),
            "chunked_prefill_on_cpu": current_platform.is_cpu()
            and bool(self.model_runner.scheduler_config.enable_chunked_prefill),
        }


def describe_architecture(config: Any) -> dict[str, Any]:
    """Kind and sizes of a model from its Hugging Face configuration; weights of one fit into another that is equal."""
    text = config.get_text_config()
    names = (
        "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
    )  # fmt: skip
    return {name: getattr(text, name, None) for name in names}

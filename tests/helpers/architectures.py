"""Tiny random models of transformers' causal architectures, each trained for two iterations and exported.

`python tests/helpers/architectures.py > results.jsonl` runs all of them, `… NAME …` the named ones (`SHOW=1` shows
tracebacks), and `python tests/helpers/architectures.py --table results.jsonl` prints the table of docs/models.md.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

from dynamo_lightning.errors import RunError, UserError

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
    "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "sliding_window": 8,
    "attention_dropout": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "dropout": 0.1,
    "hidden_dropout": 0.1, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    "activation_dropout": 0.1, "is_decoder": True,
}  # fmt: skip
"""Given to every configuration that takes them."""

LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": ...,
    "num_key_value_heads": 4,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
SPECIAL: dict[str, dict] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 64},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "dff": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 4.0, "residual_multiplier": 0.5},
    "granitemoe": {"logits_scaling": 8.0},
    "granitemoeshared": {"logits_scaling": 8.0, "shared_intermediate_size": 16},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.0625, "layer_types": ["sliding_attention", "full_attention"]},
    "hyperclovax": {"logits_scaling": 0.125},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "minicpm3": {**MLA, "dim_model_base": 8},
    "deepseek_v2": {**MLA, "q_lora_rank": None, "first_k_dense_replace": 1, "topk_method": "greedy"},
    "deepseek_v3": {**MLA, "first_k_dense_replace": 1},
    "glm4_moe": {"first_k_dense_replace": 1},
    "dots1": {"first_k_dense_replace": 1},
    "falcon": {"new_decoder_architecture": False, "alibi": False},
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "falcon_mamba": {"state_size": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8,
                   "ssm_state_size": 8, "n_groups": 1},
    "zamba2": {**MAMBA, "mamba_ngroups": 1, "n_mamba_heads": 8, "layers_block_type": ["mamba", "hybrid"]},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"],
                        "logits_soft_cap": 3.0},
    "qwen3_next": {**LAYERS, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8},
    "qwen3_5_text": {**LAYERS, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                     "linear_value_head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8, "num_key_value_heads": 4},
    "llama4_text": {"intermediate_size_mlp": 48, "attention_chunk_size": 16},
    "phi3": {"original_max_position_embeddings": 64},
    "phimoe": {"original_max_position_embeddings": 64},
    "seed_oss": {"residual_dropout": 0.1},
    "jetmoe": {"kv_channels": 8, "num_key_value_heads": 2},
    "bert": {"is_decoder": True},
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_attention_heads": 4,
             "encoder_layers": 2, "encoder_ffn_dim": 48, "encoder_attention_heads": 4},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window_pattern": 2},
    "smollm3": {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "laurel_rank": 8,
                     "activation_sparsity_pattern": [0.0, 0.0], "vocab_size_per_layer_input": 64,
                     "layer_types": ["sliding_attention", "full_attention"]},
    "xlstm": {"num_heads": 4, "num_blocks": 2, "chunkwise_kernel": "chunkwise--native_autograd"},
    "diffllama": {"attention_dropout": 0.0},
    "doge": {"num_experts": 4, "is_moe": False},
}  # fmt: skip
"""Further settings of single architectures, by model type."""

DEFAULT = (
    "llama", "qwen2", "gemma2", "granite", "cohere2", "minicpm3", "gpt2", "opt", "phi3", "qwen3_moe", "gpt_oss",
    "stablelm", "nemotron", "llama4_text", "bloom", "mamba",
)  # fmt: skip
"""Of diverse kinds: run by the default tests."""
TESTED = (
    "afmoe", "apertus", "arcee", "aria_text", "bamba", "bert", "bert-generation", "big_bird", "biogpt", "bitnet",
    "bloom", "codegen", "cohere", "cohere2", "cohere2_moe", "ctrl", "cwm", "deepseek_v2", "deepseek_v3",
    "deepseek_v4", "diffllama", "doge", "dots1", "electra", "ernie", "ernie4_5", "ernie4_5_moe", "exaone4",
    "exaone_moe", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "fuyu", "gemma", "gemma2", "gemma3_text",
    "gemma3n_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo",
    "gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granite_swa", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3",
    "hyperclovax", "jais2", "jamba", "jetmoe", "laguna", "lfm2", "llama", "llama4_text", "mamba", "mamba2",
    "megatron-bert", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2", "minimax_m3_vl_text", "ministral",
    "ministral3", "mistral", "mixtral", "modernbert-decoder", "mpt", "nanochat", "nemotron", "nemotron_h", "olmo",
    "olmo2", "olmo3", "olmo_hybrid", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_5_text", "qwen3_moe", "qwen3_next", "rembert", "roformer", "seed_oss", "smollm3", "solar_open",
    "stablelm", "starcoder2", "vaultgemma", "xglm",
)  # fmt: skip
"""Accepted: their largest difference of log-probabilities is below 1e-3 nats in float32."""
REFUSED = ("bart", "minimax")


def names() -> list[str]:
    """Every model type that transformers has a causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(name: str, vocab_size: int):
    """A tiny configuration of a model type."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[name]
    known = set(inspect.signature(config_class.__init__).parameters) | set(getattr(config_class, "__annotations__", {}))
    for base in config_class.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    known |= set(getattr(config_class, "attribute_map", {}))
    settings = {key: value for key, value in SIZES.items() if key in known} | SPECIAL.get(name, {})
    return config_class(vocab_size=vocab_size, **{key: value for key, value in settings.items() if value is not ...})


def write_model(name: str, folder: Path):
    """A folder with a tiny random model of this type and the character tokenizer of the embedded task."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dynamo_lightning.data.arithmetic import write_architecture

    write_architecture(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (folder / "config.json").unlink()
    torch.manual_seed(0)
    config = tiny_config(name, 64)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > 3e6:
        raise ValueError(f"not tiny: {size} parameters")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(name: str, folder: Path, export: bool = True, **options) -> dict:
    """Two RL iterations of a tiny model, and its export; the largest differences of log-probabilities on the way.

    Everything from the policy's loading to its export is the package's own; only Lightning's trainer is left out.
    """
    from transformers.models.auto import tokenization_auto

    from dynamo_lightning.allocation.groups import make_groups
    from dynamo_lightning.engines.engine import SamplingConfig
    from dynamo_lightning.export import export_policy
    from dynamo_lightning.module import PolicyModule
    from dynamo_lightning.policy.forward import token_layout
    from dynamo_lightning.policy.logits import own_logits
    from dynamo_lightning.rollout.runner import sample_rollouts
    from dynamo_lightning.types import (
        Collected,
        GroupPlan,
        Outcome,
        Prompt,
        PromptBatch,
        RolloutRequest,
        Score,
    )
    from dynamo_lightning.update.config import UpdateConfig
    from dynamo_lightning.update.join import join
    from dynamo_lightning.update.sampling_check import sampling_tolerance
    from dynamo_lightning.update.steps import TrainedPolicy

    # Where mistral_common is installed without all it needs, no tokenizer of a Mistral model can be loaded.
    tokenization_auto._use_mistral_format = lambda *arguments, **options: False
    write_model(name, folder / "model")

    def make_module():
        return PolicyModule(
            str(folder / "model"),
            sampling=SamplingConfig(max_response_length=20),
            updates=UpdateConfig(num_mini_batches=2),
            **options,
        )

    module = make_module()
    module.configure_model()
    module._trainer = SimpleNamespace(
        precision_plugin=SimpleNamespace(forward_context=lambda: torch.autocast("cpu", enabled=False)),
        global_step=0,
    )
    optimizer = torch.optim.AdamW([p for p in module.policy.parameters() if p.requires_grad], lr=1e-3)
    module.on_train_start()
    prompts = [
        Prompt(i, "", "", tuple(3 + (5 * i + 7 * j) % 50 for j in range(length)), "")
        for i, length in enumerate((2, 7, 4))
    ]
    worst = {"sampled": 0.0, "own": 0.0}
    moved = 0.0
    for iteration in range(2):
        requests = [RolloutRequest(p, k, 1000 * iteration + 10 * p.prompt_id + k) for p in prompts for k in range(3)]
        module.policy.eval()
        engine = module.collector.generator
        rollouts = sample_rollouts(
            engine, module.policy, module.tokenizer, requests, max_response_length=20, temperature=1.0
        )
        outcomes = [
            Outcome(r.prompt.prompt_id, r.sample_index, Score(float(r.sample_index == 1), {}), len(r.token_ids), False)
            for r in rollouts
        ]
        batch = PromptBatch(iteration, [GroupPlan(prompt, size=3) for prompt in prompts])
        groups = make_groups(batch.plans, rollouts, outcomes)
        collected = Collected(iteration, groups, rollouts[0], 0, {})
        joined = join(collected, module.loss.advantage)
        tolerance = sampling_tolerance(None, module.collector.generator, module.policy, staleness=0)
        experience = module.updater.prepare(module.policy, joined, logp_tolerance=tolerance)
        parts = experience.old_logprobs.split([len(r.token_ids) for r in rollouts])
        with torch.no_grad():
            for rollout, part in zip(rollouts, parts, strict=True):
                logits = own_logits(module.policy, [*rollout.prompt.token_ids, *rollout.token_ids])
                own = logits.log_softmax(-1)[len(rollout.prompt.token_ids) - 1 : -1]
                own = own.gather(1, torch.tensor(rollout.token_ids, dtype=torch.int64)[:, None]).squeeze(1)
                worst["own"] = max(worst["own"], float((part - own).abs().max()))
                worst["sampled"] = max(worst["sampled"], float((part - torch.tensor(rollout.logprobs)).abs().max()))
        before = torch.cat([p.detach().flatten().clone() for p in module.policy.parameters() if p.requires_grad])
        module.updater.step(TrainedPolicy(module.policy, optimizer), experience)
        after = torch.cat([p.detach().flatten() for p in module.policy.parameters() if p.requires_grad])
        moved = max(moved, float((after - before).abs().max()))
    if export:
        torch.save({"state_dict": module.state_dict()}, folder / "last.ckpt")
        export_policy(make_module(), str(folder / "last.ckpt"), str(folder / "exported"))
    return {
        **worst,
        "moved": moved,
        "kernel": module.policy.config._attn_implementation,
        "layout": token_layout(module.policy),
        "class": type(module.policy).__name__,
    }


def survey(chosen: list[str]) -> dict[str, dict]:
    """Results of architectures, by model type; `refused` or `failed` says why there is none."""
    found = {}
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found[name] = run(name, Path(folder))
            except (UserError, RunError) as error:
                found[name] = {"refused": str(error)}
            except Exception as error:  # the list says for which architectures something is wrong
                found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
                if os.environ.get("SHOW"):
                    raise
    return found


def table(results: dict[str, dict]) -> str:
    """What `survey` found as Markdown."""
    accepted = {name: result for name, result in results.items() if "sampled" in result}
    lines = [f"{len(accepted)} architectures are accepted:", ""]
    lines += [
        "| model type | attention kernel | layout | sampled − training | own − training |",
        "|---|---|---|---|---|",
    ]
    for name, result in accepted.items():
        numbers = f"{result['sampled']:.0e} | {result['own']:.0e}"
        lines.append(f"| `{name}` | {result['kernel']} | {result['layout']} | {numbers} |")
    refused = {name: result["refused"] for name, result in results.items() if "refused" in result}
    lines += ["", f"{len(refused)} are refused in the first iteration:", "", "| model type | reason |", "|---|---|"]
    lines += [f"| `{name}` | {reason.partition('(model.sampling')[0].strip()} |" for name, reason in refused.items()]
    failed = {name: result["failed"] for name, result in results.items() if "failed" in result}
    lines += ["", f"{len(failed)} were not tried to the end, because no tiny model of them could be made or run:", ""]
    lines += ["| model type | what happened |", "|---|---|"]
    lines += [f"| `{name}` | {' '.join(reason.split())[:110].replace('|', '/')} |" for name, reason in failed.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--table"]:
        results: dict[str, dict] = {}
        for line in Path(sys.argv[2]).read_text().splitlines():
            results.update(json.loads(line))
        print(table(results))
    else:
        for name in sys.argv[1:] or names():
            print(json.dumps(survey([name])), flush=True)

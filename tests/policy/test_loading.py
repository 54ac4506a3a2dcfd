import pytest
import torch

from dynamo_lightning.policy.forward import response_loss
from dynamo_lightning.policy.loading import PolicyConfig, load_policy, load_tokenizer
from dynamo_lightning.policy.packing import make_micro_batch
from dynamo_lightning.types import Prompt, Rollout


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_an_unknown_attention_kernel_is_an_error_that_names_the_option(tiny_policy, init):
    config = PolicyConfig(init=init, attn_implementation="flash_attention_9")
    with pytest.raises(ValueError, match=r"model\.policy\.attn_implementation='flash_attention_9'"):
        load_policy(tiny_policy, config)


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_options_reach_the_policy_whether_its_weights_are_loaded_or_drawn(tiny_policy, init):
    policy = load_policy(tiny_policy, PolicyConfig(init=init, attn_implementation="eager", dtype="bfloat16"))
    assert policy.config._attn_implementation == "eager"
    assert policy.dtype == torch.bfloat16


def test_dtype_auto_is_the_checkpoints(tiny_policy, tmp_path):
    load_policy(tiny_policy, PolicyConfig(dtype="bfloat16")).save_pretrained(tmp_path)
    load_tokenizer(tiny_policy).save_pretrained(tmp_path)
    assert load_policy(str(tmp_path), PolicyConfig(dtype="auto")).dtype == torch.bfloat16
    assert load_policy(str(tmp_path), PolicyConfig()).dtype == torch.float32


def gradients(tiny_policy, config):
    """Of the log-probabilities of micro-batches of three shapes."""
    policy = load_policy(tiny_policy, config)
    prompts = [Prompt(0, "", "", (5, 6), ""), Prompt(1, "", "", (5, 6, 9), "")]
    found = []
    for length in (5, 9, 20):
        rollouts = [
            Rollout(prompt, 0, tuple(range(start, start + length)), (), "")
            for start, prompt in enumerate(prompts, start=3)
        ]
        policy.zero_grad()
        micro_batch = make_micro_batch(rollouts, [0, 1], policy.device)
        loss = response_loss(policy, micro_batch, lambda s, _: s.logprobs.sum(), couples_tokens=False, temperature=1.0)
        loss.backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]))
    return found


@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"compile": True}, {"compile": True, "gradient_checkpointing": True}]
)
def test_checkpointing_and_compiling_change_no_gradient(tiny_policy, options):
    for ours, plain in zip(
        gradients(tiny_policy, PolicyConfig(**options)), gradients(tiny_policy, PolicyConfig()), strict=True
    ):
        assert (ours - plain).norm() < 1e-5 * plain.norm()


def test_compiled_layers_are_compiled_and_keep_their_names(tiny_policy):
    compiled = load_policy(tiny_policy, PolicyConfig(compile=True))
    assert all(layer._compiled_call_impl is not None for layer in compiled.get_decoder().layers)
    assert compiled.state_dict().keys() == load_policy(tiny_policy, PolicyConfig()).state_dict().keys()


def test_layers_that_cannot_be_found_are_an_error(tiny_policy, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "get_decoder", lambda self: torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no list of decoder layers"):
        load_policy(tiny_policy, PolicyConfig(compile=True))

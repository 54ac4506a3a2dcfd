"""Runs with a real vLLM engine in the trainer's process, in full and in half precision: healthy and broken ones."""

import pytest
from vllm_here import why_there_is_no_engine

from dynamo_lightning.engines.vllm.pad_heads import write_padded

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_there_is_no_engine()), reason=why_there_is_no_engine()),
]
COLOCATED = "dynamo_lightning.engines.vllm.colocated.VLLMColocatedEngine"
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-true"}
"""Of the policy, and of the engine, which takes over the policy's."""


@pytest.fixture
def use(settings, tmp_path):
    """Makes the engine a vLLM engine in some precision; its kernels need wider heads than the embedded policy has."""
    write_padded("embedded:arithmetic-qwen3", str(tmp_path / "policy"), 32)

    def choose(class_path, precision):
        options = {"max_model_len": 96, "cache_gib": 0.25, "enforce_eager": True}
        settings["trainer"]["precision"] = PRECISIONS[precision]
        settings["model"]["model_name"] = str(tmp_path / "policy")
        settings["model"]["generator"] = {"class_path": class_path, "init_args": options}

    return choose


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_healthy_run_raises_nothing(fit, use, precision):
    use(COLOCATED, precision)
    assert fit() == {}


def test_an_engine_that_keeps_old_weights_ends_the_run_before_anything_is_learned_from_them(fit, use):
    use("deaf_vllm.DeafEngine", "float32")
    with pytest.raises(SystemExit, match="it computes with other weights"):
        fit()

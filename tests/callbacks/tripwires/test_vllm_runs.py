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
PRECISIONS = {
    "float32": ({}, {}),
    "bfloat16 on both sides": ({"precision": "bf16-true"}, {}),
    "bfloat16 in the engine": ({}, {"dtype": "bfloat16"}),
}


@pytest.fixture
def use(settings, tmp_path):
    """Makes the engine a vLLM engine in some precision; its kernels need wider heads than the embedded policy has."""
    write_padded("embedded:arithmetic-qwen3", str(tmp_path / "policy"), 32)

    def choose(class_path, precision, **options):
        trainer, engine = PRECISIONS[precision]
        small = {"max_model_len": 96, "cache_gib": 0.25, "enforce_eager": True}
        settings["trainer"].update(trainer)
        settings["model"]["model_name"] = str(tmp_path / "policy")
        settings["model"]["generator"] = {"class_path": class_path, "init_args": {**small, **engine, **options}}

    return choose


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_healthy_run_raises_nothing(fit, use, precision):
    use(COLOCATED, precision)
    assert fit() == {}


@pytest.mark.parametrize("precision", ["float32", "bfloat16 in the engine"])
def test_an_engine_that_keeps_old_weights_is_named(fit, use, settings, precision):
    use("deaf_vllm.DeafEngine", precision, max_logprob_difference=10.0)
    settings["model"]["sampling"]["logp_tolerance"] = 10.0
    settings["optimizer"]["init_args"]["lr"] = 1e-3
    found = fit()
    assert {"old_weights", "engine_mismatch"} & found.keys(), found
    assert "model.generator" in next(iter(found.values()))["message"]


def test_a_reward_that_never_pays_is_named_with_a_vllm_engine_too(fit, use, reward_function):
    use(COLOCATED, "bfloat16 on both sides")
    reward_function("return 0.0")
    assert list(fit()) == ["all_hopeless"]

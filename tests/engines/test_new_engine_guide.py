"""The page docs/new_engine.md does what it says: its module in a run, and against the engine of the library."""

import re
import sys
from pathlib import Path

import pytest
import torch

from dynamo_lightning.cli import main
from dynamo_lightning.engines.vllm.weights import sequence_logprobs
from dynamo_lightning.policy.loading import PolicyConfig, load_policy, load_tokenizer
from dynamo_lightning.rollout.runner import sample_rollouts
from dynamo_lightning.types import RolloutRequest

PAGE = Path(__file__).parents[2] / "docs" / "new_engine.md"


@pytest.fixture
def plain_engine(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "plain_engine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import plain_engine

    yield plain_engine
    sys.modules.pop("plain_engine")


@pytest.fixture
def policy(tiny_policy):
    return load_policy(tiny_policy, PolicyConfig()).eval()


def generate(engine, policy, tiny_policy, requests, **options):
    options = {"max_response_length": 6, "temperature": 1.0, **options}
    return sample_rollouts(engine, policy, load_tokenizer(tiny_policy), requests, **options)


def test_logprobs_are_those_of_the_policy(plain_engine, policy, tiny_policy, make_prompt):
    requests = [RolloutRequest(make_prompt(i), 0, seed=i) for i in range(4)]
    for rollout in generate(plain_engine.PlainEngine(), policy, tiny_policy, requests):
        sequence = [*rollout.prompt.token_ids, *rollout.token_ids.tolist()]
        expected = sequence_logprobs(policy, [sequence])[0][-len(rollout.token_ids) :]
        assert torch.allclose(torch.from_numpy(rollout.logprobs), expected, atol=1e-5)


def test_a_response_depends_on_its_own_seed_only(plain_engine, policy, tiny_policy, make_prompt):
    engine = plain_engine.PlainEngine()
    requests = [RolloutRequest(make_prompt(i), 0, seed=i) for i in range(4)]
    together = generate(engine, policy, tiny_policy, requests)
    assert generate(engine, policy, tiny_policy, requests[::-1]) == together[::-1]
    assert len({tuple(rollout.token_ids.tolist()) for rollout in together}) > 1


def test_greedy_sampling_agrees_with_the_engine_of_the_library(plain_engine, policy, tiny_policy, make_prompt):
    from dynamo_lightning.engines.transformers import TransformersEngine

    requests = [RolloutRequest(make_prompt(i), 0, seed=i) for i in range(2)]
    plain, library = (
        generate(engine, policy, tiny_policy, requests, temperature=0)
        for engine in (plain_engine.PlainEngine(), TransformersEngine())
    )
    assert [rollout.token_ids.tolist() for rollout in plain] == [rollout.token_ids.tolist() for rollout in library]


@pytest.mark.slow
def test_a_run_with_the_engine_of_the_page_trains(plain_engine):
    text = PAGE.read_text()
    command = re.search(r"python -m dynamo_lightning (fit (?:.*\\\n)*.*)\n", text).group(1).replace("\\\n", " ")
    cli = main([*command.split(), "--trainer.logger", "false"])
    assert cli.trainer.num_training_batches == 2 and cli.trainer.current_epoch == 1
    assert cli.trainer.global_step > 0  # an iteration whose rewards are all equal has no optimizer step
    assert type(cli.model.collector.generator).__name__ == "PlainEngine"


def test_a_length_that_the_engine_does_not_take_names_the_option(plain_engine, policy, tiny_policy, make_prompt):
    requests = [RolloutRequest(make_prompt(0), 0, seed=0)]
    with pytest.raises(ValueError, match=r"9 tokens, but model\.generator\.max_length is 8: raise it"):
        generate(plain_engine.PlainEngine(max_length=8), policy, tiny_policy, requests)

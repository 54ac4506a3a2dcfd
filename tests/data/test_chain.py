"""The chain task, its reward and its policy."""

import hashlib
import itertools
import random
import re

import numpy as np
import pytest
import torch

from dynamo_lightning.allocation.variance import best_variance_ratio
from dynamo_lightning.cli import DynamoCLI, main
from dynamo_lightning.data.chain import (
    KINDS,
    LENGTHS,
    Chain,
    ChainReward,
    noisy_demonstrations,
    read_right_responses,
    split_chains,
    write_response,
    write_task,
)
from dynamo_lightning.data.prompts import load_prompts
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.errors import UserError
from dynamo_lightning.policy.embedded import local_path
from dynamo_lightning.policy.loading import PolicyConfig, load_policy, load_tokenizer

MODEL = "embedded:chain-qwen3"


@pytest.fixture(scope="module")
def shipped():
    """The shipped policy in evaluation mode, and its tokenizer."""
    return load_policy(MODEL, PolicyConfig()).eval(), load_tokenizer(MODEL)


def walk(prompt):
    """Right response of a chain, from the rules as the documentation states them in words."""
    scrambles = {"X": "7491603852", "Y": "2608937514"}
    place, response = int(prompt[0]), ""
    for label, move in zip(prompt[1:-1:2], prompt[2:-1:2], strict=True):
        if move in "RLFB":
            place = (place + {"R": 1, "L": -1, "F": 3, "B": -3}[move]) % 10
        elif move == "M":
            place = {0: 9, 1: 8, 2: 7, 3: 6, 4: 5, 5: 4, 6: 3, 7: 2, 8: 1, 9: 0}[place]
        elif move == "S":
            place = {0: 1, 1: 0, 2: 3, 3: 2, 4: 5, 5: 4, 6: 7, 7: 6, 8: 9, 9: 8}[place]
        else:
            place = int(scrambles[move][place])
        response += f"{label}{place}"
    return f"{response}\\boxed{{{place}}}"


def test_a_chain_by_hand():
    assert write_response("walk", 4, "RLR") == "a5b4c5\\boxed{5}"
    assert write_response("jump", 8, "FB") == "a1b8\\boxed{8}"
    assert write_response("mirror", 3, "SM") == "a2b7\\boxed{7}"
    assert write_response("scramble", 0, "XY") == "a7b5\\boxed{5}"


def test_answers_are_right():
    for chain in itertools.chain(*split_chains(seed=0)):
        assert re.fullmatch(r"\d([a-z][A-Z])+=", chain.prompt)
        assert chain.answer == walk(chain.prompt), chain


def test_every_move_is_a_permutation():
    for kind in KINDS.values():
        for move in kind.moves.values():
            assert sorted(move) == list(range(10))


def test_splits_are_large_enough_balanced_and_disjoint():
    train, test = split_chains(seed=0)
    assert len(train) >= 1000 and len(test) >= 500
    assert len({chain.prompt for chain in train + test}) == len(train) + len(test)
    for chains in (train, test):
        counts = np.unique([f"{chain.kind} {chain.length}" for chain in chains], return_counts=True)[1]
        assert len(counts) == len(KINDS) * len(LENGTHS) and len(set(counts)) == 1


def test_prompt_ids_of_the_shipped_files_are_disjoint_and_nothing_is_too_long(shipped):
    sets = [
        load_prompts(PromptSource(f"embedded:chain/{split}.jsonl", name="chain", template="{prompt}"), shipped[1], 42)
        for split in ("train", "test")
    ]
    ids = [{prompt.prompt_id for prompt in each.prompts} for each in sets]
    assert [len(each) for each in ids] == [1152, 512] and not ids[0] & ids[1]
    assert not any(each.num_too_long or each.num_merged for each in sets)
    lengths = [len(shipped[1](prompt.answer).input_ids) + 1 for each in sets for prompt in each.prompts]
    assert (min(lengths), max(lengths)) == (20, 50)


def test_shipped_files_are_what_the_module_writes(tmp_path):
    write_task(str(tmp_path), num_short_demonstrations=10, num_demonstrations=10)
    for name in ("train.jsonl", "test.jsonl"):
        with open(local_path(f"embedded:chain/{name}"), "rb") as file:
            assert file.read() == (tmp_path / name).read_bytes()
    with open(local_path(f"{MODEL}/tokenizer.json")) as file:
        assert file.read() == (tmp_path / "chain-qwen3" / "tokenizer.json").read_text()


def test_data_depend_on_the_seed_alone():
    """Checksums of what seed 0 gives, so that the shipped policy can be rebuilt from the same demonstrations."""

    def checksum(rows):
        return hashlib.sha256("\n".join(map(str, rows)).encode()).hexdigest()[:16]

    assert checksum(chain.prompt for chain in itertools.chain(*split_chains(seed=0))) == "0e4f3ecf1fea5d41"
    assert checksum(map("".join, noisy_demonstrations(500, 5, seed=0))) == "d3d4dbddca426f99"
    assert checksum(map("".join, noisy_demonstrations(500, 20, seed=0))) == "b94f0b313d6657e9"
    assert split_chains(seed=1) != split_chains(seed=0)


def test_held_out_prompts_are_never_demonstrated():
    held_out = {chain.prompt for chain in split_chains(seed=0)[1]}
    demonstrated = {prompt for prompt, _ in noisy_demonstrations(20_000, 5, seed=0)}
    assert not held_out & demonstrated
    short = [prompt for prompt in held_out if len(prompt) == 12]
    assert short  # of which 20,000 demonstrations would otherwise hold most


def test_the_demonstrator_errs_with_its_kinds_rate_and_goes_on_from_the_wrong_place():
    steps = {kind: [0, 0] for kind in KINDS}
    for prompt, response in noisy_demonstrations(8_000, 20, seed=0):
        kind = next(name for name, each in KINDS.items() if prompt[2] in each.moves)
        place = int(prompt[0])
        for move, reached in zip(prompt[2:-1:2], response.partition("\\")[0][1::2], strict=True):
            steps[kind][0] += int(reached) != KINDS[kind].moves[move][place]
            steps[kind][1] += 1
            place = int(reached)
        assert response.endswith(f"\\boxed{{{place}}}")
    for kind, (errors, total) in steps.items():
        deviation = 4 * np.sqrt(KINDS[kind].error_rate * (1 - KINDS[kind].error_rate) / total)
        assert abs(errors / total - KINDS[kind].error_rate) <= deviation


def test_the_reward_pays_exactly_the_right_response():
    reward = ChainReward()
    answer = "a5b4c5\\boxed{5}"
    assert reward("4aRbLcR=", answer, answer) == 1.0
    for wrong in ("a5b6c5\\boxed{5}", "a5b4c5\\boxed{4}", "a5b4c5", answer + " ", " " + answer, "\\boxed{5}", ""):
        assert reward("4aRbLcR=", wrong, answer) == 0.0, wrong


@pytest.mark.parametrize("answer", ["48", "a5b4", "a5b4\\boxed{44}", "\\boxed{4}"])
def test_the_reward_refuses_answers_of_other_data_sets(answer):
    ChainReward().check_answer("a5b4\\boxed{4}")
    with pytest.raises(UserError, match=r"model\.reward"):
        ChainReward().check_answer(answer)


def test_the_policy_is_small(shipped):
    assert sum(parameter.numel() for parameter in shipped[0].parameters()) <= 2_000_000


def test_exact_success_is_the_product_of_the_tokens_probabilities(shipped):
    """Against a token-by-token reference without batching or padding."""
    policy, tokenizer = shipped
    chains = [chain for chain in split_chains(seed=0)[1] if chain.kind == "jump" and chain.length < 10][:3]
    read = read_right_responses(policy, tokenizer, chains, batch_size=2)
    for chain, rate, greedy in zip(chains, read.success_rates, read.greedy, strict=True):
        tokens = tokenizer(chain.prompt).input_ids
        expected, is_greedy = 1.0, True
        for token in [*tokenizer(chain.answer).input_ids, tokenizer.eos_token_id]:
            with torch.no_grad():
                probabilities = policy(torch.tensor([tokens])).logits[0, -1].double().softmax(-1)
            expected *= float(probabilities[token])
            is_greedy &= int(probabilities.argmax()) == token
            tokens.append(token)
        assert rate == pytest.approx(expected, rel=1e-4)
        assert greedy == is_greedy


def test_exact_success_agrees_with_sampling(shipped):
    """128 responses to each of two chains, within four standard deviations."""
    from dynamo_lightning.engines.transformers import TransformersEngine
    from dynamo_lightning.rollout.runner import sample_rollouts
    from dynamo_lightning.types import Prompt, RolloutRequest

    policy, tokenizer = shipped
    chains = [
        next(c for c in split_chains(seed=0)[1] if (c.kind, c.length) == cell) for cell in (("jump", 8), ("mirror", 5))
    ]
    seeds = random.Random(0)
    for chain, rate in zip(chains, read_right_responses(policy, tokenizer, chains).success_rates, strict=True):
        prompt = Prompt(1, chain.prompt, chain.prompt, tuple(tokenizer(chain.prompt).input_ids), chain.answer)
        requests = [RolloutRequest(prompt, index, seeds.getrandbits(62)) for index in range(128)]
        rollouts = sample_rollouts(
            TransformersEngine(128), policy, tokenizer, requests, max_response_length=52, temperature=1.0
        )
        right = np.mean([ChainReward()(chain.prompt, rollout.text, chain.answer) for rollout in rollouts])
        assert abs(right - rate) <= 4 * np.sqrt(rate * (1 - rate) / 128)


def test_the_policy_has_headroom_and_room_for_allocation(shipped):
    """The gates before any claim: exact pass@1 20 to 45 %, greedy at least 85 %, best variance ratio at most 0.7."""
    train, test = split_chains(seed=0)
    read = read_right_responses(*shipped, test)
    assert 0.20 <= np.mean(read.success_rates) <= 0.45
    assert np.mean(read.greedy) >= 0.85
    assert min(read.success_rates) <= 0.01 and max(read.success_rates) >= 0.9
    rates = np.array(read_right_responses(*shipped, train).success_rates)
    assert best_variance_ratio(rates * (1 - rates)) <= 0.7


def test_success_falls_with_length_as_the_demonstrators(shipped):
    """About (1 − ε)^n: the policy has learnt the demonstrator's distribution, not a sharper or a flatter one."""
    generator = random.Random(0)
    for name, kind in KINDS.items():
        for length in (5, 10):
            chains = []
            for _ in range(64):
                start, moves = generator.randrange(10), "".join(generator.choices(list(kind.moves), k=length))
                prompt = f"{start}{''.join(map(''.join, zip('abcdefghijklmnopqrst', moves, strict=False)))}="
                chains.append(Chain(prompt, write_response(name, start, moves), name, length))
            steps = np.array(read_right_responses(*shipped, chains).step_accuracies)
            assert np.mean(steps) == pytest.approx(1 - kind.error_rate, abs=0.06), (name, length)


@pytest.mark.parametrize("overlays", [[], ["--config=overlays/grpo.yaml"]])
def test_the_config_parses_and_leaves_room_for_every_prompt_and_response(monkeypatch, tmp_path, overlays):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DynamoCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(DynamoCLI, "_run_subcommand", lambda self, subcommand: None)
    config = main(["fit", "--config=chain.yaml", *overlays]).config["fit"]
    assert config.data.max_prompt_length >= max(2 * length + 2 for length in LENGTHS)
    assert config.model.sampling.max_response_length >= max(2 * length + len("\\boxed{0}") + 1 for length in LENGTHS)
    assert config.model.reward.class_path == "dynamo_lightning.data.chain.ChainReward"


def test_the_warm_start_config_parses(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DynamoCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(DynamoCLI, "_run_subcommand", lambda self, subcommand: None)
    config = main(["warm_start", "--config=warm_start_chain.yaml"]).config["warm_start"]
    assert config.model.policy.init == "random"
    assert config.trainer.max_steps == config.lr_scheduler.init_args.total_steps


@pytest.mark.slow
def test_the_config_trains(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cli = main(
        ["fit", "--config=chain.yaml", "--trainer.max_steps=2", "--trainer.limit_val_batches=1",
         "--data.prompts_per_batch=16", "--data.eval_rollouts_per_prompt=1", "--model.pass_at_k=[1]"]
    )  # fmt: skip
    assert cli.trainer.global_step == 2
    assert 0 <= float(cli.trainer.callback_metrics["reward"]) <= 1

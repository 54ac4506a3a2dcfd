"""Attacks on the verifier, by kind, under the rewards of the shipped training configs."""

import json
from pathlib import Path

import pytest
import yaml

from dynamo_lightning.cli import shipped_configs
from dynamo_lightning.rewards import MathReward

ATTACKS = [json.loads(line) for line in Path(__file__).with_name("attacks.jsonl").read_text("utf-8").splitlines()]
REFUSED = [attack for attack in ATTACKS if not attack["paid"]]
DEBATABLE = ("percent for number", "unit mismatch")
TRAINING_CONFIGS = ("quickstart.yaml", "qwen.yaml", "overlays/data_math.yaml", "overlays/data_openmath.yaml")


def shipped_reward(config: str) -> MathReward:
    settings = yaml.safe_load((shipped_configs() / config).read_text())["model"]["reward"]
    return MathReward(**settings.get("init_args", {}))


def paid_kinds(reward: MathReward, attacks: list[dict]) -> set[str]:
    return {attack["kind"] for attack in attacks if reward("", attack["response"], attack["gold"])}


def test_there_are_57_kinds_to_be_refused_with_several_strings_each_and_3_to_be_paid():
    kinds = [attack["kind"] for attack in REFUSED]
    assert len(set(kinds)) == 57
    assert min(kinds.count(kind) for kind in kinds) >= 2
    assert len({attack["kind"] for attack in ATTACKS}) == 60


@pytest.mark.parametrize("config", TRAINING_CONFIGS)
def test_shipped_training_rewards_pay_no_attack(config):
    assert paid_kinds(shipped_reward(config), REFUSED) == set()


@pytest.mark.parametrize("answer_kind", ["number", "expression"])
def test_what_should_be_paid_is_paid(answer_kind):
    reward = MathReward(answer_kind=answer_kind)
    unpaid = [a["response"] for a in ATTACKS if a["paid"] and not reward("", a["response"], a["gold"])]
    assert unpaid == []


def test_expressions_are_paid_only_as_restated_problems():
    paid = paid_kinds(MathReward(), REFUSED)
    assert paid == {kind for kind in paid if kind.startswith("problem restated")} != set()


def test_lenient_units_pay_the_two_debatable_kinds_and_no_other():
    assert paid_kinds(MathReward(answer_kind="number", lenient_units=True), REFUSED) == set(DEBATABLE)


def test_a_required_box_pays_no_attack():
    assert paid_kinds(MathReward(require_boxed=True, answer_kind="number"), REFUSED) == set()

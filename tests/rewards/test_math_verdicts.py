"""Verdicts that version 0.1 got wrong, one a line of `verdicts.jsonl`, with the right ones."""

import json
from pathlib import Path

import pytest

from dynamo_lightning.rewards import MathReward

VERDICTS = [json.loads(line) for line in Path(__file__).with_name("verdicts.jsonl").read_text("utf-8").splitlines()]
KINDS = sorted({verdict["kind"] for verdict in VERDICTS})


@pytest.mark.parametrize("kind", KINDS)
def test_verdicts_are_right(kind):
    wrong = [
        verdict
        for verdict in VERDICTS
        if verdict["kind"] == kind
        and MathReward(answer_kind=verdict.get("answer_kind", "expression"))("", verdict["response"], verdict["gold"])
        != float(verdict["verdict"])
    ]
    assert wrong == []
    assert len(VERDICTS) == 104

import json

import pytest

from dynamo_lightning.callbacks import GroupTable
from dynamo_lightning.errors import UserError

# Solved, mixed and hopeless groups of 2, 4 and 2 rollouts of 3 tokens each.
GROUPS = [(1.0, 1.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0)]


def test_each_iteration_has_a_line_with_its_groups(train, make_record):
    run = train([GroupTable(every_n_iterations=2)], script=lambda i: make_record(i, rewards=GROUPS), epoch_length=3)
    lines = [json.loads(line) for line in open(f"{run.folder}/groups.jsonl")]
    assert [line["iteration"] for line in lines] == [1, 3]
    assert lines[0] == {
        "iteration": 1,
        "prompt_ids": [0, 1, 2],
        "sizes": [2, 4, 2],
        "successes": [2, 1, 0],
        "tokens": [6, 12, 6],
        "expected": [0.5, 0.5, 0.5],
    }


def test_shares_of_groups_and_of_their_tokens_are_logged(train, make_record):
    run = train([GroupTable()], script=lambda i: make_record(i, rewards=GROUPS), epoch_length=1)
    assert run.logged["groups/frac_solved"] == run.logged["groups/frac_mixed"] == [pytest.approx(1 / 3)]
    assert run.logged["groups/token_frac_mixed"] == [pytest.approx(0.5)]
    assert run.logged["groups/token_frac_hopeless"] == [pytest.approx(0.25)]


def test_an_interval_below_one_is_refused():
    with pytest.raises(UserError, match=r"GroupTable\.every_n_iterations must be at least 1, got 0"):
        GroupTable(every_n_iterations=0)

r"""The reward on the gold answers of all seven benchmarks: each is right for its own row and wrong for others.

What "the same value" means is decided here without the reward: equal texts, equal numbers, or a pair listed by hand.
"""

import random
import re
from fractions import Fraction

import pytest
import yaml

from dynamo_lightning.data.problems import merge_rows
from dynamo_lightning.data.rows import read_rows
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.rewards import MathReward
from dynamo_lightning.rewards.math import _read_reference, spell

NUM_ROWS = {
    "aime24": 30,
    "aime25": 30,
    "amc23": 40,
    "math500": 500,
    "minerva": 272,
    "olympiadbench": 675,
    "gsm8k": 1319,
}
NOT_MATHEMATICS = {
    ("minerva", 5): "np.arcsin(10/13): code",
    ("olympiadbench", 73): "f(x)=a x+b, where …: a sentence",
}
"""Rows whose gold cannot be read: they are compared as text."""
FALSE_ACCEPTS = {
    ("2,3,4", "2,4,3"): "a list without brackets may be in any order",
}
"""Pairs of a gold answer and a wrong one that is accepted."""
WRONG_ANSWERS_PER_ROW = 12
REWARD = MathReward(unparsable="text")


@pytest.fixture(scope="module")
def gold(benchmark_files) -> dict[str, list[str]]:
    return gold_answers(benchmark_files)


def gold_answers(folder):
    """The gold answers by benchmark, read as the shipped config says."""
    from dynamo_lightning.cli import shipped_configs

    config = yaml.safe_load((shipped_configs() / "overlays" / "benchmark_files.yaml").read_text())
    answers = {}
    for settings in config["data"]["test"]:
        source = PromptSource(**{**settings, "path": settings["path"].replace("benchmark_files", str(folder))})
        problems, _, _ = merge_rows(read_rows(source.path, None, "train", "data.test"), source, "data.test")
        answers[source.label] = [problem.answer for problem in problems]
    return answers


def in_responses(answer):
    """The answer as models give it."""
    bare = re.sub(r"(?<!\\)\$", "", answer)
    yield rf"We try \boxed{{0}} first, which fails. Therefore, the final answer is $\boxed{{{bare}}}$."
    yield f"So we get\n\\[\n\\boxed{{ {bare} }}.\n\\]\n"
    larger = re.sub(r"\\d?frac", r"\\dfrac", bare)
    yield rf"**Final Answer**: \(\boxed{{{larger}}}\)"
    tight = re.sub(r"\\(?:left|right)(?![a-z])|(?<=[,+]) +", "", bare)
    yield rf"Hence \boxed{{{tight}}}"


def value(answer):
    """The number that an answer is, if it is a plain one, else its spelling."""
    text = spell(answer).replace(r"\%", "").replace(r"\times10^", "e").replace(r"^\circ", "").replace(r"^{\circ}", "")
    text = re.sub(r"e\{(-?\d+)\}$", r"e\1", text)
    text = re.sub(r"^(-?)\\frac(?:\{(-?\d+)\}\{(-?\d+)\}|(\d)(\d))$", r"\1\2\4/\3\5", text).replace("--", "")
    text = re.sub(r"^[a-zA-Z]+(?:\([a-zA-Z]\))?=", "", text)  # x = 5 is 5
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return text


def test_every_row_has_an_answer(gold):
    assert {name: len(answers) for name, answers in gold.items()} == NUM_ROWS
    assert sum(NUM_ROWS.values()) == 2866


def test_every_gold_answer_is_right_in_realistic_responses(gold):
    rejected = [
        (name, row, answer, response)
        for name, answers in gold.items()
        for row, answer in enumerate(answers)
        for response in in_responses(answer)
        if REWARD("", response, answer) != 1.0
    ]
    assert rejected == []


def test_every_gold_answer_is_mathematics_but_those_named(gold):
    unread = {
        (name, row)
        for name, answers in gold.items()
        for row, answer in enumerate(answers)
        if not _read_reference(answer)
    }
    assert unread == NOT_MATHEMATICS.keys()


def false_accepts(answers, wrong_answers_per_row, seed=0):
    """Wrong answers that were accepted, each `(row, gold, wrong)`, and how many were tried."""
    generator, accepted, num_tried = random.Random(seed), [], 0
    values = {answer: value(answer) for answer in answers}
    for row, answer in enumerate(answers):
        others = [other for other in values if values[other] != values[answer]]
        for other in generator.sample(others, min(wrong_answers_per_row, len(others))):
            num_tried += 1
            bare = re.sub(r"(?<!\\)\$", "", other)
            if REWARD("", rf"The answer is \boxed{{{bare}}}.", answer):
                accepted.append((row, answer, other))
    return accepted, num_tried


@pytest.mark.parametrize(
    "name",
    ["aime24", "aime25", "amc23", "math500", "gsm8k"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("minerva", "olympiadbench")],
)
def test_answers_of_other_rows_are_wrong(gold, name):
    accepted, num_tried = false_accepts(gold[name], WRONG_ANSWERS_PER_ROW)
    assert [pair for pair in accepted if pair[1:] not in FALSE_ACCEPTS] == []
    assert len(accepted) <= 0.001 * num_tried

"""Reward functions as users write them; imported by worker processes, hence not a test module."""

import asyncio
import decimal
import fractions
import time

import numpy as np


def length(prompt, response, answer):
    return len(response)


async def slow_length(prompt, response, answer):
    await asyncio.sleep(0.01)
    return len(response)


def only_long(prompt, response, answer):
    return 1.0 if len(response) > 3 else None


def scalar(prompt, response, answer):
    import torch

    return {
        "np.bool_": np.bool_(True),
        "np.float32": np.float32(0.5),
        "np.int64": np.int64(3),
        "0-d": np.array(0.25),
        "torch": torch.tensor(0.75),
        "bfloat16": torch.tensor(2.0, dtype=torch.bfloat16, requires_grad=True),
        "torch.bool": torch.tensor(True),
        "decimal": decimal.Decimal("1.5"),
        "fraction": fractions.Fraction(1, 8),
        "true": True,
        "list": [0.5],
        "vector": np.array([0.5]),
        "complex": 1j,
        "huge": 10**400,
        "decimal nan": decimal.Decimal("NaN"),
    }[response]


def dataset_length(prompt, response, answer, dataset, source):
    return len(dataset) + len(source) / 10


def other_names(question, completion, gold, **columns):
    return float("question" not in columns and "level" in columns)


def needs_level(prompt, response, answer, level):
    return level


def looks_up(prompt, response, answer, **columns):
    return {"easy": 1.0}[columns.get("level")]


def sees_special(prompt, response, answer, response_with_special_tokens):
    return float("<think>" in response_with_special_tokens and "<think>" not in response)


def shouts(prompt, response, answer):
    return float("<think>" in response)


def any_answer(prompt, response, answer, answers):
    return float(response in answers) + len(answers)


def equal(prompt, response, answer):
    return float(response == answer)


def rank_by_length(prompt, responses, answer, response_length):
    """1 for the longest response, and the group's size for its tokens."""
    assert len(response_length) == len(responses)
    return [float(len(response) == max(map(len, responses))) for response in responses]


def group_size(prompt, responses, answer):
    return np.full(len(responses), len(responses))


def too_few(prompt, responses, answer):
    return [1.0]


def hang(prompt, response, answer):
    time.sleep(600)


def hang_if_told(prompt, response, answer):
    if response == "hang":
        time.sleep(600)
    return 1.0

"""Environments of the tests, and an engine that talks with them."""

import threading
from typing import ClassVar

import numpy as np

from dynamo_lightning.engines.engine import Completion, Engine
from dynamo_lightning.environments import Environment, Step


class Countdown(Environment):
    """Asks again until it has been told `tries` times; rewards what was said last."""

    closed: ClassVar[list] = []

    def __init__(self, tries=3, observation="?"):
        self.tries, self.observation = tries, observation

    def reset(self, prompt):
        self.prompt_id = prompt.prompt_id
        self.thread = threading.get_ident()

    def step(self, response):
        self.tries -= 1
        if self.tries <= 0:
            return Step(reward=float(len(response.text)))
        return Step(self.observation, reward=10.0)

    def close(self):
        self.closed.append(self.prompt_id)


class Speaker(Engine):
    """Says `n` letters in its n-th turn, so that tokens tell the turns apart; remembers what it was asked."""

    def __init__(self):
        self.asked = []
        self.synced_version = 7

    def generate(self, policy, tokenizer, requests, *, temperature):
        self.asked.append(list(requests))
        completions = []
        for request in requests:
            turn = request.token_ids.count(ord("?")) + 1
            text = "abc"[turn - 1] * min(turn, request.max_tokens)
            completions.append(
                Completion(list(map(ord, text)), np.full(len(text), -turn), turn <= request.max_tokens, turn)
            )
        return completions

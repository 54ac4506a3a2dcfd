"""An engine that says what it is told to, and a policy that is none; tokens are the characters of a text."""

from dynamo_lightning.distributed import run_seed
from dynamo_lightning.engines.engine import Completion, Engine
from dynamo_lightning.rollout.requests import make_requests


class NoPolicy:
    device = None

    def eval(self):
        pass


class Characters:
    """A tokenizer of characters."""

    chat_template = None

    def decode(self, token_ids, skip_special_tokens):
        return "".join(map(chr, token_ids))

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(character) for character in text]}


class TextEngine(Engine):
    """Responds to each rollout's request with `text_of(request)`, as long as no other turn is asked for.

    Args:
        text_of: Of a `RolloutRequest`.
        batch: What is going to be sampled, in training.
        one_by_one: Batches of one, the last first.
    """

    def __init__(self, text_of, batch, one_by_one=False):
        self.text_of, self.one_by_one = text_of, one_by_one
        self.rollout_of = {request.seed: request for request in make_requests(batch, "train", run_seed())}

    def batches(self, lengths):
        positions = range(len(lengths))
        return [[position] for position in reversed(positions)] if self.one_by_one else [list(positions)]

    def generate(self, policy, tokenizer, requests, *, temperature):
        texts = [self.text_of(self.rollout_of[request.seed]) for request in requests]
        return [Completion(list(map(ord, text)), [-1.0] * len(text), True, 0) for text in texts]

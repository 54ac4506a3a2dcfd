"""Environment × engine → rollouts: conversations side by side, one turn of all of them at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from dynamo_lightning.distributed import derive_seed, max_over_ranks, stop_together
from dynamo_lightning.engines.engine import Completion, Engine, Request, Sampler, check_completions
from dynamo_lightning.environments import Environment, Response, SingleTurn, Step
from dynamo_lightning.errors import UserError
from dynamo_lightning.rollout.observations import observation_tokens
from dynamo_lightning.types import BoolArray, IntArray, Rollout, RolloutRequest, Status, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_THREADS = 32
"""Environments that work side by side."""


class RolloutRunner:
    """Plays conversations of the policy with an environment.

    Args:
        engine: For messages about what it returns.
        environment: Copied for each rollout.
        max_response_length: Tokens after the prompt, observations included, after which a conversation is cut off.
    """

    def __init__(self, engine: Engine, environment: Environment, max_response_length: int) -> None:
        self.engine = engine
        self.environment = environment
        self.max_response_length = max_response_length

    def play(
        self,
        sample: Sampler,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[RolloutRequest],
        lockstep: torch.device | None = None,
    ) -> list[Rollout]:
        """Sample one rollout for each request.

        Args:
            sample: The engine.
            tokenizer: Decodes the responses and tokenises the observations.
            requests: `[num_rollouts]`.
            lockstep: Where ranks communicate, if all of them must sample equally often and equally many, as a sharded
                policy must; `None` if each may go its own way.

        Returns:
            `[num_rollouts]`, in the order of the requests.

        Raises:
            UserError: If the environment returns something else than a `Step`.
            RunError: If the engine returns something else than was asked for.
        """
        is_single = type(self.environment) is SingleTurn  # it waits for nothing: no threads, one turn
        together = None if is_single else lockstep
        conversations = [Conversation(request, copy.deepcopy(self.environment), tokenizer) for request in requests]
        with ThreadPoolExecutor(max_workers=NUM_THREADS) as threads:
            each = map if is_single else threads.map
            try:
                list(each(Conversation.reset, conversations))
                while True:
                    running = [conversation for conversation in conversations if conversation.status is None]
                    count = len(running) if together is None else max_over_ranks(len(running), together)
                    if not count:
                        break
                    asked = [conversation.request(self.max_response_length) for conversation in running]
                    filler = Request(requests[0].prompt.token_ids, requests[0].seed, 1)
                    asked += [filler] * (count - len(running))
                    completions = sample(asked)
                    check_completions(asked, completions, self.engine)
                    for conversation, completion in zip(running, completions, strict=False):
                        conversation.hear(completion)
                    self.go_on(running, list(each(Conversation.step, running)), together)
            finally:
                list(each(Conversation.close, conversations))
        return [conversation.rollout() for conversation in conversations]

    def go_on(
        self, running: Sequence[Conversation], steps: Sequence[Step | None], together: torch.device | None
    ) -> None:
        """Add what the environments said; an error of any rank is raised on all, which would wait for it."""
        message = ""
        try:
            for conversation, step in zip(running, steps, strict=True):
                if conversation.status is None:
                    conversation.add(step, self.max_response_length)
        except UserError as error:
            if together is None:
                raise
            message = str(error)
        if together is not None:
            stop_together(message)


class Conversation:
    """A rollout on its way: `reset`, then `request`, `hear`, `step` and `add` in turn, then `close`.

    `reset`, `step` and `close` call the environment, in any thread.

    Args:
        request: The rollout to sample.
        environment: Its own.
        tokenizer: Decodes the responses and tokenises the observations.
    """

    def __init__(self, request: RolloutRequest, environment: Environment, tokenizer: PreTrainedTokenizerBase) -> None:
        self.rollout_request = request
        self.environment = environment
        self.tokenizer = tokenizer
        self.status: Status | None = None
        self.completions: list[Completion] = []
        self.observations: list[IntArray] = []
        self.texts: list[str] = []
        self.reward: float | None = None
        self.failure = ""

    def fail(self, error: Exception) -> None:
        """Keep what went wrong, but for what was said first."""
        name = type(self.environment).__name__
        self.failure = self.failure or f"the environment {name} raised {type(error).__name__}: {error}"

    def reset(self) -> None:
        """Have the environment begin."""
        try:
            self.environment.reset(self.rollout_request.prompt)
        except Exception as error:  # the user's code: it counts as a reward that fails
            self.fail(error)

    @property
    def length(self) -> int:
        """Tokens after the prompt so far."""
        return sum(len(c.token_ids) for c in self.completions) + sum(map(len, self.observations))

    def request(self, max_response_length: int) -> Request:
        """The next response to sample; of a conversation that has failed to begin one token."""
        own, turn = self.rollout_request, len(self.completions)
        if not turn:
            return Request(own.prompt.token_ids, own.seed, 1 if self.failure else max_response_length)
        said = [part for pair in zip(self.completions, self.observations, strict=True) for part in pair]
        after = np.concatenate([part.token_ids if isinstance(part, Completion) else part for part in said])
        seed = derive_seed(own.seed, "turn", turn)
        return Request((*own.prompt.token_ids, *after.tolist()), seed, max_response_length - self.length)

    def hear(self, completion: Completion) -> None:
        """Take the policy's response."""
        self.completions.append(completion)
        self.texts.append(str(self.tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True)))

    def step(self) -> Step | None:
        """Have the environment answer the last response; `None` if it has failed."""
        last = self.completions[-1]
        if not self.failure:
            try:
                return self.environment.step(Response(self.texts[-1], last.token_ids, last.finished))
            except Exception as error:
                self.fail(error)
        self.status = "failed"
        return None

    def add(self, step: Step | None, max_response_length: int) -> None:
        """Take what the environment made of the last response.

        Raises:
            UserError: If it is no `Step`, its reward no finite number, or its observation cannot be rendered.
        """
        name = f"the environment {type(self.environment).__name__} (model.environment)"
        if not isinstance(step, Step):
            raise UserError(
                f"{name} returned {step!r} from step(): return a Step; Step() without an observation ends the "
                "conversation"
            )
        if step.reward is not None:
            if not math.isfinite(step.reward):
                raise UserError(f"{name} returned the reward {step.reward}: it must be finite")
            self.reward = (self.reward or 0.0) + float(step.reward)
        last = self.completions[-1]
        if not last.finished:
            self.status = "truncated"
        elif step.observation is None:
            self.status = "finished"
        else:
            tokens = observation_tokens(self.tokenizer, step.observation, int(last.token_ids[-1]), name)
            if self.length + len(tokens) < max_response_length:
                self.observations.append(tokens)
            else:  # there is no room for a response
                self.status = "truncated"

    def close(self) -> None:
        """Have the environment release what it holds; an error then loses no rollout."""
        try:
            self.environment.close()
        except Exception as error:
            rank_zero_warn(f"an environment {type(self.environment).__name__} could not be closed: {error}")

    def rollout(self) -> Rollout:
        """The rollout, once it has a status."""
        assert self.status is not None
        parts: list[IntArray] = []
        masks: list[BoolArray] = []
        turns: list[Turn] = []
        for number, completion in enumerate(self.completions):
            start = sum(map(len, parts))
            turns.append(Turn(start, start + len(completion.token_ids), completion.version))
            parts.append(completion.token_ids)
            masks.append(np.ones(len(completion.token_ids), dtype=bool))
            if number < len(self.observations):
                parts.append(self.observations[number])
                masks.append(np.zeros(len(self.observations[number]), dtype=bool))
        given = [c.token_statistics for c in self.completions if c.token_statistics is not None]
        return Rollout(
            self.rollout_request.prompt,
            self.rollout_request.sample_index,
            np.concatenate(parts),
            np.concatenate([completion.logprobs for completion in self.completions]),
            "\n".join(self.texts),
            self.status,
            np.concatenate(masks),
            tuple(turns),
            self.reward,
            self.failure,
            np.concatenate(given) if len(given) == len(self.completions) else None,
        )


def sample_rollouts(
    engine: Engine,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[RolloutRequest],
    *,
    max_response_length: int,
    environment: Environment | None = None,
    **options: Any,
) -> list[Rollout]:
    """Rollouts of an engine as it is, outside of training.

    Args:
        engine: Has the policy's weights.
        policy: The policy.
        tokenizer: Its own.
        requests: `[num_rollouts]`.
        max_response_length: Tokens after the prompt.
        environment: By default each rollout is one response.
        options: Further arguments of `Engine.generate`, such as the temperature.

    Returns:
        `[num_rollouts]`, in the order of the requests.
    """

    def ask(asked: Sequence[Request]) -> list[Completion]:
        return engine.generate(policy, tokenizer, asked, **options)

    return RolloutRunner(engine, environment or SingleTurn(), max_response_length).play(ask, tokenizer, requests)

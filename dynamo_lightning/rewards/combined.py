"""Rewards made of rewards: a weighted sum, and one reward for each data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynamo_lightning.errors import UserError
from dynamo_lightning.rewards.group import GroupReward
from dynamo_lightning.rewards.reward import (
    Components,
    FunctionReward,
    Reward,
    call_reward,
    without_arguments,
)


class CombinedReward(Reward):
    """Base class of rewards that are made of others: answers, warm-up and memory are those of every part."""

    @property
    def needs_group(self) -> bool:  # type: ignore[override]  # computed from the parts
        """True if a part sees all responses of a prompt at once."""
        return any(part.needs_group for part in self.parts)

    def __call__(self, prompt: str, response: str, answer: str, **columns: Any) -> float | None:
        """Return the total, or `None` if no part applies."""
        components = self.components(prompt, response, answer, **columns)
        return self.total(components) if components else None

    def check_answer(self, answer: str) -> None:
        """Check the answer with every part."""
        for part in self.parts:
            part.check_answer(answer)

    def warm_up(self) -> None:
        """Warm up every part."""
        for part in self.parts:
            part.warm_up()

    def free_memory(self) -> None:
        """Empty every part's caches."""
        for part in self.parts:
            part.free_memory()


class WeightedReward(CombinedReward):
    """Weighted sum of rewards, `total = Σ_i weights[i] · rewards[i]`; each reward is also logged by its name.

    A reward that does not apply to a row (`None`) is left out of the sum, and of its own mean in the log.

    Args:
        rewards: The rewards to add.
        weights: One factor for each reward.

    Raises:
        UserError: If there is no reward, the lengths differ, or two rewards have the same name.
    """

    def __init__(self, rewards: list[Reward], weights: list[float]) -> None:
        if not rewards or len(rewards) != len(weights):
            raise UserError(f"rewards and weights must pair up, got {len(rewards)} rewards and {len(weights)} weights")
        names = [reward.name for reward in rewards]
        if len(set(names)) < len(names):
            raise UserError(f"rewards must have different names to be told apart in metrics, got {names}")
        self.rewards = rewards
        self.weights = weights

    @property
    def parts(self) -> Sequence[Reward]:
        """The rewards to add."""
        return self.rewards

    def components(self, prompt: str, response: str, answer: str, **columns: Any) -> dict[str, float]:
        """Return each reward that applies by its name, unweighted."""
        values = {reward.name: call_reward(reward, prompt, response, answer, columns) for reward in self.rewards}
        return {name: value for name, value in values.items() if value is not None}

    def group_components(
        self, prompt: str, responses: Sequence[str], answer: str, columns: Sequence[Mapping[str, Any]]
    ) -> list[Components]:
        """See the base class."""
        merged: list[Components] = [{} for _ in responses]
        for reward in self.rewards:
            for position, part in enumerate(group_totals(reward, prompt, responses, answer, columns)):
                so_far = merged[position]
                if isinstance(so_far, Exception):
                    continue
                merged[position] = part if isinstance(part, Exception) else {**so_far, **part}
        return merged

    def total(self, components: Mapping[str, float]) -> float:
        """Return the weighted sum of `components`."""
        pairs = zip(self.weights, self.rewards, strict=True)
        return sum(weight * components[reward.name] for weight, reward in pairs if reward.name in components)


class DatasetReward(CombinedReward):
    """One reward for each data set, by the data set's name.

    The reward is logged under the name of the reward that applied. In a `WeightedReward` beside others it can be a
    bonus of some data sets only.

    Args:
        rewards: Rewards by the `name` of the data set (by default the file's stem, or the last part of the hub id).
        default: Reward of all other data sets; with `null`, no reward of this kind applies to them.

    Raises:
        UserError: If there is no reward.
    """

    def __init__(self, rewards: dict[str, Reward], default: Reward | None = None) -> None:
        if not rewards:
            raise UserError("DatasetReward needs at least one reward by the name of a data set, got none")
        self.rewards = rewards
        self.default = default

    @property
    def parts(self) -> Sequence[Reward]:
        """The rewards of all data sets."""
        return [*self.rewards.values(), *([self.default] if self.default is not None else [])]

    def of_dataset(self, dataset: str) -> Reward | None:
        """The reward of a data set, if one applies."""
        return self.rewards.get(dataset, self.default)

    def components(self, prompt: str, response: str, answer: str, **columns: Any) -> dict[str, float]:
        """Return the reward of the row's data set by its name.

        Raises:
            TypeError: If the data set's name is not among the columns.
        """
        reward = self._of_columns(columns)
        value = call_reward(reward, prompt, response, answer, columns) if reward is not None else None
        return {} if value is None else {reward.name: value}  # type: ignore[union-attr]

    def group_components(
        self, prompt: str, responses: Sequence[str], answer: str, columns: Sequence[Mapping[str, Any]]
    ) -> list[Components]:
        """See the base class."""
        reward = self._of_columns(columns[0])
        if reward is None:
            return [{} for _ in responses]
        return group_totals(reward, prompt, responses, answer, columns)

    def total(self, components: Mapping[str, float]) -> float:
        """Return the one reward that applied."""
        (value,) = components.values()
        return value

    def check_answer(self, answer: str) -> None:
        """Nothing: an answer's data set decides, see `columns.check_answer`."""

    def _of_columns(self, columns: Mapping[str, Any]) -> Reward | None:
        if "dataset" not in columns:
            raise TypeError("DatasetReward needs the column dataset: score rollouts with RewardScorer, or pass it")
        return self.of_dataset(columns["dataset"])


def group_totals(
    reward: Reward, prompt: str, responses: Sequence[str], answer: str, columns: Sequence[Mapping[str, Any]]
) -> list[Components]:
    """A reward's total of each response of a group under its own name; nothing where it does not apply."""
    parts = reward.group_components(prompt, responses, answer, [without_arguments(own) for own in columns])
    return [part if isinstance(part, Exception) or not part else {reward.name: reward.total(part)} for part in parts]


if TYPE_CHECKING:
    RewardLike = Reward | Callable[..., Any] | Sequence[Reward | Callable[..., Any]]
else:
    # On the command line a reward is a class with options; functions are FunctionReward's.
    RewardLike = Reward


def as_reward(given: RewardLike) -> Reward:
    """Make a reward of what a library user passes: a reward, a function, or a list of them, which are added.

    Raises:
        UserError: If it is none of these, or a list without anything in it.
    """
    if getattr(given, "_lazy_class_type", None) is not None:  # a default of the command line: not picklable by itself
        given = given._lazy_class_type(**given._lazy_kwargs)  # type: ignore[union-attr,operator]
    if isinstance(given, Reward):
        return given
    if isinstance(given, type):
        raise UserError(f"model.reward={given.__name__} is a class: make a reward of it, {given.__name__}()")
    if callable(given):
        return FunctionReward(given)
    if not isinstance(given, Iterable) or isinstance(given, str | Mapping):
        raise UserError(
            f"model.reward={given!r} is a {type(given).__name__}: give a Reward, a function (prompt, response, answer, "
            "**columns) -> float, or a list of them"
        )
    rewards = [as_reward(one) for one in given]
    if not rewards:
        raise UserError("model.reward=[] is an empty list: give at least one reward")
    return rewards[0] if len(rewards) == 1 else WeightedReward(rewards, [1.0] * len(rewards))


__all__ = [
    "CombinedReward",
    "DatasetReward",
    "GroupReward",
    "RewardLike",
    "WeightedReward",
    "as_reward",
]

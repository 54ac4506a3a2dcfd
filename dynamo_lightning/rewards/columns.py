"""Columns of the data against the parameters of rewards: what collides is named, what is missing is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from dynamo_lightning.errors import UserError
from dynamo_lightning.rewards.calling import ADDED_COLUMNS, COLUMNS_ON_REQUEST
from dynamo_lightning.rewards.combined import DatasetReward
from dynamo_lightning.rewards.reward import Reward
from dynamo_lightning.types import Prompt


def check_columns(reward: Reward, prompts: Sequence[Prompt], option: str) -> None:
    """Compare the columns of a data set with what the rewards that apply to it take, before anything is sampled.

    Args:
        reward: The reward.
        prompts: The data set, at least one prompt.
        option: Where the data set stands in the config, for messages.

    Raises:
        UserError: Naming the reward, the column that it needs and the row that lacks it.
    """
    dataset = prompts[0].source
    present: set[str] = set().union(*(prompt.columns for prompt in prompts))
    provided = {*ADDED_COLUMNS, *COLUMNS_ON_REQUEST, "source"}
    replaced = sorted(present & {*ADDED_COLUMNS, *COLUMNS_ON_REQUEST})
    if replaced:
        rank_zero_warn(
            f"{option}: the columns {', '.join(replaced)} of data set {dataset!r} do not reach rewards, which get the "
            "run's own under these names: rename them to have them"
        )
    for part in rewards_of_dataset(reward, dataset):
        signature = part.signature
        collide = sorted(present & signature.taken)
        if collide:
            rank_zero_warn(
                f"{option}: the columns {', '.join(collide)} of data set {dataset!r} have the names of parameters that "
                f"reward {part.name!r} gets anyway, so it does not get the columns: rename one of the two to have them"
            )
        for column in sorted(signature.required - provided):
            lacking = next((prompt for prompt in prompts if column not in prompt.columns), None)
            if lacking is not None:
                place = f" at {lacking.place}" if lacking.place and column in present else ""
                raise UserError(
                    f"model.reward: reward {part.name!r} needs the column {column!r}, which data set {dataset!r} "
                    f"({option}) lacks{place}; its columns besides prompt and answer: "
                    f"{', '.join(sorted(present)) or 'none'}. Add it, or give the parameter a default"
                )


def rewards_of_dataset(reward: Reward, dataset: str) -> Iterator[Reward]:
    """The simple rewards that are computed for a data set."""
    if isinstance(reward, DatasetReward):
        own = reward.of_dataset(dataset)
        if own is not None:
            yield from rewards_of_dataset(own, dataset)
    elif reward.parts:
        for part in reward.parts:
            yield from rewards_of_dataset(part, dataset)
    else:
        yield reward


def check_answer(reward: Reward, prompt: Prompt) -> None:
    """Check all accepted answers of a prompt with the rewards that apply to its data set.

    Raises:
        ValueError: Quoting the answer, if no response could be compared with it.
    """
    for answer in prompt.answers or (prompt.answer,):
        for part in rewards_of_dataset(reward, prompt.source):
            part.check_answer(answer)

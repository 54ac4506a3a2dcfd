"""Failed rewards: their shares, and when they stop a run (it is certain that too many fail, or a reward hangs)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from dynamo_lightning.errors import RunError
from dynamo_lightning.types import Outcome, Score

_HANGING_ROUNDS = 3
"""Time-outs of every worker in a row, without a single reward in time, after which a reward is said to hang."""


class FailureWatch:
    """Counts the failures of a batch while it is scored.

    Args:
        reward_name: For messages.
        time_limit: `ScoringConfig.time_limit`, seconds.
        max_failure_share: `ScoringConfig.max_failure_share`.
        num_workers: `ScoringConfig.num_workers`.
    """

    def __init__(self, reward_name: str, time_limit: float, max_failure_share: float, num_workers: int) -> None:
        self.reward_name = reward_name
        self.time_limit = time_limit
        self.max_failure_share = max_failure_share
        self.num_workers = num_workers
        self.expected: int | None = None
        """Rollouts of the batch on all ranks; as long as it is unknown, nothing is stopped."""
        self._warned = False
        self.reset()

    def expect(self, num_rollouts: int) -> None:
        """Begin to count for a batch of so many rollouts on all ranks, unless its count has begun."""
        if self.expected is None:
            self.expected = num_rollouts

    def reset(self) -> None:
        """Forget the batch."""
        self.expected = None
        self._failures: list[Score] = []
        self._num_scored = self._num_overruns = self._num_hung = 0

    @property
    def none_in_time(self) -> bool:
        """True if rewards overran in this batch, and none was computed."""
        return self._num_overruns > 0 and len(self._failures) == self._num_scored

    def overrun(self) -> None:
        """Take note of a reward that took too long; the first time in a run, say so."""
        self._num_overruns += 1
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"reward {self.reward_name!r}: a response got no reward within model.scoring.time_limit="
                f"{self.time_limit:g} seconds; such rewards count as failed, and more than a share of "
                f"model.scoring.max_failure_share={self.max_failure_share:g} stops the run"
            )

    def add(self, scores: Sequence[Score]) -> None:
        """Take in scores as they come.

        Raises:
            RunError: If it is certain by now that too many of the batch fail, or if all that were tried hang.
        """
        failed = [score for score in scores if score.failure is not None]
        self._num_scored += len(scores)
        self._failures += failed
        self._num_hung += all(score.failure == "timeout" for score in scores)
        if self.expected is None or self.max_failure_share >= 1:
            return
        if len(self._failures) > self.max_failure_share * max(self.expected, self._num_scored):
            raise RunError(
                f"the rewards of {len(self._failures)} of the first {self._num_scored} rollouts failed "
                f"({_kinds(self._failures)}), of a batch of {self.expected}: above model.scoring.max_failure_share="
                f"{self.max_failure_share:g}, so the rest is not scored; first messages:{_messages(self._failures)}"
            )
        if self.none_in_time and self._num_hung >= _HANGING_ROUNDS * self.num_workers:
            raise RunError(
                f"reward {self.reward_name!r} hangs: none of the first {self._num_scored} responses got a reward "
                f"within model.scoring.time_limit={self.time_limit:g} seconds; mend it, or raise the limit"
            )


def check_failure_share(scores: Sequence[Score], max_failure_share: float) -> None:
    """Stop when the rewards of too many rollouts failed: `failures / rollouts > max_failure_share`.

    Args:
        scores: The whole global batch, failures included even if they are to be dropped.
        max_failure_share: `ScoringConfig.max_failure_share`.

    Raises:
        RunError: With the counts and the first messages.
    """
    failures = [score for score in scores if score.failure is not None]
    if failures and len(failures) / len(scores) > max_failure_share:
        raise RunError(
            f"the rewards of {len(failures)} of {len(scores)} rollouts failed ({_kinds(failures)}), a share of "
            f"{len(failures) / len(scores):.3f}, above model.scoring.max_failure_share={max_failure_share:g}; first "
            f"messages:{_messages(failures)}"
        )


def _kinds(failures: Sequence[Score]) -> str:
    return ", ".join(f"{kind}: {sum(s.failure == kind for s in failures)}" for kind in ("timeout", "crash"))


def _messages(failures: Sequence[Score]) -> str:
    return "".join(f"\n  {message}" for message in list(dict.fromkeys(score.message for score in failures))[:3])


def failure_metrics(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Share of rollouts whose reward timed out or crashed, dropped ones included."""
    return {
        f"rewards/frac_{kind}": statistics.fmean(outcome.score.failure == kind for outcome in outcomes)
        for kind in ("timeout", "crash")
    }

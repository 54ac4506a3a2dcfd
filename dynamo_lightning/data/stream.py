"""The stream of prompt batches: sized, stateful and seeded, and the same on every rank.

It is a plain iterable instead of a `DataLoader`, for three reasons: Lightning fetches an unsized or worker-fed loader
one batch ahead, when the statistics that decide on the next allocation are still one step old; what was fetched ahead
is lost on resume; and a distributed sampler would give each rank other prompts, where all ranks share one batch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dynamo_lightning.data.mixture import Mixture
from dynamo_lightning.errors import UserError
from dynamo_lightning.types import Prompt, PromptBatch


class PromptStream:
    """Batches of prompts in a new random order in each pass, every prompt once; or as often as a mixture says.

    An epoch is a pass; with weights above 1 it is several, see `Mixture`. Batches end where a pass ends, so that no
    batch has a prompt twice.

    Each `iter()` yields what is left of the current epoch, or the whole next one if nothing is. The position moves on
    *before* a batch is yielded, so a checkpoint written while the batch is trained on says where to go on.

    A data set that changed between save and load: the position counts prompts, so the pass goes on from the same place
    in the new permutation if it still has so many prompts (a few may come twice or not at all in this one pass);
    otherwise the next pass starts. The same holds for another `prompts_per_batch`.

    Args:
        prompts: The data set.
        prompts_per_batch: Prompts of one RL iteration, over all ranks.
        seed: Seed of the permutations, at least 0; epoch `e` is permuted by `(seed, e)`.
        make_batch: Called with the iteration number and the prompts of a batch when the batch is due.
        mixture: How often the prompts of several data sets come, which follow each other in `prompts`; by default every
            prompt comes once in a pass.
        overfit_batches: Lightning's option of that name: the first so many batches (or that share of them) are yielded
            in every epoch; 0 switches it off.
        drop_last: Whether the last batch of a pass is dropped if it has fewer prompts.

    Raises:
        UserError: If there is no prompt, no full batch under `drop_last`, or an argument is out of range.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        prompts_per_batch: int,
        seed: int,
        make_batch: Callable[[int, Sequence[Prompt]], PromptBatch],
        drop_last: bool = False,
        mixture: Mixture | None = None,
        overfit_batches: int | float = 0,
    ) -> None:
        if prompts_per_batch < 1 or seed < 0:
            raise UserError(f"data.prompts_per_batch={prompts_per_batch} must be at least 1, seed={seed} at least 0")
        self.mixture = mixture or Mixture([len(prompts)], [1.0]) if prompts else None
        smallest = min(self.mixture.pass_sizes) if self.mixture is not None else 0
        if smallest < (prompts_per_batch if drop_last else 1):
            raise UserError(
                f"{smallest} prompts do not fill one batch of data.prompts_per_batch={prompts_per_batch}"
                + (" (data.drop_last is true)" if drop_last else "")
            )
        self.prompts = prompts
        self.prompts_per_batch = prompts_per_batch
        self.seed = seed
        self.make_batch = make_batch
        self.drop_last = drop_last
        self.overfit_batches = overfit_batches
        self.epoch = 0
        """Passes over the data set begun before this one: which permutation it is."""
        self.position = 0
        """Prompts of this pass that were yielded or taken."""
        self.step = 0
        """Batches of this epoch that were yielded; an epoch is a pass unless prompts are taken in between."""
        self.iteration = 0
        """Batches yielded since the run began; never reset."""
        self._permutation: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        """Return the number of batches of a full epoch."""
        assert self.mixture is not None
        per_batch = self.prompts_per_batch
        return sum(size // per_batch if self.drop_last else -(-size // per_batch) for size in self.mixture.pass_sizes)

    def __iter__(self) -> Iterator[PromptBatch]:
        """Yield the remaining batches of this epoch, or those of the next one if none remains."""
        # Lightning stops after `len()` batches without asking for one more, so an epoch is closed by the next one.
        if self.step >= len(self):
            self.step = 0
        if self.overfit_batches and self.step in (0, self._num_repeated()):
            self.epoch = self.position = self.step = 0
        while self.step < len(self):
            if not self._has_batch():
                self.epoch, self.position = self.epoch + 1, 0
            iteration = self.iteration
            prompts = self.take(self.prompts_per_batch)
            self.iteration += 1
            self.step += 1
            yield self.make_batch(iteration, prompts)

    def take(self, count: int) -> list[Prompt]:
        """Take further prompts of the running pass, at most those that are left of it; `iter()` goes on after them.

        An epoch has `len()` batches all the same, which is what Lightning counts: its rest comes out of the next pass.

        Args:
            count: How many.
        """
        taken = self._order()[self.position : self.position + count]
        self.position += len(taken)
        return [self.prompts[i] for i in taken]

    def state_dict(self) -> dict[str, int]:
        """Return the place in the stream, as primitives."""
        return {"epoch": self.epoch, "position": self.position, "step": self.step, "iteration": self.iteration}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on from a saved place; call it before `iter()` yields.

        Raises:
            UserError: If the place is not one of integers from 0.
        """
        place = {key: state_dict.get(key) for key in self.state_dict()}
        if not all(isinstance(value, int) and value >= 0 for value in place.values()):
            raise UserError(f"corrupt place in the prompt stream: {place}")
        self.epoch, self.position, self.step, self.iteration = (state_dict[key] for key in place)

    def _order(self) -> NDArray[np.int64]:
        """Return the order of this pass, positions in `prompts`, `[num_prompts of the pass]`."""
        if self._permutation is None or self._permutation[0] != self.epoch:
            assert self.mixture is not None
            members = self.mixture.members(self.seed, self.epoch)
            generator = np.random.default_rng([self.seed, self.epoch])
            self._permutation = (self.epoch, members[generator.permutation(len(members))])
        return self._permutation[1]

    def _num_repeated(self) -> int:
        """Return the number of batches that `overfit_batches` repeats."""
        share = self.overfit_batches
        return share if isinstance(share, int) else int(len(self) * share)

    def _has_batch(self) -> bool:
        """Return whether this pass has another batch."""
        return len(self._order()) - self.position >= (self.prompts_per_batch if self.drop_last else 1)


class EvaluationStream:
    """The prompts in order, in batches, from the start at each `iter()`; the same on every rank.

    Not a `DataLoader`, to which Lightning would give a distributed sampler.

    Args:
        prompts: The data set.
        prompts_per_batch: Prompts of one evaluation step, over all ranks; the last batch may be shorter.
        make_batch: Called with the number of the batch and its prompts.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        prompts_per_batch: int,
        make_batch: Callable[[int, Sequence[Prompt]], PromptBatch],
    ) -> None:
        self.prompts = prompts
        self.prompts_per_batch = prompts_per_batch
        self.make_batch = make_batch

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.prompts) // self.prompts_per_batch)

    def __iter__(self) -> Iterator[PromptBatch]:
        """Yield every prompt once."""
        for number in range(len(self)):
            start = number * self.prompts_per_batch
            yield self.make_batch(number, self.prompts[start : start + self.prompts_per_batch])

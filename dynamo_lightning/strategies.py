"""FSDP2 as a strategy name: `--trainer.strategy fsdp2`, or `Trainer(strategy="fsdp2")`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from dynamo_lightning.checkpoints import weight_shapes


class FSDP2Strategy(ModelParallelStrategy):
    """Every process works on rollouts of its own; parameters, gradients and optimizer state are spread over all.

    Lightning's own default makes the processes of a node share the same data, cut by tensor parallelism.

    Args:
        save_distributed_checkpoint: Each process writes its part into a folder, which any number of processes can
            resume from; false gathers everything into one file on the first process, which a run with any other
            strategy can resume from too.
        process_group_backend: By default `nccl` on GPUs and `gloo` on CPUs.
        timeout: How long a collective operation waits for other processes before the run stops.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """As Lightning's, data parallel over all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """As Lightning's, which would load part of another policy before it fails."""
        path = str(self.broadcast(checkpoint_path))
        module: Any = self.lightning_module
        module.check_weights(weight_shapes(path))
        return super().load_checkpoint(path, weights_only)


def register() -> None:
    """Make the name known to Lightning."""
    StrategyRegistry.register(
        "fsdp2",
        FSDP2Strategy,
        description="Fully sharded data parallel by PyTorch's fully_shard (FSDP2)",
        override=True,
    )

"""FSDP1 on CPUs, for tests: Lightning passes no device, without which FSDP1 asks for a GPU."""

from contextlib import contextmanager

import torch
from lightning.pytorch.strategies import FSDPStrategy, fsdp
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)
from torch.distributed.fsdp.wrap import enable_wrap


def full_state(module, world_size, rank0_only=True):
    """Lightning's, without off-loading: on a CPU that gives views of memory that is freed at once."""
    options = {"offload_to_cpu": False, "rank0_only": rank0_only}
    return FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(**options),
        FullOptimStateDictConfig(**options),
    )


fsdp._get_full_state_dict_context = full_state


class CPUFSDPStrategy(FSDPStrategy):
    """Lightning's with gloo and the CPU as device."""

    def __init__(self, state_dict_type: str = "full") -> None:
        super().__init__(process_group_backend="gloo", state_dict_type=state_dict_type)

    @contextmanager
    def model_sharded_context(self):
        """What `wrap` does inside."""
        with enable_wrap(
            wrapper_cls=FullyShardedDataParallel,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        ):
            yield

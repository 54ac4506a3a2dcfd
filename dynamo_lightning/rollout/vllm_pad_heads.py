"""Command of version 0.1 for `python -m dynamo_lightning.engines.vllm.pad_heads`."""

from dynamo_lightning.engines.renamed import warn_once
from dynamo_lightning.engines.vllm.pad_heads import write_padded

if __name__ == "__main__":
    from jsonargparse import auto_cli

    warn_once("dynamo_lightning.rollout.vllm_pad_heads", "dynamo_lightning.engines.vllm.pad_heads")
    auto_cli(write_padded, as_positional=False)

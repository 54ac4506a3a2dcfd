"""Name of version 0.1 for `dynamo_lightning.engines.vllm.engine`."""

from dynamo_lightning.engines.renamed import old_names

__getattr__ = old_names(__name__)

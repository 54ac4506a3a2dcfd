"""Engines that are another program's as far as the loop can tell, and one of them that keeps its first weights."""

import copy

from dynamo_lightning.engines.transformers import TransformersEngine


class CopyEngine(TransformersEngine):
    """Another program with a copy of the weights, as far as the loop can tell."""

    uses_external_engine = True
    gives_statistics = False


class OldWeightsEngine(CopyEngine):
    """Keeps the weights that it began with."""

    policy = None

    def generate(self, policy, tokenizer, requests, **options):
        self.policy = self.policy or copy.deepcopy(policy)
        return super().generate(self.policy, tokenizer, requests, **options)

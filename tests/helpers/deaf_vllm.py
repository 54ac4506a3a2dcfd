"""A vLLM engine that takes the first weights only and hides it, as far as our checks of a push can be deceived."""

from dynamo_lightning.engines.vllm.colocated import VLLMColocatedEngine


class DeafEngine(VLLMColocatedEngine):
    has_weights = False

    def push(self, weights, version):
        if not self.has_weights:
            super().push(weights, version)
        self.has_weights = True

    def check_weights(self, expected, version):
        """Finds nothing."""

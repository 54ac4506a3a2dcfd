"""What makes an engine sample at another temperature than it was asked for, as classes to be mixed in."""

import torch


class Hot:
    """Samples at `factor` times the temperature, and reports the log-probabilities of what it did."""

    factor: float

    def generate(self, policy, tokenizer, requests, *, temperature, **options):
        return super().generate(policy, tokenizer, requests, temperature=self.factor * temperature, **options)


class HidesIt:
    """As what it is mixed into, with the log-probabilities that the right temperature would have given."""

    def generate(self, policy, tokenizer, requests, *, temperature, **options):
        completions = super().generate(policy, tokenizer, requests, temperature=temperature, **options)
        for request, completion in zip(requests, completions, strict=True):
            ids = torch.tensor([[*request.token_ids, *completion.token_ids.tolist()]])
            with torch.no_grad():
                logprobs = (policy(ids).logits[0] / temperature).log_softmax(-1)
            positions = torch.arange(len(request.token_ids) - 1, ids.shape[1] - 1)
            completion.logprobs[:] = logprobs[positions, ids[0, len(request.token_ids) :]].numpy()
        return completions

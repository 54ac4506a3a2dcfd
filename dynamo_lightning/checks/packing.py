"""Packed sequences that do not see each other."""

from __future__ import annotations

from dynamo_lightning.checks.case import CheckCase
from dynamo_lightning.checks.result import CheckResult
from dynamo_lightning.policy.agreement import logprob_difference
from dynamo_lightning.policy.forward import packing_difference, token_layout


def check_packing(case: CheckCase) -> CheckResult:
    """The layout of training, and how far neighbours change a sequence in it; what cannot be right ends the set-up."""
    case.policy.eval()
    neighbours, logprobs = packing_difference(case.policy), logprob_difference(case.policy)
    layout = token_layout(case.policy)
    numbers = {"layout": layout, "neighbours": neighbours, "logprobs": logprobs}
    message = (
        f"sequences are {layout}: neighbours change hidden states by {neighbours:.1e} of their size, log-probabilities "
        f"differ from the model's own by {logprobs:.1e} nats"
    )
    if layout == "padded":
        return CheckResult(
            "packing", "warning", f"{message}; another model.policy.attn_implementation may allow packing", numbers
        )
    return CheckResult("packing", "ok", message, numbers)

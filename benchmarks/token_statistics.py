"""Peak memory and time of the vocabulary head, forward and backward, beside the plain path, TRL and Liger.

    python benchmarks/token_statistics.py --json benchmarks/results/token_statistics.json

Every candidate gets the same hidden states, head weight and advantages, and takes the gradient of the clipped surrogate
at ratio 1; losses and gradients are compared with the plain path's. Each measurement is a process of its own, and
candidates take turns, so that a busy machine hits them alike; medians over the rounds. Processor time is printed beside
wall time, since other work on the machine lengthens only the latter. Peak extra memory on the CPU is
the high-water mark of the resident set (VmHWM, reset before the run) above the resident set before; on CUDA
`torch.cuda.max_memory_allocated`. The gradients of hidden states and weight, which every candidate returns, are
subtracted and printed.

The plain path makes float32 logits, log-softmax, log-probabilities and entropies, the latter without gradient. Ours
give Σπ²Λ besides. `--peers PATH` is a folder that TRL and Liger are installed in.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dynamo_lightning.losses.token_statistics import MAX_LOGITS_BYTES, TokenStatistics, chunked_loss, token_statistics

NUM_SEQUENCES = 8  # Liger's chunks are sequences
PLAIN = "plain logits"
Surrogate = Callable[[Tensor, Tensor], Tensor]


def surrogate(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The clipped surrogate at ratio 1, summed over the tokens given."""
    ratio = (logprobs - logprobs.detach()).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
    """Whole logits."""
    logprobs = functional.log_softmax(functional.linear(hidden, weight).float(), dim=-1)
    with torch.no_grad():
        -(logprobs.exp() * logprobs).sum(-1)
    return surrogate(logprobs.gather(-1, targets[:, None]).squeeze(-1), advantages) / len(targets)


def fused(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
    """The loss inside the chunk."""

    def token_loss(found: TokenStatistics, tokens: slice) -> Tensor:
        return surrogate(found.logprobs, advantages[tokens]) / len(targets)

    return chunked_loss(hidden, weight, targets, token_loss)


def recomputed(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
    """The statistics, for any loss."""
    found = token_statistics(hidden, weight, targets, entropy_gradient=False)
    return surrogate(found.logprobs, advantages) / len(targets)


def trl(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
    """What TRL's GRPOTrainer puts in place of the head."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    found = ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", "entropy")
    )
    return surrogate(found[0], advantages) / len(targets)


def liger_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
    """Liger's log-probabilities and entropies; its fallback in torch where there is no Hopper GPU."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    found = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets, return_entropy=True)
    return surrogate(-found[0], advantages) / len(targets)


def liger_grpo(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
    """Liger's loss inside the chunk; no entropies."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    length = len(targets) // NUM_SEQUENCES
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, loss_type="dr_grpo", max_completion_length=length, use_ref_model=False, compiled=False
    )
    ids = targets.view(NUM_SEQUENCES, length)
    states = hidden.view(NUM_SEQUENCES, length, -1)
    return loss(states, weight, ids, torch.ones_like(ids), advantages[::length].contiguous())[0]


CANDIDATES = {
    PLAIN: plain,
    "ours, loss in the chunk": fused,
    "ours, any loss": recomputed,
    "TRL chunked log-prob": trl,
    "Liger scaled cross-entropy": liger_cross_entropy,
    "Liger fused GRPO loss": liger_grpo,
}


def resident_bytes(field: str) -> int:
    """A field of this process's memory status: `VmRSS`, or its high-water mark `VmHWM`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(name: str, device: str, tokens: int, vocab: int, hidden_size: int) -> dict[str, Any]:
    """One forward and backward pass of one candidate, after one over a tiny problem."""
    candidate = CANDIDATES[name]
    for small, (num_tokens, num_entries, width) in ((True, (64, 256, 32)), (False, (tokens, vocab, hidden_size))):
        torch.manual_seed(0)
        hidden = torch.randn(num_tokens, width, device=device).requires_grad_()
        # Logits of standard deviation 3: neither uniform nor all but certain.
        weight = torch.randn(num_entries, width, device=device).mul_(3 / width**0.5).requires_grad_()
        targets = torch.randint(num_entries, (num_tokens,), device=device)
        advantages = torch.randn(NUM_SEQUENCES, device=device).repeat_interleave(num_tokens // NUM_SEQUENCES)
        if not small:
            break
        candidate(hidden, weight, targets, advantages).backward()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_bytes("VmRSS")
    start, processor_start = time.perf_counter(), time.process_time()
    loss = candidate(hidden, weight, targets, advantages)
    loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    peak = (torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")) - before
    assert hidden.grad is not None and weight.grad is not None
    gradients = hidden.grad.nbytes + weight.grad.nbytes
    probe = [float(loss), *(float(g.double().norm()) for g in (hidden.grad, weight.grad))]
    return {
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "peak_extra_bytes": peak - gradients,
        "gradient_bytes": gradients,
        "probe": probe,
    }


def in_a_process(name: str, options: argparse.Namespace) -> dict[str, Any] | str:
    """One measurement in a fresh interpreter; the last line of its error if the candidate does not run."""
    path = os.pathsep.join(part for part in (str(Path.cwd()), options.peers, os.environ.get("PYTHONPATH")) if part)
    sizes = ("--tokens", str(options.tokens), "--vocab", str(options.vocab), "--hidden", str(options.hidden))
    done = subprocess.run(
        [sys.executable, __file__, "--one", name, "--device", options.device, *sizes],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def version(package: str) -> str:
    """Its installed version."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"


def main() -> None:
    """Take the measurements, print the table, write the rows."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 1024)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", help="folder with trl and liger-kernel, if they are not installed")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.device, options.tokens, options.vocab, options.hidden)))
        return
    if options.peers:
        sys.path.append(options.peers)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CANDIDATES}
    failures: dict[str, str] = {}
    for _ in range(options.rounds):
        for name in CANDIDATES:
            if name in failures:
                continue
            result = in_a_process(name, options)
            print(name, result, file=sys.stderr, flush=True)
            if isinstance(result, str):
                failures[name] = result
            else:
                runs[name].append(result)
    keys = ("peak_extra_bytes", "seconds", "processor_seconds")
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in keys}
        for name, found in runs.items()
        if found
    }
    reference, base = runs[PLAIN][0], medians[PLAIN]
    print(
        f"{options.device}, {options.tokens} tokens, vocabulary {options.vocab}, hidden size {options.hidden}, float32"
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {version('trl')}, {version('liger-kernel')}")
    print(f"bound on our chunks {MAX_LOGITS_BYTES / 2**20:.0f} MiB; medians of {options.rounds} rounds")
    print(f"gradients of hidden states and weight (subtracted): {reference['gradient_bytes'] / 2**20:.0f} MiB\n")
    print(f"{'':28}{'peak extra':>12}{'of plain':>10}{'seconds':>9}{'of plain':>10}{'processor':>11}{'of plain':>10}")
    for name in CANDIDATES:
        if name in failures:
            print(f"{name:28}does not run here: {failures[name]}")
            continue
        found = medians[name]
        worst = max(abs(a / b - 1) for a, b in zip(runs[name][0]["probe"], reference["probe"], strict=True))
        print(
            f"{name:28}{found[keys[0]] / 2**20:8.0f} MiB{found[keys[0]] / base[keys[0]]:10.3f}"
            f"{found[keys[1]]:9.2f}{found[keys[1]] / base[keys[1]]:10.2f}"
            f"{found[keys[2]]:11.2f}{found[keys[2]] / base[keys[2]]:10.2f}"
            f"{'' if worst < 1e-3 else f'   loss or gradient differs by {worst:.1%}'}"
        )
    if options.json:
        shared = {"device": options.device, "tokens": options.tokens, "vocab": options.vocab}
        rows = [{"name": name, **shared, **found} for name, found in medians.items()]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

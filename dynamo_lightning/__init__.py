"""RLVR on PyTorch Lightning: DynaMO's rollout allocation and token-level advantage modulation (arXiv 2602.19208)."""

__version__ = "0.1.0"

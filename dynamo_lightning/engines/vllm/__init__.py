"""Sampling by vLLM, in the training process or on servers; nothing here imports vLLM before an engine starts."""

"""Evaluation of a policy: metrics over sampled responses."""

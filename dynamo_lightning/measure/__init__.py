"""Measurements of the policy gradient during training: its variance, from scores of rollouts."""

"""Rollouts of a batch: requests to an engine, rewards, and their distribution over ranks."""

"""Engines that sample responses: token ids in, token ids with their log-probabilities out."""

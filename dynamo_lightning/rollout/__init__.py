"""Sampling responses: who samples how many for whom, and the generators that do it."""

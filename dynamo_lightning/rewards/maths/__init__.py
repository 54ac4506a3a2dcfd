"""Verification of mathematical answers: find the final answer, read it, compare it with the reference answer."""

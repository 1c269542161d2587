"""Greedy and beam search over an engine's candidates."""

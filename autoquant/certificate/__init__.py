"""Proof that what a config claims leaves the function of a model unchanged."""

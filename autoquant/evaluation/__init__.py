"""Perplexity, and tables of it."""

"""Checkpoints on disk: read, rewritten, quantized."""

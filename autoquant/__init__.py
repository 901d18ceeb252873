"""Reads the quantization symmetries of any causal language model off its graph, and proves them."""

from __future__ import annotations

__version__ = "0.1.0"

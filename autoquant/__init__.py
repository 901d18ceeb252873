"""Reads the quantization symmetries of any causal language model off its graph, and proves them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(model: str | Path, dtype: torch.dtype | None = None) -> Any:
    """A runnable model from a folder of ``autoquant quantize``, or any causal LM that transformers loads.

    ``dtype`` is that of everything that is not int8 (as stored: null). Raises AutoQuantError where there is no such
    model.
    """
    from autoquant import loading  # torch is imported when it is needed

    return loading.load(model, dtype)

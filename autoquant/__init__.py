"""Reads the quantization symmetries of any causal language model off its graph, and proves them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autoquant.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__all__ = ["__version__", "load"]


def load(model: str | Path, dtype: torch.dtype | None = None) -> Any:
    """A runnable model from a folder of ``autoquant quantize``, or any causal LM that transformers loads.

    ``dtype`` is that of everything that is not int8 (as stored: null). Raises AutoQuantError where there is no such
    model.
    """
    from autoquant.checkpoint import load as loading  # torch is imported when it is needed

    return loading.load(model, dtype)

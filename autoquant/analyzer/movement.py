"""Data movement as it is done on labels: what an operator copies of a tensor, copied of the labels of its elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autoquant.analyzer.variables import ZERO
from autoquant.aten import operator_name


def function_of(node: fx.Node, shape: tuple[int, ...]) -> Callable[..., Any]:
    """The operator itself; a view is a reshape, since labels may be strided otherwise than the tensor they label."""
    operator = operator_name(node)
    if operator in ("alias", "clone", "contiguous", "detach", "detach_copy", "lift_fresh_copy"):
        return lambda labels, *args, **kwargs: labels
    if operator in ("view", "_unsafe_view", "_reshape_alias"):
        return lambda labels, shape, *args: labels.reshape(shape)
    if operator in ("reshape_as", "view_as"):
        return lambda labels: labels.reshape(shape)
    if operator == "expand_as":
        return lambda labels: labels.expand(shape)
    if operator == "as_strided":
        whole = node.all_input_nodes[0].meta["val"].is_contiguous()
        return lambda labels, *args, **kwargs: _strided(labels, whole, *args, **kwargs)
    target: Callable[..., Any] = node.target  # type: ignore[assignment]  # a call_function node
    return target


def _strided(labels: Tensor, whole: bool, *args: Any, **kwargs: Any) -> Tensor:
    """Elements by where they lie in memory; ``whole``: the tensor lies there as its labels do once they are copied.

    RuntimeError where it does not, or where the memory of another tensor is read too.
    """
    if not whole:
        raise RuntimeError("where its elements lie is not known")
    return labels.contiguous().as_strided(*args, **kwargs)


def dim_of(operator: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The dimension that a run is taken along (``aten.PARTING``), counted from the front or from the back."""
    place = 2 if operator == "split_with_sizes" else 1
    return int(args[place] if len(args) > place else kwargs.get("dim", 0))


def windows(
    labels: Tensor, kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """``F.unfold`` of labels, whose channels are copied for each place of a window: ``[..., C * places, windows]``."""
    padded = torch.nn.functional.pad(labels, (padding[1], padding[1], padding[0], padding[0]), value=ZERO)
    for size, apart, step in zip(kernel, dilation, stride, strict=True):  # the axis last but one, which goes on by one
        padded = padded.unfold(-2, apart * (size - 1) + 1, step)[..., ::apart]
    return padded.movedim((-2, -1), (-4, -3)).flatten(-5, -3).flatten(-2)

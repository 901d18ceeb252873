"""What operators copy of labels is what they copy of a tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from autoquant.analyzer.movement import dim_of, function_of, windows

IMAGE = torch.arange(1.0, 2 * 3 * 5 * 7 + 1).view(2, 3, 5, 7)


@pytest.mark.parametrize("image", [IMAGE, IMAGE[0]])
@pytest.mark.parametrize(
    ("kernel", "dilation", "padding", "stride"),
    [((2, 2), (1, 1), (0, 0), (2, 2)), ((3, 2), (1, 2), (1, 2), (2, 1)), ((1, 1), (1, 1), (0, 0), (1, 1))],
)
def test_windows_are_those_of_unfold(
    image: Tensor, kernel: tuple[int, int], dilation: tuple[int, int], padding: tuple[int, int], stride: tuple[int, int]
) -> None:
    expected = functional.unfold(image, kernel, dilation, padding, stride)
    assert torch.equal(windows(image.long(), kernel, dilation, padding, stride), expected.long())


def strided(x: Tensor) -> torch.fx.Node:
    """The node of a call on a tensor that lies in memory as ``x`` does."""
    graph = torch.fx.Graph()
    argument = graph.placeholder("x")
    argument.meta["val"] = x
    return graph.call_function(torch.ops.aten.as_strided.default, (argument, [2, 4], [2, 1]))


def test_overlapping_chunks_are_read_where_they_lie() -> None:
    labels = torch.arange(6).view(2, 3)
    move = function_of(strided(torch.empty(2, 3, device="meta")), (2, 4))
    assert move(labels, [2, 4], [2, 1]).tolist() == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert move(labels.T.contiguous().T, [2, 4], [2, 1]).tolist() == [[0, 1, 2, 3], [2, 3, 4, 5]]  # as the tensor lies
    with pytest.raises(RuntimeError, match="out of bounds"):
        move(labels, [2, 5], [2, 1])


def test_where_a_transposed_tensor_lies_is_not_known() -> None:
    move = function_of(strided(torch.empty(3, 2, device="meta").T), (2, 4))
    with pytest.raises(RuntimeError, match="where its elements lie is not known"):
        move(torch.arange(6).view(2, 3), [2, 4], [2, 1])


def test_runs_are_taken_along_a_dimension() -> None:
    assert dim_of("slice", ("x", 1, 0, 3), {}) == 1
    assert dim_of("slice", ("x",), {}) == 0
    assert dim_of("split_with_sizes", ("x", [1, 2], -1), {}) == -1
    assert dim_of("split_with_sizes", ("x", [1, 2]), {"dim": 2}) == 2

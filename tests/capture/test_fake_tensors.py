"""Models without weights that branch on integers; scans that are cut into chunks."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Literal

import pytest
import torch
from torch import nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._functorch import vmap

from autoquant.capture.fake_tensors import fakeify_, known_values, short_chunks, undisturbed
from autoquant.capture.routes import capture, check_against_eager
from autoquant.errors import AutoQuantError


class Placed(nn.Module):
    """Puts features where the ids say so, in runs whose lengths the ids decide."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.project = nn.Linear(3, 4)

    def forward(self, features: torch.Tensor, ids: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        assert ids is not None
        mask = ids == 7
        if mask.sum() != features.shape[0]:
            raise ValueError("as many features as places")
        lengths = torch.unique_consecutive(mask, return_counts=True)[1].tolist()
        made = self.project(features)
        text = self.table(ids).masked_scatter(mask[..., None], made)
        parts = torch.split(text, lengths, 1)
        return torch.cat([part * (i + 1) for i, part in enumerate(parts)], 1), made[made.new_zeros(2).long()]


IDS = torch.tensor([[1, 2, 7, 7, 3]])


def test_a_model_that_branches_on_known_integers_is_captured_and_computes_the_same() -> None:
    module = Placed()
    inputs = {"ids": IDS, "features": torch.randn(2, 3)}
    captured = capture(module, (), inputs, known=["ids"])
    assert (captured.how, captured.known) == ("export", ("ids",))
    assert [source.name for source in captured.subgraphs[0].inputs.values() if source.kind == "input"] == ["features"]
    assert check_against_eager(module, (), inputs, captured) < 1e-6
    other = {**inputs, "ids": torch.tensor([[7, 1, 2, 7, 3]])}  # a check that can fail
    assert check_against_eager(module, (), other, captured) > 1e-2


def test_the_first_output_alone() -> None:
    module = Placed()
    inputs = {"ids": IDS, "features": torch.randn(2, 3)}
    both, one = (capture(module, (), inputs, known=["ids"], first=first) for first in (False, True))
    counts = [len(c.subgraphs[0].graph.graph.output_node().args[0]) for c in (both, one)]
    assert counts == [2, 1]
    assert check_against_eager(module, (), inputs, one) < 1e-6


def test_without_weights() -> None:
    module = Placed().to("meta")
    inputs = {"ids": IDS, "features": torch.empty(2, 3, device="meta")}
    with undisturbed(module):
        given, mode = fakeify_(module, inputs)
        with mode, known_values():
            text, rows = module(**given)
    assert (text.shape, rows.shape) == ((1, 5, 4), (2, 4))
    assert all(parameter.is_meta for parameter in module.parameters())
    with undisturbed(module):
        given, mode = fakeify_(module, inputs)
        with mode, known_values(), pytest.raises(ValueError, match="as many features as places"):
            module(**{**given, "ids": torch.tensor([[7, 7, 7]])})


def test_integers_alone_are_computed_and_nothing_is_assumed_of_others() -> None:
    module = nn.Linear(2, 2).to("meta")
    with undisturbed(module):
        _, mode = fakeify_(module, ())
        with mode, known_values():
            assert (torch.arange(4) * 2).tolist() == [0, 2, 4, 6]
            assert torch.zeros(2, dtype=torch.long).tolist() == [0, 0]
            places = torch.tensor([[True, False, True]])[..., None].expand_as(torch.rand(1, 3, 2))
            assert places.tolist() == [[[True, True], [False, False], [True, True]]], (
                "a shape alone is used of the other"
            )
            x = torch.zeros(2, 2)  # a fill in floating point is the trace's
            assert type(x) is not torch.Tensor
            assert x[torch.tensor([True, False])].shape == (1, 2)
            assert module.weight[torch.tensor([True, True]), 0].shape == (2,)


def in_chunks(x: torch.Tensor, keep: torch.Tensor, chunk_size: int = 64, *, scale: float = 1.0) -> torch.Tensor:
    """``y_t = y_(t-1) * keep + x_t``, a chunk at a time: a token is a step of the graph."""
    tokens = x.shape[0]
    x = torch.nn.functional.pad(x, (0, 0, 0, -tokens % chunk_size)).view(-1, chunk_size, x.shape[-1])
    state, made = torch.zeros_like(x[0, 0]), []
    for chunk in range(x.shape[0]):
        for token in range(chunk_size):
            state = state * keep + scale * x[chunk, token]
            made.append(state)
    return torch.stack(made)[:tokens]


@functools.wraps(in_chunks)
def wrapped(*args: torch.Tensor) -> torch.Tensor:
    return in_chunks(*args)


class Scan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keep = nn.Parameter(torch.tensor([0.5, 0.25]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return wrapped(x, self.keep)


@pytest.mark.parametrize("how", ["dynamo", "export"])
def test_a_scan_in_chunks_by_default_is_traced_in_short_ones(how: Literal["dynamo", "export"]) -> None:
    module, x = Scan().double(), torch.randn(5, 2, dtype=torch.float64)
    captured = capture(module, (x,), {}, how)
    products = [n for n in captured.subgraphs[0].graph.graph.nodes if n.target is torch.ops.aten.mul.Tensor]
    assert len(products) == 2 * 6  # three chunks of two, not one of 64
    assert check_against_eager(module, (x,), {}, captured) < 1e-15  # against the module's own chunks
    assert in_chunks.__defaults__ == (64,)


def test_chunks_that_are_short_or_given_stay() -> None:
    def short(x: int, chunk_size: int = 2) -> int:
        return chunk_size

    def unset(x: int, chunk_size: int | None = None) -> int | None:
        return chunk_size

    namespace = ModuleType("chunked")
    namespace.__dict__.update(short=short, unset=unset, in_chunks=in_chunks, number=64)
    sys.modules["chunked"] = namespace
    try:
        module = type("Chunked", (nn.Module,), {"__module__": "chunked"})()
        with pytest.raises(ValueError, match="inside"), short_chunks(module):
            assert (short(0), unset(0), in_chunks.__defaults__) == (2, None, (2,))
            raise ValueError("inside")
        assert in_chunks.__defaults__ == (64,)
    finally:
        del sys.modules["chunked"]


class Mapped(nn.Module):
    """A mask made place by place, as transformers makes those that are not merely causal."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        assert ids is not None
        places, starts = torch.arange(ids.shape[1]), ids[0] - 1

        def seen(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return (q - k < 2) & (k >= starts[k])

        with TransformGetItemToIndex():
            mask = torch.vmap(torch.vmap(seen, (None, 0)), (0, None))(places, places)
        return x * mask.sum(0)


def test_known_values_that_are_mapped_over_are_no_part_of_the_trace() -> None:
    kwargs = {"x": torch.ones(3), "ids": torch.tensor([[1, 3, 3]])}
    captured = capture(Mapped(), (), kwargs, "export", known=("ids",))
    assert check_against_eager(Mapped(), (), kwargs, captured) == 0.0
    assert Mapped()(**kwargs).tolist() == [2, 0, 3]
    before = vmap._add_batch_dim
    with known_values():
        assert torch.vmap(lambda q: q + 1)(torch.arange(3)).tolist() == [1, 2, 3]
        assert torch.vmap(lambda q: q + 1)(torch.zeros(3, device="meta")).is_meta  # not known: as torch does it
    assert vmap._add_batch_dim is before


def test_sizes_that_known_tensors_hold_are_numbers() -> None:
    sizes = torch.tensor([[2, 3]])
    (images,), mode = fakeify_(nn.Module(), (torch.zeros(1, 4, 6, 5, device="meta"),))
    with mode, known_values():
        height, width = sizes[0]
        cut = images[..., :height, : width - 1]
        parts = images.flatten(1).split([height * 10, width * 20 + 40], dim=1)
        grid = images.view(height * 2, width * 2, 5)
    assert (cut.shape, grid.shape) == ((1, 4, 2, 2), (4, 6, 5))
    assert [part.shape[1] for part in parts] == [20, 100]


def test_pixels_are_equal_to_no_number_and_what_is_computed_may_be() -> None:
    (pixels,), mode = fakeify_(nn.Module(), (torch.zeros(3, 4, device="meta"),))
    with mode, known_values():
        empty = (pixels.view(3, 2, 2) == 0.0).sum(dim=(1, 2)) == 4
        kept = pixels[~empty]
        computed = torch.relu(pixels) == 0.0
    assert (empty.tolist(), kept.shape) == ([False] * 3, (3, 4))
    assert type(computed) is not torch.Tensor, "a number may be what relu makes"


def test_what_is_filled_to_be_as_large_as_another_is_known_as_integers_until_it_is_used() -> None:
    (pixels,), mode = fakeify_(nn.Module(), (torch.zeros(2, 3, device="meta"),))
    with mode, known_values():
        rows = torch.full_like(pixels[0], True).bool()
        rows[torch.tensor([1])] = False
        kept = pixels[:, rows]
        counts = torch.ones_like(pixels[:, 0]).long()
        written = torch.zeros_like(pixels)
        written.add_(pixels)
        unknown = written.bool(), torch.empty_like(pixels).int()
    assert (rows.tolist(), kept.shape, counts.tolist()) == ([True, False, True], (2, 2), [1, 1])
    assert all(type(tensor) is not torch.Tensor for tensor in unknown), "what was written; nothing was filled in"


class Counting(nn.Module):
    """Counts, in a table of zeros, which places were chosen; ``seen`` looks at the table another way before."""

    def __init__(self, seen: bool) -> None:
        super().__init__()
        self.router, self.seen = nn.Linear(4, 3), seen

    def forward(self, x: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        scores = self.router(x)
        counts = torch.zeros(x.shape[0], 3, dtype=torch.int64)
        first = counts[0] if self.seen else None
        counts.scatter_add_(-1, scores.topk(2).indices, torch.ones(x.shape[0], 2, dtype=torch.int64))
        counts[:, 0] += 1
        return scores * counts if first is None else scores * first


def test_what_is_written_into_a_known_tensor_is_no_constant() -> None:
    module, inputs = Counting(seen=False).eval(), {"x": torch.randn(5, 4), "ids": IDS}
    captured = capture(module, (), inputs, "export", known=["ids"])
    assert not captured.untraceable
    for x in (inputs["x"], torch.randn(5, 4)):
        assert check_against_eager(module, (), {**inputs, "x": x}, captured) < 1e-6
    with pytest.raises(AutoQuantError, match="cannot capture Counting"):  # its view would not be written
        capture(Counting(seen=True).eval(), (), inputs, "export", known=["ids"])


class Converting(nn.Module):
    """A router that is kept in a data type of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.router, self.dtype = nn.Linear(4, 2), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.router = self.router.to(self.dtype)
        return self.router(x.to(self.dtype))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_module_that_is_what_it_is_converted_to_stays(device: str) -> None:
    module, x = Converting(torch.float32).to(device).eval(), torch.ones(3, 4, device=device)
    captured = capture(module, (x,), {}, "export")
    assert not captured.untraceable
    assert {source.name for source in captured.subgraphs[0].inputs.values() if source.kind == "parameter"} == {
        "router.weight",
        "router.bias",
    }


def test_another_data_type_is_still_converted_to() -> None:
    module = Converting(torch.float64).eval()
    with undisturbed(module):
        assert module(torch.ones(3, 4)).dtype is torch.float64
    with pytest.raises(AutoQuantError, match="Couldn't swap"):
        capture(Converting(torch.float64).to("meta"), (torch.ones(3, 4, device="meta"),), {}, "export")

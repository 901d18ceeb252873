"""Which layers stand for others where a run shows what is called, and what runs between."""

from __future__ import annotations

import torch
from block_nets import Block, Net, settings
from torch import nn

from autoquant.analyzer.analyze import analyze, run_without_weights
from autoquant.analyzer.layers import find_stacks, represent
from autoquant.analyzer.templates import canonical, unfold
from autoquant.models.source import LoadedModel, ModelSource


class Skipping(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](self.stem(x))
        return self.blocks[min(2, len(self.blocks) - 1)](x) if len(self.blocks) > 2 else x


def test_layers_that_are_not_called_keep_the_model_whole() -> None:
    net = Skipping([Block(i) for i in range(4)])
    pruned, (stack_map,) = represent(net, find_stacks(net), lambda m: m(torch.zeros(2, 4)))
    assert pruned is net
    assert stack_map.originals == ((0,), (1,), (2,), (3,))


class Tower(nn.Module):
    """Blocks of which those in ``taken_indexes`` are handed to a merger each; the mergers' outputs are returned."""

    def __init__(self, depth: int, taken_indexes: list[int]) -> None:
        super().__init__()
        self.config = settings(depth=depth, taken_indexes=taken_indexes)
        self.taken_indexes = taken_indexes
        self.blocks = nn.ModuleList([Block(i) for i in range(depth)])
        self.mergers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in taken_indexes])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        taken = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.taken_indexes:
                taken.append(self.mergers[self.taken_indexes.index(i)](x))
        return x, taken


class Towers(nn.Module):
    """A tower, and a trunk whose first layers each take what one merger made."""

    def __init__(self, depth: int, taken_indexes: list[int], layers: int) -> None:
        super().__init__()
        self.tower = Tower(depth, taken_indexes)
        self.trunk = Net([Block(i) for i in range(layers)], settings(num_layers=layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, taken = self.tower(self.trunk.stem(x))
        for i, block in enumerate(self.trunk.blocks):
            h = block(h)
            if i in range(len(taken)):
                h = h + taken[i]
        return h


def test_layers_that_are_listed_by_number_are_kept() -> None:
    # what is after a listed layer, and after each of the first of the trunk, is no kind's usual way
    net = Towers(12, [3, 6, 9], 9)
    pruned, maps = represent(net, find_stacks(net), lambda m: m(torch.zeros(2, 4)))
    kept = {m.path: [originals[0] for originals in m.originals] for m in maps}
    assert {3, 6, 9} < set(kept["tower.blocks"])
    assert len(kept["tower.blocks"]) < 9
    assert pruned.tower.taken_indexes == [kept["tower.blocks"].index(i) for i in (3, 6, 9)]
    assert (kept["tower.mergers"], kept["trunk.blocks"]) == ([0, 1, 2], [0, 1, 2, 3, 4, 8])
    assert [m.whole for m in maps] == [None] * 3
    source = ModelSource("towers", factory=lambda: (Towers(12, [3, 6, 9], 9), (torch.randn(2, 4),)))
    few, every = analyze(source), analyze(source, full=True)
    assert canonical(unfold(few.findings)) == canonical(unfold(every.findings))
    assert [len(stack.originals) for stack in few.stacks] == [len(numbers) for numbers in kept.values()]


class Wary(nn.Module):
    """Takes, where it is not traced, an operator of which no trace without memory exists."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(i) for i in range(4)])

    def forward(self, x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        if not torch.compiler.is_compiling():
            raise RuntimeError("Expected inputs of BF16 type but got mat_a.dtype=torch.float32")
        return x[where]


def test_an_operator_that_has_no_shapes_hides_no_depth() -> None:
    net = Wary().to("meta")
    inputs = {"x": torch.zeros(2, 8, device="meta"), "where": torch.tensor([1])}
    returned = run_without_weights(net, LoadedModel(net, (), inputs, known=("where",)))
    assert isinstance(returned, torch.Tensor)
    assert returned.shape == (1, 8)


def test_where_most_layers_have_a_way_of_their_own_all_are_kept() -> None:
    class Odd(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for i, block in enumerate(self.blocks):
                x = block(x) + i
            return x

    net = Odd([Block(i) for i in range(6)])
    pruned, (stack_map,) = represent(net, find_stacks(net), lambda m: m(torch.zeros(2, 4)))
    assert (pruned, stack_map.whole) == (net, "the model does something of its own after layer 1")

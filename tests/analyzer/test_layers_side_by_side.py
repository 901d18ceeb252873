"""Stacks of which one hands something to another layer by layer, as an encoder leaves its keys to a decoder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from block_nets import Mixer
from torch import nn

from autoquant.analyzer.analyze import analyze
from autoquant.analyzer.layers import find_stacks, represent
from autoquant.analyzer.templates import canonical, unfold
from autoquant.certificate.certify import certify
from autoquant.models.source import ModelSource

DEPTH = 6
Taken = Callable[[int, int], int]
"""Number of the layer that layer i of so many takes from."""


class Giving(nn.Module):
    """Joins what it makes with what was kept before, which is nothing, and leaves it."""

    def __init__(self, index: int, width: int = 16) -> None:
        super().__init__()
        self.mixer = Mixer(index, width, None)
        self.value = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + self.mixer.down(self.mixer.up(x)), torch.cat([kept, self.value(x)], 0)


class Taking(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.mixer = Mixer(index, 16, None)
        self.out = nn.Linear(4, 8)

    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return x + self.mixer.down(self.mixer.up(x)) + self.out(kept)


class Pair(nn.Module):
    def __init__(self, taken: Taken, widths: dict[int, int] | None = None, layers: int = DEPTH) -> None:
        super().__init__()
        self.taken = taken
        self.stem = nn.Linear(4, 8)
        self.encoder = nn.ModuleList([Giving(i, (widths or {}).get(i, 16)) for i in range(DEPTH)])
        self.decoder = nn.ModuleList([Taking(i) for i in range(layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, kept = self.stem(x), []
        empty = [x.new_zeros(0, 4) for _ in self.encoder]
        for layer, before in zip(self.encoder, empty, strict=True):
            h, left = layer(h, before)
            kept.append(left)
        h = self.stem(x)
        for i, layer in enumerate(self.decoder):
            h = layer(h, kept[self.taken(i, len(self.decoder))])
        return h


def beside(i: int, depth: int) -> int:
    return i


def run(net: nn.Module) -> object:
    return net(torch.zeros(2, 4))


def test_layers_that_take_from_the_layer_beside_them_are_alike() -> None:
    net = Pair(beside)
    pruned, maps = represent(net, find_stacks(net), run)
    assert pruned is not net
    assert [m.originals for m in maps] == [((0, 1, 2, 3, 4), (5,))] * 2


@pytest.mark.parametrize("widths", [None, {2: 24}])
def test_what_is_found_holds_for_all_layers(widths: dict[int, int] | None) -> None:
    source = ModelSource("pair", factory=lambda: (Pair(beside, widths), (torch.randn(2, 4),)))
    found, full = analyze(source), analyze(source, full=True)
    assert canonical(unfold(found.findings)) == canonical(unfold(full.findings))
    names = [group.name for group in found.config.smoothing.groups]
    assert any("value" in name and "out" in name for name in names)
    proof = certify(found, source).certificate
    assert proof is not None
    assert proof.proved


@pytest.mark.parametrize(
    ("taken", "reason"),
    [
        (lambda i, depth: depth - 1 - i, None),  # as the two halves of a U-Net: each layer has another one's
        (lambda i, depth: i if depth == DEPTH else 0, "layer 5 of decoder takes something from another layer"),
    ],
)
def test_layers_that_take_from_others_do_not_stand_for_one_another(taken: Taken, reason: str | None) -> None:
    net = Pair(taken)
    pruned, maps = represent(net, find_stacks(net), run)
    assert pruned is net
    assert maps[1].originals == tuple((i,) for i in range(DEPTH))
    assert reason is None or reason in (maps[1].whole or "")


@pytest.mark.parametrize("net", [Pair(beside, {2: 24}), Pair(beside, layers=4)], ids=["widths", "depths"])
def test_stacks_that_belong_together_keep_the_same_layers(net: Pair) -> None:
    pruned, maps = represent(net, find_stacks(net), run)
    assert pruned is net
    assert [m.whole for m in maps] == ["encoder and decoder belong together layer by layer and differ"] * 2

"""A claim for several layers that fails in one of them holds in the others."""

from __future__ import annotations

import torch
from odd_units import INNER, WIDTH, WORDS
from torch import Tensor, nn

from autoquant.analyzer.analyze import analyze
from autoquant.certificate.certify import certify
from autoquant.certificate.claims import layers_of, refused_claims, standing, with_layers
from autoquant.config.format import Config
from autoquant.models.source import ModelSource

FAR = 100
"""Beyond the second reading of the analysis, within the longest run of the proof."""


class Block(nn.Module):
    """Beyond :data:`FAR` tokens the scale does not pass one that is ``odd``."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.odd = odd

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.up(self.norm(hidden)).relu()
        if self.odd:
            inner = torch.cat([inner[:, :FAR], inner[:, FAR:].tanh()], 1)
        return hidden + self.down(inner)  # type: ignore[no-any-return]  # a call's


class Stack(nn.Module):
    def __init__(self, odd: tuple[int, ...], depth: int) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block(i in odd) for i in range(depth))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden  # type: ignore[no-any-return]  # a call's


def certified(*odd: int, depth: int = 4) -> Config:
    source = ModelSource("stack", factory=lambda: (Stack(odd, depth), (torch.arange(1, 4)[None],)))
    return certify(analyze(source), source)


UP = ("layers.{layer}.up -> down", "linear_linear")


def test_the_layers_that_hold_are_kept() -> None:
    config = certified(2)
    assert layers_of(config, UP) == (0, 1, 3)
    assert layers_of(config, ("layers.{layer}.norm -> up", "norm_linear")) == (0, 1, 2, 3)
    (blocked,) = refused_claims(config)
    assert (blocked.path, blocked.layers, blocked.operator) == ("layers.{layer}.down", "2", "linear_linear")
    assert "changes the logits of the small model by" in blocked.reason
    assert standing(config) == "proved"


def test_one_that_holds_in_none_is_left_out() -> None:
    config = certified(0, 1, 2, 3)
    assert layers_of(config, UP) == ()
    (blocked,) = refused_claims(config)
    assert blocked.layers == "0-3"


def test_all_layers_are_kept_where_all_hold() -> None:
    config = certified()
    assert layers_of(config, UP) == (0, 1, 2, 3)
    assert refused_claims(config) == ()
    fewer = with_layers(config, {UP: (1, 3), ("layers.{layer}.norm -> up", "norm_linear"): ()})
    assert [(group.name, group.layers) for group in fewer.smoothing.groups] == [(UP[0], "1,3")]


class PlusOne(Block):
    """Of its norm, one and the weight is the gain."""

    def forward(self, hidden: Tensor) -> Tensor:
        normed = torch.nn.functional.rms_norm(hidden, (WIDTH,), 1 + self.norm.weight)
        return hidden + self.down(self.up(normed).relu())  # type: ignore[no-any-return]  # a call's


class Mixed(Stack):
    def __init__(self) -> None:
        super().__init__((), 4)
        self.layers[2] = PlusOne(False)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(nn.functional.rms_norm(super().forward(ids), (WIDTH,)))  # type: ignore[no-any-return]


def test_gains_of_two_forms_in_one_space_keep_their_own_layers() -> None:
    source = ModelSource("mixed", factory=lambda: (Mixed(), (torch.arange(1, 4)[None],)))
    config = certify(analyze(source), source)
    assert refused_claims(config) == ()
    (space,) = config.rotation.spaces
    found = {(read.layers, read.norm and read.norm.offset) for read in space.reads}
    assert found == {("0-1,3", 0), ("2", 1), (None, None)}

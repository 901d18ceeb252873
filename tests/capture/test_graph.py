"""What a graph keeps of what a model returns."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from autoquant.capture.graph import shape
from autoquant.capture.routes import capture, check_against_eager
from autoquant.errors import AutoQuantError
from autoquant.library_patches import pytree


class Cache:
    """What no trace knows."""


class Said(OrderedDict[str, Any]):
    """What a model of a library returns: a mapping with attributes."""

    @property
    def logits(self) -> torch.Tensor:
        made: torch.Tensor = self["logits"]
        return made


pytree.register_pytree_node(
    Said,
    lambda said: (list(said.values()), list(said)),
    lambda values, names: Said(zip(names, values, strict=True)),
    serialized_type_name=f"{__name__}.Said",
)


class Saying(nn.Module):
    def __init__(self, cache: Cache | None) -> None:
        super().__init__()
        self.body, self.head, self.cache = nn.Linear(4, 4), nn.Linear(4, 6), cache

    def forward(self, x: torch.Tensor) -> Said:
        states = self.body(x)
        beside = {} if self.cache is None else {"cache": self.cache}
        return Said(states=states, logits=self.head(states), further=states.relu(), **beside)


@pytest.mark.parametrize("cache", [None, Cache()])
@pytest.mark.parametrize("how", ["auto", "export"])
def test_what_stands_behind_the_logits_is_left_out(how: Any, cache: Cache | None) -> None:
    module, x = Saying(cache).eval(), torch.randn(3, 4)
    captured = capture(module, (x,), {}, how, first=True)
    states, logits = captured.subgraphs[0].graph.graph.output_node().args[0]  # a result of its own, and the logits
    assert (shape(states), shape(logits)) == ((3, 4), (3, 6))
    assert check_against_eager(module, (x,), {}, captured) < 1e-6
    assert not module._forward_hooks
    if cache is not None:
        with pytest.raises(AutoQuantError, match="in output, which is not a known type"):
            capture(module, (x,), {}, "export")

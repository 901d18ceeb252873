from __future__ import annotations

import functools
from typing import Any

import torch

from autoquant.certificate.depth import hangs_on_depth
from autoquant.models.reduce import small
from autoquant.models.repair import find_source
from autoquant.models.source import LoadedModel


def model() -> tuple[LoadedModel, Any]:
    loaded = small(find_source("llama", layers=2))
    return loaded, loaded.module.get_submodule("model.layers.1.mlp")


def test_a_number_that_only_the_cache_is_given_does_not_count() -> None:
    assert not hangs_on_depth(model()[0])


def test_a_forward_that_asks_for_its_number() -> None:
    loaded, mlp = model()

    class Every(type(mlp)):  # type: ignore[misc]  # the class is known when it runs
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x).tanh() if self.layer_idx % 4 == 3 else super().forward(x)

    mlp.__class__, mlp.layer_idx = Every, 1
    assert hangs_on_depth(loaded)
    assert type(mlp.layer_idx) is int


def test_code_of_its_own() -> None:
    loaded, mlp = model()
    handle = mlp.register_forward_hook(lambda *_: None)
    assert hangs_on_depth(loaded)
    handle.remove()
    assert not hangs_on_depth(loaded)
    mlp.scaled = functools.partial(torch.mul, other=2)
    assert hangs_on_depth(loaded)
    del mlp.scaled
    mlp.forward = mlp.forward
    assert hangs_on_depth(loaded)

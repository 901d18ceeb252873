"""``x.data`` of what a forward computes: read and written it is followed, exchanged it is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from autoquant.capture.routes import capture, check_against_eager
from autoquant.errors import AutoQuantError

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """Two linears with ``act`` in between."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(3, 4), nn.Linear(4, 3), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))  # type: ignore[no-any-return]  # a call's


def read(h: Tensor) -> Tensor:
    return h.data.relu()


def written(h: Tensor) -> Tensor:
    """This one ended torch 2.13 by a segmentation fault."""
    h.data.mul_(2).add_(1)
    return h


def copied(h: Tensor) -> Tensor:
    h.data.copy_(h.tanh())
    return h


@pytest.mark.parametrize("how", ["dynamo", "export"])
@pytest.mark.parametrize("act", [read, written, copied])
def test_data_is_followed(act: Callable[[Tensor], Tensor], how: Literal["dynamo", "export"]) -> None:
    module = Between(act)
    captured = capture(module, (X,), {}, how)
    assert captured.how == how
    (subgraph,) = captured.subgraphs
    assert "constant" not in {given.kind for given in subgraph.inputs.values()}
    assert check_against_eager(module, (X,), {}, captured) < 1e-6


def exchanged(h: Tensor) -> Tensor:
    h.data = h.data.tanh()
    return h


@torch.no_grad()
@pytest.mark.parametrize("what", ["activation", "weight"])
def test_other_data_is_refused_in_one_line(what: str) -> None:
    """Of a weight it was a segmentation fault too."""
    module = Between(exchanged)
    if what == "weight":

        def of_the_weight(h: Tensor) -> Tensor:
            module.down.weight.data = module.down.weight.data * 2
            return h.relu()

        module.act = of_the_weight
    with pytest.raises(AutoQuantError, match=r"cannot capture Between: .*it gives a tensor the data of") as said:
        capture(module, (X,), {})
    assert "\n" not in said.value.message


class Within(nn.Module):
    """The part that cannot be traced is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.part, self.down = nn.Linear(3, 4), Part(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.part(self.up(x)))  # type: ignore[no-any-return]  # a call's


class Part(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return exchanged(x.clone())


def test_a_part_that_exchanges_data_is_left_untraced() -> None:
    module = Within()
    captured = capture(module, (X,), {})
    assert [call.path for call in captured.untraceable] == ["part"]
    assert check_against_eager(module, (X,), {}, captured) < 1e-6

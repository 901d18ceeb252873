from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoquant.calibration.observers import observe_linears
from autoquant.errors import AutoQuantError

OUT, IN, E, T = 5, 8, 3, 9


def module(*shape: int) -> nn.Module:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
    return holder


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


USES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "linear": lambda x, w: functional.linear(x, w),
    "linear by keyword": lambda x, w: functional.linear(x, weight=w),
    "@ .T": lambda x, w: x @ w.T,
    "mm": lambda x, w: torch.mm(x, w.t()),
    "addmm": lambda x, w: torch.addmm(torch.zeros(OUT), x, w.T),
    "from the left": lambda x, w: (w @ x.T).T,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_maxima_are_per_channel_and_grow(use: Callable[..., Tensor]) -> None:
    holder = module(OUT, IN)
    first, second = randn(T, IN), 2 * randn(2, IN)
    with observe_linears(holder, ["weight"]) as maxima:
        use(first, holder.weight)
        assert torch.equal(maxima["weight"], first.abs().amax(0))
        use(second, holder.weight)
    use(100 * first, holder.weight)  # the context is closed
    assert torch.equal(maxima["weight"], torch.maximum(first.abs().amax(0), second.abs().amax(0)))


def test_experts_are_told_apart_and_unvisited_ones_stay_zero() -> None:
    holder, x = module(E, OUT, IN), randn(T, IN)
    wanted = torch.stack([x[:4].abs().amax(0), torch.zeros(IN), x[4:].abs().amax(0)])
    offs = torch.tensor([4, 4, T], dtype=torch.int32)
    with observe_linears(holder, ["weight"]) as looped:
        functional.linear(x[:4], holder.weight[0])
        x[4:] @ holder.weight[2].T
    with observe_linears(holder, ["weight"]) as grouped:
        functional.grouped_mm(x, holder.weight.transpose(1, 2), offs=offs)
    assert torch.equal(looped["weight"], wanted)
    assert torch.equal(grouped["weight"], wanted)
    batch = randn(E, T, IN)
    with observe_linears(holder, ["weight"]) as batched:
        torch.bmm(batch, holder.weight.mT)
    assert torch.equal(batched["weight"], batch.abs().amax(1))


def test_only_the_named_weights_are_watched_and_tied_ones_share() -> None:
    both = nn.ModuleList([nn.Linear(IN, IN), nn.Linear(IN, IN), nn.Linear(IN, IN)])
    both[2].weight = both[0].weight
    x = randn(2, IN)
    with torch.no_grad(), observe_linears(both, ["0.weight", "2.weight"]) as maxima:
        both[1](both[0](x))
    assert set(maxima) == {"0.weight", "2.weight"}
    assert torch.equal(maxima["2.weight"], x.abs().amax(0))


def test_an_unknown_name_is_an_error() -> None:
    with (
        pytest.raises(AutoQuantError, match="wieght: the model has no such parameter"),
        observe_linears(module(E, OUT, IN), ["wieght"]),
    ):
        pass


def test_what_multiplies_nothing_is_absent() -> None:
    holder = module(OUT, IN)
    with observe_linears(holder, ["weight"]) as maxima:
        randn(T, OUT) @ randn(OUT, IN)
        holder.weight.sum()
    assert maxima == {}

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoquant.calibration.observers import observe_linears
from autoquant.config.format import Strategy
from autoquant.errors import AutoQuantError
from autoquant.models.locate import locate
from autoquant.quantizer.linear import Int8Linear, quantize_
from autoquant.quantizer.strategies import PlannedLinear, scheme_of


class Doubling(nn.Module):
    """A wrapper as an online rotation is one: it changes the input and hands it to its linear."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(2 * x)


def test_a_parameter_is_found_by_name() -> None:
    model = nn.ModuleDict({"block": nn.ModuleDict({"up": nn.Linear(3, 2)})})
    found = locate(model, "block.up.weight")
    assert found.parameter is model["block"]["up"].weight
    assert (found.parent, found.child, found.owner, found.name) == (
        model["block"],
        "up",
        model["block"]["up"],
        "weight",
    )
    assert locate(nn.Linear(2, 2), "weight").name == "weight"


def test_what_is_not_there_is_named_with_the_nearest() -> None:
    with pytest.raises(AutoQuantError, match=r"0.wieght: the model has no such parameter; did you mean '0.weight'\?"):
        locate(nn.Sequential(nn.Linear(2, 2)), "0.wieght")


@torch.no_grad()
def test_a_wrapped_linear_keeps_its_name_and_sees_what_the_wrapper_makes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Doubling(Doubling(nn.Linear(6, 4))))
    x = torch.randn(5, 6)
    wanted = model(x)
    planned = [PlannedLinear("0", "0.weight", "0.bias", 6, 4, None, 1, scheme_of(Strategy.PER_CHANNEL_STATIC))]
    with observe_linears(model, ["0.weight"]) as maxima:
        model(x)
    assert torch.equal(maxima["0.weight"], (4 * x).abs().amax(0))
    quantize_(model, planned, maxima)
    assert isinstance(model[0].linear.linear, Int8Linear)
    torch.testing.assert_close(model(x), wanted, rtol=0.05, atol=0.05)

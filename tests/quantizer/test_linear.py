from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoquant.calibration.observers import observe_linears
from autoquant.config.format import Strategy
from autoquant.errors import AutoQuantError
from autoquant.quantizer import int8
from autoquant.quantizer.linear import (
    Int8Linear,
    int8_weights,
    quantize_,
    quantize_weight,
    replace_with_empty_,
    set_mode_,
)
from autoquant.quantizer.strategies import PlannedLinear, scheme_of

DIM, INNER, EXPERTS = 12, 20, 3


class Experts(nn.Module):
    """A stack [E, 2 * INNER, DIM] and one in the other layout [E, INNER, DIM], used expert by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, DIM) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, DIM) / 4)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            gate, up = nn.functional.linear(x[chosen == e], self.gate_up[e]).chunk(2, -1)
            out[chosen == e] = (nn.functional.silu(gate) * up) @ self.down[e]
        return out


class Block(nn.Module):
    """A linear with bias, a Conv1D, a module that multiplies by W.T itself, and experts."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.conv = Conv1D(DIM, DIM)
        self.own = Own(DIM, DIM, bias=False)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.conv(torch.relu(x))
        x = x + self.own(x)
        return self.experts(x, torch.arange(len(x)) % 2)  # expert 2 never gets a token


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def model() -> Block:
    torch.manual_seed(0)
    block = Block()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def plan(strategy: Strategy) -> list[PlannedLinear]:
    scheme = scheme_of(strategy)
    return [
        PlannedLinear("first", "first.weight", "first.bias", DIM, DIM, None, 1, scheme),
        PlannedLinear("conv", "conv.weight", "conv.bias", DIM, DIM, None, 0, scheme),
        PlannedLinear("own", "own.weight", None, DIM, DIM, None, 1, scheme),
        PlannedLinear("experts.gate_up", "experts.gate_up", None, DIM, 2 * INNER, EXPERTS, 2, scheme),
        PlannedLinear("experts.down", "experts.down", None, INNER, DIM, EXPERTS, 1, scheme),
    ]


def inputs() -> Tensor:
    return torch.randn(16, DIM, generator=torch.Generator().manual_seed(3))


def maxima(block: nn.Module, planned: list[PlannedLinear]) -> dict[str, Tensor]:
    with torch.no_grad(), observe_linears(block, [linear.weight for linear in planned]) as seen:
        block(inputs())
    return seen


W8A8 = [strategy for strategy in Strategy if scheme_of(strategy).kv_cache is None]


@pytest.mark.parametrize("strategy", W8A8)
@torch.no_grad()
def test_every_kind_of_linear_is_replaced_and_close_to_float(strategy: Strategy) -> None:
    block, planned = model(), plan(strategy)
    wanted = block(inputs())
    quantize_(block, planned, maxima(block, planned))
    assert isinstance(block.first, Int8Linear)
    assert set(int8_weights(block)) == {"first.weight", "conv.weight", "own.weight", "experts.gate_up", "experts.down"}
    got = block(inputs())
    error = ((got - wanted).square().mean() / wanted.square().mean()).sqrt().item()
    assert 1e-4 < error < 0.05, f"{strategy}: {error}"


@pytest.mark.parametrize("strategy", W8A8)
@torch.no_grad()
def test_fake_mode_agrees_within_float_rounding(strategy: Strategy) -> None:
    block, planned = model(), plan(strategy)
    quantize_(block, planned, maxima(block, planned))
    x = inputs()
    real = [module(x) for module in (block.first, block.conv, block.own)]
    set_mode_(block, "fake")
    fake = [module(x) for module in (block.first, block.conv, block.own)]
    assert all(not torch.equal(a, b) for a, b in zip(real, fake, strict=True)), "the modes took the same way"
    for a, b in zip(real, fake, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", W8A8)
@torch.no_grad()
def test_a_linear_is_the_formula_of_the_module_text(strategy: Strategy) -> None:
    block, planned = model(), plan(strategy)
    weight, bias, x = block.first.weight.clone(), block.first.bias.clone(), inputs()
    seen = maxima(block, planned)
    quantize_(block, planned, seen)
    scheme = scheme_of(strategy)
    weight_scale = weight.abs().amax(1 if scheme.weight_per_channel else (0, 1), keepdim=True) / 127
    input_scale = {
        "per_tensor_static": seen["first.weight"].max() / 127,
        "per_tensor_dynamic": x.abs().max() / 127,
        "per_token_dynamic": x.abs().amax(1, keepdim=True) / 127,
    }[scheme.activation]
    q_weight, q_x = (weight / weight_scale).round(), (x / input_scale).round().clamp(-127, 127)
    wanted = (q_x.double() @ q_weight.double().T) * input_scale.double() * weight_scale.double().T + bias.double()
    torch.testing.assert_close(block.first(x).double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_static_stack_has_a_scale_per_expert_and_unvisited_ones_the_largest() -> None:
    block, planned = model(), plan(Strategy.PER_CHANNEL_STATIC)
    seen = maxima(block, planned)
    quantize_(block, planned, seen)
    each = seen["experts.gate_up"].amax(1)
    assert each[2] == 0 and each[0] != each[1]
    scale = block.experts.gate_up.input_scale
    assert torch.equal(scale, torch.stack([each[0], each[1], each.max()]) / 127)


def test_per_tensor_means_per_expert_in_a_stack() -> None:
    weight = torch.randn(EXPERTS, 4, 6, generator=torch.Generator().manual_seed(0))
    values, scale = quantize_weight(weight, 2, scheme_of(Strategy.PER_TENSOR_STATIC))
    assert values.shape == (EXPERTS, 4, 6) and scale.shape == (EXPERTS, 1, 1)
    assert torch.equal(scale.flatten(), weight.abs().amax((1, 2)) / 127)


def test_the_other_layout_is_stored_rows_first_with_scales_per_output() -> None:
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))  # [in, out]
    values, scale = quantize_weight(weight, 0, scheme_of(Strategy.PER_CHANNEL_PER_TOKEN))
    assert values.shape == (3, 5) and values.is_contiguous()
    assert torch.equal(scale.flatten(), weight.abs().amax(0) / 127)
    assert torch.equal(int8.dequantize(values, scale).T.sign(), weight.sign())


def test_mse_clipping_lowers_the_weight_error() -> None:
    weight = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    scheme = scheme_of(Strategy.PER_TENSOR_STATIC)

    def error(clip: Any) -> float:
        return (int8.dequantize(*quantize_weight(weight, 1, scheme, clip)) - weight).square().mean().item()

    assert error("mse") < 0.9 * error("absmax")


BROKEN = {
    "missing": (
        {"weight": "frist.weight"},
        "frist.weight: the model has no such parameter; did you mean 'first.weight'?",
    ),
    "not a parameter": ({"weight": "experts"}, "experts: the model has no such parameter"),
    "shape": ({"out_features": DIM + 1}, r"first.weight: shape \(12, 12\) in the model, \(13, 12\) in the config"),
    "no maximum": ({"weight": "own.weight"}, "own.weight: no calibration maximum"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_plan_that_does_not_fit_changes_nothing(change: dict[str, Any], message: str) -> None:
    from dataclasses import replace

    block, planned = model(), plan(Strategy.PER_CHANNEL_STATIC)
    before = copy.deepcopy(block.state_dict())
    broken = [planned[1], replace(planned[0], **change)]
    with pytest.raises(AutoQuantError, match=message):
        quantize_(block, broken, {"first.weight": torch.ones(DIM), "conv.weight": torch.ones(DIM)})
    assert not int8_weights(block)
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())


@pytest.mark.parametrize(
    ("maximum", "message"), [(0.0, "always zero during calibration"), (torch.nan, "NaN or infinite during calibration")]
)
def test_a_useless_maximum_is_an_error(maximum: float, message: str) -> None:
    block, planned = model(), plan(Strategy.PER_CHANNEL_STATIC)[:1]
    with pytest.raises(AutoQuantError, match=message):
        quantize_(block, planned, {"first.weight": torch.full((DIM,), maximum)})


def test_a_weight_that_is_not_finite_is_named() -> None:
    block, planned = model(), plan(Strategy.PER_CHANNEL_PER_TOKEN)
    with torch.no_grad():
        block.own.weight[0, 0] = torch.inf
    with pytest.raises(AutoQuantError, match=r"own.weight: holds NaN or infinite"):
        quantize_(block, planned)
    assert not int8_weights(block)


@pytest.mark.parametrize("strategy", W8A8)
@torch.no_grad()
def test_an_empty_model_takes_the_state_of_a_quantized_one(strategy: Strategy) -> None:
    block, planned = model(), plan(strategy)
    twin = copy.deepcopy(block).to("meta")
    quantize_(block, planned, maxima(block, planned))
    replace_with_empty_(twin, planned)
    twin.load_state_dict(block.state_dict(), assign=True)
    assert torch.equal(twin(inputs()), block(inputs()))


@torch.no_grad()
def test_it_survives_deepcopy_and_torch_compile() -> None:
    block, planned = model(), plan(Strategy.PER_CHANNEL_PER_TOKEN)[:1]
    quantize_(block, planned)
    wanted = block.first(inputs())
    assert torch.equal(copy.deepcopy(block).first(inputs()), wanted)
    compiled = torch.compile(block.first, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs()), wanted, rtol=1e-6, atol=1e-6)

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoquant.algorithms.gptq_qronos import Run, needs_values, output_errors, round_in_sequence, walk
from autoquant.calibration.observers import observe_linears
from autoquant.config.format import ActivationQuantization, Rounding, StaticClip, Strategy, WeightQuantization
from autoquant.errors import AutoQuantError
from autoquant.quantizer.linear import quantize_
from autoquant.quantizer.strategies import PlannedLinear, scheme_of

STATIC, TOKEN = Strategy.PER_CHANNEL_STATIC, Strategy.PER_CHANNEL_PER_TOKEN
OUTPUT = ActivationQuantization(clip=StaticClip.OUTPUT)


class Chain(nn.Module):
    """ids -> table -> first -> gelu -> second (twice) -> routed, which sees some of the tokens only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 12, bias=False)
        self.routed = nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        h = functional.gelu(self.first(self.table(ids)))
        h = self.second(self.second(h))
        rows = h.flatten(0, 1)
        return self.routed(rows[ids.flatten() % 2 == 0])


def planned(*names: str, strategy: Strategy = STATIC, **settings: object) -> tuple[PlannedLinear, ...]:
    model = Chain()
    entries = []
    for name in names:
        part = model.get_submodule(name)
        assert isinstance(part, nn.Linear)
        bias = None if part.bias is None else f"{name}.bias"
        entries.append(
            PlannedLinear(
                name, f"{name}.weight", bias, part.in_features, part.out_features, None, 1, scheme_of(strategy),
                **settings,  # type: ignore[arg-type]  # a test's shorthand
            )
        )  # fmt: skip
    return tuple(entries)


def windows(count: int = 6) -> list[Tensor]:
    return list(torch.randint(20, (count, 10), generator=torch.Generator().manual_seed(1)).split(1))


def test_linears_are_visited_in_the_order_of_the_pass_with_exact_and_noisy_inputs() -> None:
    model, seen = Chain().eval(), []

    def visit(entry: PlannedLinear, exact: Tensor, noisy: Tensor, weight: Tensor, bias: Tensor | None) -> Run:
        seen.append((entry.path, tuple(exact.shape), torch.equal(exact, noisy)))
        return lambda x: functional.linear(x, weight, bias) + 1

    missed = walk(model, planned("second", "first", "routed"), windows(), visit)
    assert seen == [("first", (60, 8), True), ("second", (60, 12), False)]
    assert missed == ("routed.weight",)
    assert not any(part._forward_hooks for part in model.modules()), "nothing is left on the model"


def test_a_linear_that_is_called_twice_is_decided_once() -> None:
    model, calls = Chain().eval(), []

    def visit(entry: PlannedLinear, exact: Tensor, noisy: Tensor, weight: Tensor, bias: Tensor | None) -> Run:
        def run(x: Tensor) -> Tensor:
            calls.append(x.shape)
            return functional.linear(x, weight, bias)

        return run

    walk(model, planned("second"), windows(), visit)
    assert len(calls) >= 1


@pytest.mark.parametrize("strategy", [STATIC, TOKEN])
def test_plain_settings_are_those_of_maxima(strategy: Strategy) -> None:
    """The first linear's inputs have no upstream noise: sequence and maxima agree to the bit."""
    model, entries = Chain().eval(), planned("first", strategy=strategy)
    decided, missed = round_in_sequence(model, entries, windows())
    with observe_linears(model, ["first.weight"]) as maxima, torch.no_grad():
        for ids in windows():
            model(ids)
    reference = Chain().eval()
    quantize_(reference, entries, maxima)
    weight = reference.first.weight
    assert missed == ()
    assert torch.equal(decided["first.weight"].values, weight.values)
    assert torch.equal(decided["first.weight"].scale, weight.scale)
    if strategy is STATIC:
        assert torch.equal(decided["first.weight"].input_scale, weight.input_scale)


@pytest.mark.parametrize("strategy", [STATIC, TOKEN])
def test_the_quantized_model_computes_what_the_pass_saw(strategy: Strategy) -> None:
    entries = planned("first", "second", strategy=strategy, activations=OUTPUT, weights=WeightQuantization(
        rounding=Rounding.QRONOS, bias_correction=True))  # fmt: skip
    model, ids = Chain().eval().requires_grad_(False), torch.cat(windows())
    decided, _ = round_in_sequence(model, entries, windows())
    exact = functional.linear(functional.gelu(model.first(model.table(ids))), model.second.weight).flatten(0, 1)
    quantize_(model, entries, rounded=decided)
    got = model.second(functional.gelu(model.first(model.table(ids)))).flatten(0, 1)
    error = float((got - exact).double().square().sum() / exact.double().square().sum())
    assert error == pytest.approx(decided["second.weight"].error, rel=1e-3)
    assert 0 < error < 1e-2
    assert output_errors(decided)[0][1] >= output_errors(decided)[1][1]


def errors(weights: WeightQuantization, activations: ActivationQuantization | None = None) -> Sequence[float]:
    entries = planned("first", "second", weights=weights, activations=activations or ActivationQuantization())
    decided, _ = round_in_sequence(Chain().eval(), entries, windows(64))
    return [decided[f"{name}.weight"].error for name in ("first", "second")]


def test_each_means_lowers_the_output_error() -> None:
    plain = errors(WeightQuantization())
    for rounding in (Rounding.GPTQ, Rounding.QRONOS):
        assert sum(errors(WeightQuantization(rounding=rounding))) < sum(plain)
    assert sum(errors(WeightQuantization(), OUTPUT)) <= sum(plain)


def test_bias_correction_takes_the_mean_error_out() -> None:
    entries = planned("second", strategy=TOKEN, weights=WeightQuantization(bias_correction=True))
    model, ids = Chain().eval(), torch.cat(windows())
    decided, _ = round_in_sequence(model, entries, windows())
    inputs = functional.gelu(model.first(model.table(ids)))
    exact = functional.linear(inputs, model.second.weight)
    quantize_(model, entries, rounded=decided)
    assert model.second.bias is not None, "made where there was none"
    assert (model.second(inputs) - exact).mean((0, 1)).abs().max() < 1e-6


def test_what_needs_values() -> None:
    assert not needs_values(planned("first"))
    assert needs_values(planned("first", activations=OUTPUT))
    assert not needs_values(planned("first", strategy=TOKEN, activations=OUTPUT)), "dynamic scales are not clipped"
    assert needs_values(planned("first", strategy=TOKEN, weights=WeightQuantization(rounding=Rounding.GPTQ)))
    assert not needs_values(planned("first", weights=WeightQuantization(clip="mse")))
    assert needs_values(planned("first", weights=WeightQuantization(bias_correction=True)))


@pytest.mark.parametrize(("value", "message"), [(0.0, "always zero"), (float("nan"), "NaN or infinite")])
def test_useless_inputs_are_refused(value: float, message: str) -> None:
    model = Chain().eval()
    with torch.no_grad():
        model.table.weight.fill_(value)
    with pytest.raises(AutoQuantError, match=f"first.weight: its input was {message}"):
        round_in_sequence(model, planned("first"), windows())

"""Whatever runs the text: the same observers see the same, and a runner more is one class."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from quantized import PACKAGED, STATIC_KV, config_of, windows
from torch import Tensor, nn

from autoquant.algorithms.gptq_qronos import round_in_sequence
from autoquant.algorithms.prefix_search import find_prefix
from autoquant.calibration.observers import sweep
from autoquant.calibration.runner import LayerByLayer, Observer, Progress, Runner, silent, whole
from autoquant.checkpoint.quantize import load_float32
from autoquant.config.format import Rounding, Strategy, edited
from autoquant.errors import AutoQuantError
from autoquant.models.structure import structure_of
from autoquant.quantizer.strategies import plan_linears

LINEARS = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(5)]


@dataclass(slots=True)
class Backwards:
    """A second runner: the last batch first, as two halves of the rows."""

    passes: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        observers: Sequence[Observer] = (),
        progress: Progress = silent,
    ) -> None:
        self.passes += [tuple(batch.shape) for batch in reversed(batches)]
        whole(model, batches[::-1], observers, progress)


def layer_by_layer(model: nn.Module) -> tuple[nn.Module, Runner]:
    """The same model without weights, and the runner that brings them."""
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}
    inventory, empty = structure_of(model), copy.deepcopy(model)
    shared = {name: nn.Parameter(torch.empty_like(weights[name], device="meta")) for name in inventory.shapes}
    for name in inventory.shapes:
        owner, _, last = name.rpartition(".")
        empty.get_submodule(owner)._parameters[last] = shared[inventory.canonical[name]]
    return empty, LayerByLayer(inventory, weights.__getitem__)


def test_every_runner_finds_the_same() -> None:
    model = load_float32(PACKAGED)
    expected = sweep(model, LINEARS, windows(3), cache=True)
    empty, layered = layer_by_layer(model)
    steps: list[tuple[int, int]] = []
    for ran, runner in ((model, Backwards()), (empty, layered)):
        found = sweep(ran, LINEARS, windows(3), cache=True, runner=runner, progress=lambda *at: steps.append(at))
        assert set(found.inputs) == set(LINEARS)
        assert all(torch.equal(found.inputs[name], expected.inputs[name]) for name in LINEARS)
        for kind in ("key", "value"):
            assert all(torch.equal(found.cache[kind][i], expected.cache[kind][i]) for i in range(5))
    assert steps == [*((i, 3) for i in (1, 2, 3)), *((i, 5) for i in (1, 2, 3, 4, 5))], "windows, then layers"


def test_rounding_and_the_search_for_a_prefix_go_through_the_runner() -> None:
    config = config_of(PACKAGED)
    section = edited(config.quantization, weights=edited(config.quantization.weights, rounding=Rounding.GPTQ))
    planned = plan_linears(edited(config, quantization=section), Strategy(STATIC_KV))
    runner, model = Backwards(), load_float32(PACKAGED)
    expected, _ = round_in_sequence(model, planned, windows(2))
    rounded, _ = round_in_sequence(model, planned, windows(2), runner=runner)
    assert runner.passes == [(4, 25)], "one pass, each window twice"
    assert torch.equal(rounded[LINEARS[1]].values, expected[LINEARS[1]].values)
    assert find_prefix(model, planned, 0, windows(3), runner) == find_prefix(model, planned, 0, windows(3)) == (0,)
    assert runner.passes[1:] == [(1, 25)] * 6, "without a prefix and behind it"


@pytest.mark.parametrize("kind", ["whole", "layers"])
def test_an_error_ends_the_run_with_nothing_left_on_the_model(kind: str) -> None:
    model = load_float32(PACKAGED)
    ran, runner = (model, whole) if kind == "whole" else layer_by_layer(model)
    layer = ran.get_submodule("model.layers.3.mlp")
    forward = layer.forward

    def fails(x: Tensor) -> Tensor:
        if x.shape[1] == 2:
            raise IndexError("the last batch")
        result: Tensor = forward(x)
        return result

    layer.forward = fails
    with pytest.raises(IndexError, match="the last batch"):
        sweep(ran, LINEARS, (*windows(2), torch.tensor([[0, 99]])), cache=True, runner=runner)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ran.modules())


@pytest.mark.parametrize("kind", ["whole", "layers"])
def test_batches_that_do_not_fit_the_model_are_refused_before_the_run(kind: str) -> None:
    model = load_float32(PACKAGED)
    ran, runner = (model, whole) if kind == "whole" else layer_by_layer(model)
    steps: list[tuple[int, int]] = []
    with pytest.raises(AutoQuantError, match="token 99999 is beyond the model's table of 2048 tokens"):
        runner(ran, (*windows(2), torch.tensor([[0, 99_999]])), progress=lambda *at: steps.append(at))
    assert steps == []

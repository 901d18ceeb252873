"""Linears quantized one after the other in the order in which the model calls them, each on what it will really get.

One forward pass over all calibration windows at once. The batch holds every window twice: the first half stays in
floating point, the second runs through the linears that are quantized already. When a linear is called, its exact
inputs and its noisy ones are both there: its static scale is chosen on the noisy ones, its weight is rounded against
the exact ones, and the second half goes on with the int8 result. So nothing is swept twice, and upstream noise is
present in every decision, as in Qronos (Zhang et al. 2025, "Qronos: Correcting the Past by Shaping the Future in
Post-Training Quantization"); GPTQ (Frantar et al. 2022) rounds each weight against its noisy inputs alone. The
arithmetic of both is in :mod:`autoquant.algorithms.rounding`.

A linear whose rows are no longer the windows in order (an expert's tokens) cannot be split in halves: it is rounded to
the nearest value, and its static scale is the maximum. Shapes: N windows, T tokens, O outputs, I inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoquant.algorithms.bias_correction import corrected_bias
from autoquant.algorithms.clipping import clipped_maximum
from autoquant.algorithms.rounding import corrected, cross_moment, gptq
from autoquant.calibration.runner import Progress, Runner, silent, whole
from autoquant.config.format import ActivationQuantization, Rounding, StaticClip, WeightQuantization
from autoquant.errors import AutoQuantError
from autoquant.models.locate import Location, locate
from autoquant.quantizer import int8
from autoquant.quantizer.linear import Rounded
from autoquant.quantizer.strategies import PlannedLinear
from autoquant.quantizer.weight import Int8Weight, linear

Run = Callable[[Tensor], Tensor]
"""A linear as a function of its inputs [..., I]."""
Visit = Callable[[PlannedLinear, Tensor, Tensor, Tensor, Tensor | None], Run]
"""Told of a linear when it is first called: the plan, exact and noisy inputs [T, I], weight [O, I], bias [O]. Returns
what the noisy half goes on with."""


class _Done(BaseException):
    """Ends the pass after the last linear. No Exception, so that no model's code catches it."""


def needs_values(planned: Sequence[PlannedLinear]) -> bool:
    """True if any linear needs more of the calibration than maxima."""
    return any(
        entry.weights.rounding is not Rounding.NEAREST
        or entry.weights.bias_correction
        or (entry.scheme.is_static and entry.activations.clip is not StaticClip.ABSMAX)
        for entry in planned
    )


@torch.no_grad()
def walk(
    model: nn.Module,
    planned: Sequence[PlannedLinear],
    batches: Sequence[Tensor],
    visit: Visit,
    progress: Progress = silent,
    runner: Runner = whole,
) -> tuple[str, ...]:
    """Run ``batches`` (token ids [1, S] of equal length) once, and ``visit`` each planned linear at its first call.

    Returns the weights' names of the linears that could not be visited: not called, or called with other rows than the
    windows'. ``model`` is left as it was.
    """
    twice = windows_twice(batches)
    with visiting(model, planned, len(twice) // 2, visit, progress) as visited, suppress(_Done):
        runner(model, [twice])
    return missed(planned, visited)


def windows_twice(batches: Sequence[Tensor]) -> Tensor:
    """The batch [2 N, S] of a walk: all windows that are as long as the first, and all of them again.

    Raises AutoQuantError where there are none.
    """
    if not batches:
        raise AutoQuantError("what is decided by the values of a pass needs windows of text: there are none")
    length = batches[0].shape[1]
    windows = torch.cat([batch for batch in batches if batch.shape[1] == length])
    return torch.cat([windows, windows])


def missed(planned: Sequence[PlannedLinear], visited: Collection[str]) -> tuple[str, ...]:
    """The weights' names of the linears that were not visited."""
    return tuple(entry.weight for entry in planned if entry.weight not in visited)


@contextmanager
def visiting(
    model: nn.Module,
    planned: Sequence[PlannedLinear],
    count: int,
    visit: Visit,
    progress: Progress = silent,
    *,
    to_the_end: bool = False,
) -> Iterator[Collection[str]]:
    """A context in which ``visit`` is told of each planned linear that a pass of ``count`` windows, twice, calls.

    Yields the weights' names that were visited. Parameters are looked at when a linear is called: they may come and go
    with its layer. The pass ends with the last linear, by an exception of :func:`walk`'s, unless ``to_the_end``.
    """
    runs: dict[str, Run | None] = {}
    visited: set[str] = set()
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    repeated = {module for module, number in places.items() if number > 1}  # called more than once in a pass
    hooked = [(entry, locate(model, entry.weight)) for entry in planned if entry.stack is None]

    def decide(entry: PlannedLinear, found: Location, x: Any, output: Any) -> Run | None:
        weight = found.owner.get_parameter(found.name).detach()
        weight_OI = weight if entry.in_dim == weight.dim() - 1 else weight.mT
        bias = dict(found.owner.named_parameters(recurse=False)).get("bias")
        if not _splits(x, output, 2 * count, weight_OI, bias):
            return None
        visited.add(entry.weight)
        return visit(entry, x[:count].flatten(0, -2), x[count:].flatten(0, -2), weight_OI, bias)

    def hook(entry: PlannedLinear, found: Location, module: nn.Module, args: Any, output: Any) -> Any:
        x: Any = args[0] if args else None
        if entry.weight not in runs:
            runs[entry.weight] = None
            runs[entry.weight] = decide(entry, found, x, output)
            progress(len(runs), len(hooked))
        run = runs[entry.weight]
        result = output if run is None else torch.cat([output[:count], run(x[count:]).to(output.dtype)])
        if len(runs) == len(hooked) and module not in repeated and not to_the_end:
            raise _Done
        return result

    with ExitStack() as stack:
        for entry, found in hooked:
            handle = found.owner.register_forward_hook(partial(hook, entry, found))
            stack.callback(handle.remove)
        yield visited


def _splits(x: Any, output: Any, rows: int, weight_OI: Tensor, bias: Tensor | None) -> bool:
    """True if a module's input holds all windows twice, and its output is the product that its parameters say."""
    if not (isinstance(x, Tensor) and isinstance(output, Tensor) and x.dim() >= 2 and x.shape[0] == rows):
        return False
    if x.shape[-1] != weight_OI.shape[1]:
        return False
    expected = functional.linear(x[:1], weight_OI, bias)
    return expected.shape == output[:1].shape and torch.allclose(
        expected, output[:1], rtol=1e-3, atol=1e-4, equal_nan=True
    )


@torch.no_grad()
def round_in_sequence(
    model: nn.Module,
    planned: Sequence[PlannedLinear],
    batches: Sequence[Tensor],
    progress: Progress = silent,
    runner: Runner = whole,
) -> tuple[dict[str, Rounded], tuple[str, ...]]:
    """Decide int8 values, scales and biases of the planned linears by weight name, in one pass over ``batches``.

    ``model`` is in floating point, rotated and smoothed; it is not changed. Also returns the names of the weights that
    the pass could not reach, for which the caller falls back to maxima.
    Raises AutoQuantError where a linear's input was always zero or is not finite.
    """
    decided: dict[str, Rounded] = {}

    def visit(entry: PlannedLinear, exact: Tensor, noisy: Tensor, weight: Tensor, bias: Tensor | None) -> Run:
        decided[entry.weight], run = decide_linear(entry, exact, noisy, weight, bias)
        return run

    return decided, walk(model, planned, batches, visit, progress, runner)


def decide_linear(
    entry: PlannedLinear, exact: Tensor, noisy: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Rounded, Run]:
    """What :func:`round_linear` makes of a linear with the error that this leaves, and the linear as it is then."""
    rounded = round_linear(entry, exact, noisy, weight, bias)
    run = int8_run(entry, rounded, weight.dtype)
    error = float((run(noisy) - functional.linear(exact, weight, bias)).double().square().sum())
    size = float(functional.linear(exact, weight).double().square().sum())
    return replace(rounded, error=error / max(size, 1e-30)), run


def round_linear(entry: PlannedLinear, exact: Tensor, noisy: Tensor, weight: Tensor, bias: Tensor | None) -> Rounded:
    """One linear by its own settings; ``exact`` and ``noisy`` [T, I], ``weight`` [O, I], ``bias`` [O] or None."""
    settings = entry.weights
    input_scale = static_input_scale(entry, noisy, weight, entry.activations)
    target = weight
    if settings.rounding is not Rounding.NEAREST or settings.bias_correction:
        inputs = rounded_inputs(noisy, entry, input_scale)
        if settings.rounding is not Rounding.NEAREST:
            moment = cross_moment(inputs, inputs)
        if settings.rounding is Rounding.QRONOS:
            target = corrected(weight, cross_moment(exact, inputs), moment)
    scale = weight_scale(target, entry, settings)
    nearest = settings.rounding is Rounding.NEAREST
    values = int8.quantize(target, scale) if nearest else gptq(target, moment, scale)
    if settings.bias_correction:
        bias = corrected_bias(exact, weight, inputs, int8.dequantize(values, scale), bias)
    return Rounded(values.contiguous(), scale, input_scale, bias, 0.0)


def weight_scale(weight: Tensor, entry: PlannedLinear, settings: WeightQuantization) -> Tensor:
    """Float32 scale [O, 1] or [1, 1] of a weight [O, I]."""
    dims = (-1,) if entry.scheme.weight_per_channel else (-2, -1)
    return int8.absmax_scale(weight, dims) if settings.clip == "absmax" else int8.mse_scale(weight, dims)


def static_input_scale(
    entry: PlannedLinear, noisy: Tensor, weight: Tensor, choice: ActivationQuantization
) -> Tensor | None:
    """The static scale [] of inputs [T, I], None for dynamic ones. Raises AutoQuantError where none exists."""
    if not entry.scheme.is_static:
        return None
    largest = clipped_maximum(noisy, weight, choice)
    if not bool(largest.isfinite()):
        raise AutoQuantError(f"{entry.weight}: its input was NaN or infinite during calibration")
    if not bool(largest > 0):
        raise AutoQuantError(f"{entry.weight}: its input was always zero during calibration, so no static scale exists")
    return int8.scale_of(largest)


def rounded_inputs(x: Tensor, entry: PlannedLinear, input_scale: Tensor | None) -> Tensor:
    """What int8 keeps of inputs [T, I]; a per-tensor dynamic scale is taken over all of them."""
    if input_scale is None:
        per_token = entry.scheme.activation.value.startswith("per_token")
        input_scale = int8.absmax_scale(x, (1,) if per_token else None)
    return int8.fake_quantize(x, input_scale)


def int8_run(entry: PlannedLinear, rounded: Rounded, dtype: torch.dtype) -> Run:
    """The linear in int8 arithmetic, as the quantized model will compute it."""
    view = Int8Weight(
        rounded.values, rounded.scale, rounded.input_scale, entry.scheme.activation, dtype, transposed=False
    ).view()
    return lambda x: linear(x, view, rounded.bias)


def output_errors(decided: Mapping[str, Rounded]) -> list[tuple[str, float]]:
    """Weight names with their output error, the largest first."""
    return sorted(((name, one.error) for name, one in decided.items()), key=lambda pair: -pair[1])

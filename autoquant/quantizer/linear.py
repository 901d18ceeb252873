"""Int8 linears, and the replacement of a model's linears by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoquant.errors import AutoQuantError
from autoquant.models.locate import Location, locate
from autoquant.quantizer import int8
from autoquant.quantizer.strategies import PlannedLinear, Scheme
from autoquant.quantizer.weight import Int8Weight, Mode, linear

Maxima = Mapping[str, Tensor]
"""Largest input magnitude per channel by weight name: float32 [I], or [E, I] for a stack of experts."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """What was decided for one linear. ``bias`` [O] replaces its own; ``error`` is the squared output error over the
    calibration tokens, with upstream noise, as a share of the squared output.
    """

    values: Tensor
    scale: Tensor
    input_scale: Tensor | None
    bias: Tensor | None
    error: float


class Int8Linear(nn.Module):
    """``y = x @ W.T + b`` in int8 arithmetic for any batch shape: x is [..., I], y is [..., O] in x's dtype.

    ``weight`` holds the int8 values and all scales; ``bias`` [O] stays in floating point and is added in float32.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.out_features, self.in_features = weight.values.shape

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.view(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantize_(
    model: nn.Module,
    planned: Sequence[PlannedLinear],
    maxima: Maxima | None = None,
    rounded: Mapping[str, Rounded] | None = None,
) -> None:
    """Replace the planned linears of ``model`` in place by int8 ones.

    ``maxima`` holds per-channel input maxima by weight name ([I], or [E, I] for a stack), needed by static strategies.
    Linears in ``rounded`` take what was decided there; the others are rounded to the nearest value.

    Everything is checked before the first replacement. Raises AutoQuantError for a path that the model lacks, a shape
    that differs, a weight with NaN or infinity, a missing or useless calibration maximum.
    """
    for entry in planned:
        if not _locate(model, entry).parameter.isfinite().all():
            raise AutoQuantError(f"{entry.weight}: holds NaN or infinite values")
    rounded = rounded or {}
    scales = [None if entry.weight in rounded else static_scale(entry, maxima or {}) for entry in planned]
    for entry, scale in zip(planned, scales, strict=True):  # nothing here keeps a replaced weight alive
        found = locate(model, entry.weight)
        decided = rounded.get(entry.weight)
        if decided is not None:
            _set_bias_(found.owner, decided.bias)
            _replace(found, entry, decided.values, decided.scale, decided.input_scale)
            continue
        values, weight_scale = quantize_weight(found.parameter, entry.in_dim, entry.scheme, entry.weights.clip)
        _replace(found, entry, values, weight_scale, None if scale is None else scale.to(values.device))


def _set_bias_(owner: nn.Module, bias: Tensor | None) -> None:
    if bias is not None:
        owner.register_parameter("bias", nn.Parameter(bias.detach().clone(), requires_grad=False))


def replace_with_empty_(model: nn.Module, planned: Sequence[PlannedLinear]) -> None:
    """Like :func:`quantize_` with uninitialised values of the right shapes: what a checkpoint is loaded into."""
    for entry in planned:
        found = _locate(model, entry)
        stack = () if entry.stack is None else (entry.stack,)
        rows = entry.out_features if entry.scheme.weight_per_channel else 1
        device = found.parameter.device
        values = torch.empty(*stack, entry.out_features, entry.in_features, device=device, dtype=torch.int8)
        scale = torch.empty(*stack, rows, 1, device=device, dtype=torch.float32)
        input_scale = torch.empty(stack, device=device, dtype=torch.float32) if entry.scheme.is_static else None
        _replace(found, entry, values, scale, input_scale)


def quantize_weight(parameter: Tensor, in_dim: int, scheme: Scheme, clip: str = "absmax") -> tuple[Tensor, Tensor]:
    """Int8 values [(E,) O, I] and float32 scale [(E,) O or 1, 1] of a weight whose dimension ``in_dim`` is summed over.

    Each expert of a stack is a tensor of its own: "per tensor" is one scale per expert.
    """
    weight = parameter.detach() if in_dim == parameter.dim() - 1 else parameter.detach().mT
    dims = (-1,) if scheme.weight_per_channel else (-2, -1)
    scale = int8.absmax_scale(weight, dims) if clip == "absmax" else int8.mse_scale(weight, dims)
    return int8.quantize(weight, scale).contiguous(), scale


def static_scale(planned: PlannedLinear, maxima: Maxima) -> Tensor | None:
    """Float32 scale of a static input: [] or, for a stack, [E] with unvisited experts at the largest of the others."""
    if not planned.scheme.is_static:
        return None
    if planned.weight not in maxima:
        raise AutoQuantError(f"{planned.weight}: no calibration maximum of its input, which a static strategy needs")
    maximum = maxima[planned.weight].float()
    if not maximum.isfinite().all():
        raise AutoQuantError(f"{planned.weight}: its input was NaN or infinite during calibration")
    largest = maximum.amax()
    if largest == 0:
        raise AutoQuantError(
            f"{planned.weight}: its input was always zero during calibration, so no static scale exists"
        )
    if planned.stack is not None:
        each = maximum.expand(planned.stack, -1).amax(-1)
        largest = torch.where(each > 0, each, largest)
    return int8.scale_of(largest)


def set_mode_(model: nn.Module, mode: Mode) -> None:
    """Compute every int8 linear of ``model`` in int8, or on the same rounded values in float32 (``fake``)."""
    for module in model.modules():
        if isinstance(module, Int8Weight):
            module.mode = mode


def int8_weights(model: nn.Module) -> Mapping[str, Int8Weight]:
    """The int8 weights of a model by the name of the parameter that each replaced."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Weight)}


def _locate(model: nn.Module, planned: PlannedLinear) -> Location:
    """The planned linear's weight, its shape checked."""
    found = locate(model, planned.weight)
    stack = () if planned.stack is None else (planned.stack,)
    matrix = (planned.out_features, planned.in_features)
    wanted = (*stack, *(matrix if planned.in_dim == len(stack) + 1 else matrix[::-1]))
    got = tuple(found.parameter.shape)
    if got != wanted:
        raise AutoQuantError(f"{planned.weight}: shape {got} in the model, {wanted} in the config")
    return found


def _replace(
    found: Location, planned: PlannedLinear, values: Tensor, scale: Tensor, input_scale: Tensor | None
) -> None:
    """A plain linear becomes an Int8Linear. Any other module keeps its own code, around an int8 weight."""
    transposed = planned.in_dim != found.parameter.dim() - 1
    weight = Int8Weight(values, scale, input_scale, planned.scheme.activation, found.parameter.dtype, transposed)
    owner = found.owner
    if type(owner).forward is nn.Linear.forward and found.name == "weight":
        bias = dict(owner.named_parameters(recurse=False)).get("bias")
        setattr(found.parent, found.child, Int8Linear(weight, bias).train(owner.training))
    else:
        delattr(owner, found.name)
        setattr(owner, found.name, weight)

"""An int8 weight that stands where a floating-point parameter stood, whatever the code around does with that parameter.

``nn.Linear`` calls ``linear(x, W)``, other modules ``addmm(b, x, W)`` or ``x @ W.T``, and mixtures of experts hold a
stack ``W[E, O, I]`` that they index, transpose and hand to a grouped product. :class:`WeightView` answers all of these
through ``__torch_function__`` with int8 arithmetic. It is a closed world: any other operation is an error that names
it, never a silent return to floating point.

Shapes: E experts, O output channels, I input channels, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autoquant.errors import AutoQuantError
from autoquant.quantizer import cpu_linear, cuda_linear, int8
from autoquant.quantizer.cpu_linear import Packed
from autoquant.quantizer.strategies import Granularity

Mode = Literal["int8", "fake"]


@dataclass(frozen=True, slots=True)
class WeightView:
    """A look at an int8 weight: all of it, one expert, or its transpose.

    ``values`` is int8 [(E,) O, I] and ``scale`` float32 [(E,) O or 1, 1]; ``input_scale`` is float32 [(E)] for static
    activations and None for dynamic ones. ``transposed`` shows it as [(E,) I, O]; ``dtype`` is the one it pretends to
    have; ``packed`` remembers forms of the values that a CPU multiplies faster.
    """

    values: Tensor
    scale: Tensor
    input_scale: Tensor | None
    activation: Granularity
    mode: Mode
    dtype: torch.dtype
    transposed: bool
    packed: Packed | None = None

    @property
    def shape(self) -> torch.Size:
        *stack, out_features, in_features = self.values.shape
        return torch.Size([*stack, in_features, out_features] if self.transposed else self.values.shape)

    @property
    def ndim(self) -> int:
        return self.values.dim()

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def mT(self) -> WeightView:
        return replace(self, transposed=not self.transposed)

    @property
    def T(self) -> WeightView:
        return self.t()

    def t(self) -> WeightView:
        if self.ndim != 2:
            raise AutoQuantError(f"an int8 weight of shape {tuple(self.shape)} has no .T; use .mT")
        return self.mT

    def transpose(self, first: int, second: int) -> WeightView:
        if {first % self.ndim, second % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            raise AutoQuantError(f"an int8 weight of shape {tuple(self.shape)} cannot swap axes {first} and {second}")
        return self.mT

    def __getitem__(self, index: Any) -> WeightView:
        """Experts by number, slice, mask or index tensor: the first axis only, and not the one of a matrix."""
        if self.ndim < 3 or isinstance(index, tuple):
            raise AutoQuantError(f"an int8 weight of shape {tuple(self.shape)} cannot be indexed by {index!r}")
        input_scale = None if self.input_scale is None else self.input_scale[index]
        return replace(self, values=self.values[index], scale=self.scale[index], input_scale=input_scale)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def contiguous(self) -> WeightView:
        return self

    def to(self, *args: Any, **kwargs: Any) -> WeightView:
        """Another dtype is only pretended: the values stay int8. The device must be the weight's own."""
        example = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if example.device != self.device:
            raise AutoQuantError(
                f"an int8 weight on {self.device} was asked for on {example.device}: move the whole model"
            )
        return replace(self, dtype=example.dtype)

    def type(self, dtype: torch.dtype) -> WeightView:
        return self.to(dtype)

    def float(self) -> WeightView:
        return self.to(torch.float32)

    def dequantize(self) -> Tensor:
        """The float32 weight that the int8 one stands for, in the shape it shows."""
        weight = int8.dequantize(self.values, self.scale)
        return weight.mT if self.transposed else weight

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})


class Int8Weight(nn.Module):
    """Int8 values and float32 scales as buffers, usable in place of the parameter they were made from.

    ``values`` int8 [(E,) O, I], whatever the parameter's own layout was; ``scale`` float32 [(E,) O or 1, 1];
    ``input_scale`` float32 [(E)], static activations only.
    """

    values: Tensor
    scale: Tensor
    input_scale: Tensor | None

    def __init__(
        self,
        values: Tensor,
        scale: Tensor,
        input_scale: Tensor | None,
        activation: Granularity,
        dtype: torch.dtype,
        transposed: bool,
    ) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.register_buffer("input_scale", input_scale)
        self.activation = activation
        self.pretended_dtype = dtype
        self.transposed = transposed
        self.mode: Mode = "int8"
        self.packed = Packed()
        self.seen: WeightView | None = None

    def view(self) -> WeightView:
        """The whole weight as the surrounding code expects it; the same object while nothing changes.

        Of a small product the attributes of a module are a tenth of the time.
        """
        if torch.compiler.is_compiling():
            return self._viewed(None)
        buffers, seen = self._buffers, self.seen
        values = buffers["values"]
        if (
            seen is None
            or seen.values is not values
            or seen.scale is not buffers["scale"]
            or seen.input_scale is not buffers["input_scale"]
            or seen.mode != self.mode
        ):
            if self.packed.source is not values:
                self.packed = Packed(self.values)
            self.seen = seen = self._viewed(self.packed)
        return seen

    def _viewed(self, packed: Packed | None) -> WeightView:
        return WeightView(
            values=self.values,
            scale=self.scale,
            input_scale=self.input_scale,
            activation=self.activation,
            mode=self.mode,
            dtype=self.pretended_dtype,
            transposed=self.transposed,
            packed=packed,
        )

    def forget(self) -> None:
        """Let go of what was made of the values: they are moved, or go."""
        self.seen, self.packed = None, Packed()

    def __getitem__(self, index: Any) -> WeightView:
        return self.view()[index]

    def __getattr__(self, name: str) -> Any:
        """What a module does not have (shape, dtype, T, transpose ...) is asked of the weight."""
        return getattr(self.view(), name) if name in WEIGHT_ATTRIBUTES else super().__getattr__(name)

    # nn.Module's own conversions would change the buffers for good; code around a weight means a converted copy.
    # Moving the model does not come here: it calls _apply on every module.
    def to(self, *args: Any, **kwargs: Any) -> WeightView:  # type: ignore[override]  # see above
        return self.view().to(*args, **kwargs)

    def type(self, dst_type: Any) -> WeightView:  # type: ignore[override]  # see above
        return self.view().to(dst_type)

    def float(self) -> WeightView:  # type: ignore[override]  # see above
        return self.view().float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Weight:
        """Follow the model to another device, never to another dtype: scales stay float32."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        self.forget()  # it holds what is moved
        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]  # torch's own
        return self

    def extra_repr(self) -> str:
        per = "channel" if self.scale.shape[-2] > 1 else "tensor"
        return f"{tuple(self.values.shape)}, w_int8_per_{per}, a_int8_{self.activation.value}, mode={self.mode}"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})


# What code around a weight asks it, beyond taking products and indexing.
WEIGHT_ATTRIBUTES = frozenset(
    (
        "shape",
        "ndim",
        "device",
        "dtype",
        "mT",
        "T",
        "t",
        "transpose",
        "size",
        "dim",
        "data_ptr",
        "contiguous",
        "dequantize",
    )
)


def linear(x: Tensor, weight: WeightView, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias``: x is [..., I], the weight shows [O, I], the result is [..., O] in x's dtype.

    In mode int8 both factors are int8 and the sum over I is an exact int32; in mode fake the same rounded values are
    multiplied in float32, which differs by float rounding only.
    """
    if weight.values.dim() != 2 or weight.transposed:
        raise AutoQuantError(f"a linear needs an int8 weight [O, I]; it shows {tuple(weight.shape)}")
    if x.shape[-1:] != weight.values.shape[-1:]:
        raise AutoQuantError(f"an int8 weight [O, I] {tuple(weight.shape)} cannot take an input {tuple(x.shape)}")
    # Kernels want the strides that a reshape gives a single row; one that is a matrix already saves the 5 µs.
    x_TI = x if x.dim() == 2 and x.stride() == (x.shape[1], 1) else x.reshape(-1, x.shape[-1])
    per_token = weight.activation is Granularity.TOKEN_DYNAMIC
    if weight.mode == "fake":
        out_TO = int8.fake_quantize(x_TI, input_scale(x_TI, weight)) @ weight.dequantize().t()
        out_TO = (out_TO if bias is None else out_TO + bias.float()).to(x.dtype)
    elif cuda_linear.takes(x, weight.values):
        out_TO = torch.ops.autoquant.int8_linear(
            x_TI, weight.values, weight.scale, _static_scale(weight), per_token, bias
        )
    elif cpu_linear.takes(x, weight.values, weight.packed):
        assert weight.packed is not None
        out_TO = cpu_linear.linear(
            x_TI, weight.values, weight.packed, weight.scale, _static_scale(weight), per_token, bias
        )
    else:
        out_TO = int8.linear(x_TI, weight.values, weight.scale, input_scale(x_TI, weight), bias)
    return out_TO if x.dim() == 2 else out_TO.reshape(*x.shape[:-1], weight.values.shape[0])


def input_scale(x_TI: Tensor, weight: WeightView) -> Tensor:
    """Scale of an input, float32: [T, 1] per token, [1, 1] per dynamic tensor, [] static."""
    static = _static_scale(weight)
    if static is not None:
        return static
    return int8.absmax_scale(x_TI, (1,) if weight.activation is Granularity.TOKEN_DYNAMIC else None)


def _static_scale(weight: WeightView) -> Tensor | None:
    if weight.activation.is_static and weight.input_scale is None:
        raise AutoQuantError("an int8 weight with static activations has no input scale: calibrate first")
    return weight.input_scale if weight.activation.is_static else None


def product(x: Tensor, weight: WeightView) -> Tensor:
    """``x @ W`` for a weight that shows [I, O] or [E, I, O]; a stack takes x as [E, T, I], expert by expert."""
    if weight.ndim == 2:
        return linear(x, weight.mT)
    if x.dim() != 3 or x.shape[0] != weight.shape[0]:
        raise AutoQuantError(f"a stack of int8 weights {tuple(weight.shape)} cannot take an input {tuple(x.shape)}")
    return torch.stack([linear(x[e], weight[e].mT) for e in range(weight.shape[0])])


def product_from_left(weight: WeightView, x: Tensor) -> Tensor:
    """``W @ x`` as the transpose of ``x.mT @ W.mT``."""
    if x.dim() == 1:
        return linear(x, weight)
    return product(x.mT, weight.mT).mT


def grouped_product(x: Tensor, weight: WeightView, offs: Tensor) -> Tensor:
    """``x[offs[e-1] : offs[e]] @ W[e]`` for every expert: x is [T, I] sorted by expert, the weight shows [E, I, O]."""
    shown = weight.mT
    if (
        weight.mode == "int8"
        and not shown.transposed
        and weight.activation is not Granularity.TENSOR_DYNAMIC
        and cuda_linear.takes(x, weight.values)
        and len(weight.values) <= cuda_linear.MOST_EXPERTS
    ):
        grouped: Tensor = torch.ops.autoquant.int8_grouped_linear(
            x, weight.values, weight.scale, _static_scale(weight), offs.to(torch.int32)
        )
        return grouped
    out_TO = x.new_zeros(x.shape[0], weight.shape[-1])
    start = 0
    for expert, end in enumerate(offs.tolist()):
        if end > start:
            out_TO[start:end] = linear(x[start:end], weight[expert].mT)
        start = end
    return out_TO


def dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Carry out a torch function one of whose arguments is an int8 weight; AutoQuantError for all but products."""
    args = tuple(arg.view() if isinstance(arg, Int8Weight) else arg for arg in args)
    named = {name: arg.view() if isinstance(arg, Int8Weight) else arg for name, arg in kwargs.items()}
    name = getattr(func, "__name__", str(func)).strip("_")
    handler = HANDLERS.get(name.removesuffix(".default"))
    if handler is None:
        raise AutoQuantError(f"an int8 weight took part in '{name}': exclude this linear from quantization")
    return handler(*args, **named)


def _matmul(left: Any, right: Any) -> Tensor:
    return product_from_left(left, right) if isinstance(left, WeightView) else product(left, right)


def _addmm(bias: Any, x: Tensor, weight: WeightView, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta != 1 or alpha != 1:
        raise AutoQuantError("an int8 weight took part in 'addmm' with factors: exclude this linear from quantization")
    return linear(x, weight.mT, bias)


def _linear(input: Tensor, weight: WeightView, bias: Tensor | None = None) -> Tensor:
    return linear(input, weight, bias)


def _grouped_mm(
    input: Tensor, weight: WeightView, offs: Tensor, bias: None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    if bias is not None:
        raise AutoQuantError("an int8 weight took part in a grouped product with a bias: exclude this linear")
    return grouped_product(input, weight, offs).to(out_dtype or input.dtype)


def _transpose(weight: WeightView, *axes: int, **named: int) -> WeightView:
    return weight.transpose(*axes, *named.values())


# By the operation's name: torch.matmul, Tensor.matmul and the @ operator are one operation with three function objects.
HANDLERS: Mapping[str, Callable[..., Any]] = {
    "linear": _linear,
    "matmul": _matmul,
    "rmatmul": lambda right, left: _matmul(left, right),
    "mm": _matmul,
    "bmm": _matmul,
    "addmm": _addmm,
    "grouped_mm": _grouped_mm,
    "grouped_mm_fallback": _grouped_mm,
    "transpose": _transpose,
    "t": WeightView.t,
}

"""Int8 linears as what ONNX has for them: QuantizeLinear, DequantizeLinear and a MatMul between floats.

A runtime takes ``MatMul(DQ(Q(x)), DQ(W))`` for the int8 product that it stands for; one that does not computes the same
but for float rounding. Traced by ``torch.onnx.export`` alone: the operators compute nothing in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoquant.errors import AutoQuantError
from autoquant.quantizer.linear import Int8Linear
from autoquant.quantizer.weight import Int8Weight

OPSET = 19
"""Q and DQ of int8 are older; what toolchains for NPUs take ends between 19 and 21."""


class QDQLinear(nn.Module):
    """``y = x @ W + b``: x is [..., I], y is [..., O], float32.

    ``values`` int8 [I, O], as MatMul takes it; ``scale`` float32 [O], or [] per tensor; ``input_scale`` float32 [].
    All zero points are 0. QuantizeLinear rounds half to even and saturates at -128 and 127, as ours do.
    """

    values: Tensor
    scale: Tensor
    zero_points: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: Int8Linear) -> None:
        super().__init__()
        weight = linear.weight
        if weight.input_scale is None:
            raise AutoQuantError("only static activation scales are expressed in QDQ nodes")
        shape = (-1,) if weight.scale.numel() > 1 else ()
        scale = weight.scale.detach().reshape(shape)
        self.register_buffer("values", weight.values.detach().t().contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("zero_points", torch.zeros_like(scale, dtype=torch.int8))
        self.register_buffer("input_scale", weight.input_scale.detach().reshape(()))
        self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.int8))
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:  # of two matrices and a bias onnxruntime makes a Gemm, and rounds the bias to its integers
            return self(x.unsqueeze(0)).squeeze(0)  # type: ignore[no-any-return]  # a module's call is untyped
        rounded = _symbolic("QuantizeLinear", (x, self.input_scale, self.input_zero_point), torch.int8)
        inputs = _symbolic("DequantizeLinear", (rounded, self.input_scale, self.input_zero_point), torch.float32)
        axis = {"axis": 1} if self.scale.dim() else None
        weight = _symbolic("DequantizeLinear", (self.values, self.scale, self.zero_points), torch.float32, axis)
        out = inputs @ weight
        return out if self.bias is None else out + self.bias


def replace_by_qdq_(model: nn.Module) -> None:
    """Replace every int8 linear of a model. Raises AutoQuantError for int8 weights that another module holds."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Int8Linear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, QDQLinear(module))
    for path, module in model.named_modules():
        if isinstance(module, Int8Weight):
            raise AutoQuantError(f"{path}: the int8 weight of no plain linear; exclude it from quantization")


def _symbolic(
    operator: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, attributes: dict[str, int] | None = None
) -> Tensor:
    """An operator of ONNX in a trace; its result has the shape of its first input."""
    made: Tensor = torch.onnx.ops.symbolic(
        operator, inputs, dict(attributes or {}), dtype=dtype, shape=inputs[0].shape, version=OPSET
    )
    return made

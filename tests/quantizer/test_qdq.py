from __future__ import annotations

import pytest
import torch
from torch import nn

from autoquant.errors import AutoQuantError
from autoquant.quantizer import int8
from autoquant.quantizer.linear import Int8Linear
from autoquant.quantizer.qdq import QDQLinear, replace_by_qdq_
from autoquant.quantizer.strategies import Granularity
from autoquant.quantizer.weight import Int8Weight


def weight(static: bool = True, per_channel: bool = True) -> Int8Weight:
    made = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    scale = int8.absmax_scale(made, (1,) if per_channel else (0, 1))
    kind = Granularity.TENSOR_STATIC if static else Granularity.TOKEN_DYNAMIC
    given = torch.tensor(0.5) if static else None
    return Int8Weight(int8.quantize(made, scale), scale, given, kind, torch.float32, transposed=False)


@pytest.mark.parametrize("per_channel", [True, False])
def test_tensors_are_as_matmul_takes_them(per_channel: bool) -> None:
    held = weight(per_channel=per_channel)
    made = QDQLinear(Int8Linear(held, torch.ones(3)))
    assert torch.equal(made.values, held.values.t()) and made.values.is_contiguous()
    assert torch.equal(made.scale.flatten(), held.scale.flatten())
    assert made.scale.shape == made.zero_points.shape == ((3,) if per_channel else ())
    assert made.input_scale.item() == 0.5 and made.bias is not None
    assert not made.zero_points.any() and made.zero_points.dtype is made.input_zero_point.dtype is torch.int8
    assert made(torch.zeros(2, 4, 5)).shape == (2, 4, 3) and made(torch.zeros(4, 5)).shape == (4, 3)


def test_dynamic_scales_and_weights_of_other_modules_are_refused() -> None:
    with pytest.raises(AutoQuantError, match="only static activation scales"):
        replace_by_qdq_(nn.Sequential(Int8Linear(weight(static=False), None)))
    holder = nn.Module()
    holder.weight = weight()
    with pytest.raises(AutoQuantError, match=r"^0\.weight: the int8 weight of no plain linear"):
        replace_by_qdq_(nn.Sequential(holder))


def test_every_linear_is_replaced() -> None:
    model = nn.Sequential(nn.Sequential(Int8Linear(weight(), None)), Int8Linear(weight(), None), nn.Linear(3, 3))
    replace_by_qdq_(model)
    assert isinstance(model.get_submodule("0.0"), QDQLinear) and isinstance(model[1], QDQLinear)
    assert isinstance(model[2], nn.Linear)

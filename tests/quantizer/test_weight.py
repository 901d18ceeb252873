from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoquant.errors import AutoQuantError
from autoquant.quantizer import int8
from autoquant.quantizer.strategies import Granularity
from autoquant.quantizer.weight import Int8Weight, linear

E, OUT, IN, T = 4, 6, 8, 10


def make(
    *shape: int, transposed: bool = False, activation: Granularity = Granularity.TOKEN_DYNAMIC, static: Any = None
) -> tuple[Int8Weight, Tensor]:
    """An int8 weight [(E,) O, I] and the float64 tensor that it stands for, as the code around sees it."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    scale = int8.absmax_scale(weight, (-1,))
    made = Int8Weight(int8.quantize(weight, scale), scale, static, activation, torch.float32, transposed)
    exact = made.values.double() * made.scale.double()
    return made, exact.mT if transposed else exact


def rounded(x: Tensor) -> Tensor:
    """What a per-token int8 linear sees of x, float64."""
    scale = int8.absmax_scale(x, (-1,))
    return int8.quantize(x, scale).double() * scale.double()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def close(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-5)


MATRIX_USES: dict[str, Callable[[Tensor, Any, Tensor], Tensor]] = {
    "linear": lambda x, w, b: functional.linear(x, w, b),
    "linear by keyword": lambda x, w, b: functional.linear(x, weight=w, bias=b),
    "@ .T": lambda x, w, b: x @ w.T + b,
    "@ .mT": lambda x, w, b: x @ w.mT + b,
    "matmul .t()": lambda x, w, b: torch.matmul(x, w.t()) + b,
    "method": lambda x, w, b: x.matmul(w.transpose(0, 1)) + b,
    "torch.transpose": lambda x, w, b: x @ torch.transpose(w, -1, -2) + b,
    "mm": lambda x, w, b: torch.mm(x, w.t()) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
    "from the left": lambda x, w, b: (w @ x.T).T + b,
}


@pytest.mark.parametrize("use", MATRIX_USES.values(), ids=MATRIX_USES)
def test_a_matrix_is_multiplied_however_it_is_written(use: Callable[..., Tensor]) -> None:
    weight, exact = make(OUT, IN)
    x, bias = randn(T, IN), randn(OUT)
    close(use(x, weight, bias), rounded(x) @ exact.T + bias.double())


def test_a_transposed_matrix_is_what_conv1d_holds() -> None:
    weight, exact = make(OUT, IN, transposed=True)
    assert weight.shape == exact.shape == (IN, OUT)
    x, bias = randn(T, IN), randn(OUT)
    close(torch.addmm(bias, x, weight), rounded(x) @ exact + bias.double())
    close(x @ weight, rounded(x) @ exact)


STACK_USES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "loop": lambda x, w: torch.stack([functional.linear(x[e], w[e]) for e in range(E)]),
    "loop, index tensors": lambda x, w: torch.stack([x[e] @ w[torch.tensor(e)].T for e in range(E)]),
    "bmm": lambda x, w: torch.bmm(x, w.transpose(1, 2)),
    "bmm from the left": lambda x, w: torch.bmm(w, x.mT).mT,
    "matmul": lambda x, w: x @ w.mT,
}


@pytest.mark.parametrize("use", STACK_USES.values(), ids=STACK_USES)
def test_a_stack_is_multiplied_however_it_is_written(use: Callable[..., Tensor]) -> None:
    weight, exact = make(E, OUT, IN)
    x = randn(E, T, IN)
    close(use(x, weight), rounded(x) @ exact.mT)


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products(transposed: bool) -> None:
    from transformers.integrations import moe  # also registers the fallback operator

    weight, exact = make(E, OUT, IN, transposed=transposed)
    x, offs = randn(T, IN), torch.tensor([3, 3, 7, T], dtype=torch.int32)
    experts = torch.tensor([0] * 3 + [2] * 4 + [3] * 3)
    wanted = torch.einsum("ti,tio->to", rounded(x), (exact if transposed else exact.mT)[experts])
    close(moe._grouped_linear(x, weight, offs, is_transposed=transposed), wanted)
    shown: Any = weight if transposed else weight.mT
    close(torch.ops.transformers.grouped_mm_fallback(x, shown, offs), wanted)
    close(moe._batched_linear(x, weight[experts], is_transposed=transposed), wanted)


@pytest.mark.parametrize("activation", Granularity)
def test_granularity_decides_what_shares_a_scale(activation: Granularity) -> None:
    static = torch.tensor(0.02) if activation.is_static else None
    weight, exact = make(OUT, IN, activation=activation, static=static)
    x = randn(2, 3, IN)
    x[0, 0] *= 100
    scale = {
        Granularity.TENSOR_STATIC: torch.tensor(0.02),
        Granularity.TENSOR_DYNAMIC: int8.absmax_scale(x),
        Granularity.TOKEN_DYNAMIC: int8.absmax_scale(x, (-1,)),
    }[activation]
    kept = int8.quantize_activations(x, scale)
    assert not activation.is_static or kept.amin() == -128
    close(functional.linear(x, weight), (kept.double() * scale.double()) @ exact.T)


@pytest.mark.parametrize("shape", [(IN,), (T, IN), (2, 3, IN), (2, 1, 3, IN), (0, IN)])
def test_per_token_is_per_token_for_any_batch_shape(shape: tuple[int, ...]) -> None:
    weight, _ = make(OUT, IN)
    x = randn(*shape)
    whole = linear(x, weight.view())
    assert whole.shape == (*shape[:-1], OUT)
    for row, out in zip(x.reshape(-1, IN), whole.reshape(-1, OUT), strict=True):
        assert torch.equal(linear(row[None], weight.view())[0], out)


def test_a_nan_token_stays_alone() -> None:
    weight, _ = make(OUT, IN)
    x = randn(3, IN)
    clean = linear(x, weight.view())
    x[1, 2] = torch.nan
    out = linear(x, weight.view())
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_inputs_dtype(dtype: torch.dtype) -> None:
    weight, _ = make(OUT, IN)
    assert linear(randn(2, IN).to(dtype), weight.view()).dtype == dtype


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "embedding": (lambda w: functional.embedding(torch.tensor([0]), w), "took part in 'embedding'"),
    "product with a tensor": (lambda w: torch.ones(OUT, IN) * w, "took part in 'mul'"),
    "addmm with a factor": (lambda w: torch.addmm(torch.ones(OUT), randn(1, IN), w.T, beta=2), "'addmm' with factors"),
    "a slice": (lambda w: w[:3], r"shape \(6, 8\) cannot be indexed"),
    "a permutation": (lambda w: w.transpose(0, 0), "cannot swap axes 0 and 0"),
    "a wrong input": (lambda w: functional.linear(torch.ones(2, IN + 1), w), r"cannot take an input \(2, 9\)"),
    "the wrong way round": (lambda w: functional.linear(torch.ones(2, OUT), w.T), "needs an int8 weight"),
    "another device": (lambda w: w.to("meta"), "move the whole model"),
}


@pytest.mark.parametrize(("use", "message"), REFUSED.values(), ids=REFUSED)
def test_anything_else_is_an_error_that_names_it(use: Callable[[Any], Any], message: str) -> None:
    weight, _ = make(OUT, IN)
    with pytest.raises(AutoQuantError, match=message):
        use(weight)


def test_a_static_weight_without_a_scale_says_so() -> None:
    weight, _ = make(OUT, IN, activation=Granularity.TENSOR_STATIC)
    with pytest.raises(AutoQuantError, match="calibrate first"):
        linear(randn(1, IN), weight.view())


def test_stacks_of_another_length_are_refused() -> None:
    weight, _ = make(E, OUT, IN)
    with pytest.raises(AutoQuantError, match=r"cannot take an input \(3, 2, 8\)"):
        torch.bmm(torch.ones(3, 2, IN), weight.mT)


def test_code_that_asks_a_weight_for_another_dtype_changes_nothing() -> None:
    weight, exact = make(OUT, IN)
    before = copy.deepcopy(weight.state_dict())
    x = randn(2, IN)
    for converted in (weight.to(torch.bfloat16), weight.type(torch.float32), weight.float()):
        close(functional.linear(x, converted), rounded(x) @ exact.T)
    assert weight.to(torch.bfloat16).dtype == torch.bfloat16
    assert weight.dtype == torch.float32 and weight.size(0) == OUT and weight.dim() == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in weight.state_dict().items())


def test_converting_the_model_keeps_int8_and_float32_scales() -> None:
    holder = nn.Module()
    holder.weight, _ = make(OUT, IN)
    holder.other = nn.Parameter(torch.ones(2))
    scale = holder.weight.scale.clone()
    holder.to(torch.bfloat16)
    holder.half()
    assert holder.other.dtype == torch.float16
    assert holder.weight.values.dtype == torch.int8
    assert holder.weight.scale.dtype == torch.float32 and torch.equal(holder.weight.scale, scale)
    assert holder.to("meta").weight.values.device.type == "meta"


def test_copies_and_state_dicts_round_trip() -> None:
    weight, exact = make(OUT, IN)
    twin = copy.deepcopy(weight)
    twin.values.zero_()
    twin.load_state_dict(weight.state_dict())
    assert set(weight.state_dict()) == {"values", "scale"}
    close(functional.linear(torch.eye(IN), twin), rounded(torch.eye(IN)) @ exact.T)
    assert "w_int8_per_channel, a_int8_per_token_dynamic, mode=int8" in repr(weight)

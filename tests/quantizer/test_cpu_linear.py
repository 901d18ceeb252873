from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from autoquant.quantizer import cpu_linear, int8
from autoquant.quantizer.cpu_linear import Packed
from autoquant.quantizer.strategies import Granularity
from autoquant.quantizer.weight import Int8Weight, linear

exact = pytest.mark.skipif(not cpu_linear.is_exact(), reason="oneDNN's int8 product is not exact here")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def probes_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "PROBED", [])
    monkeypatch.setattr(cpu_linear, "QUICK", [])


def inputs(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Halves, tiny, zero, NaN and infinite rows among ordinary ones."""
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator)
    x[::7] = torch.randint(-254, 255, x[::7].shape, generator=generator) * 0.5
    x[2::7] *= 1e-7 if dtype == torch.float16 else 1e-38
    x[3::7] = 0.0
    x[4::7, 1] = torch.nan
    x[5::7, 2] = -torch.inf
    return x.to(dtype)


def vpmaddubsw(rows: Tensor, packed: Any, each: Tensor, bias: Any, dtype: torch.dtype, zero: int) -> Tensor:
    """AVX2's kernel: pairs of products of unsigned rows are added in int16, which saturates; the shift is taken off."""
    b = packed.to_dense().long()
    rows = rows.long() + (128 if zero == cpu_linear.SIGNED else 0)
    pairs = (rows[:, :, None] * b[None]).unflatten(1, (-1, 2)).sum(2)
    shift = 128 if zero == cpu_linear.SIGNED else zero
    sums = (pairs.clamp(-(2**15), 2**15 - 1).sum(1) - shift * b.sum(0)).float() * each
    return (sums if bias is None else sums + bias).to(dtype)


def weight(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    values[..., ::3, :] = -128
    return values


@exact
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 64, 48), (3, 70, 5), (150, 2050, 33), (300, 1000, 9), (1030, 140, 130)])
def test_the_numbers_are_those_of_the_formula(shape: tuple[int, int, int], bias: bool, dtype: torch.dtype) -> None:
    rows, columns, outputs = shape
    x, values = inputs(rows, columns, dtype), weight(outputs, columns)
    scale = torch.rand(outputs, 1, generator=torch.Generator().manual_seed(1)) * 1e-3
    added = torch.linspace(-1, 1, outputs).to(dtype) if bias else None
    clean = torch.where(x.isfinite(), x, 1.0)
    for per_token, given, of in ((True, None, x), (False, None, clean), (False, torch.tensor(0.03), x)):
        shared = given if given is not None else int8.absmax_scale(of, (1,) if per_token else None)
        for weight_scale in (scale, scale[:1]):
            wanted = int8.linear(of, values, weight_scale, shared, added)
            got = cpu_linear.linear(of, values, Packed(values), weight_scale, given, per_token, added)
            assert got.dtype == dtype
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@exact
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 700])
def test_nan_and_infinity_make_their_row_nan_or_all_of_a_tensor(rows: int, dtype: torch.dtype, bad: float) -> None:
    x, values = torch.ones(rows, 256, dtype=dtype), weight(5, 256)
    x[0, 3] = bad
    one = torch.ones(5, 1)
    for per_token in (True, False):
        wanted = int8.linear(x, values, one, int8.absmax_scale(x, (1,) if per_token else None), None)
        got = cpu_linear.linear(x, values, Packed(values), one, None, per_token, None)
        assert got.isnan().all(1).tolist() == [True, *[not per_token] * (rows - 1)]
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@exact
def test_a_nan_with_bits_of_its_own_is_zero_under_a_static_scale() -> None:
    x = torch.tensor([[1.0, 2.0]])
    x.view(torch.int32)[0, 0] = 0x7FC00013
    assert x.isnan().tolist() == [[True, False]]
    assert cpu_linear.quantized(x, torch.tensor(1.0))[0].tolist() == [[0, 2]]


@exact
def test_a_scale_for_each_row_can_be_given() -> None:
    x, values, scale = inputs(300, 64, torch.float32), weight(5, 64), torch.full((5, 1), 0.01)
    x, given = torch.where(x.isfinite(), x, 1.0), torch.linspace(0.001, 0.1, 300)[:, None]
    wanted = int8.linear(x, values, scale, given, None)
    assert torch.equal(cpu_linear.linear(x, values, Packed(values), scale, given, False, None), wanted)


@exact
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_below_the_normal_numbers_are_kept(dtype: torch.dtype) -> None:
    x, values = torch.linspace(-1, 1, 64).to(dtype).expand(20, 64), weight(40, 64)
    static, scale = torch.tensor(1.0), torch.full((40, 1), 1e-8 if dtype == torch.float16 else 1e-41)
    wanted = int8.linear(x, values, scale, static, None)
    assert wanted.count_nonzero() and wanted.abs().max() < torch.finfo(dtype).tiny
    assert torch.equal(cpu_linear.linear(x, values, Packed(values), scale, static, False, None), wanted)


@exact
def test_values_that_change_are_packed_again() -> None:
    made = Int8Weight(weight(6, 8), torch.ones(6, 1), None, Granularity.TOKEN_DYNAMIC, torch.float32, False)
    x = torch.eye(8)
    for change in (lambda: made.values.zero_(), lambda: made.values.copy_(weight(6, 8, seed=1))):
        before = linear(x, made.view())
        assert len(made.packed.held) == 1
        change()
        assert not torch.equal(linear(x, made.view()), before)
        assert torch.equal(linear(x, made.view()) * 127, made.values.t() * 127.0 * int8.absmax_scale(x, (1,)) * 127)
    made.load_state_dict({"values": weight(6, 8, seed=2), "scale": torch.ones(6, 1)}, assign=True)
    wanted = int8.linear(x, weight(6, 8, seed=2), torch.ones(6, 1), int8.absmax_scale(x, (1,)), None)
    assert torch.equal(linear(x, made.view()), wanted)


@exact
def test_experts_are_packed_one_by_one_and_copies_of_them_not_at_all() -> None:
    made = Int8Weight(weight(3, 6, 8), torch.ones(3, 6, 1), None, Granularity.TOKEN_DYNAMIC, torch.float32, False)
    x = torch.eye(8)
    for expert in (0, torch.tensor(2)):
        linear(x, made[expert])
    assert len(made.packed.held) == 2
    chosen = made[torch.tensor([1, 1])][0]
    assert not cpu_linear.takes(x, chosen.values, chosen.packed)
    assert torch.equal(linear(x, chosen), linear(x, made[1]))


@exact
def test_copies_begin_empty() -> None:
    made = Int8Weight(weight(6, 8), torch.ones(6, 1), None, Granularity.TOKEN_DYNAMIC, torch.float32, False)
    linear(torch.eye(8), made.view())
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert not twin.packed.held
        assert torch.equal(linear(torch.eye(8), twin.view()), linear(torch.eye(8), made.view()))


def test_a_kernel_that_saturates_is_found_out(monkeypatch: pytest.MonkeyPatch, probes_forgotten: None) -> None:
    honest = int8.reference_matmul

    few = torch.randint(-60, 60, (3, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.onednn.qlinear_prepack(few, None)
    got = cpu_linear.product(few // 4, packed, zero=cpu_linear.UNSIGNED)  # where nothing saturates
    small = [probe for probe in int8.probes() if probe[0].shape[1] <= 70]
    monkeypatch.setattr(int8, "probes", lambda: small)
    monkeypatch.setattr(cpu_linear, "_product", vpmaddubsw)
    monkeypatch.setattr(cpu_linear, "QUICK", [cpu_linear.UNSIGNED])
    assert torch.equal(got, cpu_linear.product(few // 4, packed, zero=cpu_linear.UNSIGNED))
    assert not cpu_linear.probe_product(cpu_linear.UNSIGNED)
    assert cpu_linear.is_exact() and cpu_linear.zero_point() == cpu_linear.HALVES
    a = torch.full((4, 64), 127, dtype=torch.int8)
    made = Int8Weight(a, torch.ones(4, 1), torch.tensor(1.0), Granularity.TENSOR_STATIC, torch.float32, False)
    assert torch.equal(linear(a.float(), made.view()), honest(a, a.t()).float()) and made.packed.held


def test_a_kernel_that_is_wrong_with_halves_too_is_not_used(
    monkeypatch: pytest.MonkeyPatch, probes_forgotten: None
) -> None:
    def wrong(rows: Tensor, packed: Any, each: Tensor, bias: Any, dtype: torch.dtype, zero: int) -> Tensor:
        return vpmaddubsw(rows, packed, each, bias, dtype, zero).clamp(-(2**15), 2**15)

    monkeypatch.setattr(cpu_linear, "_product", wrong)
    assert not cpu_linear.is_exact()
    a = torch.full((4, 64), 127, dtype=torch.int8)
    made = Int8Weight(a, torch.ones(4, 1), torch.tensor(1.0), Granularity.TENSOR_STATIC, torch.float32, False)
    assert torch.equal(linear(a.float(), made.view()), int8.reference_matmul(a, a.t()).float())
    assert not made.packed.held


@pytest.mark.parametrize("zero", [cpu_linear.SIGNED, cpu_linear.UNSIGNED, cpu_linear.HALVES])
def test_forms_of_rows_stand_for_the_same(monkeypatch: pytest.MonkeyPatch, zero: int) -> None:
    """All int8 values, by a kernel that adds in int64: on a machine one form alone is exact and quick."""
    given: list[Tensor] = []

    def summed(rows: Tensor, packed: Any, each: Tensor, bias: Any, dtype: torch.dtype, zero: int) -> Tensor:
        given.append(rows)
        return ((rows.long() - zero) @ packed.t().long()).float()

    monkeypatch.setattr(cpu_linear, "_product", summed)
    q, values = torch.arange(-128, 128).to(torch.int8).view(16, 16), weight(40, 16, seed=1)
    assert torch.equal(cpu_linear.product(q, values, zero=zero), (q.long() @ values.t().long()).float())
    assert given[0].dtype == (torch.int8 if zero == cpu_linear.SIGNED else torch.uint8)
    if zero == cpu_linear.HALVES:
        assert (given[0].aminmax()) == (0, 16) and given[0].shape == (32, 16)
        assert 2 * 16 * 128 < 2**15  # a pair of products in int16


@exact
@pytest.mark.parametrize("zero", [cpu_linear.SIGNED, cpu_linear.UNSIGNED, cpu_linear.HALVES])
def test_forms_of_rows_are_exact_on_this_machine(zero: int) -> None:
    """One of them alone is quick: with AMX the signed one, with VNNI the unsigned one."""
    if zero != cpu_linear.HALVES == cpu_linear.zero_point():
        pytest.skip("whole rows saturate on a processor without VNNI")
    assert cpu_linear.probe_product(zero)
    q, values = weight(5, 66), weight(40, 66, seed=1)
    q[0] = -128
    packed = torch.ops.onednn.qlinear_prepack(values, None)
    assert torch.equal(cpu_linear.product(q, packed, zero=zero), (q.long() @ values.t().long()).float())


@pytest.mark.parametrize(("signed", "unsigned", "wanted"), [(3e-2, 4e-5, 128), (4e-5, 3e-2, 0), (4e-5, 2e-5, 0)])
def test_the_quick_form_is_taken_and_timed_once(
    monkeypatch: pytest.MonkeyPatch, signed: float, unsigned: float, wanted: int
) -> None:
    """Twice is no other kernel."""
    monkeypatch.setattr(cpu_linear, "QUICK", [])
    monkeypatch.setattr(cpu_linear, "_seconds", {0: signed, 128: unsigned}.__getitem__)
    assert cpu_linear.quick() == wanted
    monkeypatch.setattr(cpu_linear, "_seconds", {}.__getitem__)
    assert cpu_linear.quick() == wanted


@exact
def test_sums_stay_within_int32_and_those_of_halves_exact_in_float32() -> None:
    unsigned, halves = cpu_linear.DEEPEST[cpu_linear.UNSIGNED], cpu_linear.DEEPEST[cpu_linear.HALVES]
    assert 255 * 128 * unsigned < 2**31 <= 255 * 128 * (unsigned + 300)
    assert 8 * 128 * halves == 2**24
    deepest = cpu_linear.DEEPEST[cpu_linear.zero_point()]
    values = torch.zeros(1, deepest + 1, dtype=torch.int8)
    assert cpu_linear.takes(torch.zeros(1, deepest), values[:, 1:], Packed(values))
    assert not cpu_linear.takes(torch.zeros(1, deepest + 1), values, Packed(values))


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, AttributeError])
def test_where_the_kernel_is_missing_there_is_another(
    monkeypatch: pytest.MonkeyPatch, probes_forgotten: None, error: type[Exception]
) -> None:
    def missing(*arguments: Any) -> Tensor:
        raise error("no kernel")

    monkeypatch.setattr(cpu_linear, "_product", missing)
    assert not cpu_linear.is_exact()


@exact
def test_the_product_of_two_scales_is_made_again_where_one_changes() -> None:
    values, scale, given = weight(6, 8), torch.linspace(0.1, 1.0, 6)[:, None], torch.tensor(0.5)
    packed = Packed(values)
    first = packed.both(scale, given)
    assert packed.both(scale, given) is first and not first.is_tiny
    assert torch.equal(first.product, scale[:, 0] * 0.5)
    given.fill_(int8.TINY)
    assert torch.equal(packed.both(scale, given).product, scale[:, 0] * int8.TINY)
    assert packed.both(scale, given).is_tiny
    with torch.inference_mode():
        assert torch.equal(packed.both(scale * 2, given).product, scale[:, 0] * 2 * int8.TINY)
    assert len(packed.scales) == 1


def test_gradients_fakes_and_other_dtypes_are_not_taken() -> None:
    values = weight(6, 8)
    packed = Packed(values)
    assert cpu_linear.takes(torch.ones(2, 8), values, packed) == cpu_linear.is_exact()
    for x in (torch.ones(2, 8, requires_grad=True), torch.ones(2, 8, dtype=torch.float64), torch.ones(0, 8)):
        assert not cpu_linear.takes(x, values, packed)
    assert not cpu_linear.takes(torch.ones(2, 8), values.clone(), packed)
    assert not cpu_linear.takes(torch.ones(2, 8), values, None)

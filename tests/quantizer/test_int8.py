from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.errors import AutoQuantError
from autoquant.quantizer import int8

BACKENDS = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

seeds = st.integers(0, 2**32 - 1)
# From where scales are subnormal to where squares overflow.
exponents = st.integers(-44, 37)


def values(seed: int, exponent: int, shape: tuple[int, ...] = (5, 33)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = 10.0 ** torch.empty(shape, dtype=torch.float64).uniform_(-2, 0, generator=generator)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread * 10.0**exponent).float()


@given(seeds, exponents)
@settings(max_examples=50, deadline=None)
def test_error_is_at_most_half_a_scale(seed: int, exponent: int) -> None:
    x = values(seed, exponent)
    for dims in (None, (1,)):
        scale = int8.absmax_scale(x, dims)
        error = (int8.quantize(x, scale).double() * scale.double() - x.double()).abs()
        # x / scale is rounded to float32 once, by at most 127 * 2**-24 steps.
        assert (error <= scale.double() * (0.5 + 127 * 2.0**-23)).all()


@given(seeds, exponents)
@settings(max_examples=50, deadline=None)
def test_quantizing_twice_changes_nothing(seed: int, exponent: int) -> None:
    x = values(seed, exponent)
    scale = int8.absmax_scale(x, (1,))
    q = int8.quantize(x, scale)
    assert torch.equal(int8.quantize(int8.dequantize(q, scale), scale), q)
    assert q.abs().max() <= 127


@given(seeds, exponents)
@settings(max_examples=50, deadline=None)
def test_negation_negates(seed: int, exponent: int) -> None:
    x = values(seed, exponent)
    assert torch.equal(int8.absmax_scale(-x, (1,)), int8.absmax_scale(x, (1,)))
    scale = int8.absmax_scale(x, (1,))
    assert torch.equal(int8.quantize(-x, scale), -int8.quantize(x, scale))


def test_rounding_is_half_to_even_and_saturates_at_127() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 128.0, 1e30, -1e30])
    assert int8.quantize(x, torch.tensor(1.0)).tolist() == [0, 2, 2, 0, -2, 126, 127, 127, 127, -127]


def test_activations_saturate_at_minus_128_as_servers_have_it() -> None:
    x, one = torch.tensor([126.5, 127.5, 1e30, -127.5, -127.4, -128.6, -1e30]), torch.tensor(1.0)
    assert int8.quantize_activations(x, one).tolist() == [126, 127, 127, -128, -127, -128, -128]
    assert int8.fake_quantize(x, one).tolist() == [126.0, 127.0, 127.0, -128.0, -127.0, -128.0, -128.0]


@given(seeds, exponents)
@settings(max_examples=50, deadline=None)
def test_activations_under_their_own_scale_never_get_to_minus_128(seed: int, exponent: int) -> None:
    x = values(seed, exponent)
    scale = int8.absmax_scale(x, (1,))
    assert torch.equal(int8.quantize_activations(x, scale), int8.quantize(x, scale))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_float32_whatever_the_input(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -2.0], [3.0, 0.5]], dtype=dtype)
    assert int8.absmax_scale(x).dtype == torch.float32
    assert torch.equal(int8.absmax_scale(x, (1,)), torch.tensor([[2.0], [3.0]]) / 127)
    assert int8.absmax_scale(x).shape == (1, 1)


def test_zeros_give_zeros() -> None:
    x = torch.tensor([[0.0, -0.0], [1.0, 2.0]])
    scale = int8.absmax_scale(x, (1,))
    assert scale[0].item() == int8.TINY
    assert int8.quantize(x, scale)[0].tolist() == [0, 0]
    assert int8.fake_quantize(x, scale)[0].tolist() == [0.0, 0.0]


def test_subnormals_keep_the_bound_with_the_smallest_normal_scale() -> None:
    x = torch.tensor([1e-45, 4e-39, -8e-39, 1.4e-36])  # 1.4e-36 / 127 is subnormal
    scale = int8.absmax_scale(x)
    assert scale.item() == int8.TINY
    assert (int8.fake_quantize(x, scale).double() - x.double()).abs().max() <= int8.TINY / 2
    assert int8.quantize(x, scale).tolist() == [0, 0, -1, 119]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_group_with_nan_or_infinity_becomes_nan_and_no_other_does(bad: float) -> None:
    x = torch.tensor([[1.0, bad, 3.0], [1.0, 2.0, 3.0]])
    scale = int8.absmax_scale(x, (1,))
    assert scale[0].isnan().all() and scale[1].isfinite().all()
    assert int8.quantize(x, scale)[0].tolist() == [0, 0, 0]
    assert int8.fake_quantize(x, scale)[0].isnan().all()
    assert int8.mse_scale(x, (1,))[0].isnan().all()


def test_with_a_static_scale_infinity_saturates_and_nan_is_zero() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert int8.quantize(x, torch.tensor(0.1)).tolist() == [127, -127, 0]
    assert int8.quantize_activations(x, torch.tensor(0.1)).tolist() == [127, -128, 0]


def test_no_elements_have_a_scale() -> None:
    assert int8.absmax_scale(torch.empty(0, 4)).tolist() == [[int8.TINY]]
    assert int8.absmax_scale(torch.empty(0, 4), (1,)).shape == (0, 1)


def test_mse_search_is_never_worse_and_clips_outliers() -> None:
    x = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 12.0
    full, best = int8.absmax_scale(x, (1,)), int8.mse_scale(x, (1,))

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (int8.fake_quantize(x, scale) - x).square().mean(1)

    assert (error(best) <= error(full)).all()
    assert best[0] < 0.7 * full[0]
    assert error(best)[0] < 0.8 * error(full)[0]


SHAPES = [(1, 1, 1), (1, 64, 8), (3, 70, 5), (17, 1024, 24), (16, 1025, 7), (40, 4100, 16)]


@pytest.mark.parametrize("device", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("product", [int8.matmul, int8.reference_matmul])
def test_products_are_bit_exact(device: str, shape: tuple[int, int, int], product: object) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(m + k + n)
    ones = torch.ones(m, k, dtype=torch.int8), torch.ones(k, n, dtype=torch.int8)
    random = [torch.randint(-128, 128, s, generator=generator, dtype=torch.int8) for s in ((m, k), (k, n))]
    cases = [(ones[0] * a, ones[1] * b) for a in (-128, 127) for b in (-128, 127)]
    cases.append((random[0], random[1]))
    cases.append((random[0], random[1].t().contiguous().t()))  # column-major, as a linear's weight comes
    for a, b in cases:
        got = product(a.to(device), b.to(device)).cpu()  # type: ignore[operator]  # one of the two functions
        assert got.dtype == torch.int32
        assert torch.equal(got.long(), a.long() @ b.long())


def test_one_more_product_would_not_be_exact_in_float32() -> None:
    assert 128**2 * int8.EXACT_FLOAT32_DEPTH <= 2**24 < 128**2 * (int8.EXACT_FLOAT32_DEPTH + 1)
    assert 128**2 * int8.EXACT_INT32_DEPTH < 2**31 <= 128**2 * (int8.EXACT_INT32_DEPTH + 1)


def test_a_sum_that_could_overflow_is_refused() -> None:
    a = torch.ones(1, int8.EXACT_INT32_DEPTH + 1, dtype=torch.int8)
    with pytest.raises(AutoQuantError, match="131072 channels can overflow int32: at most 131071"):
        int8.matmul(a, a.t())


def test_a_kernel_that_saturates_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """AVX2's vpmaddubsw: a is made unsigned, pairs of products are added in int16, the shift is taken off."""
        pairs = ((a.long() + 128)[:, :, None] * b.long()[None]).unflatten(1, (-1, 2)).sum(2)
        return (pairs.clamp(-(2**15), 2**15 - 1).sum(1) - 128 * b.long().sum(0)).int()

    b = torch.randint(-60, 60, (64, 3), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(saturating(b.t() // 4, b), (b.t() // 4).int() @ b.int())  # right where nothing saturates
    monkeypatch.setattr(torch, "_int_mm", saturating)
    int8.PROBED.clear()
    try:
        assert not int8.int_mm_serves("cpu")
        a = torch.full((4, 64), 127, dtype=torch.int8)
        assert int8.matmul(a, a.t()).unique().tolist() == [127**2 * 64]
    finally:
        int8.PROBED.clear()


def test_a_device_without_the_kernel_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(torch, "_int_mm", missing)
    int8.PROBED.clear()
    try:
        a = torch.full((2, 3), -127, dtype=torch.int8)
        assert int8.matmul(a, a.t()).unique().tolist() == [127**2 * 3]
    finally:
        int8.PROBED.clear()


@pytest.mark.parametrize(("times", "wanted"), [(30.0, False), (2.0, True)])
def test_a_kernel_that_is_a_loop_is_not_used(monkeypatch: pytest.MonkeyPatch, times: float, wanted: bool) -> None:
    """Where processors have no VNNI; twice is no other kernel."""
    took = iter([times, 1.0])
    monkeypatch.setattr(int8, "least_seconds", lambda run: next(took))
    monkeypatch.setattr(int8, "probe_int_mm", lambda device: True)
    monkeypatch.setattr(int8, "PROBED", {})
    assert int8.int_mm_serves("cpu") == wanted
    assert int8.int_mm_serves("cuda") and not list(took)  # neither is asked twice, nor a GPU at all


def test_autocast_does_not_reach_the_products() -> None:
    a = torch.full((2, 1000), 127, dtype=torch.int8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert int8.reference_matmul(a, a.t()).unique().tolist() == [127**2 * 1000]

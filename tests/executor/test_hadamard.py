"""Hadamard constructions: exact orthogonality, coverage of real sizes, and the fast transform against the dense one."""

from __future__ import annotations

import math
from functools import reduce

import pytest
import torch

from autoquant.executor.hadamard import apply_hadamard, describe, factor_matrices, find_construction, hadamard_matrix

REAL_SIZES = (
    64,
    80,
    96,
    112,
    128,
    192,
    256,
    352,
    512,
    576,
    640,
    768,
    896,
    960,
    1024,
    1152,
    1280,
    1408,
    1536,
    1600,
    1792,
    1920,
    2048,
    2304,
    2560,
    2816,
    2880,
    3072,
    3200,
    3328,
    3584,
    4096,
    4544,
    4608,
    4864,
    5120,
    5376,
    5632,
    5760,
    6144,
    6400,
    6656,
    6912,
    7168,
    7680,
    8192,
    8640,
    8960,
    9216,
    9728,
    10240,
    10944,
    11008,
    12288,
    13312,
    13696,
    13824,
    14336,
    14784,
    16384,
    17408,
    17920,
    18432,
    18944,
    20480,
    21504,
    22016,
    24576,
    25600,
    27392,
    27648,
    28672,
    29568,
    36864,
    49152,
    53248,
)


@pytest.mark.parametrize(
    ("n", "name"),
    [
        (1, "Sylvester 1"),
        (8, "Sylvester 8"),
        (12, "Paley I 12 (q = 11)"),
        (28, "Paley I 28 (q = 27)"),
        (36, "Paley II 36 (q = 17)"),
        (52, "Paley II 52 (q = 25)"),
        (4096, "Sylvester 4096"),
        (3584, "Sylvester 128 x Paley I 28 (q = 27)"),
        (5120, "Sylvester 256 x Paley I 20 (q = 19)"),
        (2880, "Paley I 12 (q = 11) x Paley I 12 (q = 11) x Paley I 20 (q = 19)"),
        (4544, "Sylvester 16 x Paley I 284 (q = 283)"),
        (11008, "Sylvester 32 x Paley I 344 (q = 343)"),
        (18944, "Sylvester 128 x Paley II 148 (q = 73)"),
        (130, "65 blocks of Sylvester 2"),
    ],
)
def test_the_construction_is_named(n: int, name: str) -> None:
    assert describe(n) == name


@pytest.mark.parametrize("n", [2, 12, 20, 28, 36, 52, 100, 148, 284, 344])
def test_factors_are_exact_hadamard_matrices(n: int) -> None:
    for factor in factor_matrices(n):
        h = factor.astype("int64")
        assert set(h.flatten().tolist()) == {-1, 1}
        assert (h @ h.T == h.shape[0] * torch.eye(h.shape[0]).long().numpy()).all()


@pytest.mark.parametrize("n", [4096, 3584, 5120, 2880, 4544])
def test_hidden_sizes_are_orthogonal_to_1e_12(n: int) -> None:
    """All of H H^T would take minutes for 5120: every row has norm 1 and random vectors keep their products."""
    h = apply_hadamard(torch.eye(n, dtype=torch.float64)[:64])
    assert (h @ h.mT - torch.eye(64, dtype=torch.float64)).abs().max() < 1e-12
    assert torch.allclose(h.abs(), torch.full_like(h, n**-0.5), rtol=1e-12)
    x = torch.randn(8, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    assert (apply_hadamard(apply_hadamard(x), transpose=True) - x).abs().max() < 1e-12


def test_real_sizes_are_covered_by_one_block() -> None:
    missing = [n for n in REAL_SIZES if find_construction(n).copies > 1]
    assert missing == [13696, 27392]  # 107 * 2**k: no Paley order divides them
    assert describe(13696) == "107 blocks of Sylvester 128"


@pytest.mark.parametrize("n", [1, 3, 6, 24, 130, 352, 336])
@pytest.mark.parametrize("transpose", [False, True])
def test_the_fast_transform_is_the_dense_product(n: int, transpose: bool) -> None:
    h = hadamard_matrix(n)
    assert (h @ h.mT - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-12
    x = torch.randn(3, n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    dense = torch.einsum("anb,nm->amb", x, h.mT if transpose else h)
    assert torch.allclose(apply_hadamard(x, dim=1, transpose=transpose), dense, atol=1e-12)


def test_the_kronecker_order_is_sylvester_first() -> None:
    expected = torch.kron(*(torch.from_numpy(f).double() for f in factor_matrices(24))) / math.sqrt(24)
    assert torch.equal(hadamard_matrix(24), expected) or torch.allclose(hadamard_matrix(24), expected, atol=1e-15)


@pytest.mark.parametrize(("n", "orders"), [(64, [64]), (128, [16, 8]), (5632, [16, 8, 44]), (8192, [32, 16, 16])])
def test_a_power_of_two_is_cut_evenly(n: int, orders: list[int]) -> None:
    assert [len(factor) for factor in factor_matrices(n)] == orders


@pytest.mark.parametrize(
    ("n", "orders"),
    [(2048, [8, 8, 32]), (4096, [16, 8, 32]), (128, [4, 32]), (64, [64]), (5632, [16, 8, 44]), (2, [2])],
)
def test_the_innermost_factor_may_be_larger(n: int, orders: list[int]) -> None:
    factors = factor_matrices(n, most_bits=4, innermost=5)
    assert [len(factor) for factor in factors] == orders
    product = reduce(torch.kron, (torch.from_numpy(factor).double() for factor in factors))
    assert torch.allclose(product / math.sqrt(n), hadamard_matrix(n), atol=1e-14)


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="positive size, not 0"):
        find_construction(0)

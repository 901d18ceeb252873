"""Random rotations: orthogonal, reproducible, and invisible to LayerNorm where asked."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm

from autoquant.config.format import RotationMethod
from autoquant.executor.rotation import hadamard_rotation, make_rotation, random_orthogonal

HADAMARD, ORTHOGONAL = RotationMethod.HADAMARD, RotationMethod.ORTHOGONAL
METHODS = [HADAMARD, ORTHOGONAL]


@pytest.mark.parametrize("keep_ones", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 7, 24, 64, 352])
def test_rotations_are_orthogonal_and_undone_by_their_transpose(
    n: int, method: RotationMethod, keep_ones: bool
) -> None:
    rotation = make_rotation(n, method, "seed", keep_ones)
    q = rotation.apply(torch.eye(n, dtype=torch.float64))
    assert (q @ q.mT - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-12
    assert (rotation.apply_transposed(q) - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("keep_ones", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_any_axis_can_be_rotated_where_it_lies(dim: int, method: RotationMethod, keep_ones: bool) -> None:
    rotation = make_rotation(24, method, "seed", keep_ones)
    x = torch.randn(24, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rotation.apply(x, dim), rotation.apply(x.movedim(dim, -1)).movedim(-1, dim), atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [24, 64, 352])
def test_keep_ones_commutes_with_layer_norm_and_still_spreads_outliers(n: int, method: RotationMethod) -> None:
    rotation = make_rotation(n, method, "seed", keep_ones=True)
    ones = torch.ones(n, dtype=torch.float64)
    assert (rotation.apply(ones) - ones).abs().max() < 1e-12
    x = torch.randn(5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3  # not centred
    assert (layer_norm(rotation.apply(x), (n,)) - rotation.apply(layer_norm(x, (n,)))).abs().max() < 1e-12
    q = rotation.apply(torch.eye(n, dtype=torch.float64))
    assert q.abs().max() * n**0.5 < 6  # a permutation would have sqrt(n)


def test_without_keep_ones_layer_norm_sees_the_rotation() -> None:
    rotation = make_rotation(24, HADAMARD, "seed")
    x = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (layer_norm(rotation.apply(x), (24,)) - rotation.apply(layer_norm(x, (24,)))).abs().max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides(method: RotationMethod) -> None:
    eye = torch.eye(24, dtype=torch.float64)
    first = make_rotation(24, method, "0:residual").apply(eye)
    assert torch.equal(first, make_rotation(24, method, "0:residual").apply(eye))
    assert not torch.equal(first, make_rotation(24, method, "1:residual").apply(eye))


def test_haar_matrices_have_no_preferred_sign() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.stack([random_orthogonal(4, generator)[0, 0] for _ in range(400)])
    assert abs(float(first.mean())) < 0.1  # QR alone gives -0.42
    assert abs(float(first.square().mean()) - 1 / 4) < 0.05


def test_the_construction_is_named() -> None:
    assert make_rotation(2880, HADAMARD, "s").construction.startswith("random signs x Paley I 12 (q = 11)")
    assert make_rotation(24, ORTHOGONAL, "s", True).construction == "random orthogonal, all-ones kept"
    assert hadamard_rotation(64).construction == "Sylvester 64"

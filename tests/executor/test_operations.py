"""Operations on one parameter: pieces give what the whole gives, and every layout of stacks is the same mathematics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoquant.config.format import RotationMethod
from autoquant.executor import operations, pieces
from autoquant.executor.operations import (
    Add,
    Axis,
    Centre,
    Fill,
    Normalise,
    Operation,
    Rotate,
    Scale,
    contract,
)
from autoquant.executor.pieces import execute
from autoquant.executor.rotation import make_rotation


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def plain(dim: int, size: int) -> Axis:
    return Axis(dim, None, False, torch.arange(size))


def whole(size: int) -> operations.Blocks:
    return ((0, torch.arange(size)[None]),)


Q8 = make_rotation(8, RotationMethod.HADAMARD, "q")
Q = Q8.apply(torch.eye(8, dtype=torch.float64))


def test_scale_with_offset_acts_on_the_gain() -> None:
    gain = random(6)
    factors = torch.arange(1.0, 7.0, dtype=torch.float64)
    changed = execute([Scale("", plain(0, 6), factors, 1)], gain)
    assert torch.allclose(1 + changed, (1 + gain) * factors, atol=1e-15)


@pytest.mark.parametrize("dim", [0, 1])
def test_rotate_multiplies_the_channel_axis(dim: int) -> None:
    weight = random(8, 5) if dim == 0 else random(5, 8)
    expected = Q.mT @ weight if dim == 0 else weight @ Q
    assert torch.allclose(execute([Rotate("", plain(dim, 8), whole(8), (Q8,))], weight), expected, atol=1e-14)


def test_rotate_repeats_and_leaves_other_positions_alone() -> None:
    weight = random(3, 20)
    positions = torch.stack([torch.arange(2, 10), torch.arange(10, 18)])
    changed = execute([Rotate("", plain(1, 20), ((0, positions),), (Q8,))], weight)
    assert torch.equal(changed[:, :2], weight[:, :2]) and torch.equal(changed[:, 18:], weight[:, 18:])
    assert torch.allclose(changed[:, 2:10], weight[:, 2:10] @ Q, atol=1e-14)
    assert torch.allclose(changed[:, 10:18], weight[:, 10:18] @ Q, atol=1e-14)


def test_stacks_in_a_dimension_of_their_own_or_along_the_rows_agree() -> None:
    weight = random(4, 6, 5)  # [experts, out, in]
    factors = random(4 * 5)
    three = execute([Scale("", Axis(2, 4, False, torch.arange(20)), factors)], weight)
    two = execute([Scale("", Axis(1, 4, True, torch.arange(20)), factors)], weight.flatten(0, 1))
    assert torch.equal(three, weight * factors.reshape(4, 1, 5))
    assert torch.equal(two, three.flatten(0, 1))


@pytest.mark.parametrize("stacked", [False, True])
def test_contract_is_what_a_linear_makes_of_a_constant(stacked: bool) -> None:
    beta = random(5)
    if not stacked:
        weight = random(7, 5)
        assert torch.allclose(contract(weight, plain(1, 5), beta), weight @ beta, atol=1e-14)
        assert torch.allclose(contract(weight.mT, plain(0, 5), beta), weight @ beta, atol=1e-14)
        return
    weight, per_expert = random(4, 7, 5), random(20)
    expected = torch.einsum("eoi,ei->eo", weight, per_expert.reshape(4, 5))
    assert torch.allclose(contract(weight, Axis(2, 4, False, torch.arange(20)), per_expert), expected, atol=1e-14)
    flat = contract(weight.flatten(0, 1), Axis(1, 4, True, torch.arange(20)), per_expert)
    assert torch.allclose(flat, expected.flatten(), atol=1e-14)


@pytest.mark.parametrize(
    "steps",
    [
        [Rotate("", plain(1, 8), whole(8), (Q8,))],
        [Scale("", plain(0, 12), random(12)), Rotate("", plain(1, 8), whole(8), (Q8,))],
        [Scale("", plain(1, 8), random(8)), Scale("", plain(0, 12), random(12))],
        [Rotate("", plain(1, 8), whole(8), (Q8,)), Centre("", plain(0, 12), whole(12))],
        [Fill("", 2.0), Scale("", plain(1, 8), random(8))],
        [Normalise("", plain(1, 8), True, 1e-5, random(8), random(8))],
        [Add("", random(12, 8)), Scale("", plain(1, 8), random(8))],
    ],
)
def test_pieces_give_what_the_whole_gives(steps: list[Operation], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(12, 8)
    expected = execute(steps, weight)
    monkeypatch.setattr(pieces, "PIECE", 16)
    monkeypatch.setattr(pieces, "NARROWEST", 1)
    assert torch.allclose(execute(steps, weight), expected, atol=1e-14)


def test_pieces_of_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(4, 6, 8)
    steps = [Scale("", Axis(1, 4, False, torch.arange(24)), random(24)), Rotate("", plain(2, 8), whole(8), (Q8,))]
    expected = execute(steps, weight)
    monkeypatch.setattr(pieces, "PIECE", 16)
    monkeypatch.setattr(pieces, "NARROWEST", 1)
    assert torch.allclose(execute(steps, weight), expected, atol=1e-14)


def test_the_result_is_rounded_once() -> None:
    weight = random(6, 8).bfloat16()
    steps = [Scale("", plain(1, 8), torch.full((8,), 1 / 3, dtype=torch.float64))] * 2
    assert torch.equal(execute(steps, weight), (weight.double() / 9).bfloat16())
    assert execute(steps, weight, torch.float32).dtype is torch.float32


def test_normalise_is_layer_norm_or_rms_norm() -> None:
    table, gain, bias = random(7, 8), random(8), random(8) * 2
    layer = execute([Normalise("", plain(1, 8), True, 1e-5, gain, bias)], table)
    assert torch.allclose(layer, torch.nn.functional.layer_norm(table, (8,), gain, bias, 1e-5), atol=1e-14)
    rms = execute([Normalise("", plain(1, 8), False, 1e-6, gain, torch.zeros_like(bias))], table)
    assert torch.allclose(rms, torch.nn.functional.rms_norm(table, (8,), gain, 1e-6), atol=1e-14)

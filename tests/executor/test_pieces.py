"""A parameter worked on in pieces: the same as one operation after the other on the whole, whatever the layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoquant.config.format import RotationMethod
from autoquant.executor import pieces
from autoquant.executor.operations import Add, Axis, Blocks, Fill, Operation, Rotate, Scale, run_all
from autoquant.executor.pieces import Mix, Times, carry_out, execute, fit
from autoquant.executor.rotation import hadamard_rotation, make_rotation


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def rotate(axis: Axis, size: int, blocks: int = 1, keep_ones: bool = False) -> Rotate:
    """All positions of the axis, in as many runs as there are; block k has runs k * repeats to (k + 1) * repeats."""
    runs = torch.arange(len(axis.channels)).reshape(blocks, -1, size)
    made = tuple(make_rotation(size, RotationMethod.HADAMARD, str(b), keep_ones) for b in range(blocks))
    return Rotate(f"rotate {size}", axis, tuple(enumerate(runs)), made)


def plain(dim: int, size: int) -> Axis:
    return Axis(dim, None, False, torch.arange(size))


def stacked(dim: int, stack: int, size: int, flat: bool) -> Axis:
    return Axis(dim, stack, flat, torch.arange(stack * size))


CASES: dict[str, tuple[tuple[int, ...], list[Operation]]] = {
    "reader": ((12, 16), [Scale("", plain(1, 16), random(16)), rotate(plain(1, 16), 16)]),
    "writer": ((16, 12), [rotate(plain(0, 16), 16), Scale("", plain(1, 12), random(12))]),
    "writer of heads, four to a block": ((16, 32), [rotate(plain(0, 16), 16), rotate(plain(1, 32), 4, 2)]),
    "reader and writer, no free dimension": ((16, 12), [rotate(plain(0, 16), 16), rotate(plain(1, 12), 12)]),
    "a layer norm's": ((12, 16), [rotate(plain(1, 16), 16, keep_ones=True), Scale("", plain(0, 12), random(12))]),
    "more rows than one call takes": ((1100, 16), [rotate(plain(1, 16), 16)]),
    "few columns, then many, for each factor": ((512, 24), [rotate(plain(0, 512), 512)]),
    "a large factor": ((10, 284), [rotate(plain(1, 284), 284)]),
    "a large factor along the rows": ((284, 10), [rotate(plain(0, 284), 284)]),
    "blocks smaller than the size": ((4, 36), [rotate(plain(1, 36), 36)]),
    "bias": ((16,), [Add("", random(16)), rotate(plain(0, 16), 16), Scale("", plain(0, 16), random(16), 1)]),
    "gain": ((16,), [Fill("", 1.0), Scale("", plain(0, 16), random(16), 1)]),
    "number": ((), [Fill("", 0.5)]),
    "experts": ((3, 8, 16), [Scale("", stacked(2, 3, 16, False), random(48)), rotate(stacked(2, 3, 16, False), 16)]),
    "experts along the rows": (
        (24, 16),
        [Scale("", stacked(1, 3, 16, True), random(48)), rotate(stacked(1, 3, 16, True), 16)],
    ),
    "rows and experts along them": (
        (24, 16),
        [Scale("", plain(0, 24), random(24)), Scale("", stacked(1, 3, 16, True), random(48)), rotate(plain(1, 16), 16)],
    ),
    "rows rotated across experts": (
        (24, 16),
        [Scale("", stacked(1, 3, 16, True), random(48)), rotate(plain(0, 24), 8)],
    ),
    "empty": ((0, 16), [rotate(plain(1, 16), 16)]),
}


def expected(shape: tuple[int, ...], operations: list[Operation]) -> tuple[Tensor, Tensor]:
    weight = random(*shape)
    return weight, run_all(operations, weight)


@pytest.mark.parametrize("piece", [16, 64, pieces.PIECE])
@pytest.mark.parametrize("case", CASES)
def test_pieces_are_the_whole(case: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", piece)
    monkeypatch.setattr(pieces, "NARROWEST", 2)
    monkeypatch.setattr(pieces, "_WIDE", 1)
    weight, wanted = expected(*CASES[case])
    before = weight.clone()
    changed = execute(CASES[case][1], weight)
    assert changed.shape == weight.shape and torch.allclose(changed, wanted, atol=1e-13)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("case", ["reader", "bias", "experts", "experts along the rows", "rows and experts along them"])
def test_some_rows_alone(case: str) -> None:
    shape, operations = CASES[case]
    weight, wanted = expected(shape, operations)
    fitted = fit(operations, shape)
    assert fitted is not None
    if case == "bias":
        assert fitted.rows == 16, "all of them in one run"
        return
    assert fitted.rows == 1
    each = shape[0] // fitted.shape[0]  # rows of the parameter for one of the view
    result = torch.empty_like(weight)
    for first in range(fitted.shape[0]):
        rows = slice(first * each, (first + 1) * each)
        carry_out(fitted, weight[rows], result[rows], first)
    assert torch.allclose(result, wanted, atol=1e-13)


def test_a_fold_is_one_product_and_one_mix() -> None:
    fitted = fit(CASES["reader"][1], (12, 16))
    assert fitted is not None
    (cut,) = fitted.passes
    assert [type(step) for step in cut.steps] == [Times, Mix] and cut.dim == 0


def test_what_cancels_is_zero() -> None:
    """8 is no square: the norm is not multiplied in before the sums, which would no longer be exact."""
    weight = torch.tensor([[0.7, -0.7, 0.1, 0.2, -0.2, 1.3, -1.3, -0.1]] * 2).bfloat16()
    rotation = Rotate("", plain(1, 8), ((0, torch.arange(8)[None]),), (hadamard_rotation(8),))
    changed = execute([Scale("", plain(1, 8), torch.full((8,), 3.0, dtype=torch.float64)), rotation], weight)
    assert torch.equal(changed, run_all([rotation], 3 * weight.double()).bfloat16())
    assert not changed[:, 0].any() and changed[:, 1:].any()


def test_where_pieces_are_large_the_copy_in_between_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, operations = CASES["reader and writer, no free dimension"]
    monkeypatch.setattr(pieces, "PIECE", 16)
    monkeypatch.setattr(pieces, "NARROWEST", 1)
    monkeypatch.setattr(pieces, "_WIDE", 1)
    fitted = fit(operations, shape)
    assert fitted is not None and [cut.dim for cut in fitted.passes] == [1, 0] and fitted.rows is None
    weight = random(*shape).bfloat16()
    assert torch.equal(execute(operations, weight), run_all(operations, weight.double()).bfloat16())


def test_what_is_no_run_is_rotated_where_it_lies() -> None:
    positions = torch.tensor([[0, 2, 4, 6], [1, 3, 5, 7]])
    blocks: Blocks = ((0, positions),)
    made = make_rotation(4, RotationMethod.HADAMARD, "q")
    operations: list[Operation] = [Rotate("", plain(1, 8), blocks, (made,))]
    weight = random(3, 8)
    q = made.apply(torch.eye(4, dtype=torch.float64))
    changed = execute(operations, weight)
    for row in positions:
        assert torch.allclose(changed[:, row], weight[:, row] @ q, atol=1e-14)

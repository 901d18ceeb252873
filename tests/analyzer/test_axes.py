"""Axes of parameters as axes of variables, through whatever views they are used."""

from __future__ import annotations

import pytest
import torch

from autoquant.analyzer.axes import Axes, Param
from autoquant.analyzer.variables import Reason, Variables

HERE = Reason("test", "aten.op", "", 0)


@pytest.fixture
def axes() -> Axes:
    return Axes(Variables())


def weight(*shape: int) -> Param:
    return Param("w", shape, (), shape)


def test_a_matrix_has_rows_and_columns(axes: Axes) -> None:
    found = axes.factors(weight(6, 4), 1, 0, HERE)
    assert found is not None
    assert (found.columns.shape, found.rows.shape) == ((4,), (6,))
    assert (found.column_dim, found.row_dim) == (1, 0)
    assert not set(found.columns.tolist()) & set(found.rows.tolist())


def test_a_transposed_matrix_has_the_same_axes(axes: Axes) -> None:
    straight = axes.factors(weight(6, 4), 1, 0, HERE)
    turned = axes.factors(weight(6, 4).viewed(lambda w: w.t(), (4, 6)), 0, 1, HERE)
    assert straight is not None and turned is not None
    assert torch.equal(straight.columns, turned.columns) and torch.equal(straight.rows, turned.rows)


def test_a_slice_of_rows_keeps_their_labels(axes: Axes) -> None:
    whole = axes.factors(weight(6, 4), 1, 0, HERE)
    part = axes.factors(weight(6, 4).viewed(lambda w: w[2:5], (3, 4)), 1, 0, HERE)
    assert whole is not None and part is not None
    assert torch.equal(part.rows, whole.rows[2:5]) and torch.equal(part.columns, whole.columns)


def test_a_reshape_that_mixes_rows_and_columns_has_no_factors(axes: Axes) -> None:
    assert axes.factors(weight(6, 4).viewed(lambda w: w.reshape(4, 6), (4, 6)), 1, 0, HERE) is None


def test_stacked_matrices_have_axes_each(axes: Axes) -> None:
    found = axes.factors(weight(3, 6, 4), 2, 1, HERE)
    assert found is not None
    assert found.columns.shape == (3, 4) and found.rows.shape == (3, 6)
    assert len(set(found.rows.flatten().tolist())) == 18


def test_experts_of_a_stack_keep_no_labels_of_their_own(axes: Axes) -> None:
    """Else each of 288 experts that a loop is unrolled over would hold the labels of all of them."""
    first, other = (
        axes.factors(weight(3, 6, 4).viewed(lambda w, e=e: w[e], (6, 4)), 1, 0, HERE)  # type: ignore[misc]  # e is bound
        for e in (0, 2)
    )
    assert first is not None and other is not None
    for one, another, size in ((first.rows, other.rows, 6), (first.columns, other.columns, 4)):
        assert torch.equal(another, one + 2 * size)
        assert one.untyped_storage().data_ptr() == another.untyped_storage().data_ptr()


def test_a_parameter_used_in_two_ways_is_contested(axes: Axes) -> None:
    axes.leaf(Param("g", (4,), (), (4,)), 0, HERE)
    assert axes.conflicts() == []
    axes.leaf(Param("g", (4,), (), (4,)), 1, HERE)
    ((members, reason),) = axes.conflicts()
    assert {family.param for family in members} == {"g"}
    assert "different ways" in reason.text
    assert list(axes.contested()) == ["g"]


def test_a_gain_and_one_plus_it_are_different_families(axes: Axes) -> None:
    plain = axes.leaf(Param("g", (4,), (), (4,)), 0, HERE)
    plus = axes.leaf(Param("g", (4,), (), (4,)), 1, HERE)
    assert plain is not None and plus is not None
    assert not set(plain.tolist()) & set(plus.tolist())

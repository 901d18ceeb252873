"""Axes of parameters as families of variables, through whatever views they are used."""

from __future__ import annotations

import pytest
import torch

from autoquant.analyzer.axes import Families, Param
from autoquant.analyzer.variables import Reason, Variables

HERE = Reason("test", "aten.op", "", 0)


@pytest.fixture
def families() -> Families:
    return Families(Variables())


def weight(*shape: int) -> Param:
    return Param("w", shape, (), shape)


def test_a_matrix_has_rows_and_columns(families: Families) -> None:
    found = families.factors(weight(6, 4), 1, 0, HERE)
    assert found is not None
    assert (found.columns.shape, found.rows.shape) == ((4,), (6,))
    assert (found.column_dim, found.row_dim) == (1, 0)
    assert not set(found.columns.tolist()) & set(found.rows.tolist())


def test_a_transposed_matrix_has_the_same_axes(families: Families) -> None:
    straight = families.factors(weight(6, 4), 1, 0, HERE)
    turned = families.factors(weight(6, 4).viewed(lambda w: w.t(), (4, 6)), 0, 1, HERE)
    assert straight is not None and turned is not None
    assert torch.equal(straight.columns, turned.columns) and torch.equal(straight.rows, turned.rows)


def test_a_slice_of_rows_keeps_their_labels(families: Families) -> None:
    whole = families.factors(weight(6, 4), 1, 0, HERE)
    part = families.factors(weight(6, 4).viewed(lambda w: w[2:5], (3, 4)), 1, 0, HERE)
    assert whole is not None and part is not None
    assert torch.equal(part.rows, whole.rows[2:5]) and torch.equal(part.columns, whole.columns)


def test_a_reshape_that_mixes_rows_and_columns_has_no_factors(families: Families) -> None:
    assert families.factors(weight(6, 4).viewed(lambda w: w.reshape(4, 6), (4, 6)), 1, 0, HERE) is None


def test_stacked_matrices_have_axes_each(families: Families) -> None:
    found = families.factors(weight(3, 6, 4), 2, 1, HERE)
    assert found is not None
    assert found.columns.shape == (3, 4) and found.rows.shape == (3, 6)
    assert len(set(found.rows.flatten().tolist())) == 18


def test_a_parameter_used_in_two_ways_is_contested(families: Families) -> None:
    families.leaf(Param("g", (4,), (), (4,)), 0, HERE)
    assert families.conflicts() == []
    families.leaf(Param("g", (4,), (), (4,)), 1, HERE)
    ((members, reason),) = families.conflicts()
    assert {family.param for family in members} == {"g"}
    assert "different ways" in reason.text
    assert list(families.contested()) == ["g"]


def test_a_gain_and_one_plus_it_are_different_families(families: Families) -> None:
    plain = families.leaf(Param("g", (4,), (), (4,)), 0, HERE)
    plus = families.leaf(Param("g", (4,), (), (4,)), 1, HERE)
    assert plain is not None and plus is not None
    assert not set(plain.tolist()) & set(plus.tolist())

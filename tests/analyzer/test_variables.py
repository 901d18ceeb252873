"""Equations between log-scales, and what they leave free."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from autoquant.analyzer.variables import ONE, ZERO, Reason, Solution, Variables


def because(text: str, order: int = 0) -> Reason:
    return Reason(text, "aten.op", "module", order)


def solved(variables: Variables, keep: Tensor | None = None) -> Solution:
    flags = np.zeros(variables.count, dtype=np.bool_)
    if keep is not None:
        flags[keep.numpy()] = True
    return variables.solve(flags)


def test_nothing_is_fixed_without_equations() -> None:
    variables = Variables()
    x = variables.fresh(3)
    solution = solved(variables)
    assert not solution.fixed[x].any()
    assert len(set(solution.component[x])) == 3
    assert solution.fixed[ONE]


def test_equal_variables_are_one() -> None:
    variables = Variables()
    x, y = variables.fresh(3), variables.fresh(3)
    variables.equal(x, y, 0)
    solution = solved(variables)
    assert (solution.component[x] == solution.component[y]).all()
    assert (solution.weight[x] == solution.weight[y]).all()


def test_ratios_multiply_along_a_chain() -> None:
    variables = Variables()
    x, y, z = variables.fresh(2), variables.fresh(2), variables.fresh(2)
    variables.equal(y, x, 0, ratio=2.0)
    variables.equal(z, y, 0, ratio=-1.0)
    solution = solved(variables)
    assert (solution.weight[y] / solution.weight[x] == 2.0).all()
    assert (solution.weight[z] / solution.weight[x] == -2.0).all()
    assert not solution.fixed[x].any()


def test_contradicting_ratios_fix_the_scale() -> None:
    variables = Variables()
    x, y = variables.fresh(1), variables.fresh(1)
    variables.equal(y, x, 3)
    variables.equal(y, x, 4, ratio=2.0)
    solution = solved(variables)
    assert solution.fixed[x].all() and solution.fixed[y].all()
    assert "two different powers" in variables.reasons[int(solution.reason[int(x[0])])].text


def test_a_fixed_scale_says_why_and_the_earliest_site_wins() -> None:
    variables = Variables()
    x, y = variables.fresh(1), variables.fresh(1)
    variables.equal(x, y, 0)
    variables.fix(y, because("later", 7))
    variables.fix(x, because("earlier", 5))
    solution = solved(variables)
    assert variables.reasons[int(solution.reason[int(x[0])])].text == "earlier"


def test_zero_gives_way() -> None:
    variables = Variables()
    x = variables.fresh(2)
    merged = variables.merge(x, torch.tensor([ZERO, ONE]), 0)
    assert merged[0] == x[0]
    solution = solved(variables)
    assert not solution.fixed[x[0]] and solution.fixed[x[1]]


def test_merging_along_an_axis_joins_it() -> None:
    variables = Variables()
    x = variables.fresh(6).view(2, 3)
    out = variables.merge_along(x, [1], 0)
    assert out.shape == (2,)
    solution = solved(variables)
    assert len(set(solution.component[x[0]])) == len(set(solution.component[x[1]])) == 1
    assert solution.component[x[0, 0]] != solution.component[x[1, 0]]


def test_a_factor_without_scale_passes_the_other_through() -> None:
    variables = Variables()
    x = variables.fresh(2)
    assert torch.equal(variables.product(x, torch.full((2,), ONE), 0), x)
    assert torch.equal(variables.product(x, torch.full((2,), ZERO), 0), torch.full((2,), ZERO))


def test_a_product_with_itself_squares() -> None:
    variables = Variables()
    x = variables.fresh(2)
    z = variables.product(x, x, 0)
    solution = solved(variables)
    assert (solution.weight[z] / solution.weight[x] == 2.0).all()
    assert not solution.fixed[x].any()


def test_a_quotient_by_itself_has_no_scale() -> None:
    variables = Variables()
    x = variables.fresh(2)
    z = variables.product(x, variables.power(x, -1.0, 0), 0)
    with np.errstate(all="raise"):
        solution = solved(variables)
    assert solution.fixed[z].all()
    assert not solution.fixed[x].any()


def test_of_two_free_factors_the_lone_parameter_is_given_up() -> None:
    variables = Variables()
    gain, rows = variables.fresh(2), variables.fresh(2)
    z = variables.product(gain, rows, 0)
    solution = solved(variables, keep=rows)
    assert solution.fixed[gain].all()
    assert (solution.component[z] == solution.component[rows]).all()


def test_a_product_whose_factor_is_fixed_later_is_the_other_factor() -> None:
    variables = Variables()
    x, y = variables.fresh(2), variables.fresh(2)
    z = variables.product(x, y, 0)
    variables.fix(x, because("an output", 9))
    solution = solved(variables)
    assert (solution.component[z] == solution.component[y]).all()
    assert not solution.fixed[y].any()


def test_a_fixed_product_makes_its_factors_cancel() -> None:
    variables = Variables()
    x, y = variables.fresh(1), variables.fresh(1)
    variables.fix(variables.product(x, y, 0), because("an output"))
    solution = solved(variables)
    assert solution.weight[y] / solution.weight[x] == -1.0
    assert not solution.fixed[x].any()


@pytest.mark.parametrize("seed", range(20))
def test_random_equations_hold_in_the_solution(seed: int) -> None:
    """Any choice of one log-scale per component satisfies every equation that was demanded."""
    print(f"seed {seed}")
    generator = np.random.default_rng(seed)
    variables = Variables()
    x = variables.fresh(30)
    demanded: list[tuple[int, int, float]] = []
    for order in range(20):
        i, j = generator.integers(0, 30, 2)
        ratio = float(generator.choice([1.0, 1.0, -1.0, 2.0, 0.5]))
        variables.equal(x[int(i)], x[int(j)], order, ratio)
        if i != j or ratio != 1.0:
            demanded.append((int(x[int(i)]), int(x[int(j)]), ratio))
    products = [(int(variables.product(x[i], x[i + 1], 30 + i)), int(x[i]), int(x[i + 1])) for i in range(0, 6, 2)]
    variables.fix(x[29], because("an output"))
    solution = solved(variables)
    free = generator.normal(size=int(solution.component.max()) + 1)
    log = np.where(solution.fixed, 0.0, solution.weight * free[solution.component])
    for left, right, ratio in demanded:
        assert log[left] == pytest.approx(ratio * log[right])
    for z, a, b in products:
        assert log[z] == pytest.approx(log[a] + log[b])
    assert log[int(x[29])] == 0.0

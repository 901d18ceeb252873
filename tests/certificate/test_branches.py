"""Branches by the number of sequences and tokens are found, wherever their limits stand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autoquant.certificate.branches import sizes_that_matter
from autoquant.certificate.prove import prove
from tests.certificate.modules import Unit, loaded
from tests.certificate.test_runs import up_to_down

LIMITS = {"most": 200}


def every_seventh(unit: Unit, hidden: Tensor) -> Tensor:
    return hidden.tanh() if hidden.shape[1] % 7 == 0 else hidden.relu()


def a_limit_in_a_table(unit: Unit, hidden: Tensor) -> Tensor:
    return hidden.tanh() if hidden.shape[1] > LIMITS["most"] else hidden.relu()


def a_limit_that_is_computed(unit: Unit, hidden: Tensor) -> Tensor:
    return hidden.relu() if hidden.shape[1] < 2 ** len(LIMITS["most"].__class__.__name__ * 3) else hidden.tanh()


def four_sequences(unit: Unit, hidden: Tensor) -> Tensor:
    return hidden.tanh() if hidden.shape[0] == 14 else hidden.relu()


def counted(unit: Unit, hidden: Tensor) -> Tensor:
    """``len`` is a number of its own, of which nothing can be asked."""
    return hidden.tanh() if len(hidden) == 4 else hidden.relu()


def behind_another(unit: Unit, hidden: Tensor) -> Tensor:
    if hidden.shape[1] < 300:
        return hidden.relu()
    return hidden.tanh() if hidden.shape[1] == 333 else 2 * hidden.relu()


def a_remainder_by_a_size(unit: Unit, hidden: Tensor) -> Tensor:
    """Of which there is none for one sequence."""
    return hidden.tanh() if hidden.shape[1] % (hidden.shape[0] - 1) else hidden.relu()


def sizes(act: Callable[[Unit, Tensor], Tensor]) -> list[tuple[int, int]]:
    ids = lambda count, tokens: ((torch.zeros(count, tokens, dtype=torch.long),), {})  # noqa: E731
    return list(sizes_that_matter(Unit(act), ids, (2, 5)))


@pytest.mark.parametrize(
    ("act", "size"),
    [
        (every_seventh, (2, 7)),
        (a_limit_in_a_table, (2, 201)),
        (a_limit_that_is_computed, (2, 512)),
        (four_sequences, (14, 5)),
        (counted, (4, 5)),
        (behind_another, (2, 333)),
    ],
)
def test_the_smallest_size_that_goes_another_way_is_run(
    act: Callable[[Unit, Tensor], Tensor], size: tuple[int, int]
) -> None:
    assert size in sizes(act)
    (failed,) = prove(loaded(Unit(act)), up_to_down()).failed()
    assert failed.name == "up -> down" and failed.change > 1e-3


def test_what_asks_nothing_is_run_at_one_token_and_one_sequence_more() -> None:
    """torch itself asks whether a size is 1."""
    assert set(sizes(lambda unit, hidden: hidden.relu())) <= {(2, 1), (1, 5), (1, 1), (2, 2), (1, 2)}


def test_a_size_that_would_be_divided_by_answers_nothing() -> None:
    """One sequence is the first that is tried; the code cannot be run with it."""
    assert sizes(a_remainder_by_a_size)[0] == (3, 5)

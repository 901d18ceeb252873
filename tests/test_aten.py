from __future__ import annotations

import pytest
import torch

from autoquant.aten import FACTORS, PRODUCTS
from autoquant.quantizer.weight import HANDLERS


@pytest.mark.parametrize("name", sorted(set(FACTORS) - {"transformers::grouped_mm_fallback"}))
def test_the_table_says_where_the_factors_stand(name: str) -> None:
    """Names of the arguments in the operator's own schema."""
    operator = getattr(torch.ops.aten, name)
    names = [argument.name for argument in operator.default._schema.arguments]
    first, second = FACTORS[name]
    assert (names[first], names[second]) in {
        ("input", "weight"), ("self", "other"), ("self", "mat2"), ("mat1", "mat2"), ("batch1", "batch2"),
    }  # fmt: skip


def test_an_int8_weight_takes_part_in_each_product_but_one() -> None:
    names = {name.rpartition("::")[2].strip("_") for name in FACTORS}
    assert names - set(HANDLERS) == {"baddbmm"}, "its int8 weight is refused in a line"
    assert set(FACTORS) <= PRODUCTS

"""How each operator carries scales and rotations: the table of operators, one module for each family.

The scale rule, the rotation rule and the sentence for ``--explain`` of an operator stand together. Importing this
package registers all of them.
"""

from autoquant.analyzer.rules import (
    arithmetic,
    attention,
    choices,
    complex_numbers,
    convolutions,
    einsum,
    elementwise,
    experts,
    norms,
    products,
    reductions,
    tables,
    writes,
)
from autoquant.analyzer.rules.registry import ROTATIONS, SCALES, Rule, Rules

__all__ = [
    "ROTATIONS",
    "SCALES",
    "Rule",
    "Rules",
    "arithmetic",
    "attention",
    "choices",
    "complex_numbers",
    "convolutions",
    "einsum",
    "elementwise",
    "experts",
    "norms",
    "products",
    "reductions",
    "tables",
    "writes",
]

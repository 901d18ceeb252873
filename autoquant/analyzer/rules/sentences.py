"""Words for the steps of ``--explain`` that several rules share."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from autoquant.analyzer.axes import Param
from autoquant.aten import CASTS, MOVEMENT, operator_name
from autoquant.capture.graph import module_path

MOVES = "moves elements"
MOVES_VECTORS = "moves whole vectors"
FORMAT = "changes the number format only"
ENDS = "ends here: f(s x) is not s f(x)"
ADDS = "sums: what is added carries the same scale"
PICKS = "picks one of several: all of them carry the same scale"
WRITES = "writes into a tensor: what is written and what stays carry the same scale"
LENGTH = "takes the vector's length, which a rotation keeps"


def qualified(operator: str) -> str:
    """``aten.silu``, ``transformers.grouped_mm_fallback``."""
    return operator.replace("::", ".") if "::" in operator else f"aten.{operator}"


def is_movement(node: fx.Node) -> bool:
    """True if the node copies elements or changes their format, and does nothing else."""
    name = operator_name(node)
    return name in MOVEMENT or name in CASTS or name == "getitem"


def params_text(params: Collection[Param]) -> str:
    """The parameters' names, each once."""
    return ", ".join(dict.fromkeys(param.name for param in params))


def origin(node: fx.Node) -> str:
    """``'silu at model.layers.0.mlp.act_fn'``: what made an argument, data movement aside."""
    while is_movement(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if node.op != "call_function":
        return "an input or a parameter"
    return f"{operator_name(node).rpartition('::')[2]} at {module_path(node) or 'the model'}"


def product_with_weight(node: fx.Node, carriers: Collection[fx.Node], params: Collection[Param]) -> str:
    """What a product does to a scale: with a weight, or of two activations."""
    if params:
        return "product with a weight: each row can take a scale"
    return "product of two activations: the scale of one passes, the other has scale 1"


def written_by_weight(node: fx.Node, carriers: Collection[fx.Node], params: Collection[Param]) -> str:
    """What a product does to a vector: its weight writes it, or attention adds several up."""
    if params:
        return "writes the vector: the rows of the weight are rotated"
    return "attention: adds up the vectors of each head, a rotation per head passes"

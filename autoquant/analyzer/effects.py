"""What an operator does to a scale or a rotation that passes through it, in plain words."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from autoquant.analyzer.axes import Param
from autoquant.analyzer.variables import Reason
from autoquant.aten import CASTS, MOVEMENT, PASSES, PRODUCTS, operator_name
from autoquant.capture.graph import module_path

MOVES = "moves elements"
FORMAT = "changes the number format only"

_ATTENTION = "scaled_dot_product_attention"
_GROUPED = frozenset({"_grouped_mm", "transformers::grouped_mm_fallback"})
_SUMS = frozenset({"sum", "mean", "index_add", "scatter_add", "amax", "cumsum"})


def qualified(operator: str) -> str:
    """``aten.silu``, ``transformers.grouped_mm_fallback``."""
    return operator.replace("::", ".") if "::" in operator else f"aten.{operator}"


def is_movement(node: fx.Node) -> bool:
    """Does the node copy elements or change their format, and nothing else?"""
    name = operator_name(node)
    return name in MOVEMENT or name in CASTS or name == "getitem"


def scale_effect(node: fx.Node, carriers: Collection[fx.Node], params: Collection[Param]) -> str:
    """What ``node`` does to the scale that comes in through ``carriers``; ``params`` are its parameter arguments."""
    name = operator_name(node)
    if name in CASTS:
        return FORMAT
    if is_movement(node):
        return MOVES
    if name == "embedding":
        return "looks up an embedding: each column of the table can take a scale"
    if name in _GROUPED:
        return "grouped product with the experts' weights: each row can take a scale, in every expert its own"
    if name in ("layer_norm", "rms_norm") and params:
        return "normalises, then multiplies by the norm's weight: each element of it can take a scale"
    if name in PRODUCTS and params:
        return "product with a weight: each row can take a scale"
    if name == _ATTENTION:
        if carriers and node.args[2] in carriers:
            return "attention: every head passes the scale of its values through"
        return "attention: queries meet keys, whose scales must cancel"
    if name in PRODUCTS:
        return "product of two activations: the scale of one passes, the other has scale 1"
    if name in ("mul", "div"):
        return _product(node, carriers, params, name)
    if name == "add" and params and not carriers:
        return f"1 + {params_text(params)}, a norm's gain: each element of it can take a scale"
    if name in ("add", "sub"):
        return "adds a parameter: it takes the same scale" if params else "sum: both sides carry the same scale"
    if name in PASSES:
        return "passes a scale: f(s x) = s f(x) for every s > 0"
    if name in ("pow", "square", "sqrt", "rsqrt", "reciprocal"):
        return "a power: the scale is raised to it"
    if name in _SUMS:
        return "sums: what is added carries the same scale"
    return "passes the scale"


def _product(node: fx.Node, carriers: Collection[fx.Node], params: Collection[Param], name: str) -> str:
    word = "product" if name == "mul" else "quotient"
    if params and not carriers:
        return f"multiplies by {params_text(params)}: each element of it can take a scale"
    others = [argument for argument in node.all_input_nodes if argument not in carriers]
    if others:
        return f"{word}: the scale of one side passes, the other ({origin(others[0])}) has scale 1"
    if len(carriers) > 1:
        return f"{word}: the scales of both sides combine"
    return f"{word} with a constant: passes a scale"


def rotation_effect(node: fx.Node, carriers: Collection[fx.Node], params: Collection[Param]) -> str:
    """What ``node`` does to a rotated vector that comes in through ``carriers``."""
    name = operator_name(node)
    if name in CASTS:
        return FORMAT
    if is_movement(node):
        return "moves whole vectors"
    if name == "embedding":
        return "looks up an embedding: the columns of the table are rotated"
    if name == "layer_norm":
        return (
            "centres the vector, divides by its length, which a rotation keeps; its weight is folded into the readers"
        )
    if name == "rms_norm":
        return "divides by the vector's length, which a rotation keeps; its weight is folded into the readers"
    if name in PRODUCTS and params:
        return "writes the vector: the rows of the weight are rotated"
    if name in PRODUCTS:
        return "attention: adds up the vectors of each head, a rotation per head passes"
    if name in ("add", "sub"):
        return "sum: both sides are rotated alike"
    if name in ("mul", "div"):
        if params:
            return f"multiplies by {params_text(params)}, which is folded into every reader"
        return "scales the vector by one number, which a rotation does not mind"
    if name in ("pow", "square", "mean", "linalg_vector_norm"):
        return "takes the vector's length, which a rotation keeps"
    return "passes whole vectors"


def blocking(reason: Reason) -> str:
    """The last line of a chain that ends: ``'BLOCKS: it is not proportional to its input'``."""
    return f"BLOCKS: {reason.text}"


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

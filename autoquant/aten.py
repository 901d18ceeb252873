"""The operators that are understood, by what they do: the left column of the operator table.

``analyzer/rules`` holds the other two columns. Names are ATen's without overload; operators of other libraries keep
their name space. An operator that has no rule blocks whatever reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import ascii_letters

from torch import fx

from autoquant.library_patches import OpOverload


def operator_name(node: fx.Node) -> str:
    """``'silu'`` for aten.silu.default; other libraries keep their name space: ``'transformers::grouped_mm'``."""
    target = node.target
    if isinstance(target, OpOverload):
        space, name = target._schema.name.split("::")
        return ALIASES.get(name, name) if space == "aten" else f"{space}::{name}"
    return getattr(target, "__name__", str(target))


def base_name(node: fx.Node) -> str:
    """The operator's name without its name space."""
    return operator_name(node).rpartition("::")[2]


HIGHER_ORDER = frozenset(["flex_attention"])
"""Operators that take functions, of which torch keeps no schema."""

ALIASES = {
    "absolute": "abs", "clip": "clamp", "concat": "cat", "concatenate": "cat", "divide": "div", "moveaxis": "movedim",
    "multiply": "mul", "negative": "neg", "special_expit": "sigmoid", "special_softmax": "softmax", "subtract": "sub",
    "swapaxes": "transpose", "swapdims": "transpose", "true_divide": "div",
}  # fmt: skip
"""ATen's second names of an operator, with the same arguments."""

NO_RULE = "the operator has no rule"
NO_ROTATION = "no rotation passes it"

MOVEMENT = frozenset(
    """alias as_strided atleast_1d atleast_2d atleast_3d broadcast_to chunk clone column_stack constant_pad_nd
    contiguous detach detach_copy diag_embed diagonal dstack expand expand_as flatten flip fliplr flipud gather hstack
    index index_select lift_fresh_copy movedim narrow pad permute pixel_shuffle pixel_unshuffle ravel repeat
    repeat_interleave reshape reshape_as roll rot90 select slice split split_with_sizes squeeze stack cat t
    take_along_dim tensor_split tile transpose tril triu unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze
    view view_as vstack _unsafe_view _reshape_alias numpy_T mT""".split()
)
"""Operators that copy elements (or put 0 in their place) and change none: they are run on the labels themselves."""

JOINING = frozenset("""cat column_stack dstack hstack stack vstack""".split())
"""Data movement that takes a list of tensors."""

PARTING = frozenset("""narrow slice split_with_sizes""".split())
"""Data movement that takes runs of what lies along one dimension; the data may say how long they are."""

CHOOSING = JOINING | frozenset("""index index_select gather take_along_dim""".split())
"""Data movement that may depend on the data."""

LIKE_ANOTHER = frozenset("""expand_as reshape_as view_as type_as""".split())
"""Operators that take the shape or the number format of their second argument, and nothing else of it."""

CASTS = frozenset("""to _to_copy type_as""".split())
"""Operators that change the number format only."""

LINEAR = frozenset("""to _to_copy type_as dropout feature_dropout alpha_dropout neg conj real imag positive""".split())
"""f(s x) = s f(x) for every number s, element by element: scales and rotations pass."""

PASSES = LINEAR | frozenset("""relu leaky_relu rrelu abs""".split())
"""f(s x) = s f(x) for every s > 0."""

NONLINEAR = frozenset(
    """silu gelu tanh sigmoid softmax _softmax log_softmax softplus exp exp2 expm1 log log1p log2 log10 erf erfc sin cos
    sinh cosh asinh atan tan elu selu celu mish hardswish hardsigmoid log_sigmoid logit logsumexp logcumsumexp round
    floor ceil trunc frac relu6 atan2 cumprod prod nan_to_num floor_divide remainder fmod logaddexp bucketize histc
    hardshrink softshrink""".split()
)
"""Operators that are understood, and allow no scale."""

COMPARISONS = frozenset("""eq ne gt ge lt le""".split())
"""Which of two is larger does not change under one positive scale on both."""

SIGNS = frozenset(
    """sign sgn isnan isinf isfinite all any logical_not logical_and logical_or
    logical_xor count_nonzero""".split()
)
"""Operators that see only where an element is 0, positive, negative or not finite: no positive scale reaches them."""

FILLS = {
    "empty": 0, "new_empty": 0, "empty_like": 0, "empty_strided": 0, "zeros": 0, "new_zeros": 0, "zeros_like": 0,
    "ones": 1, "new_ones": 1, "ones_like": 1, "full_like": None, "new_full": None,
}  # fmt: skip
"""Tensors of one value that does not depend on the arguments' values. Empty ones are written before they are read."""

RANDOM_LIKE = frozenset("""rand_like randn_like randint_like""".split())
"""Operators that take the shape and the number format of their argument, and make random numbers."""

RANDOM = frozenset("""rand randn randint bernoulli multinomial randperm uniform normal""".split()) | RANDOM_LIKE
"""Operators whose result cannot be computed beforehand."""

COUNTING = frozenset("""arange linspace cumsum sum count_nonzero nonzero tril_indices triu_indices""".split())
"""Operators whose result says how long something is, or where in it: of other lengths it has other values."""

SAME_INDICES = frozenset("""to _to_copy reshape view contiguous""".split())
"""Operators that keep indices, and their order."""

COUNTS = frozenset("""histc bincount""".split())
"""Operators that count how often each index occurs."""

CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
"""Their number of spatial dimensions."""

POOLS = {
    f"{kind}{dims}d": dims
    for kind in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_nearest")
    for dims in (1, 2, 3)
} | {
    "upsample_linear1d": 1, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_trilinear3d": 3,
    "_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 2,
}  # fmt: skip
"""Sums, maxima and copies along the spatial dimensions, whose number is given."""

FACTORS = {
    "linear": (0, 1), "matmul": (0, 1), "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2),
    "_grouped_mm": (0, 1), "transformers::grouped_mm_fallback": (0, 1),
}  # fmt: skip
"""Products of two matrices and the positions of both factors, for analysis, calibration and learned rotations alike."""

PRODUCTS = (
    frozenset(FACTORS)
    | frozenset(CONVOLUTIONS)
    | frozenset("einsum inner scaled_dot_product_attention tensordot".split())
)
"""Products that add over channels: what comes out belongs to other channels."""

MULTIPLIED = frozenset("mul matmul mm bmm einsum inner tensordot".split())
"""Products of which nothing is left where a factor is 0."""

ATTENTION = frozenset("""scaled_dot_product_attention flex_attention""".split())
"""Operators that are attention as a whole; their third argument is the values."""

NORMS = frozenset("layer_norm rms_norm".split())
"""Operators that divide a vector by its length, and may multiply by a weight."""


def einsum_letters(equation: str, shapes: Sequence[Sequence[int]]) -> tuple[list[str], str] | None:
    """A letter for each dimension of the operands and of the result, ``...`` written out.

    None where a letter stands twice in one of them, where the result is left out, or where what ``...`` stands for is
    not the same for all operands that have it.
    """
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    covered = {
        tuple(shape)[term.index("...") :][: len(shape) - len(term) + 3]
        for term, shape in zip(terms, shapes, strict=True)
        if "..." in term
    }
    if not arrow or len(covered) > 1:
        return None
    unused = [letter for letter in ascii_letters if letter not in equation]
    written = "".join(unused[: len(next(iter(covered), ()))])
    terms = [term.replace("...", written) for term in terms]
    result = result.replace("...", written)
    if any(len(set(term)) < len(term) for term in (*terms, result)):
        return None
    return terms, result


def rescales(node: fx.Node) -> bool:
    """True if it is something times a finite number but 0, for products (and as a result of the graph) alone.

    The scales of a weight's rows and columns are then the same before and after.
    """
    if operator_name(node) not in ("mul", "div") or len(node.args) != 2 or node.kwargs:
        return False
    factor = node.args[1]
    products = all(user.op == "output" or operator_name(user) in PRODUCTS for user in node.users)
    if not isinstance(factor, int | float) or isinstance(factor, bool):
        return False
    return factor != 0 and math.isfinite(factor) and products


CHOICES = frozenset("""topk sort argmax argsort""".split())
"""Operators that rank."""

"""The operators that are understood, by what they do: the left column of the operator table.

``scale_rules`` and ``rotation_rules`` hold the other two columns. Names are ATen's without overload; operators of other
libraries keep their name space. An operator that is in neither table blocks whatever reaches it.
"""

from __future__ import annotations

import torch
from torch import fx


def operator_name(node: fx.Node) -> str:
    """``'silu'`` for aten.silu.default; other libraries keep their name space: ``'transformers::grouped_mm'``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        space, name = target._schema.name.split("::")
        return name if space == "aten" else f"{space}::{name}"
    return getattr(target, "__name__", str(target))


def base_name(node: fx.Node) -> str:
    """The operator's name without its name space."""
    return operator_name(node).rpartition("::")[2]


NO_RULE = "the operator has no rule"
NO_ROTATION = "no rotation passes it"

MOVEMENT = frozenset(
    """alias broadcast_to chunk clone constant_pad_nd contiguous detach detach_copy diagonal expand
    expand_as flatten flip gather index index_select lift_fresh_copy movedim narrow pad permute pixel_shuffle ravel
    repeat repeat_interleave reshape reshape_as roll select slice split split_with_sizes squeeze stack cat concat
    concatenate swapaxes swapdims t take_along_dim tensor_split tile transpose tril triu unbind unflatten unfold
    unsafe_chunk unsafe_split unsqueeze view view_as _unsafe_view _reshape_alias numpy_T mT""".split()
)
"""Operators that copy elements and change none: they are run on the labels themselves."""

CHOOSING = frozenset("""index index_select gather take_along_dim cat concat concatenate stack""".split())
"""Data movement that may depend on the data."""

LIKE_ANOTHER = frozenset("""expand_as reshape_as view_as type_as""".split())
"""Operators that take the shape or the number format of their second argument, and nothing else of it."""

CASTS = frozenset("""to _to_copy type_as float half bfloat16 double""".split())
"""Operators that change the number format only."""

PASSES = frozenset(
    """to _to_copy type_as dropout feature_dropout alpha_dropout neg relu leaky_relu abs _assert_tensor_metadata
    identity float conj real positive""".split()
)
"""f(s x) = s f(x) for every s > 0."""

NONLINEAR = frozenset(
    """silu gelu tanh sigmoid softmax _softmax log_softmax softplus exp exp2 expm1 log log1p log2 erf sin cos elu selu
    celu mish hardswish hardsigmoid logsigmoid log_sigmoid_forward logsumexp round floor ceil glu relu6 softsign
    argmax argmin sign sgn tan atan atan2 cumprod prod isnan isinf nan_to_num eq ne gt ge lt le floor_divide
    remainder fmod var std var_mean group_norm batch_norm logaddexp maximum minimum any all logical_not logical_and
    logical_or bucketize histc bincount nonzero one_hot""".split()
)
"""Operators that are understood, and allow no scale."""

FILLS = {
    "empty": 0, "new_empty": 0, "empty_like": 0, "empty_strided": 0, "zeros": 0, "new_zeros": 0, "zeros_like": 0,
    "ones": 1, "new_ones": 1, "ones_like": 1, "full_like": None, "new_full": None,
}  # fmt: skip
"""Tensors of one value that does not depend on the arguments' values. Empty ones are written before they are read."""

RANDOM = frozenset("""rand randn randint rand_like randn_like bernoulli multinomial randperm uniform normal""".split())
"""Operators whose result cannot be computed beforehand."""

GROUPING = frozenset("""cumsum histc bincount to _to_copy clamp clamp_max clamp_min reshape view contiguous""".split())
"""Operators between the experts' indices and the offsets of their rows."""

PRODUCTS = frozenset(
    """linear matmul mm bmm addmm baddbmm einsum scaled_dot_product_attention _grouped_mm
    transformers::grouped_mm_fallback conv1d""".split()
)
"""Products that add over channels: what comes out belongs to other channels."""

CHOICES = frozenset("""topk sort argmax argsort""".split())
"""Operators that rank."""

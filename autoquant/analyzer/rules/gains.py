"""Parameters that multiply vectors: gains, which are folded into the linears behind or before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx

from autoquant.analyzer.interpreter import Site, Value
from autoquant.analyzer.rotation_notes import Product, Read
from autoquant.analyzer.rotation_state import Gain, RotationAnalysis, Vector, varies
from autoquant.analyzer.variables import ZERO
from autoquant.aten import LINEAR, operator_name
from autoquant.config.format import Norm

_REARRANGED = (
    "alias clone contiguous detach flatten lift_fresh_copy movedim permute reshape squeeze t transpose unflatten "
    "unsqueeze view _unsafe_view _reshape_alias numpy_T mT slice"
)
REARRANGED = frozenset(_REARRANGED.split())
"""Operators that hold each element of their argument once, or not at all."""


def rotate_gained(a: RotationAnalysis, site: Site, vector: Vector, gain: Gain) -> Value:
    """A norm weight: it waits for the linears that it can be folded into."""
    shape = gain.param.full_shape
    size = max(shape, default=1)
    if vector.gain is not None or int(np.prod(shape)) != size or site.operator != "mul":
        return a.end(site, [vector, gain], "it is multiplied by a parameter")
    index = gain.param.replay(torch.arange(size).view(shape))
    wide = tuple(vector.coordinates.shape)
    if any(size not in (1, own) for size, own in zip(index.shape[::-1], wide[::-1], strict=False)) or (
        index.ndim > len(wide)
    ):
        return a.end(site, [vector, gain], "it is multiplied by a parameter")
    a.axes.other_use(gain.param, site.because("it is a gain"), gain.words)
    norm = Norm(
        kind="layer" if vector.centred else "rms",
        weight=gain.param.name,
        bias=None,
        offset=1 if gain.offset else 0,
        eps=None,
    )
    a.gain_sizes[gain.param.name] = size
    return replace(vector, gain=norm, gain_index=index.expand(wide), table=None)


def behind_gain(
    a: RotationAnalysis,
    site: Site,
    vector: Vector,
    dims: Sequence[int],
    added: Callable[[Vector], Value],
    placed: Callable[[Tensor], Tensor],
) -> Value:
    """What ``added`` makes of a vector where whole vectors are added along ``dims``: a gain waits behind their sum too.

    ``placed`` brings the places of its channels, of size 1 along ``dims``, to the shape of the sum. A norm's bias does
    not wait: it would be added as often as there are vectors.
    """
    gain, index = vector.gain, vector.gain_index
    if gain is None or index is None:
        return added(vector)
    if gain.bias is not None:
        return a.end(site, [vector], f"vectors are added, to each of which {gain.bias} was added")
    if dims:  # a token of zeros has whatever gain the others have
        zero = vector.coordinates == ZERO
        index = torch.where(zero, index.masked_fill(zero, -1).amax(tuple(dims), keepdim=True), index)
    if any(varies(index, dim) for dim in dims):
        return a.end(site, [vector], "its channels are summed")
    for dim in dims:
        index = index.narrow(dim, 0, 1)
    out = added(replace(vector, gain=None, gain_index=None))
    return replace(out, gain=gain, gain_index=placed(index)) if isinstance(out, Vector) else out


def folded_before(a: RotationAnalysis, site: Site, node: object, value: Value) -> Value:
    """A vector without the gain that waits on it, which goes into the rows of the linear that made it (LayerScale).

    ``diag(g) (W x + b)`` is ``(diag(g) W) x + diag(g) b``. The value as it is where the gain waits for a reader behind
    it, or something else sees what the linear makes.
    """
    if not isinstance(value, Vector) or value.gain is None or value.gain_index is None or value.factors is not None:
        return value
    made = None if value.gain.bias is not None or value.centred else product_before(a, node)
    if made is None:
        return value
    place = a.axes.place(made.weight, made.dim, value.coordinates)
    if place is None or not torch.equal(place, value.gain_index):
        return value
    here = Read(site, made.weight, None, made.dim, value.gain, behind=True)
    a.reads.append(here)
    if made.bias is not None:
        a.reads.append(replace(here, weight=made.bias, dim=0))
    return replace(value, gain=None, gain_index=None)


def product_before(a: RotationAnalysis, node: object) -> Product | None:
    """The product with a weight that ``node`` is, but for one gain and the order of its elements; None for anything
    else, and where another operator sees what is made on the way.
    """
    gains = 0
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node in a.products:
            return a.products[node]
        name = operator_name(node)
        if name in ("mul", "div") and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]  # times a number
        elif name == "mul" and gains == 0:
            gains += 1
            vectors = [one for one in node.all_input_nodes if _comes_of_product(a, one)]
            node = vectors[0] if len(vectors) == 1 else None
        elif name in REARRANGED or name in LINEAR:
            node = node.args[0]
        else:
            return None
    return None


def _comes_of_product(a: RotationAnalysis, node: fx.Node) -> bool:
    while node not in a.products:
        name = operator_name(node)
        if not (name in REARRANGED or name in LINEAR) or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return True

"""The scale rules of operators that write into a tensor: what was there and what is written must agree where they may
meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autoquant.analyzer.axes import Param
from autoquant.analyzer.interpreter import Known, Rule, Site, Value
from autoquant.analyzer.rotation_state import whole_rows
from autoquant.analyzer.scale_state import ScaleAnalysis, shape_of
from autoquant.aten import NO_RULE


def write_rules(a: ScaleAnalysis) -> dict[str, Rule]:
    """The scale rule of every operator that writes."""
    v = a.variables

    def run(site: Site, *args: Value, **kwargs: Value) -> Tensor:
        """The operator itself, on labels."""
        target: Callable[..., Tensor] = site.node.target  # type: ignore[assignment]  # a call_function node
        return target(*args, **kwargs)

    def copy(site: Site, x: Value, source: Value, *args: Value) -> Value:
        return a.labels(site, source).expand(site.shape)

    def write_slice(site: Site, x: Value, source: Value, *args: Value, **kwargs: Value) -> Value:
        labels, written = a.labels(site, x), a.labels(site, source)
        a.mixed(labels)
        a.mixed(written)
        return run(site, labels, written.expand(shape_of(source)), *args, **kwargs)

    def along(site: Site, labels: Tensor, written: Tensor, dim: int) -> Value:
        """Rows of ``written`` go anywhere along ``dim``: all that is there takes their scale."""
        a.mixed(labels)
        a.mixed(written)
        row = v.merge_along(written, [dim], site.order, keepdim=True)
        return v.merge(v.merge_along(labels, [dim], site.order, keepdim=True), row, site.order).expand(site.shape)

    def write_rows(site: Site, x: Value, dim: int, index: Value, source: Value, **kwargs: Value) -> Value:
        """index_add, index_copy, index_fill."""
        labels, written = a.labels(site, x), a.labels(site, source)
        if written.ndim == 0 < labels.ndim:  # one number everywhere
            written = written.expand((1,) * labels.ndim)
        return along(site, labels, written, dim % max(labels.ndim, 1))

    def scatter(site: Site, x: Value, dim: int, index: Value, source: Value, *args: Value, **kwargs: Value) -> Value:
        """Position by position along ``dim``: the other coordinates of what is written stay."""
        labels, written = a.labels(site, x), a.labels(site, source)
        dim %= max(labels.ndim, 1)
        if isinstance(index, (Tensor, Param)) or "prod" in args or kwargs.get("reduce") in ("prod", "multiply"):
            return a.block(site, [x, index, source], NO_RULE)
        if isinstance(index, Known) and site.operator == "scatter" and not kwargs:
            a.mixed(labels)
            a.mixed(written)
            return run(site, labels, dim, index.value, written if written.ndim else int(written))
        sizes = shape_of(index)
        if any(size != labels.shape[d] for d, size in enumerate(sizes) if d != dim):
            return a.block(site, [x, source], "it is written to part of a tensor")
        for d, size in enumerate(sizes if written.ndim else ()):
            written = written.narrow(d, 0, size)
        return along(site, labels, written if written.ndim else written.expand((1,) * labels.ndim), dim)

    def index_put(site: Site, x: Value, indices: Sequence[Value], values: Value, accumulate: bool = False) -> Value:
        """``x[indices] = values``, or ``+=``."""
        labels, written = a.labels(site, x), a.labels(site, values)
        a.mixed(labels)
        a.mixed(written)
        if any(isinstance(index, (Tensor, Param)) for index in indices):
            return a.block(site, [x, *indices, values], "it is used as an index")
        if not accumulate and all(index is None or isinstance(index, Known) for index in indices):
            return run(site, labels, [None if index is None else index.value for index in indices], written)
        if written.numel() == 1:
            return v.merge(labels, written.reshape(()), site.order).expand(site.shape)
        dims = [d for d, index in enumerate(indices) if index is not None]
        if dims != list(range(dims[0], dims[-1] + 1)) or any(_is_mask(indices[d]) for d in dims):
            return a.block(site, [x, values], "it is written to places that the data choose")
        chosen = torch.broadcast_shapes(*(shape_of(indices[d]) for d in dims))
        first, last = labels.shape[: dims[0]], labels.shape[dims[-1] + 1 :]
        places = written.expand(*first, *chosen, *last)
        row = v.merge_along(places, list(range(dims[0], dims[0] + len(chosen))), site.order)
        base = v.merge_along(labels, dims, site.order)
        return v.merge(base, row, site.order).reshape(*first, *(1,) * len(dims), *last).expand(site.shape)

    def masked_scatter(site: Site, x: Value, mask: Value, source: Value) -> Value:
        """The elements of ``source`` in order, where the mask is true."""
        labels, written = a.labels(site, x), a.labels(site, source)
        a.mixed(labels)
        a.mixed(written)
        if isinstance(mask, Known):
            return run(site, labels, mask.value, written)
        if isinstance(mask, (Tensor, Param)):
            return a.block(site, [x, mask, source], "it is used as a condition")
        rows = whole_rows(site.node.args[1], mask) and labels.shape[-1:] == written.shape[-1:]
        row = v.merge_along(written, range(written.ndim - rows), site.order)
        base = v.merge_along(labels, range(labels.ndim - rows), site.order)
        return v.merge(base, row, site.order).expand(site.shape)

    return {
        "copy": copy,
        "masked_scatter": masked_scatter,
        "slice_scatter": write_slice,
        "select_scatter": write_slice,
        "index_add": write_rows,
        "index_copy": write_rows,
        "index_fill": write_rows,
        "scatter": scatter,
        "scatter_add": scatter,
        "scatter_reduce": scatter,
        "index_put": index_put,
    }


def _is_mask(index: Value) -> bool:
    dtype = index.value.dtype if isinstance(index, Known) else index.dtype
    return bool(dtype in (torch.bool, torch.uint8))

"""Buffers of a small model that a checkpoint would fill: random, as its parameters are."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from autoquant.aten import operator_name
from autoquant.capture.routes import Captured
from autoquant.library_patches import pytree
from autoquant.models.reduce import failure_of
from autoquant.models.source import LoadedModel, quiet

_LARGEST_STATE = 1e4  # beyond it a value is a mask's infinity
_MOVES = frozenset(
    {
        "alias",
        "view",
        "reshape",
        "_unsafe_view",
        "slice",
        "select",
        "expand",
        "unsqueeze",
        "squeeze",
        "permute",
        "transpose",
        "t",
        "clone",
        "contiguous",
        "detach",
        "lift_fresh_copy",
        "lift_fresh",
        "flatten",
        "narrow",
        "repeat",
        "_to_copy",
        "to",
        "bitwise_not",
        "logical_not",
    }
)
_PLACES = {
    "index": (1,),
    "index_select": (2,),
    "gather": (2,),
    "embedding": (1,),
    "where": (0,),
    "masked_fill": (1,),
    "scatter": (2,),
    "scatter_add": (2,),
    "index_add": (2,),
    "index_put": (1,),
    "take_along_dim": (1,),
}
"""Operators and the arguments of theirs that are indices or conditions."""


def randomise_buffers_(loaded: LoadedModel, captured: Captured, seed: int) -> tuple[str, ...]:
    """Give persistent buffers random values and return the names of those that were changed.

    Floats keep their sign and order of magnitude; zeros become N(0, 0.3^2). Integers and booleans that are used as
    numbers become any values of their range. Those that are nothing but an index or a condition are structure and stay,
    as do tables that no checkpoint holds (rotary angles). Nothing is changed where the model does not run with them.
    """
    module = loaded.module
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    changed = _randomise_(module, captured, seed)
    if changed and not _runs(loaded):
        with torch.no_grad():
            for name in changed:
                module.get_buffer(name).copy_(before[name])
        return ()
    return changed


def _runs(loaded: LoadedModel) -> bool:
    if failure_of(loaded) is not None:
        return False
    with torch.no_grad(), torch.random.fork_rng(devices=()), quiet():
        output = loaded.module(*loaded.args, **loaded.kwargs)
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors[:1])


def _randomise_(module: nn.Module, captured: Captured, seed: int) -> tuple[str, ...]:
    numbers = _used_as_numbers(captured)
    stored = module.state_dict(keep_vars=True)
    changed = []
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name not in stored or buffer.numel() == 0 or buffer.is_complex():
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} buffer {name}".encode()))
            if buffer.is_floating_point():
                value = _float_state(buffer, generator)
            elif name in numbers:
                value = _integers(buffer, generator)
            else:
                continue
            buffer.copy_(value)
            changed.append(name)
    return tuple(changed)


def _float_state(buffer: Tensor, generator: torch.Generator) -> Tensor:
    double = buffer.detach().double()
    factor = torch.exp(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) - 0.5)
    fresh = 0.3 * torch.randn(buffer.shape, generator=generator, dtype=torch.float64)
    value = torch.where(double == 0, fresh, double * factor)
    return torch.where(double.isfinite() & (double.abs() < _LARGEST_STATE), value, double)


def _integers(buffer: Tensor, generator: torch.Generator) -> Tensor:
    """Of the range of the values that are there; where all are one value, as before a checkpoint is loaded, the first
    is another one at least, and no integer is what it was.
    """
    if buffer.dtype is torch.bool:
        value = torch.randint(0, 2, buffer.shape, generator=generator).bool()
        if bool((value == buffer).all()):
            value.view(-1)[0] = ~value.view(-1)[0]
        return value
    low, high = int(buffer.min()), int(buffer.max())
    if low == high:
        low, high = low + 1, high + 3
    return torch.randint(low, high + 1, buffer.shape, generator=generator)


def _used_as_numbers(captured: Captured) -> frozenset[str]:
    """Integer and boolean buffers that some operator takes for more than an index or a condition."""
    found = set()
    for subgraph in captured.subgraphs:
        by_name = {node.name: node for node in subgraph.graph.graph.nodes if node.op == "placeholder"}
        for name, given in subgraph.inputs.items():
            if given.kind == "buffer" and name in by_name and not _is_index(by_name[name]):
                found.add(given.name)
    return frozenset(found)


def _is_index(node: fx.Node) -> bool:
    queue, seen = [node], set()
    while queue:
        current = queue.pop()
        for user in current.users:
            name = operator_name(user) if user.op == "call_function" else ""
            if name in _MOVES and not _becomes_float(user):
                if user not in seen:
                    seen.add(user)
                    queue.append(user)
            elif not _only_in(user, current, _PLACES.get(name, ())):
                return False
    return True


def _becomes_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _only_in(user: fx.Node, argument: fx.Node, places: Iterable[int]) -> bool:
    """True if ``argument`` stands in no other of the user's arguments than ``places``."""
    allowed = set(places)
    for number, value in enumerate(user.args):
        held = value if isinstance(value, list | tuple) else [value]
        if argument in held and number not in allowed:
            return False
    return bool(allowed) and argument not in user.kwargs.values()

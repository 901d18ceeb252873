"""Every expert of a model is made to run, whether each did is measured, and what is said of one that did not."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoquant.certificate.claims import Claim
from autoquant.config.format import Config, Slot
from autoquant.config.layers import LAYER, fill, layer_numbers
from autoquant.config.slots import channels_of

_OF_ONE = re.compile(r"expert[^.]*[._]\d+\.|(^|\.)\d+\..*expert.*\.\d+\.")
"""Of a parameter that is numbered behind the word, or within a numbered layer."""

Unit = tuple[str, int]
"""A parameter that belongs to one expert (and 0), or one that holds several stacked and the number of the expert."""


def choices_of(config: Config) -> frozenset[int]:
    """Among how many experts the routers of a config choose: outputs of routers, and matrices that are stacked."""
    linears = config.model.linears
    return frozenset(
        [linear.out_features for linear in linears if linear.role == "router" and linear.out_features > 1]
        + [linear.stack for linear in linears if linear.stack is not None and linear.stack > 1]
    )


@contextmanager
def force_choices(counts: Collection[int]) -> Iterator[None]:
    """Within it, what ranks ``counts`` candidates chooses each of them in turn, whatever their scores.

    The scores of the chosen are the ones that they have, so that what a router weighs by is computed as ever. So does a
    table of choices by token that no checkpoint has filled yet.
    """

    class Force(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if func is Tensor.__getitem__ and _is_unfilled(*args):
                return _from_table(func(*args), min(counts))
            forced = _forced(func, args, kwargs, counts)
            return func(*args, **kwargs) if forced is None else forced

    with Force():
        yield


_RANKING: dict[Any, str] = {
    **dict.fromkeys((torch.topk, Tensor.topk), "topk"),
    **dict.fromkeys((torch.argmax, Tensor.argmax), "argmax"),
    **dict.fromkeys((torch.max, Tensor.max), "max"),
    **dict.fromkeys((torch.sort, Tensor.sort), "sort"),
    **dict.fromkeys((torch.argsort, Tensor.argsort), "argsort"),
}
"""What ranks candidates, by the function that is called."""

_ORDER: dict[str, tuple[str, ...]] = {
    "topk": ("input", "k", "dim"),
    "argmax": ("input", "dim", "keepdim"),
    "max": ("input", "dim", "keepdim"),
    "sort": ("input", "dim", "descending"),
    "argsort": ("input", "dim", "descending"),
}
"""The names of their arguments, as they may be given by position."""


def _forced(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], counts: Collection[int]) -> Any:
    ranks = _RANKING.get(func)
    if ranks is None:
        return None
    named = dict(zip(_ORDER[ranks], args, strict=False)) | kwargs
    scores, dim = named.get("input", named.get("self")), named.get("dim", None if "max" in ranks else -1)
    if not isinstance(scores, Tensor) or type(dim) is not int or scores.dim() == 0 or scores.shape[dim] not in counts:
        return None
    count = int(named["k"]) if ranks == "topk" else scores.shape[dim] if "sort" in ranks else 1
    chosen = _in_turn(scores, dim, count, each=1 if "sort" in ranks else count)
    if "sort" in ranks and not named.get("descending"):  # the best come last
        chosen = chosen.flip(dim)
    values = scores.gather(dim, chosen)
    if ranks in ("argmax", "max") and not named.get("keepdim"):
        chosen, values = chosen.squeeze(dim), values.squeeze(dim)
    if ranks.startswith("arg"):
        return chosen
    return getattr(torch.return_types, ranks)((values, chosen))


def _is_unfilled(table: Tensor, index: object) -> bool:
    """True if rows of whole numbers are looked up that are all the same number."""
    whole_numbers = isinstance(index, Tensor) and not index.is_floating_point() and index.dtype is not torch.bool
    numbers = table.dtype in (torch.int32, torch.int64) and table.dim() == 2 and len(table) > 1
    return whole_numbers and numbers and bool((table == table[0, 0]).all())


def _from_table(rows: Tensor, count: int) -> Tensor:
    """Rows of whole numbers, of choices among ``count`` in turn where they can be that."""
    if rows.dim() == 0 or not 0 < rows.shape[-1] <= count:
        return rows
    scores = rows.new_empty((1,)).expand(*rows.shape[:-1], count)
    return _in_turn(scores, -1, rows.shape[-1], each=rows.shape[-1]).to(rows.dtype)


def _in_turn(scores: Tensor, dim: int, k: int, each: int) -> Tensor:
    """Indices along ``dim``: row r takes k candidates from number r * each on, and begins anew at the end."""
    moved = scores.movedim(dim, -1)
    rows = torch.arange(moved.shape[:-1].numel(), device=scores.device)
    chosen = (rows[:, None] * each + torch.arange(k, device=scores.device)) % moved.shape[-1]
    return chosen.reshape(*moved.shape[:-1], k).movedim(-1, dim).contiguous()


def units_of(config: Config, module: nn.Module) -> list[Unit]:
    """The weights of single experts among a config's linears: matrices of a stack, and numbered parts of a layer."""
    held = dict(module.named_parameters(remove_duplicate=False))
    found: list[Unit] = []
    for linear in config.model.linears:
        for name in _filled(linear.weight, linear.layers):
            if name not in held:
                continue
            if linear.stack is not None and held[name].shape[0] == linear.stack:
                found += [(name, number) for number in range(linear.stack)]
            elif linear.stack is None and _OF_ONE.search(name):
                found.append((name, 0))
    return found


def unreached(config: Config, units: Collection[Unit], seen: Collection[Unit] | None) -> dict[Claim, str]:
    """The claims of ``config`` that are about a weight of an expert that no run reached, with the first such weight.

    Matrices of one stack go through one product, so that a claim holds for one of them if it says the same of another
    that was reached: with the same channels in every slot (a slot without ``stack`` gives all matrices the same), or
    with channels of its own that lie alike in all of them.
    ``seen``: what was reached, None where that is not known; then all matrices of a stack have to be alike, and nothing
    is said of parts that are numbered.
    """
    numbers: dict[str, list[int]] = {}
    for name, number in units:
        numbers.setdefault(name, []).append(number)
    found: dict[Claim, str] = {}
    for claim, members in _members(config):
        offsets = _Alike([slot for slot, _ in members])
        for slot, layers in members:
            for name in _filled(slot.path, layers):
                held = numbers.get(name, [])
                known = held[:1] if seen is None else [number for number in held if (name, number) in seen]
                for number in held:
                    if number in known or (seen is None and slot.stack is None):
                        continue
                    if slot.stack is None and slot.dim > 0 and known and len(held) > 1:
                        continue  # one slot for all matrices says the same of each
                    if slot.stack is None or not any(offsets.alike(slot.stack, number, other) for other in known):
                        found.setdefault(claim, f"'{name}'" + ("" if slot.stack is None else f" (expert {number})"))
    return found


class _Alike:
    """Which matrices of the stacks of a claim are said the same of."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.single = any(slot.stack is None for slot in slots)
        self.rows: dict[int, NDArray[np.int64]] = {}
        for stack in {slot.stack for slot in slots if slot.stack is not None}:
            same = [channels_of(slot).reshape(stack, -1) for slot in slots if slot.stack == stack]
            self.rows[stack] = np.concatenate(same, axis=1)

    def alike(self, stack: int, one: int, other: int) -> bool:
        """True if every slot says of both matrices the same, but for a shift of all channels where all are stacked."""
        mine, theirs = self.rows[stack][one], self.rows[stack][other]
        held = mine >= 0
        if not np.array_equal(held, theirs >= 0):
            return False
        shifts = np.unique(mine[held] - theirs[held])
        return len(shifts) == 0 or (len(shifts) == 1 and (shifts[0] == 0 or not self.single))


def _members(config: Config) -> Iterator[tuple[Claim, list[tuple[Slot, str | None]]]]:
    """Each group and space with its slots and the layers of these."""
    for group in config.smoothing.groups:
        yield (group.name, group.kind.value), [(slot, group.layers) for slot in (*group.sources, *group.targets)]
    for space in config.rotation.spaces:
        slots: list[tuple[Slot, str | None]] = [(w, w.layers or space.layers) for w in space.writers]
        slots += [(reader, read.layers or space.layers) for read in space.reads for reader in read.readers]
        yield (space.name, space.kind), slots


def _filled(path: str, layers: str | None) -> list[str]:
    return [path] if layers is None or LAYER not in path else [fill(path, n) for n in layer_numbers(layers)]


def reached(outputs: Iterable[Tensor], module: nn.Module, units: Collection[Unit]) -> set[Unit]:
    """Those of ``units`` that some output depends on: whose gradient is not zero."""
    names = list(dict.fromkeys(name for name, _ in units))
    parameters = [module.get_parameter(name) for name in names]
    generator = torch.Generator().manual_seed(0)
    scalars = [
        (tensor * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)).sum()
        for tensor in outputs
        if tensor.requires_grad
    ]
    if not scalars:
        return set()
    total = torch.stack(scalars).sum()
    found = dict(zip(names, torch.autograd.grad(total, parameters, allow_unused=True), strict=True))
    hit: set[Unit] = set()
    for name, number in units:
        gradient = found[name]
        if gradient is None:
            continue
        stacked = (name, 1) in units
        if bool((gradient[number] if stacked else gradient).any()):
            hit.add((name, number))
    return hit

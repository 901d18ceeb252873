"""Modules that cannot be traced, as one operator each, so that the rest of the model can be.

A loop over the experts that were hit, a patcher that cuts where its own entropies say: such a ``forward`` takes one
way or another by values, and there are none. It is replaced by a call of ``autoquant::opaque``, which takes
every tensor that the module is given and every parameter that it holds. The operator has no rule, so that it blocks
whatever reaches it, and nothing is known of what it returns but the shapes.

The shapes come from a rehearsal on the meta device, where every condition is false, every number is 0 and every element
is nonzero; where these contradict each other, from one on zeros; and where there are values, from a run of the model.
Where the graph is run with values, to be compared with the model, the module itself is called, and what was not
foreseen is an error.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from autoquant.capture.graph import Names
from autoquant.errors import AutoQuantError
from autoquant.library_patches import TorchDispatchMode, nonzero_takes_all, plain_calls, pytree

OPERATOR = "autoquant::opaque"
UNTRACED = "it reaches a module whose forward cannot be traced"

Shapes = tuple[tuple[tuple[int, ...], torch.dtype], ...]
"""Shape and dtype of each tensor in a result."""

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(slots=True, weakref_slot=True)
class UntraceableCall:
    """One call of a module that is not traced, with what is needed to run it for real."""

    path: str
    reason: str
    """What tracing the module's forward said."""
    module: nn.Module
    leaves: tuple[Any, ...]
    """Arguments that are no tensors; None where a tensor goes."""
    places: tuple[int, ...]
    """Positions of the tensors among the arguments."""
    spec: pytree.TreeSpec
    outputs: Shapes = ()
    """Shape and dtype of each tensor that it returns."""
    beside: tuple[Any, ...] = ()
    """What it returns beside them, None for a tensor: numbers that the trace takes for constants."""
    state: tuple[str, ...] = field(default=())
    """Names of its parameters and buffers, in the order in which the operator takes them."""

    def run(self, tensors: Sequence[Tensor], state: dict[str, Tensor]) -> Any:
        """What the module returns, with other parameters and buffers; those that it sets are set in ``state``."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return functional_call(self.module, state, args, kwargs)


_CALLS: WeakValueDictionary[str, UntraceableCall] = WeakValueDictionary()
_NUMBERS = itertools.count()


@torch.library.custom_op(OPERATOR, mutates_args=())
def _opaque(tensors: list[Tensor], state: list[Tensor], call: str) -> list[Tensor]:
    """Run the module itself."""
    untraceable = _CALLS[call]
    held = dict(zip(untraceable.state, state, strict=True))
    outputs, beside, results = _described(untraceable.run(tensors, held))
    found, foreseen = [[shape for shape, _ in made] for made in (outputs, untraceable.outputs)]
    if found != foreseen or beside != untraceable.beside:
        raise AutoQuantError(
            f"{untraceable.path} cannot be traced, and what it returns depends on values: shapes {found}, where "
            f"{foreseen} was foreseen"
            + (f"; {beside}, where {untraceable.beside} was" if beside != untraceable.beside else "")
        )
    return [result.clone() for result in results]


def _described(result: Any) -> tuple[Shapes, tuple[Any, ...], list[Tensor]]:
    """Shapes and dtypes of the tensors in a result, what is beside them, and the tensors."""
    leaves = pytree.tree_leaves(result)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    beside = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors), beside, tensors


@_opaque.register_fake
def _shapes(tensors: list[Tensor], state: list[Tensor], call: str) -> list[Tensor]:
    device = next(tensor.device for tensor in (*tensors, *state))
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in _CALLS[call].outputs]


def culprit(error: BaseException | None, names: Names, untraceable: Collection[type]) -> nn.Module | None:
    """The innermost module in whose forward an error was raised, not of the classes that are untraceable already.

    None where that is the whole model.
    """
    found = None
    while error is not None:
        frame = error.__traceback__
        while frame is not None:
            code = frame.tb_frame.f_code
            owner = frame.tb_frame.f_locals.get(next(iter(code.co_varnames), ""))
            module = _registered(owner, names) if code.co_name == "forward" else None
            if module is not None and type(module) not in untraceable:
                found = module
            frame = frame.tb_next
        if found is not None:
            return found
        error = error.__cause__ or error.__context__
    return None


def _registered(owner: object, names: Names) -> nn.Module | None:
    """The module of the model, other than the whole, that ``owner`` is or stands for while it is exported."""
    if not isinstance(owner, nn.Module):
        return None
    module = getattr(owner, "get_base", lambda: owner)()  # what export puts in front of a module
    return module if names.modules.get(id(module)) else None


@contextlib.contextmanager
def untraceable_(
    module: nn.Module,
    reasons: dict[type, str],
    calls: list[UntraceableCall],
    names: Names,
    run: Callable[[], object] | None = None,
) -> Iterator[None]:
    """Replace the forward of the outermost submodules of some classes by one operator; their calls are added to a list.

    ``reasons``: why each class cannot be traced. ``run`` runs the module on its inputs, where there are values: then
    the shapes are those that are seen.
    """
    shapes = _seen(list(_outermost(module, reasons)), names, run) if run is not None and reasons else {}
    replaced: list[nn.Module] = []
    try:
        for part in _outermost(module, reasons):
            replaced.append(part)
            part.__dict__["forward"] = _forward(part, names.modules[id(part)], reasons[type(part)], calls, shapes)
        yield
    finally:
        for part in replaced:
            del part.__dict__["forward"]


def _outermost(module: nn.Module, classes: Collection[type]) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child) in classes:
            yield child
        else:
            yield from _outermost(child, classes)


def _seen(parts: Sequence[nn.Module], names: Names, run: Callable[[], object]) -> dict[str, list[Shapes]]:
    """What each of some submodules returns in a run, call by call."""
    shapes: dict[str, list[Shapes]] = {}

    def note(part: nn.Module, _: Any, result: Any) -> None:
        shapes.setdefault(names.modules[id(part)], []).append(_described(result)[0])

    handles = [part.register_forward_hook(note) for part in parts]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _forward(
    module: nn.Module, path: str, reason: str, calls: list[UntraceableCall], shapes: dict[str, list[Shapes]]
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        tensors = [leaves[i] for i in places]
        rest = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        strange = next((leaf for leaf in rest if not isinstance(leaf, _PLAIN)), None)
        if strange is not None:  # it could hold a tensor, or be where the module leaves one
            raise AutoQuantError(f"{path} takes a {type(strange).__name__}, whose tensors cannot be seen")
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        if not tensors and not state:
            raise AutoQuantError(f"{path} takes no tensor")
        call = UntraceableCall(path, reason, module, rest, places, spec, state=tuple(state))
        replacement = module.__dict__.pop("forward")
        try:
            result = _rehearse(call, tensors, state)
        finally:
            module.__dict__["forward"] = replacement
        call.outputs, call.beside, _ = _described(result)
        actual_shapes = seen.pop(0) if (seen := shapes.get(path)) else call.outputs
        if len(actual_shapes) == len(call.outputs):
            call.outputs = actual_shapes
        name = f"{path}#{next(_NUMBERS)}"
        _CALLS[name] = call
        calls.append(call)
        actual = iter(torch.ops.autoquant.opaque(tensors, list(state.values()), name))
        return pytree.tree_map_only(Tensor, lambda _: next(actual), result)

    forward.__wrapped__ = type(module).forward  # type: ignore[attr-defined]  # what asks for its arguments gets those of the module
    return forward


def _rehearse(call: UntraceableCall, tensors: Sequence[Tensor], state: Mapping[str, Tensor]) -> Any:
    """What the module returns without values. Raises where more than its results shows."""
    try:
        result = _run_apart(call, tensors, state, _on_meta)
    except AutoQuantError:
        raise
    except Exception:  # the module's own code, by its values on the meta device
        result = _run_apart(call, tensors, state, _zeros)
    leaves = pytree.tree_leaves(result)
    strange = next((leaf for leaf in leaves if not isinstance(leaf, (Tensor, *_PLAIN))), None)
    if strange is not None:
        raise AutoQuantError(f"{call.path} returns a {type(strange).__name__}, whose tensors cannot be seen")
    return result


def _run_apart(
    call: UntraceableCall, tensors: Sequence[Tensor], state: Mapping[str, Tensor], made: Callable[[Tensor], Tensor]
) -> Any:
    """What the module returns for tensors of the same shapes, whatever traces or fakes the rest."""
    with (
        plain_calls(),
        torch.no_grad(),
        nonzero_takes_all(),
    ):
        given = [made(tensor) for tensor in tensors]
        held = {name: made(tensor) for name, tensor in state.items()}
        everything = [*given, *held.values()]
        before = [tensor._version for tensor in everything]
        attributes = _tensor_attributes(call.module)
        with _WithoutValues({_storage(tensor) for tensor in everything}):
            result = call.run(given, held)
        if [tensor._version for tensor in everything] != before:
            raise AutoQuantError(f"{call.path} writes to a tensor that it is given or holds")
        if list(map(id, held.values())) != list(map(id, everything[len(given) :])) or attributes != _tensor_attributes(
            call.module
        ):
            raise AutoQuantError(f"{call.path} keeps a tensor that it made")
    return result


def _zeros(tensor: Tensor) -> Tensor:
    """Zeros without memory for them all."""
    return torch.zeros((), dtype=tensor.dtype).expand(tuple(tensor.shape))


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")


def _storage(tensor: Tensor) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number


def _tensor_attributes(module: nn.Module) -> list[tuple[int, str, int]]:
    """The tensors among the attributes of a module and its submodules, by identity."""
    return [
        (id(part), name, id(value))
        for part in module.modules()
        for name, value in vars(part).items()
        if isinstance(value, Tensor)
    ]


class _WithoutValues(TorchDispatchMode):
    """Numbers read off a tensor are 0; a tensor that the module was not given, and does not hold, is an error."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's __init__
        self.known = known
        self.made: list[Any] = []  # kept, so that no storage's address is used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and taken[0].is_meta:
            return torch.zeros((), dtype=taken[0].dtype).item()
        if func is not torch.ops.aten.lift_fresh.default and any(_storage(t) not in self.known for t in taken):
            raise AutoQuantError("a module that cannot be traced uses a tensor that is not its own")
        result = func(*args, **(kwargs or {}))
        self.made.append(result)
        self.known.update(_storage(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
        return result

"""What a trace did not reach: parts of the model that its inputs, the way to its logits, or Dynamo leaves out."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from types import CodeType, FunctionType

from torch import Tensor, nn

from autoquant.analyzer.findings import Findings
from autoquant.capture.graph import Captured
from autoquant.config.format import Blocked, SmoothingGroup, SmoothingKind
from autoquant.models.images import IMAGES
from autoquant.models.sounds import SOUNDS


def untraced(
    module: nn.Module, captured: Captured, missing: Mapping[str, str], uncaptured: str | None = None
) -> tuple[Blocked, ...]:
    """The outermost modules none of whose matrices the graphs use, blocked with the reason.

    ``missing``: inputs that could not be made, each with the reason. ``uncaptured``: why the graphs are of text alone.
    """
    used = {
        name
        for subgraph in captured.subgraphs
        for node in subgraph.graph.graph.nodes
        if node.op == "placeholder" and node.users and subgraph.inputs[node.name].kind in ("parameter", "graph break")
        for name in _names(subgraph.inputs[node.name].name, captured)
    }
    reason = "it is not traced: nothing that it computes reaches the logits"
    if missing:
        reason = "it is not traced: " + "; ".join(f"no {name} could be made ({why})" for name, why in missing.items())
    if uncaptured is not None:
        reason = f"it is not traced: the model is analysed on text alone (with images or sound: {uncaptured})"
    hidden = (
        "it is not traced: code between the pieces that Dynamo compiles uses it, and what feeds or reads it is unseen"
    )
    return tuple(
        Blocked(path=path, what=what, reason=here, operator="forward", at=path)
        for path in _outermost(module, "", used)
        for here in [hidden if any(name.startswith(f"{path}.") for name in captured.hidden) else reason]
        for what in ("smoothing", "rotation")
    )


def without_residual(found: Findings) -> Findings:
    """``found`` on text alone, without rotations of a stream that images or sound write to as well, unseen."""
    reason = "what images or sound add to the stream is not traced, so that it cannot be rotated with it"
    return _without(found, [reason if space.kind == "R1" else None for space in found.spaces])


@dataclass(frozen=True, slots=True)
class Widths:
    """Sizes of the matrices of a part: ``any``, and ``read``, along which they may be multiplied with a vector."""

    any: frozenset[int]
    read: frozenset[int]


def beside_unreached(found: Findings, unreached: Mapping[str, Widths]) -> Findings:
    """``found`` without rotations of a stream that parts as wide as it may read or write for other inputs, and without
    scales of what goes out of a stack of layers that such parts may read, as a head for images does.

    ``unreached``: the widths of such parts by their paths (:func:`unreached_parts`).
    """

    def why(size: int, does: str) -> str | None:
        wide = [path for path, own in unreached.items() if size in (own.read if does == "read" else own.any)]
        return f"{wide[0]}, which the inputs that could be made do not reach, may {does} it" if wide else None

    goes_out = [
        group
        for group in found.groups
        if (group.kind, group.layers) == (SmoothingKind.NORM_LINEAR, None)
        and not any(name.isdecimal() for slot in group.sources for name in slot.path.split("."))
        and why(group.channels, "read") is not None
    ]
    return _without(
        _unscaled(found, goes_out, [why(group.channels, "read") for group in goes_out]),
        [why(space.size, "read or write") if space.kind == "R1" else None for space in found.spaces],
    )


def within_language_model(found: Findings, module: nn.Module, text: object, forward: Callable[[], object]) -> Findings:
    """``found`` on text alone, without claims about what images or sound may come to by another way.

    The language model, whose configuration is ``text``, and its output embeddings run the same code for them as for
    text. A part beside it may take another branch for text, and so may one inside that holds parts which ``forward``,
    on text, does not call.
    """
    called = _called(list(module.modules()), forward)
    parts = dict(module.named_modules(remove_duplicate=False))
    own = [path for path, part in parts.items() if type(getattr(part, "config", None)) is type(text)]
    head = getattr(module, "get_output_embeddings", lambda: None)()
    heads = {path for path, part in parts.items() if part is head}

    def passed_by(slots: Iterable[str]) -> bool:
        owners = {path.rpartition(".")[0] for path in slots} - heads
        if not all(_inside(owner, own) for owner in owners):
            return True
        return any(_inside(path, own) and _branches(parts[path], called) for path in _around(owners))

    reason = "what images or sound become is not traced, and may come to it by another way than text does"
    lost = [group for group in found.groups if passed_by(slot.path for slot in (*group.sources, *group.targets))]
    found = _unscaled(found, lost, [reason] * len(lost))
    slots = [(*space.writers, *(reader for read in space.reads for reader in read.readers)) for space in found.spaces]
    return _without(found, [reason if passed_by(slot.path for slot in members) else None for members in slots])


def _inside(path: str, parts: Iterable[str]) -> bool:
    return any(part in ("", path) or path.startswith(f"{part}.") for part in parts)


def _around(paths: Iterable[str]) -> set[str]:
    """Those modules among ``paths`` and around them that lie in the innermost one that holds them all, and itself."""
    steps = [path.split(".") for path in paths]
    shared = len(list(itertools.takewhile(lambda names: len(set(names)) == 1, zip(*steps, strict=False))))
    return {".".join(names[:count]) for names in steps for count in range(shared, len(names) + 1)}


def _branches(part: nn.Module, called: Set[int]) -> bool:
    """Whether a module holds parameters in a part that it does not call."""
    for child in part.children():
        if isinstance(child, _HELD) or id(child) in called:
            continue
        reached = any(id(inner) in called for inner in child.modules())  # a list, whose entries are called
        if _branches(child, called) if reached else any(True for _ in child.parameters()):
            return True
    return False


def _unscaled(found: Findings, lost: Sequence[SmoothingGroup], reasons: Sequence[str | None]) -> Findings:
    """``found`` without some of its groups, each with a reason, which is said of all their targets."""
    blocked = tuple(
        Blocked(path=path, what="smoothing", reason=str(reason), operator=group.kind.value, at=path)
        for group, reason in zip(lost, reasons, strict=True)
        for path in dict.fromkeys(slot.path.rpartition(".")[0] for slot in group.targets)
    )
    kept = tuple(group for group in found.groups if group not in lost)
    return replace(found, groups=kept, blocked=(*found.blocked, *blocked))


def _without(found: Findings, reasons: Sequence[str | None]) -> Findings:
    """``found`` without the spaces that have a reason, which is said where their first writer is."""
    blocked = tuple(
        Blocked(path=path, what="rotation", reason=reason, operator=space.kind, at=path)
        for space, reason in zip(found.spaces, reasons, strict=True)
        if reason is not None
        for path in [space.writers[0].path.rpartition(".")[0]]
    )
    kept = tuple(space for space, reason in zip(found.spaces, reasons, strict=True) if reason is None)
    return replace(found, spaces=kept, blocked=(*found.blocked, *blocked))


def unreached_parts(module: nn.Module, paths: Sequence[str], forward: Callable[[], object]) -> dict[str, Widths]:
    """Those of ``paths`` with matrices of which ``forward`` calls no owner, with the widths of these matrices.

    ``forward`` runs the module on the inputs that it is analysed on. A part that runs, and of which nothing reaches the
    logits, never does; one that does not run may, for other inputs: an adapter, cross-attention, a head for images.
    Left out is what no code of the model names but where it is made, and what reads pixels or sound outside of the
    forward: it makes token ids of them.
    """
    methods = _methods(module)
    named, forwards = _looked_up(methods, methods), _looked_up(methods, ("forward",))
    called = _called([part for path in paths for part in module.get_submodule(path).modules()], forward)
    found = {}
    for path in paths:
        part, names = module.get_submodule(path), [name for name in path.split(".") if not name.isdecimal()]
        own = names[-1] if names else path
        coded = getattr(part, "main_input_name", None) in (*IMAGES, *SOUNDS) and own not in forwards
        matrices = list(_uncalled(part, called)) if own in named and not coded else []
        if matrices:
            read = frozenset(size for holder, matrix in matrices for size in _read_along(holder, matrix))
            found[path] = Widths(frozenset(size for _, matrix in matrices for size in matrix.shape), read)
    return found


def _read_along(holder: nn.Module, matrix: Tensor) -> tuple[int, ...]:
    """Sizes along which a matrix may be multiplied with a vector: none of a table of tokens."""
    if isinstance(holder, nn.Embedding):
        return ()
    taken = isinstance(holder, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return (matrix.shape[1],) if taken else tuple(matrix.shape)


def _called(parts: Iterable[nn.Module], forward: Callable[[], object]) -> set[int]:
    """Which of ``parts`` are called by ``forward``, by their identity."""
    called = set[int]()
    hooks = [part.register_forward_pre_hook(lambda part, *_: called.add(id(part))) for part in parts]
    try:
        with contextlib.suppress(Exception):  # the model's own code: what it has not called by then is not reached
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _uncalled(part: nn.Module, called: set[int]) -> Iterator[tuple[nn.Module, Tensor]]:
    """The matrices that parts own which are not called, nor used by the part that is and holds them, behind their
    owners.
    """
    if id(part) not in called:
        yield from ((part, parameter) for parameter in part.parameters(recurse=False) if parameter.dim() > 1)
    for child in part.children():
        held = isinstance(child, _HELD) and id(part) in called
        yield from _uncalled(child, called | {id(child)} if held else called)


_HELD = (nn.ParameterList, nn.ParameterDict, nn.modules.linear.NonDynamicallyQuantizableLinear)
"""What is never called: whoever holds it uses its tensors. The last one is the projection of nn.MultiheadAttention."""


def _methods(module: nn.Module) -> dict[str, list[CodeType]]:
    """The code of the methods of a model's classes by their names, but for those that make them."""
    found: dict[str, list[CodeType]] = {}
    kinds = {kind for part in module.modules() for kind in type(part).__mro__ if issubclass(kind, nn.Module)}
    for kind in kinds - {nn.Module}:
        for name, value in vars(kind).items():
            function = inspect.unwrap(getattr(value, "fget", None) or value)
            if isinstance(function, FunctionType) and not name.startswith(("__init__", "_init_weights")):
                found.setdefault(name, []).append(function.__code__)
    return found


def _looked_up(methods: Mapping[str, Sequence[CodeType]], names: Iterable[str]) -> set[str]:
    """What methods of some names look up, and those that they call."""
    found, left = set[str](), list(names)
    while left:
        new = {name for code in methods.get(left.pop(), ()) for name in _names_of(code)} - found
        found |= new
        left += new
    return found


def _names_of(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_of(constant)


def _names(name: str, captured: Captured) -> tuple[str, ...]:
    return next((names for names in captured.aliases if name in names), (name,))


def _outermost(module: nn.Module, path: str, used: set[str]) -> Iterator[str]:
    for name, child in module.named_children():
        inner = f"{path}{name}"
        matrices = [f"{inner}.{key}" for key, p in child.named_parameters(remove_duplicate=False) if p.dim() > 1]
        if matrices and not used.intersection(matrices):
            yield inner
        elif matrices:
            yield from _outermost(child, f"{inner}.", used)

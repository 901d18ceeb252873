"""The certificate: no config is written that was not proved by the code that will apply it.

The same architecture is built small, with random norm weights, biases and routers, and analysed in the same way. Its
findings must be those of the full-size model, sizes apart. Then each group and each space is applied alone, and all of
them together, by the real executor, with random scales and rotations, and the logits are compared.

Right configs land below 1e-6 relative and wrong ones above 1e-2, so that 1e-5 separates them.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.analyzer.analysis import analyse
from autoquant.analyzer.analyze import Analyzed, build_config, captured_from, stacks_length
from autoquant.analyzer.layers import find_stacks, whole
from autoquant.analyzer.templates import fold, name_across_layers
from autoquant.capture.routes import check_against_eager
from autoquant.config.format import Blocked, Certificate, CertificateRow, Config, RotationMethod, Slot, edited
from autoquant.config.layers import LAYER
from autoquant.errors import AutoQuantError
from autoquant.executor.apply import apply_, check_finite
from autoquant.executor.online import check_installable
from autoquant.executor.plan import Plan, make_plan
from autoquant.executor.resolve import resolve
from autoquant.executor.scales import random_scales
from autoquant.library_patches import pytree
from autoquant.models.reduce import float64_throughout, grouped_experts, runs_in_float64, small, widened
from autoquant.models.source import LoadedModel, ModelSource
from autoquant.models.structure import ModelStructure, structure_of
from autoquant.threads import one_thread

TOLERANCE = 1e-5


TOLERANCES = {torch.float64: TOLERANCE, torch.float32: 1e-4}
"""Per dtype of the model that is compared: rounding alone changes float32 logits by 1e-6 and more."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One claim, applied alone (or all of them): the relative change of the logits."""

    name: str
    kind: str
    change: float

    def holds(self, tolerance: float = TOLERANCE) -> bool:
        """Whether the logits stayed the same; a NaN did not."""
        return self.change <= tolerance


@one_thread()
def certify(
    analyzed: Analyzed, source: ModelSource, *, seed: int = 0, progress: Callable[[str], None] = lambda step: None
) -> Config:
    """The config with its certificate; online rotations that the executor cannot place are listed as blocked instead.

    Raises AutoQuantError, naming the group, where a claim changes the logits by more than ``TOLERANCE``, where the
    small model allows other groups than the large one, or where its graph does not compute what the model does.
    """
    loaded, config = small_claims(analyzed, source, seed, progress)
    config, refused = placeable(loaded.module, config)
    trials = prove(loaded, config, seed=seed, progress=progress)
    for trial in trials:
        if not trial.holds():
            raise AutoQuantError(
                f"{source.name}: '{trial.name}' ({trial.kind}) changes the logits of the small model by "
                f"{trial.change:.2g}, more than {TOLERANCE:g}: it is not proved, so nothing is written"
            )
    return _with_certificate(analyzed.config, refused, trials, dtype_of(loaded.module), seed)


def small_claims(
    analyzed: Analyzed, source: ModelSource, seed: int, progress: Callable[[str], None]
) -> tuple[LoadedModel, Config]:
    """A small random model and its own config, which claims what the full-size one does. Raises AutoQuantError.

    Where one layer of every kind is too few, two are taken: layers that share parameters, or that all read one tensor
    from outside, make a claim across them, which one of them alone does not show.
    """
    progress("building the small model")
    try:
        return _same_claims(analyzed, source, small(source, seed))
    except AutoQuantError as error:
        progress("building a deeper small model")
        try:
            return _same_claims(analyzed, source, small(source, seed, each=2))
        except AutoQuantError:
            raise error from None


def _same_claims(analyzed: Analyzed, source: ModelSource, loaded: LoadedModel) -> tuple[LoadedModel, Config]:
    config = small_config(source, loaded)
    held = [name for name, _ in loaded.module.named_parameters(remove_duplicate=False)]
    _check_same_claims(analyzed.config, config, held)
    return widened(loaded), config


def prove(
    loaded: LoadedModel,
    config: Config,
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda step: None,
) -> tuple[Trial, ...]:
    """Apply each claim alone and then all together, with random scales and rotations, and compare the logits.

    In float64 the model's own casts to float32 are widened. Raises AutoQuantError where
    the config does not fit the model or a weight is not finite.
    """
    widen = float64_throughout() if runs_in_float64(loaded) else contextlib.nullcontext()
    chosen = list(claims(config))
    trials = []
    with widen:
        if chosen:  # all problems, before any work
            resolve(config, structure_of(loaded.module), only=[name for name, _ in chosen], seed=seed)
        reference = logits(loaded.module, loaded)
        if not bool(reference.isfinite().all()):
            for name, parameter in loaded.module.named_parameters():
                check_finite(name, parameter)
            raise AutoQuantError("the model's own logits hold a NaN or an infinity")
        for name, kind in chosen:
            progress(f"proving {name} ({kind})")
            trials.append(Trial(name, kind, changed(loaded, reference, keep(config, [(name, kind)]), seed)))
        if chosen:
            progress("proving all together")
            trials.append(Trial("all", "all", changed(loaded, reference, config, seed)))
    return tuple(trials)


def small_config(source: ModelSource, loaded: LoadedModel) -> Config:
    """Analyse a small model with real weights, every layer of it; its graph is checked against eager execution."""
    with grouped_experts(loaded):
        captured = captured_from(loaded, loaded.module)
    difference = check_against_eager(loaded.module, loaded.args, loaded.kwargs, captured)
    if not difference <= TOLERANCE:
        raise AutoQuantError(
            f"{source.name}: the captured graph differs from the model by {difference:.2g}; nothing read off it holds"
        )
    analysis = analyse(captured)
    maps = whole(find_stacks(loaded.module))
    findings = name_across_layers(fold(analysis.findings, maps), maps)
    return build_config(source, loaded.module, findings, analysis, captured, stacks_length(maps))


def claims(config: Config) -> Iterator[tuple[str, str]]:
    """(name, kind) of every group, space and online rotation; online ones go by their path."""
    for group in config.smoothing.groups:
        yield group.name, group.kind.value
    for space in config.rotation.spaces:
        yield space.name, space.kind
    for online in config.rotation.online:
        yield online.path, online.kind


def keep(config: Config, chosen: Collection[tuple[str, str]]) -> Config:
    """The config with the claims (name, kind) of ``chosen`` only. A group and a space may share a name."""
    smoothing, rotation = config.smoothing, config.rotation
    groups = tuple(group for group in smoothing.groups if (group.name, group.kind.value) in chosen)
    spaces = tuple(space for space in rotation.spaces if (space.name, space.kind) in chosen)
    online = tuple(online for online in rotation.online if (online.path, online.kind) in chosen)
    return edited(
        config, smoothing=edited(smoothing, groups=groups), rotation=edited(rotation, spaces=spaces, online=online)
    )


@torch.no_grad()
def changed(loaded: LoadedModel, reference: Tensor, config: Config, seed: int) -> float:
    """Relative change of the logits when all of ``config`` is applied to a copy: ``|new - old| / |old|``, Euclidean.

    The copy shares the parameters that stay as they are.
    """
    names = [name for name, _ in claims(config)]
    config = _drawn(config)
    inventory = structure_of(loaded.module)
    resolved = resolve(config, inventory, only=names, seed=seed)
    scales = random_scales(resolved, seed)
    plan = make_plan(resolved, inventory, loaded.module.get_parameter, scales)
    copied = _copy_sharing(loaded.module, inventory, plan)
    apply_(copied, config, only=names, scales=scales, seed=seed)
    difference = logits(copied, loaded) - reference
    return float(difference.norm() / reference.norm())


def _drawn(config: Config) -> Config:
    """The config with random rotations where they are to be learned: any proves the space."""
    rotation = config.rotation
    spaces = tuple(
        edited(space, method=RotationMethod.HADAMARD) if space.method is RotationMethod.LEARNED else space
        for space in rotation.spaces
    )
    method = RotationMethod.HADAMARD if rotation.method is RotationMethod.LEARNED else rotation.method
    changes = {"spaces": spaces, "method": method}
    return edited(config, rotation=edited(rotation, **changes))


def _copy_sharing(module: nn.Module, inventory: ModelStructure, plan: Plan) -> nn.Module:
    """A deep copy, but for the parameters that ``plan`` does not write."""
    written = {inventory.canonical[name] for name in plan.operations if name in inventory.canonical}
    kept = [
        parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if inventory.canonical[name] not in written
    ]
    return copy.deepcopy(module, {id(parameter): parameter for parameter in kept})


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of the first floating-point parameter."""
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())


@torch.no_grad()
def logits(module: nn.Module, loaded: LoadedModel) -> Tensor:
    """The first floating-point tensor that the model returns, on the loaded model's own inputs."""
    output: Any = module(*loaded.args, **loaded.kwargs)
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    if not tensors:
        raise AutoQuantError(f"{type(module).__name__} returns no tensor to compare")
    return tensors[0]


def placeable(module: nn.Module, config: Config) -> tuple[Config, dict[str, str]]:
    """Without the online rotations that the executor refuses, and why it does, by path."""
    inventory = structure_of(module)
    refused: dict[str, str] = {}
    for online in config.rotation.online:
        try:
            resolved = resolve(config, inventory, only=[online.path])
            check_installable(module, resolved.online)
            make_plan(resolved, inventory, module.get_parameter, None)
        except AutoQuantError as error:
            refused[online.path] = error.message
    return keep(config, [(name, kind) for name, kind in claims(config) if name not in refused]), refused


def _with_certificate(
    config: Config, refused: dict[str, str], trials: Sequence[Trial], dtype: torch.dtype, seed: int
) -> Config:
    rows = []
    for kind in dict.fromkeys(trial.kind for trial in trials):
        same = [trial for trial in trials if trial.kind == kind]
        worst = max(same, key=lambda trial: trial.change)
        name = worst.name if kind != "all" else None
        rows.append(CertificateRow(kind=kind, count=len(same), worst=float(f"{worst.change:.1e}"), worst_name=name))
    certificate = Certificate(
        proved=True, tolerance=TOLERANCE, dtype=str(dtype).removeprefix("torch."), seed=seed, rows=tuple(rows)
    )
    kept = tuple(online for online in config.rotation.online if online.path not in refused)
    blocked = tuple(
        Blocked(path=o.path, layers=o.layers, what="rotation", reason=refused[o.path], operator=o.kind, at=o.path)
        for o in config.rotation.online
        if o.path in refused
    )
    return edited(
        config,
        certificate=certificate,
        rotation=edited(config.rotation, online=kept),
        blocked=(*config.blocked, *blocked),
    )


def _check_same_claims(large: Config, reduced: Config, held: Collection[str] = ()) -> None:
    """The small model must allow what the large one does: the same axes of the same parameters to the same powers.

    ``held``: the small model's parameters. Of parts that are numbered within a layer (adapters, experts) it has the
    first ones only: what is said of a further one has to be what is said of one of these.
    """
    both = {_plain(name) for name, _ in claims(large)} & {_plain(name) for name, _ in claims(reduced)}
    mine, theirs = _shape_of_claims(large, both), _shape_of_claims(reduced, both)
    proved = _shape_of_claims(reduced, ())
    apart = [claim for claim in claims(large) if _plain(claim[0]) not in both]
    shown = _shape_of_claims(keep(large, [claim for claim in apart if not held or _shows(large, claim, held)]), both)
    for name in dict.fromkeys(chain(mine, theirs)):
        further = name not in theirs and name not in shown and set(mine[name]) <= set(proved.get(name, ()))
        if mine.get(name) != theirs.get(name) and not further:
            raise AutoQuantError(
                f"{large.provenance.model}: '{name}' is found in the {'full-size' if name in mine else 'small'} model "
                f"{'with other members than' if name in mine and name in theirs else 'but not'} in the "
                f"{'small' if name in mine else 'full-size'} one: it cannot be proved (--no-verify skips the proof)"
            )


def _shows(large: Config, claim: tuple[str, str], held: Collection[str]) -> bool:
    """Whether a claim of ``large`` starts at one of a small model's parameters ``held``, in whatever layer."""
    alone = keep(large, [claim])
    paths = [group.sources[0].path for group in alone.smoothing.groups]
    paths += [space.writers[0].path for space in alone.rotation.spaces]
    pattern = "|".join(re.escape(path).replace(re.escape(LAYER), r"\d+") for path in paths)
    return any(re.fullmatch(pattern, name) for name in held)


def _plain(name: str) -> str:
    return name.partition(" @")[0]


def _shape_of_claims(config: Config, both: Collection[str]) -> dict[str, list[object]]:
    """Each claim with its members but without sizes and layer numbers; kinds of layers that share a name are one entry
    each. A name that is not one of ``both`` models' is taken without the numbers in it.
    """

    def key(name: str, members: Sequence[tuple[object, ...]]) -> str:
        return _plain(name) if _plain(name) in both else _name(_plain(name), members)

    found: dict[str, list[object]] = {}
    for group in config.smoothing.groups:
        sources, targets = _slots(group.sources), _slots(group.targets)
        members: object = (group.kind, _any_layer(sources), _any_layer(targets))
        found.setdefault(key(group.name, (*sources, *targets)), []).append(members)
    for space in config.rotation.spaces:
        reads = sorted({(_any_layer_in(repr(read.norm)), _any_layer(_slots(read.readers))) for read in space.reads})
        writers = _slots(space.writers)
        slots = (*writers, *(slot for read in space.reads for slot in _slots(read.readers)))
        found.setdefault(key(space.name, slots), []).append(
            (space.kind, space.centre, frozenset(_any_layer(writers)), tuple(reads))
        )
    return {name: sorted(set(members), key=repr) for name, members in found.items()}


def _name(name: str, members: Sequence[tuple[object, ...]]) -> str:
    """A claim's name without the numbers of layers, which are others in a model of other depth (its last, or those
    that share what another made); what is said of several layers is told apart from what is said of one.
    """
    sources, arrow, targets = name.partition(" -> ")
    without = [re.sub(r"(?<![\w-])\d+(?!\w)", LAYER, part) for part in (*sources.split(", "), *targets.split(", "))]
    count = len(sources.split(", "))
    short = ", ".join(dict.fromkeys(without[:count])) + arrow + ", ".join(dict.fromkeys(without[count:]))
    several = LAYER in short and len(_any_layer(members)) < len(set(members))
    return f"{short} (across layers)" if several and short != name else short


def _any_layer(slots: Iterable[tuple[object, ...]]) -> tuple[tuple[object, ...], ...]:
    """Slots that are written out for several layers, each once: the small model has fewer layers."""
    return tuple(dict.fromkeys((_any_layer_in(str(path)), *rest) for path, *rest in slots))


def _any_layer_in(text: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", LAYER, text)


def _slots(slots: Iterable[Slot]) -> tuple[tuple[object, ...], ...]:
    return tuple(dict.fromkeys((s.path, s.dim, s.stack is None, s.power, s.offset, s.index is None) for s in slots))

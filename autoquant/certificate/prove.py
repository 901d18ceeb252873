"""Each claim applied by the real executor, alone and with all others, with random scales and rotations.

All that is claimed is applied at once and every run is compared: with independent random scales and rotations two
wrong claims make up for each other with probability 0. A rotation takes the gains that some smoothing groups scale,
so the groups are also applied without the rotations. Only where that fails is each claim tried on every run alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from autoquant.capture.copies import copied
from autoquant.certificate.by_hand import by_hand, tried
from autoquant.certificate.claims import Claim, claims, keep, layers_of, with_layers
from autoquant.certificate.experts import Unit, choices_of, reached, units_of, unreached
from autoquant.certificate.runs import Reference, departure, further_runs, given, refer, stopped
from autoquant.config.format import Config, Coverage, RotationMethod, edited
from autoquant.errors import AutoQuantError
from autoquant.executor.apply import apply_, check_finite
from autoquant.executor.online import check_installable
from autoquant.executor.plan import Plan, make_plan
from autoquant.executor.resolve import resolve
from autoquant.executor.scales import random_scales
from autoquant.library_patches import gradients_throughout
from autoquant.models.reduce import float64_throughout, runs_in_float64
from autoquant.models.source import LoadedModel
from autoquant.models.structure import ModelStructure, structure_of

TOLERANCE = 1e-5

TOLERANCES = {torch.float64: TOLERANCE, torch.float32: 1e-4}
"""Per dtype of the model that is compared: rounding alone changes float32 logits by 1e-6 and more."""

_MOST_MEASURED = 400_000_000
"""Parameters of a model whose experts are counted by gradients, which take as much memory again."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Trial:
    """One claim, applied alone (or all of them): the largest relative change of an output in any run.

    ``unreached``: the weight of an expert that the claim is about and that no run reached; empty where there is none.
    ``stops``: what the model's own code says, where it does not run any more with the claim; else empty.
    """

    name: str
    kind: str
    change: float
    unreached: str = ""
    stops: str = ""

    def holds(self, tolerance: float = TOLERANCE) -> bool:
        """True if the outputs stayed the same, of which all had a part in one; a NaN did not."""
        return self.change <= tolerance and not self.unreached

    def why(self) -> str:
        """What speaks against a claim that does not hold."""
        if self.unreached:
            return f"is about {self.unreached}, which no run reached"
        if self.stops:
            return f"stops the model: {self.stops}"
        return f"changes the logits by {self.change:.2g}"


@dataclass(frozen=True, slots=True)
class Proof:
    """Every trial, those that failed included, and what the runs reached.

    ``partly``: of a claim that fails and may be split, the layers in which it holds by itself, if it does in some.
    """

    trials: tuple[Trial, ...]
    tolerance: float
    coverage: Coverage
    partly: Mapping[Claim, tuple[int, ...]] = field(default_factory=dict)

    def failed(self) -> tuple[Trial, ...]:
        """The claims that changed an output."""
        return tuple(trial for trial in self.trials if not trial.holds(self.tolerance))


DENSE = 512
"""Size up to which a rotation is a dense random one in a proof."""


@dataclass(frozen=True, slots=True)
class _Bench:
    """What claims are tried on."""

    loaded: LoadedModel
    reference: Reference
    seed: int
    tolerance: float

    def change(self, config: Config, runs: int | None = None) -> float:
        return changed(self.loaded, self.reference, config, self.seed, runs)

    def holds(self, config: Config) -> bool:
        return self.change(config) <= self.tolerance

    def stops(self, config: Config, claim: Claim, change: float) -> str:
        """What stops the model with a claim that changes it endlessly, if anything does."""
        if claim == ("all", "all") or change != float("inf"):
            return ""
        return stopped(applied(self.loaded, keep(config, [claim]), self.seed), self.reference)


def prove(
    loaded: LoadedModel,
    config: Config,
    *,
    seed: int = 0,
    split: Callable[[Claim], bool] = lambda claim: False,
    progress: Progress = lambda step: None,
) -> Proof:
    """Apply each claim alone and then all that hold together, and compare the outputs of every run.

    ``split``: whether a claim that fails is tried layer by layer. In float64 the model's own casts to float32 are
    widened. Raises AutoQuantError where the config does not fit the model, the model's own outputs are not finite, or a
    weight is not.
    """
    widen = float64_throughout() if runs_in_float64(loaded) else contextlib.nullcontext()
    chosen = list(claims(config))
    tolerance = TOLERANCES[dtype_of(loaded.module)]
    with widen:
        if chosen:  # all problems, before any work
            resolve(config, structure_of(loaded.module), only=[name for name, _ in chosen], seed=seed)
        reference = refer(loaded, further_runs(loaded, choices_of(config), seed) if chosen else ())
        if not all(bool(tensor.isfinite().all()) for tensor in reference.outputs[0]):
            for name, parameter in loaded.module.named_parameters():
                check_finite(name, parameter)
            raise AutoQuantError("the model's own logits hold a NaN or an infinity")
        again = departure(loaded.module, reference, 1) if chosen else 0.0
        if not again <= tolerance:
            raise AutoQuantError(
                f"{type(loaded.module).__name__} returns something else when it is called again with the same inputs "
                f"(changed by {again:.2g}): what it returns hangs on more than these and what it holds"
            )
        bench = _Bench(loaded, reference, seed, tolerance)
        trials = {}
        for claim in chosen:
            progress(f"proving {claim[0]} ({claim[1]})")
            trials[claim] = bench.change(keep(config, [claim]), 1)
        if chosen:
            progress("proving all together")
            trials |= _together(bench, config, trials, progress)
        units = units_of(config, loaded.module)
        seen = _reached(loaded, units, reference)
        missed = unreached(config, units, seen)
        for claim in sorted(by_hand(config)):
            progress(f"proving {claim[0]} ({claim[1]}), which is by hand, at other scales")
            hard = tried(loaded.module, reference, config, claim, seed, tolerance, _copy_sharing)
            trials[claim] = _worse(trials[claim], hard.change)
            missed = missed | ({claim: hard.idle} if hard.idle else {})
        found = tuple(
            Trial(*claim, change, missed.get(claim, ""), bench.stops(config, claim, change))
            for claim, change in trials.items()
        )
        failed = [(trial.name, trial.kind) for trial in found if not trial.holds(tolerance)]
        partly = {claim: _layers_that_hold(bench, config, claim, units, seen) for claim in failed if split(claim)}
    return Proof(found, tolerance, _coverage(reference, units, seen), {c: held for c, held in partly.items() if held})


def _worse(one: float, other: float) -> float:
    """The larger change; a NaN is the largest."""
    return one if one >= other or one != one else other


def _layers_that_hold(
    bench: _Bench, config: Config, claim: Claim, units: Collection[Unit], seen: Collection[Unit] | None
) -> tuple[int, ...]:
    """The layers in which a claim holds by itself in every run, if those are some of its layers and not all."""
    layers, found = layers_of(config, claim), []
    for layer in layers if len(layers) > 1 else ():
        one = keep(with_layers(config, {claim: (layer,)}), [claim])
        if claim not in unreached(one, units, seen) and bench.holds(one):
            found.append(layer)
    return tuple(found) if len(found) < len(layers) else ()


def _together(bench: _Bench, config: Config, alone: dict[Claim, float], progress: Progress) -> dict[Claim, float]:
    """The trial of all claims at once, and those of claims that fail in some run though not in the given one."""
    found: dict[Claim, float] = {}
    holding = [claim for claim, change in alone.items() if change <= bench.tolerance]
    change = _all_at_once(bench, config, holding)
    if not change <= bench.tolerance:
        for claim in holding:
            progress(f"proving {claim[0]} ({claim[1]}) in every run")
            one = bench.change(keep(config, [claim]))
            if not one <= bench.tolerance:
                found[claim] = one
        holding = [claim for claim in holding if claim not in found]
        change = _all_at_once(bench, config, holding)
    if not change <= bench.tolerance:  # each holds alone: one after the other, as long as it goes well
        together: list[Claim] = []
        for claim in holding:
            one = _all_at_once(bench, config, [*together, claim])
            if one <= bench.tolerance:
                together.append(claim)
            else:
                found[claim] = one
        change = _all_at_once(bench, config, together)
    return {**found, ("all", "all"): change}


def _all_at_once(bench: _Bench, config: Config, chosen: Sequence[Claim]) -> float:
    """The largest change with all of ``chosen``, and with its smoothing groups alone where there are rotations too."""
    everything = keep(config, chosen)
    if not chosen:
        return 0.0
    change = bench.change(everything)
    groups = [(group.name, group.kind.value) for group in everything.smoothing.groups]
    if groups and len(groups) < len(chosen) and change <= bench.tolerance:
        change = max(change, bench.change(keep(config, groups)))
    return change


@torch.no_grad()
def changed(loaded: LoadedModel, reference: Reference, config: Config, seed: int, runs: int | None = None) -> float:
    """The :func:`departure` of a copy to which all of ``config`` is applied, in the first ``runs`` runs."""
    return departure(applied(loaded, config, seed), reference, runs)


@torch.no_grad()
def applied(loaded: LoadedModel, config: Config, seed: int) -> nn.Module:
    """A copy to which all of ``config`` is applied. It shares the parameters that stay as they are."""
    names = [name for name, _ in claims(config)]
    config = _with_random_rotations(config)
    inventory = structure_of(loaded.module)
    resolved = resolve(config, inventory, only=names, seed=seed)
    scales = random_scales(resolved, seed)
    plan = make_plan(resolved, inventory, loaded.module.get_parameter, scales)
    copied = _copy_sharing(loaded.module, inventory, plan)
    apply_(copied, config, only=names, scales=scales, seed=seed)
    return copied


def _with_random_rotations(config: Config) -> Config:
    """The config with rotations drawn among all orthogonal matrices, as far as they can be afforded.

    Any of them shows what a space is, and a Hadamard matrix may show nothing: of a size that has none, as 5, it is
    diagonal, and passes what is applied to each element.
    """
    spaces = tuple(
        edited(space, method=RotationMethod.ORTHOGONAL if space.size <= DENSE else RotationMethod.HADAMARD)
        for space in config.rotation.spaces
    )
    return edited(config, rotation=edited(config.rotation, spaces=spaces, method=RotationMethod.HADAMARD))


def _copy_sharing(module: nn.Module, inventory: ModelStructure, plan: Plan) -> nn.Module:
    """A deep copy, but for the parameters that ``plan`` does not write."""
    written = {inventory.canonical[name] for name in plan.operations if name in inventory.canonical}
    kept = [
        parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if inventory.canonical[name] not in written
    ]
    return copied(module, {id(parameter): parameter for parameter in kept})


def _reached(loaded: LoadedModel, units: Collection[Unit], reference: Reference) -> set[Unit] | None:
    """The weights of experts that had a part in an output of some run; None where that is not measured."""
    size = sum(parameter.numel() for parameter in loaded.module.parameters())
    if not units or size > _MOST_MEASURED:
        return None
    seen: set[Unit] = set()
    # A kernel may have no derivative.
    with contextlib.suppress(RuntimeError), torch.enable_grad(), gradients_throughout():
        for run in reference.runs:
            seen |= reached(run(loaded.module), loaded.module, units)
        return seen
    return None


def _coverage(reference: Reference, units: Collection[Unit], seen: Collection[Unit] | None) -> Coverage:
    """What the runs were, and how many experts of all that the config names had a part in them."""
    names = [run.name for run in reference.runs]
    return Coverage(
        lengths=tuple(sorted({run.length for run in reference.runs if run.length})),
        padding="left padding" in names,
        offset="offset" in names,
        decode="decode" in names,
        experts=len(units),
        experts_reached=None if seen is None else len(seen),
    )


def logits(module: nn.Module, loaded: LoadedModel) -> Tensor:
    """The first floating-point tensor that the model returns, on the loaded model's own inputs."""
    with torch.no_grad():
        return given(loaded)(module)[0]


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of the first floating-point parameter."""
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())


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


def fitting(module: nn.Module, config: Config) -> tuple[Config, dict[Claim, str]]:
    """Without the groups and spaces that do not fit the module, or not beside the ones before, and why they do not."""
    inventory = structure_of(module)

    def problem(chosen: Collection[Claim]) -> str | None:
        part = keep(config, chosen)
        try:
            resolve(part, inventory, only=[name for name, _ in claims(part)])
        except AutoQuantError as error:
            return error.details[0] if error.details else error.message
        return None

    chosen = list(claims(config))
    if not chosen or problem(chosen) is None:
        return config, {}
    refused = {claim: why for claim in chosen if (why := problem([claim])) is not None}
    held = [claim for claim in chosen if claim not in refused]
    if held and problem(held) is not None:
        beside: list[Claim] = []
        for claim in held:
            why = problem([*beside, claim])
            if why is None:
                beside.append(claim)
            else:
                refused[claim] = why
        held = beside
    return keep(config, held), refused

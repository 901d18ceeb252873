"""The certificate: no config is written that was not proved by the code that will apply it.

The same architecture is built small, with random norm weights, biases, routers and buffers, and analysed in the same
way. The claims of the full-size model are carried over to it, layer sets included, and applied by the real executor
with random scales and rotations; the outputs of several runs are compared.

Right configs land below 1e-6 relative and wrong ones above 1e-2, so that 1e-5 separates them. A claim that fails is
taken out and listed as blocked; the rest is proved again and written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from autoquant.analyzer.analysis import analyse
from autoquant.analyzer.analyze import Analyzed, build_config, captured_from, captured_with, stacks_length
from autoquant.analyzer.layers import find_stacks, whole
from autoquant.analyzer.templates import fold, name_across_layers
from autoquant.capture.routes import Captured, check_against_eager
from autoquant.certificate.by_hand import BY_HAND, apart, beside, by_hand
from autoquant.certificate.claims import REFUSED, Claim, claims, digest_of, keep, layers_of, plain, with_layers
from autoquant.certificate.depth import DEEP, hangs_on_depth
from autoquant.certificate.match import Depth, match
from autoquant.certificate.prove import TOLERANCE, Proof, Trial, dtype_of, fitting, placeable, prove
from autoquant.certificate.runs import with_short_windows
from autoquant.certificate.state import randomise_buffers_
from autoquant.config.format import Blocked, Certificate, CertificateRow, Config, edited
from autoquant.config.layers import layer_set
from autoquant.errors import AutoQuantError
from autoquant.models.reduce import (
    float64_throughout,
    forward_in_float64_,
    grouped_experts,
    runs_in_float64,
    small,
    widened,
)
from autoquant.models.settings import settings_digest
from autoquant.models.source import LoadedModel, ModelSource, layer_count, sub_configs
from autoquant.threads import one_thread


@dataclass(frozen=True, slots=True)
class SmallClaims:
    """A small random model, the claims of a full-size one carried over to it, and those that could not be."""

    loaded: LoadedModel
    config: Config
    refused: Mapping[Claim, str]


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why a claim is taken out; ``layers``: of these of its layers alone, which are those of the full-size model too,
    None: of all.
    """

    why: str
    layers: frozenset[int] | None = None


@one_thread()
def certify(
    analyzed: Analyzed, source: ModelSource, *, seed: int = 0, progress: Callable[[str], None] = lambda step: None
) -> Config:
    """The config of all claims that hold, with its certificate. The others are listed as blocked (:data:`REFUSED`), as
    are online rotations that the executor cannot place. A claim that fails in some of its layers holds in the others,
    where the small model is as deep as the full-size one.

    Raises AutoQuantError where no claim holds, and where the small model cannot be built or captured.
    """
    carried = small_claims(analyzed, source, seed, progress)
    module = carried.loaded.module
    small, unfit = fitting(module, carried.config)
    small, unplaceable = placeable(module, small)
    separable = _separable(
        small, analyzed.config, [name for name, _ in module.named_parameters(remove_duplicate=False)]
    )
    proof = prove(carried.loaded, small, seed=seed, split=separable.__contains__, progress=progress)
    refusals = {claim: _Refusal(why) for claim, why in {**carried.refused, **unfit}.items()}
    for trial in proof.failed():
        claim = (trial.name, trial.kind)
        mine = frozenset(layers_of(small, claim)) - {*proof.partly.get(claim, ())}
        refusals[claim] = _Refusal(_too_much(trial), mine if claim in separable else None)
    if proof.partly:
        progress("proving the rest again")
        again = with_layers(small, proof.partly)
        failed = {(t.name, t.kind) for t in proof.failed()} - {*proof.partly}
        proof = prove(carried.loaded, keep(again, [*({*claims(again)} - failed)]), seed=seed, progress=progress)
        refusals |= {(t.name, t.kind): _Refusal(_too_much(t)) for t in proof.failed()}
    gone: dict[Claim, list[_Refusal]] = {}
    for (name, kind), refusal in refusals.items():
        gone.setdefault((plain(name), kind), []).append(refusal)
    config = analyzed.config
    left = {claim: _left(config, claim, gone.get((plain(claim[0]), claim[1]), ())) for claim in claims(config)}
    held = [claim for claim, layers in left.items() if layers is None or layers]
    if gone and not any(name not in unplaceable for name, _ in held):
        (name, kind), refusal = next(iter(refusals.items()))
        said = _said(refusal.why, name)
        raise AutoQuantError(f"{source.name}: '{name}' ({kind}) {said}; no claim holds, nothing is written")
    blocked = [*_unplaceable(config, unplaceable), *_refused(config, left, gone)]
    kept = keep(config, [claim for claim in held if claim[0] not in unplaceable])
    kept = with_layers(kept, {claim: layers for claim, layers in left.items() if layers})
    kept = edited(kept, blocked=(*config.blocked, *blocked))
    return edited(kept, certificate=certificate_of(proof, dtype_of(module), seed, kept, source))


def _separable(small: Config, large: Config, held: Collection[str]) -> frozenset[Claim]:
    """The claims of ``small`` that are about each of several layers, and those the layers of the full-size model."""
    depth = Depth(large, held)
    paths = {(group.name, group.kind.value): group.sources[0].path for group in small.smoothing.groups}
    paths |= {(space.name, space.kind): space.writers[0].path for space in small.rotation.spaces}
    paths |= {(online.path, online.kind): online.path for online in small.rotation.online}
    once = {claim for claim, count in Counter(claims(small)).items() if count == 1}
    return frozenset(claim for claim in once if layers_of(small, claim) and depth.same(paths[claim]))


def _left(config: Config, claim: Claim, refusals: Sequence[_Refusal]) -> tuple[int, ...] | None:
    """The layers in which a claim of the full-size model is left, None where nothing is taken of it."""
    layers = layers_of(config, claim)
    gone: set[int] = set()
    for refusal in refusals:
        gone |= set(layers) if refusal.layers is None else refusal.layers
        if not layers:
            return ()
    return tuple(layer for layer in layers if layer not in gone) if gone.intersection(layers) else None


def _too_much(trial: Trial) -> str:
    if trial.unreached or trial.stops:
        return trial.why()
    return f"changes the logits of the small model by {trial.change:.2g}, more than {TOLERANCE:g}"


def _said(why: str, name: str) -> str:
    return why.removeprefix(f"'{name}' ")


def small_claims(
    analyzed: Analyzed, source: ModelSource, seed: int, progress: Callable[[str], None], *, some: bool = False
) -> SmallClaims:
    """A small random model and the claims of the full-size one, carried over. Raises AutoQuantError.

    Its windows are shorter than its longest run. Where one layer of every kind is too few, two are taken: layers that
    share parameters, or that all read one tensor from outside, make a claim across them, which one of them alone does
    not show. Where what a layer does may hang on its number, there are eight. ``some``: the full-size config holds some
    of the analysis's claims only.
    """
    progress("building the small model")
    shorter = with_short_windows(source)
    first, failure = None, None
    for tried in dict.fromkeys((1, 2)):
        if tried > 1:
            progress("building a deeper small model")
        try:
            found = _carried(analyzed, (source, shorter), tried, seed, some)
        except AutoQuantError as error:
            failure = failure or error
            continue
        if not found.refused:
            return found
        first = found if first is None or len(found.refused) < len(first.refused) else first
        if source.config is None:
            break
    if first is None:
        assert failure is not None
        raise failure
    return first


def _carried(
    analyzed: Analyzed, sources: tuple[ModelSource, ModelSource], each: int, seed: int, some: bool
) -> SmallClaims:
    source, shorter = sources
    loaded = _small(source, shorter, seed, each)
    if source.config is not None and hangs_on_depth(loaded):
        loaded = _small(source, shorter, seed, max(each, DEEP))
    config, captured = _analysed(source, loaded)
    randomise_buffers_(loaded, captured, seed)
    held = [name for name, _ in loaded.module.named_parameters(remove_duplicate=False)]
    found, handmade = apart(analyzed.config)
    matched = match(found, config, held, aligned=_aligned(source, loaded), some=some)
    same = analyzed.config.provenance.fingerprint == config.provenance.fingerprint
    carried, refused = beside(matched.config, handmade, analyzed.config, held, same=same)
    return SmallClaims(widened(loaded), carried, {**matched.refused, **refused})


def _small(source: ModelSource, shorter: ModelSource, seed: int, each: int) -> LoadedModel:
    if shorter is not source:
        try:
            return small(shorter, seed, each=each)
        except AutoQuantError:  # a class may want its windows as long as they were
            pass
    return small(source, seed, each=each)


def _aligned(source: ModelSource, loaded: LoadedModel) -> bool:
    """True if layer i of the small model stands for layer i: not where the last ones share what earlier ones made."""
    if source.config is None:
        return True
    fields = [name for part in sub_configs(source.config).values() for name, v in vars(part).items() if v]
    shared = any(name.endswith("shared_layers") for name in fields)
    return not shared or layer_count(source.config) == layer_count(loaded.config)


def small_config(source: ModelSource, loaded: LoadedModel) -> Config:
    """Analyse a small model with real weights, every layer of it; its graph is checked against eager execution."""
    return _analysed(source, loaded)[0]


def _analysed(source: ModelSource, loaded: LoadedModel) -> tuple[Config, Captured]:
    with grouped_experts(loaded):
        loaded, captured = captured_with(loaded, loaded.module)
    difference = check_against_eager(loaded.module, loaded.args, loaded.kwargs, captured)
    if not difference <= TOLERANCE and runs_in_float64(loaded):
        # Code that is cut otherwise where it is traced rounds otherwise, where it casts to float32 inside.
        with float64_throughout():
            difference = check_against_eager(loaded.module, loaded.args, loaded.kwargs, captured)
        if not difference <= TOLERANCE:  # nor does what it computed in float32 of known inputs change any more
            with grouped_experts(loaded), forward_in_float64_(loaded.module):
                captured = captured_from(loaded, loaded.module)
            with float64_throughout():
                difference = check_against_eager(loaded.module, loaded.args, loaded.kwargs, captured)
    if not difference <= TOLERANCE:
        raise AutoQuantError(
            f"{source.name}: the captured graph differs from the model by {difference:.2g}; nothing read off it holds"
        )
    analysis = analyse(captured)
    maps = whole(find_stacks(loaded.module))
    findings = name_across_layers(fold(analysis.findings, maps), maps)
    config = build_config(source, loaded.module, findings, analysis, captured, stacks_length(maps))
    return config, captured


def certificate_of(proof: Proof, dtype: torch.dtype, seed: int, config: Config, source: ModelSource) -> Certificate:
    """What a ``proof`` on a small model of ``source`` shows of all that ``config`` claims."""
    failed = proof.failed()
    trials = [trial for trial in proof.trials if trial not in failed]
    return Certificate(
        proved=True,
        tolerance=TOLERANCE,
        dtype=str(dtype).removeprefix("torch."),
        seed=seed,
        rows=tuple(_rows(trials, by_hand(config))),
        coverage=proof.coverage,
        digest=digest_of(config),
        settings=None if source.config is None else settings_digest(source.config),
    )


def _rows(trials: Sequence[Trial], handmade: Collection[Claim]) -> list[CertificateRow]:
    rows = []
    kinds = {trial: BY_HAND if (trial.name, trial.kind) in handmade else trial.kind for trial in trials}
    for kind in dict.fromkeys(kinds.values()):
        same = [trial for trial in trials if kinds[trial] == kind]
        worst = max(same, key=lambda trial: trial.change)
        name = worst.name if kind != "all" else None
        rows.append(CertificateRow(kind=kind, count=len(same), worst=float(f"{worst.change:.1e}"), worst_name=name))
    return rows


def _unplaceable(config: Config, refused: Mapping[str, str]) -> list[Blocked]:
    return [
        Blocked(path=o.path, layers=o.layers, what="rotation", reason=refused[o.path], operator=o.kind, at=o.path)
        for o in config.rotation.online
        if o.path in refused
    ]


def _refused(
    config: Config, left: Mapping[Claim, tuple[int, ...] | None], gone: Mapping[Claim, Sequence[_Refusal]]
) -> Iterator[Blocked]:
    """An entry for what is not ``left`` of each claim of ``config``, at the first that reads it."""
    for group in config.smoothing.groups:
        path = group.targets[0].path.rpartition(".")[0]
        yield from _entry(config, (group.name, group.kind.value), path, group.layers, "smoothing", left, gone)
    for space in config.rotation.spaces:
        read = space.reads[0]
        path, layers = read.readers[0].path.rpartition(".")[0], read.layers or space.layers
        yield from _entry(config, (space.name, space.kind), path, layers, "rotation", left, gone)
    for online in config.rotation.online:
        yield from _entry(config, (online.path, online.kind), online.path, online.layers, "rotation", left, gone)


def _entry(
    config: Config,
    claim: Claim,
    path: str,
    layers: str | None,
    what: str,
    left: Mapping[Claim, tuple[int, ...] | None],
    gone: Mapping[Claim, Sequence[_Refusal]],
) -> Iterator[Blocked]:
    kept, (name, kind) = left[claim], claim
    if kept is None:
        return
    if kept:
        layers = layer_set(set(layers_of(config, claim)) - set(kept))
    why = gone[plain(name), kind][0].why
    reason = f"{REFUSED} ('{name}' {_said(why, name)}): please report"
    yield Blocked.model_validate(
        {"path": path, "layers": layers, "what": what, "reason": reason, "operator": kind, "at": path}
    )

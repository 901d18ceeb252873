"""The knobs of a config, set one after the other by what they do on held-out calibration text.

The text of the evaluation is never seen: a part of the calibration windows fits scales and weights, another part
judges. A knob is turned if the quantized model comes closer to the float model, in KL divergence per token, by more
than the standard error of the paired difference; of several settings of one knob the best is taken. Every knob that is
turned goes into the config with its evidence.

The order is that of the model's own pipeline, so that each knob is judged with those before it in place.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoquant.algorithms.prefix_search import find_prefix
from autoquant.algorithms.scale_search import choose_alphas
from autoquant.config.format import (
    Config,
    Decision,
    QuantizationOverride,
    RotationMethod,
    Rounding,
    Search,
    SmoothingGroup,
    SmoothingKind,
    SmoothingMethod,
    SmoothingOverride,
    StaticClip,
    Strategy,
    edited,
)
from autoquant.errors import AutoQuantError
from autoquant.evaluation.perplexity import Estimate, exp_estimate, ratio_estimate
from autoquant.models.structure import structure_of
from autoquant.pipeline.quantize import linear_groups, quantize_model_, rotate_, select
from autoquant.pipeline.select import EVERYTHING
from autoquant.pipeline.transform import prepare_
from autoquant.quantizer.prefix import prefixed
from autoquant.quantizer.strategies import plan_linears, scheme_of

UNIT = "KL divergence from float on held-out windows, nats per token"
Load = Callable[[], nn.Module]


@dataclass(frozen=True, slots=True)
class Task:
    """What is searched: ``load`` makes the float model anew; ``fit`` are token ids [1, S] each, ``held_out`` [B, S].

    ``per_token``: how many linears may get per-token scales; ``bos``: the token that each window starts with;
    ``offline``: nothing is rotated at inference.
    """

    load: Load
    strategy: Strategy
    fit: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    calibration: str
    seed: int = 0
    per_token: int = 0
    bos: int | None = None
    offline: bool = False
    means: frozenset[str] = frozenset()
    """Names of :data:`MEANS` to use."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A config with what it costs on the held-out windows. ``kl`` and ``excess`` (negative log-likelihood above
    float's) are sums per window, in nats; ``errors``: output error by weight, where linears were decided in sequence.
    """

    config: Config
    kl: tuple[float, ...]
    excess: tuple[float, ...]
    counts: tuple[int, ...]
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def divergence(self) -> float:
        """KL divergence per token."""
        return ratio_estimate(self.kl, self.counts).mean

    @property
    def perplexity_ratio(self) -> Estimate:
        """Perplexity divided by float's, paired over windows."""
        return exp_estimate(ratio_estimate(self.excess, self.counts))

    def better_than(self, other: Judged) -> bool:
        """By more than the standard error of the paired difference in KL divergence."""
        gain = ratio_estimate([theirs - mine for mine, theirs in zip(self.kl, other.kl, strict=True)], self.counts)
        return gain.mean > (0.0 if math.isnan(gain.standard_error) else gain.standard_error)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One setting of a knob: where it stands in the file, what it is, what it costs at inference; ``online``: it
    rotates activations there.
    """

    where: str
    choice: str
    config: Config
    cost: str = "none"
    online: bool = False


Mean = Callable[["Searcher", Judged], Iterable[Candidate]]


class Searcher:
    """Judges configs on one task. Holds the float model's held-out predictions, so that each is computed once."""

    def __init__(self, task: Task, tell: Callable[[str], None]) -> None:
        self.task, self.tell = task, tell
        model = task.load()
        self.reference = [_log_probabilities(model, ids) for ids in task.held_out]

    def judge(self, config: Config) -> Judged:
        """Quantize by ``config`` and compare with float on the held-out windows."""
        task = self.task
        model = task.load()
        cache = scheme_of(task.strategy).kv_cache is not None
        prepared = prepare_(model, config, task.strategy, EVERYTHING, task.fit, cache=cache)
        quantized = quantize_model_(model, config, task.strategy, prepared.swept, task.fit)
        kl: list[float] = []
        excess: list[float] = []
        counts: list[int] = []
        for ids, expected in zip(task.held_out, self.reference, strict=True):
            got = _log_probabilities(model, ids)
            kl += (expected.exp() * (expected - got)).sum((-1, -2), dtype=torch.float64).tolist()
            targets = ids[:, 1:, None].to(got.device)
            excess += (expected - got).gather(-1, targets).sum((-1, -2), dtype=torch.float64).tolist()
            counts += [ids.shape[1] - 1] * len(ids)
        return Judged(config, tuple(kl), tuple(excess), tuple(counts), quantized.errors)


@torch.no_grad()
def _log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids.to(next(model.parameters()).device)).logits
    return functional.log_softmax(logits[:, :-1].float(), -1)


def search(
    task: Task, config: Config, budget: float = math.inf, tell: Callable[[str], None] = lambda line: None
) -> Config:
    """The config with every knob that helps turned, and the evidence. ``budget``: minutes, after which nothing new is
    begun; as long as it is not reached the result depends on ``task`` and ``config`` alone.
    """
    end = time.monotonic() + budget * 60
    searcher = Searcher(task, tell)
    start = best = searcher.judge(config)
    tell(f"as it is: {_shown(start)}")
    decisions: list[Decision] = []
    for name, mean in MEANS.items():
        if name not in task.means:
            continue
        tried: list[tuple[Judged, Candidate]] = []
        for candidate in mean(searcher, best):
            if task.offline and candidate.online:
                continue
            if time.monotonic() > end:
                tell("the budget is used up")
                break
            try:
                judged = searcher.judge(candidate.config)
            except AutoQuantError as error:  # a knob that this model cannot have
                tell(f"{candidate.where} = {candidate.choice}: {error.message}")
                continue
            tell(f"{candidate.where} = {candidate.choice}: {_shown(judged)}")
            tried.append((judged, candidate))
        if not tried:
            continue
        found, chosen = min(tried, key=lambda pair: pair[0].divergence)
        if found.better_than(best):
            decisions.append(_decision(chosen, best, found))
            best = found
    ratio = best.perplexity_ratio
    record = Search(
        strategy=task.strategy,
        seed=task.seed,
        calibration=task.calibration,
        digest=_digest((*task.fit, *task.held_out)),
        fitted=len(task.fit),
        held_out=sum(len(ids) for ids in task.held_out),
        before=_percent(start.perplexity_ratio.mean),
        after=_percent(ratio.mean),
        standard_error=round(100 * ratio.standard_error, 3) if math.isfinite(ratio.standard_error) else 0.0,
        decisions=tuple(decisions),
    )
    section = edited(best.config.quantization, strategy=task.strategy)
    return edited(best.config, search=record, quantization=section)


def _shown(judged: Judged) -> str:
    ratio = judged.perplexity_ratio
    return (
        f"perplexity {_percent(ratio.mean):+.2f} ± {100 * ratio.standard_error:.2f} %, KL {judged.divergence:.5f} nats"
    )


def _percent(ratio: float) -> float:
    return round(100 * (ratio - 1), 3) if math.isfinite(ratio) else 1e9


def _digest(windows: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for ids in windows:
        digest.update(ids.cpu().numpy().tobytes())
    return digest.hexdigest()


def _decision(chosen: Candidate, before: Judged, after: Judged) -> Decision:
    return Decision(
        where=chosen.where,
        choice=chosen.choice,
        unit=UNIT,
        before=float(f"{before.divergence:.4g}"),
        after=float(f"{after.divergence:.4g}"),
        cost=chosen.cost,
    )


# --- the means, in order ----------------------------------------------------------------------------------------------


def _prefix(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """Sinks: a prefix in floating point takes their spikes out of every later token (PrefixQuant, CushionCache)."""
    task = searcher.task
    try:
        prefix = find_prefix(task.load(), plan_linears(best.config, task.strategy), task.bos, task.fit)
    except AutoQuantError as error:  # a model that can have none
        searcher.tell(f"prefix: {error.message}")
        return
    if prefix and prefix != best.config.quantization.prefix:
        cost = "the prefix's keys and values, stored in floating point"
        yield Candidate("quantization.prefix", str(list(prefix)), _quantization(best.config, prefix=prefix), cost)


def _clip(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """Static scales below the maximum."""
    if not scheme_of(searcher.task.strategy).activation.is_static:
        return
    for clip in (StaticClip.OUTPUT, StaticClip.MSE, StaticClip.PERCENTILE):
        choice = edited(best.config.quantization.activations, clip=clip)
        yield Candidate("quantization.activations.clip", clip.value, _quantization(best.config, activations=choice))


def _rotation(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """No rotation, R1 without R2, other random signs."""
    rotation = best.config.rotation
    if not rotation.spaces:
        return
    yield Candidate("rotation.enable", "false", _rotated(best.config, enable=False))
    without = tuple(edited(space, enable=False) if space.kind == "R2" else space for space in rotation.spaces)
    if without != rotation.spaces:
        yield Candidate("rotation.spaces[R2].enable", "false", _rotated(best.config, spaces=without))
    for seed in range(1, 4):
        yield Candidate("rotation.seed", str(rotation.seed + seed), _rotated(best.config, seed=rotation.seed + seed))


def _online(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """Online R4: the inputs of down projections are rotated at inference (QuaRot, Ashkboos et al. 2024)."""
    yield from _online_candidates(best.config, "R4", "a Hadamard transform before each of these linears")


def _online_candidates(config: Config, kind: str, cost: str) -> Iterator[Candidate]:
    old = config.rotation.online
    new = tuple(edited(entry, enable=True) if entry.kind == kind else entry for entry in old)
    if new != old:
        yield Candidate(f"rotation.online[{kind}].enable", "true", _rotated(config, online=new), cost, online=True)


def _alpha(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """SmoothQuant's alpha: one for all groups, and one for each group and layer by its linears' output error."""
    smoothing = best.config.smoothing
    if not smoothing.groups:
        return
    for alpha in (0.3, 0.4, 0.6, 0.7, 0.8, 0.9):
        if alpha != smoothing.alpha:
            changed = edited(smoothing, alpha=alpha)
            yield Candidate("smoothing.alpha", str(alpha), edited(best.config, smoothing=changed))
    found = _alphas(searcher.task, best.config)
    if found:
        groups = tuple(_with_alphas(group, found) for group in smoothing.groups)
        changed = edited(smoothing, groups=groups)
        yield Candidate(
            "smoothing.groups[*].overrides",
            f"{len(found)} alphas, one for each group and layer, between {min(found.values())} and "
            f"{max(found.values())}",
            edited(best.config, smoothing=changed),
        )


@torch.no_grad()
def _alphas(task: Task, config: Config) -> dict[tuple[str, int | None], float]:
    """Alpha by (group, layer) on the rotated model, with upstream noise."""
    model = task.load()
    selected = select(config, structure_of(model), EVERYTHING)
    rotate_(model, selected)
    with prefixed(model, config.quantization.prefix):
        chosen = choose_alphas(model, linear_groups(selected).groups, plan_linears(config, task.strategy), task.fit)
    return {key: one.alpha for key, one in chosen.items() if one.alpha is not None}


def _with_alphas(group: SmoothingGroup, found: Mapping[tuple[str, int | None], float]) -> SmoothingGroup:
    mine = {layer: alpha for (name, layer), alpha in found.items() if name == group.name}
    if not mine:
        return group
    if None in mine:
        return edited(group, alpha=mine[None])
    new = tuple(
        SmoothingOverride(layers=str(layer), enable=None, alpha=alpha, method=None)
        for layer, alpha in sorted((layer, alpha) for layer, alpha in mine.items() if layer is not None)
    )
    return edited(group, overrides=(*group.overrides, *new))


def _descent(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """All scales of the groups that are in use, by coordinate descent."""
    smoothing = best.config.smoothing
    if smoothing.groups and smoothing.method is not SmoothingMethod.DESCENT:
        changed = edited(smoothing, method=SmoothingMethod.DESCENT)
        yield Candidate("smoothing.method", "descent", edited(best.config, smoothing=changed))


def _weights(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """Clipping and rounding of weights."""
    now = best.config.quantization.weights
    choices: tuple[tuple[Rounding, Literal["absmax", "mse"]], ...] = (
        (Rounding.NEAREST, "mse"),
        (Rounding.GPTQ, "absmax"),
        (Rounding.QRONOS, "absmax"),
        (Rounding.QRONOS, "mse"),
    )
    for rounding, clip in choices:
        changed = edited(now, rounding=rounding, clip=clip)
        if changed != now:
            yield Candidate(
                "quantization.weights",
                f"rounding {rounding.value}, clip {clip}",
                _quantization(best.config, weights=changed),
            )


def _bias(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """The mean output error out of the biases."""
    now = best.config.quantization.weights
    if not now.bias_correction:
        changed = edited(now, bias_correction=True)
        cost = "a bias for linears that have none"
        yield Candidate(
            "quantization.weights.bias_correction", "true", _quantization(best.config, weights=changed), cost
        )


def _spikes(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """Per-token scales for the linears with the largest output error (QFeM, Yang et al. 2024, ranks by spikes)."""
    per_token = _per_token(searcher.task.strategy)
    if searcher.task.per_token < 1 or per_token is None or not best.errors:
        return
    by_weight = {entry.weight: entry.path for entry in plan_linears(best.config, searcher.task.strategy)}
    worst = sorted(best.errors, key=lambda name: -best.errors[name])
    overrides = best.config.quantization.overrides
    for count in sorted({1, max(1, searcher.task.per_token // 2), searcher.task.per_token}):
        new = tuple(QuantizationOverride(path=by_weight[name], strategy=per_token) for name in worst[:count])
        changed = _quantization(best.config, overrides=(*overrides, *new))
        cost = f"{count} linears measure each token at inference"
        yield Candidate("quantization.overrides", ", ".join(by_weight[name] for name in worst[:count]), changed, cost)


def _per_token(strategy: Strategy) -> Strategy | None:
    return Strategy.PER_CHANNEL_PER_TOKEN if scheme_of(strategy).activation.is_static else None


def _cache(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """Keys: scales between queries and keys, or a rotation of both (R3)."""
    if scheme_of(searcher.task.strategy).kv_cache is None:
        return
    smoothing = best.config.smoothing
    groups = tuple(
        edited(group, enable=True) if group.kind is SmoothingKind.QUERY_KEY else group for group in smoothing.groups
    )
    if groups != smoothing.groups:
        changed = edited(best.config, smoothing=edited(smoothing, groups=groups))
        yield Candidate("smoothing.groups[query_key].enable", "true", changed)
    yield from _online_candidates(best.config, "R3", "a Hadamard transform of queries and keys")


def _learned(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """The residual's rotation, learned (SpinQuant, Liu et al. 2024)."""
    spaces = tuple(
        edited(space, method=RotationMethod.LEARNED) if space.kind == "R1" else space
        for space in best.config.rotation.spaces
    )
    layer_norms = any(
        space.centre or any(read.norm is not None and read.norm.kind == "layer" for read in space.reads)
        for space in spaces
        if space.kind == "R1"
    )
    if best.config.rotation.enable and spaces != best.config.rotation.spaces and not layer_norms:
        yield Candidate("rotation.spaces[R1].method", "learned", _rotated(best.config, spaces=spaces))


MEANS: Mapping[str, Mean] = {
    "prefix": _prefix,
    "clip": _clip,
    "rotation": _rotation,
    "online": _online,
    "alpha": _alpha,
    "descent": _descent,
    "learned": _learned,
    "cache": _cache,
    "weights": _weights,
    "bias": _bias,
    "spikes": _spikes,
}


def _quantization(config: Config, **update: Any) -> Config:
    return edited(config, quantization=edited(config.quantization, **update))


def _rotated(config: Config, **update: Any) -> Config:
    return edited(config, rotation=edited(config.rotation, **update))

"""What a config costs: its quantized model's distance from the float model on held-out windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoquant.calibration.observers import Sweep
from autoquant.config.format import Config, Strategy
from autoquant.evaluation.perplexity import Estimate, exp_estimate, ratio_estimate
from autoquant.models.reading import read
from autoquant.pipeline.quantize import Quantized, quantize_model_
from autoquant.pipeline.select import EVERYTHING
from autoquant.pipeline.transform import prepare_
from autoquant.quantizer.strategies import scheme_of
from autoquant.searcher.kept import Kept

Load = Callable[[], nn.Module]
Refused = Callable[[Config], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Served:
    """What a server of the result asks of a config. ``refused``: why it does not take one, a sentence each;
    ``alike``: weights of one module there, which share a scheme and a static input scale.
    """

    refused: Refused
    alike: tuple[tuple[str, ...], ...] = ()

    def together(self, weight: str) -> tuple[str, ...]:
        """The weights that are one module with this one, itself among them."""
        return next((weights for weights in self.alike if weight in weights), (weight,))


ANYWHERE = Served(lambda config: ())
"""Nothing is asked."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is searched: ``load`` makes the float model anew; ``fit`` are token ids [1, S] each, ``held_out`` [B, S].

    ``per_token``: how many linears may get per-token scales, ``in_float``: how many may stay in floating point;
    ``bos``: the token that each window starts with; ``offline``: nothing is rotated at inference; ``served``: what is
    to run the result.
    """

    load: Load
    strategy: Strategy
    fit: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    calibration: str
    seed: int = 0
    per_token: int = 0
    in_float: int = 0
    bos: int | None = None
    offline: bool = False
    served: Served = ANYWHERE
    knobs: frozenset[str] = frozenset()
    """Names of the knobs to try."""
    kept: Kept = field(default_factory=Kept)
    """What was judged before, and is from now on."""


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
class Distance:
    """What :class:`Judged` has of a model, sums per window in nats."""

    kl: tuple[float, ...]
    excess: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A quantized model, and what quantization did."""

    model: nn.Module
    quantized: Quantized


class Searcher:
    """Judges configs on one task. Holds the float model's held-out predictions, so that each is computed once, and what
    the fitted windows showed of each rotated model, which configs share that smooth and quantize it otherwise.
    """

    def __init__(self, task: Task, tell: Callable[[str], None]) -> None:
        self.task, self.tell = task, tell
        self.sweeps: dict[tuple[object, ...], Sweep] = {}
        model = task.load()
        self.reference = [_log_probabilities(model, ids) for ids in task.held_out]

    def judge(self, config: Config) -> Judged:
        """Quantize by ``config`` and compare with float on the held-out windows."""
        if (known := self.task.kept.get(config)) is not None:
            kl, excess, counts, errors = known
            return Judged(config, tuple(kl), tuple(excess), tuple(counts), dict(errors))
        made = self.quantized(config)
        found = self.compared(made.model)
        errors = dict(made.quantized.errors)
        self.task.kept.put(config, (found.kl, found.excess, found.counts, errors))
        return Judged(config, found.kl, found.excess, found.counts, errors)

    def quantized(self, config: Config, before_: Callable[[nn.Module], None] = lambda model: None) -> Made:
        """The model by ``config``; ``before_`` is given it in floating point, transformed."""
        task = self.task
        model = task.load()
        cache = scheme_of(task.strategy).kv_cache is not None
        swept = partial(self._swept, config)
        prepared = prepare_(model, config, task.strategy, EVERYTHING, task.fit, cache=cache, sweeping=swept)
        before_(model)
        return Made(model, quantize_model_(model, config, task.strategy, prepared.swept, task.fit))

    def _swept(self, config: Config, weights: Sequence[str], cache: bool, sweep: Callable[[], Sweep]) -> Sweep:
        """What :func:`sweep` finds of a model that was rotated by the config, found once for each rotation."""
        key = (config.rotation.model_dump_json(), config.quantization.prefix, tuple(weights), cache)
        if key not in self.sweeps:
            self.sweeps[key] = sweep()
        return self.sweeps[key]

    def compared(self, model: nn.Module, batches: int | None = None) -> Distance:
        """How far ``model`` is from float on the held-out windows, or on the first ``batches`` of them."""
        kl: list[float] = []
        excess: list[float] = []
        counts: list[int] = []
        for ids, expected in list(zip(self.task.held_out, self.reference, strict=True))[:batches]:
            got = _log_probabilities(model, ids)
            kl += (expected.exp() * (expected - got)).sum((-1, -2), dtype=torch.float64).tolist()
            targets = ids[:, -got.shape[1] :, None].to(got.device)
            excess += (expected - got).gather(-1, targets).sum((-1, -2), dtype=torch.float64).tolist()
            counts += [got.shape[1]] * len(ids)
        return Distance(tuple(kl), tuple(excess), tuple(counts))


@torch.no_grad()
def _log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = read(model, ids.to(next(model.parameters()).device)).logits
    return functional.log_softmax(logits[:, :-1].float(), -1)

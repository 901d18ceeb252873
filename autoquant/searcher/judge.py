"""What a config costs: its quantized model's distance from the float model on held-out windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.calibration.observers import Sweep
from autoquant.calibration.runner import whole
from autoquant.checkpoint.trial import Layered, Outputs, Trials, WholeModel
from autoquant.config.format import Config, Strategy
from autoquant.evaluation.perplexity import Estimate, exp_estimate, ratio_estimate
from autoquant.models.reading import read
from autoquant.models.structure import structure_of
from autoquant.pipeline.quantize import Quantized, quantize_model_, rotate_, select
from autoquant.pipeline.select import EVERYTHING
from autoquant.pipeline.transform import prepare_
from autoquant.quantizer.prefix import at_once, prefixed
from autoquant.quantizer.strategies import scheme_of
from autoquant.searcher.kept import Kept
from autoquant.searcher.reference import Distance, Reference, joined
from autoquant.steps import Progress, silent

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
    """What is searched: ``load`` makes the float model anew, ``trials`` tries configs of it layer by layer, None: all
    have it in memory; ``fit`` are token ids [1, S] each, ``held_out`` [B, S].

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
    trials: Trials | None = None


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


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A quantized model, and what quantization did."""

    model: nn.Module
    quantized: Quantized


class Searcher:
    """Judges configs on one task. Holds what the float model predicts of the held-out windows, so that it is computed
    once, and what the fitted windows showed of each rotated model, which configs share that smooth and quantize it
    otherwise.
    """

    @torch.no_grad()
    def __init__(self, task: Task, tell: Callable[[str], None], progress: Progress = silent) -> None:
        self.task, self.tell, self.progress = task, tell, progress
        self.sweeps: dict[tuple[object, ...], Sweep] = {}
        self.reference = Reference()
        said = "float"
        if task.trials is not None:
            task.trials.run_float(task.held_out, self.reference.taking, progress, said)
            return
        model = self.load(said)
        with self.reference.taking(model) as take:
            for number, ids in enumerate(task.held_out):
                progress(f"{said}: judge", number, len(task.held_out))
                take(number, _output(model, ids))

    def load(self, said: str) -> nn.Module:
        """The float model, in memory; ``said``: for what."""
        self.progress(f"{said}: load", 0, 0)
        return self.task.load()

    def float_model(self, said: str) -> AbstractContextManager[Layered]:
        """The float model, of which no more than a layer is in memory where that is possible; ``said``: for what."""
        return self._layered(Trials.float_model, lambda stack: Layered(self.load(said), whole, at_once))

    def rotated_model(self, config: Config, said: str) -> AbstractContextManager[Layered]:
        """The same, rotated by ``config`` and behind its prefix."""

        def held(stack: ExitStack) -> Layered:
            model = self.load(said)
            selected = select(config, structure_of(model), EVERYTHING)
            rotate_(model, selected)
            stack.enter_context(prefixed(model, config.quantization.prefix))
            return Layered(model, whole, at_once, selected)

        return self._layered(lambda trials: trials.rotated_model(config), held)

    def smoothed_model(self, config: Config, said: str) -> AbstractContextManager[Layered]:
        """The same, smoothed too."""

        def held(stack: ExitStack) -> Layered:
            model = self.load(said)
            prepare_(model, config, self.task.strategy, EVERYTHING, self.task.fit, cache=False)
            return Layered(model, whole, at_once)

        return self._layered(lambda trials: trials.smoothed_model(config, self.progress, said), held)

    @contextmanager
    def _layered(
        self, streamed: Callable[[Trials], AbstractContextManager[Layered]], held: Callable[[ExitStack], Layered]
    ) -> Iterator[Layered]:
        """A model layer by layer, or in memory where it has to be there as a whole."""
        with ExitStack() as stack:
            found: Layered | None = None
            if self.task.trials is not None:
                with suppress(WholeModel):
                    found = stack.enter_context(streamed(self.task.trials))
            yield held(stack) if found is None else found

    def judge(self, config: Config, said: str = "as it is") -> Judged:
        """Quantize by ``config`` and compare with float on the held-out windows; ``said``: what is told of it."""
        if (known := self.task.kept.get(config)) is not None:
            kl, excess, counts, errors = known
            return Judged(config, tuple(kl), tuple(excess), tuple(counts), dict(errors))
        found, errors = self._tried(config, said)
        self.task.kept.put(config, (found.kl, found.excess, found.counts, errors))
        return Judged(config, found.kl, found.excess, found.counts, errors)

    def _tried(self, config: Config, said: str) -> tuple[Distance, dict[str, float]]:
        """Layer by layer where that is possible, else in memory."""
        parts: dict[int, Distance] = {}

        @contextmanager
        def around(model: nn.Module) -> Iterator[Outputs]:
            yield lambda number, output: parts.update({number: self._distance(number, output)})

        if self.task.trials is not None:
            with suppress(WholeModel):
                quantized = self.task.trials.run(config, self.task.held_out, around, self.progress, said)
                return joined([parts[number] for number in sorted(parts)]), dict(quantized.errors)
        made = self.quantized(config, said=said)
        self.progress(f"{said}: judge", 0, 0)
        return self.compared(made.model), dict(made.quantized.errors)

    def quantized(
        self, config: Config, before_: Callable[[nn.Module], None] = lambda model: None, said: str = "quantized"
    ) -> Made:
        """The model by ``config``; ``before_`` is given it in floating point, transformed."""
        task = self.task
        model = self.load(said)
        cache = scheme_of(task.strategy).kv_cache is not None
        swept = partial(self._swept, config)

        def tell(step: str, done: int, total: int) -> None:
            self.progress(f"{said}: {step}", done, total)

        prepared = prepare_(model, config, task.strategy, EVERYTHING, task.fit, cache=cache, tell=tell, sweeping=swept)
        before_(model)
        tell("quantize", 0, 0)
        return Made(model, quantize_model_(model, config, task.strategy, prepared.swept, task.fit))

    def _swept(self, config: Config, weights: Sequence[str], cache: bool, sweep: Callable[[], Sweep]) -> Sweep:
        """What :func:`sweep` finds of a model that was rotated by the config, found once for each rotation."""
        key = (config.rotation.model_dump_json(), config.quantization.prefix, tuple(weights), cache)
        if key not in self.sweeps:
            self.sweeps[key] = sweep()
        return self.sweeps[key]

    @torch.no_grad()
    def compared(self, model: nn.Module, batches: int | None = None) -> Distance:
        """How far ``model`` is from float on the held-out windows, or on the first ``batches`` of them."""
        held_out = self.task.held_out[:batches]
        return joined([self._distance(number, _output(model, ids)) for number, ids in enumerate(held_out)])

    def _distance(self, number: int, output: Any) -> Distance:
        return self.reference.distance(number, self.task.held_out[number], output.logits)


@torch.no_grad()
def _output(model: nn.Module, ids: Tensor) -> Any:
    return read(model, ids.to(next(model.parameters()).device))

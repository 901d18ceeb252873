"""What the inputs of linears look like before and after the transforms, and what int8 makes of them.

As in the figures of SmoothQuant (Xiao et al. 2023, fig. 4) and QuaRot (Ashkboos et al. 2024, fig. 1): largest channel,
largest token and median over depth. Linears that are modules of their own are seen; experts that are stacked in one
parameter are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoquant.calibration.windows import Windows
from autoquant.config.format import Config, Strategy
from autoquant.config.layers import LAYER, fill, layer_numbers
from autoquant.evaluation.perplexity import logits_of, nll_per_window
from autoquant.models.reading import read
from autoquant.pipeline.select import EVERYTHING
from autoquant.pipeline.transform import prepare_
from autoquant.quantizer.int8 import absmax_scale, dequantize, fake_quantize, quantize, scale_of
from autoquant.quantizer.strategies import Granularity, scheme_of
from autoquant.steps import Progress, silent

MEASURES = {
    "channel": "largest channel over the median channel",
    "token": "largest token over the median token",
    "peak": "largest value",
    "median": "median value",
}
TOKENS = 48
"""So many tokens of the first window are shown one by one."""
NOISE_WINDOWS = 4
"""Windows that signal to noise is taken on."""
COSTLY = 24
"""So many linears, those of the worst signal to noise, are quantized alone to see what each costs."""

LINEAR_STRATEGIES = tuple(one for one in Strategy if scheme_of(one).kv_cache is None)

_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True, slots=True)
class Seen:
    """A linear that is seen: its row in the figures and its layer (None: in none), by its path in the model."""

    path: str
    row: str
    layer: int | None


@dataclass(slots=True)
class Inputs:
    """What was seen of one linear's inputs: largest magnitudes by channel [C] and by token, medians by window."""

    channels: Tensor
    tokens: list[Tensor] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    signal: float = 0.0
    noise: dict[Strategy, float] = field(default_factory=dict)

    def measure(self, name: str) -> float:
        tokens = torch.cat(self.tokens)
        value = {
            "channel": lambda: self.channels.max() / self.channels.median(),
            "token": lambda: tokens.max() / tokens.median(),
            "peak": lambda: tokens.max(),
            "median": lambda: torch.tensor(self.medians).mean(),
        }[name]()
        return float(value)

    def decibels(self, strategy: Strategy) -> float:
        return 10 * float(torch.log10(torch.tensor(self.signal / max(self.noise[strategy], 1e-30))))


@torch.no_grad()
def measure(
    model: nn.Module,
    config: Config,
    batches: Sequence[Tensor],
    held_out: Windows,
    words: Sequence[str],
    progress: Progress = silent,
) -> dict[str, Any]:
    """Everything that the page shows of a model, as JSON. ``model`` is transformed as the config says and is left so.

    ``batches``: calibration token ids [1, S]; ``held_out``: what single linears are judged on; ``words``: the first
    window's tokens as text. What a linear was not seen in is None.
    """
    strategy = config.quantization.strategy
    seen = [one for one in seen_linears(config) if _owner(model, one.path) is not None]
    before = _observe(model, seen, batches, lambda *at: progress("look at the inputs", *at))
    prepare_(model, config, strategy, EVERYTHING, batches, cache=False, tell=progress)
    after = _observe(model, seen, batches, lambda *at: progress("look at the inputs after", *at))
    inside = [one for one in seen if one.layer is not None]
    rows = list(dict.fromkeys(one.row for one in inside))
    layers = sorted({one.layer for one in inside if one.layer is not None})
    places = _Places(inside, rows, layers)
    return {
        "measures": MEASURES,
        "linears": rows,
        "layers": layers,
        "text": list(words[:TOKENS]),
        "tokens": sum(batch.numel() for batch in batches),
        "strategy": strategy.value,
        "before": places.values(before),
        "after": places.values(after),
        "snr": {
            one.value: {"before": places.noise(before, one), "after": places.noise(after, one)}
            for one in LINEAR_STRATEGIES
        },
        "cost": _costs(model, strategy, seen, after, held_out, progress),
    }


def seen_linears(config: Config) -> Iterator[Seen]:
    """The linears that are quantized by default and not stacked, one for each layer."""
    stacks = {linear.path.partition(LAYER)[0] for linear in config.model.linears if linear.layers is not None}
    for linear in config.model.linears:
        if linear.stack is not None or linear.role != "linear" or linear.path in config.quantization.exclude:
            continue
        inside = linear.path.partition(f"{LAYER}.")[2]
        row = _NUMBER.sub(".*.", linear.path if len(stacks) > 1 or not inside else inside)
        for layer in (None,) if linear.layers is None else layer_numbers(linear.layers):
            yield Seen(linear.path if layer is None else fill(linear.path, layer), row, layer)


@dataclass(frozen=True, slots=True)
class _Places:
    """Where each linear stands in a table of rows and layers; of several in one place the worst is shown."""

    seen: Sequence[Seen]
    rows: Sequence[str]
    layers: Sequence[int]

    def table(self, value: dict[str, float], worst: Any = max) -> list[list[float | None]]:
        cells: dict[tuple[str, int | None], float] = {}
        for one in self.seen:
            if one.path in value:
                place = (one.row, one.layer)
                cells[place] = worst(cells[place], value[one.path]) if place in cells else value[one.path]
        return [[_rounded(cells.get((row, layer))) for layer in self.layers] for row in self.rows]

    def values(self, found: dict[str, Inputs]) -> dict[str, Any]:
        tables = {name: self.table({path: one.measure(name) for path, one in found.items()}) for name in MEASURES}
        return {**tables, "tokens": [self.profiles(found, row) for row in self.rows]}

    def profiles(self, found: dict[str, Inputs], row: str) -> list[list[float | None]]:
        """The largest value of each of the first tokens, for each layer."""
        by_layer = {
            one.layer: found[one.path].tokens[0][:TOKENS] for one in self.seen if one.row == row if one.path in found
        }
        return [[_rounded(x) for x in by_layer[layer].tolist()] if layer in by_layer else [] for layer in self.layers]

    def noise(self, found: dict[str, Inputs], strategy: Strategy) -> list[list[float | None]]:
        return self.table({path: one.decibels(strategy) for path, one in found.items() if strategy in one.noise}, min)


def _observe(model: nn.Module, seen: Sequence[Seen], batches: Sequence[Tensor], progress: Any) -> dict[str, Inputs]:
    found: dict[str, Inputs] = {}

    def look(path: str, x_TI: Tensor) -> None:
        magnitudes = x_TI.abs()
        channels = magnitudes.amax(0)
        one = found.setdefault(path, Inputs(torch.zeros_like(channels)))
        one.channels = torch.maximum(one.channels, channels)
        one.tokens.append(magnitudes.amax(1))
        one.medians.append(float(magnitudes.median()))

    def disturb(path: str, x_TI: Tensor) -> None:
        one, owner = found[path], _owner(model, path)
        assert owner is not None
        weight_OI = owner.weight.float()
        y = functional.linear(x_TI, weight_OI)
        one.signal += float(y.square().sum())
        for strategy in LINEAR_STRATEGIES:
            x_q, w_q = _int8_input(x_TI, strategy, one.channels.max()), _int8_weight(weight_OI, strategy)
            error = float((functional.linear(x_q, w_q) - y).square().sum())
            one.noise[strategy] = one.noise.get(strategy, 0.0) + error

    for pass_, told in ((look, batches), (disturb, batches[:NOISE_WINDOWS])):
        with _hooked(model, seen, pass_):
            for number, batch in enumerate(told):
                read(model, batch.to(next(model.parameters()).device))
                progress(number + 1, len(told))
    return found


@contextmanager
def _hooked(model: nn.Module, seen: Sequence[Seen], told: Any) -> Iterator[None]:
    """Tell of each linear's inputs as float32 [T, I]; inputs of no tokens are passed over."""
    handles = []
    for one in seen:
        owner = _owner(model, one.path)
        assert owner is not None

        def hook(module: nn.Module, args: tuple[Any, ...], path: str = one.path) -> None:
            x_TI = args[0].detach().float().flatten(0, -2)
            if len(x_TI):
                told(path, x_TI)

        handles.append(owner.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _owner(model: nn.Module, path: str) -> Any:
    """The nn.Linear of this path, itself or within what an online rotation has put in its place; None: another."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return next((one for one in module.modules() if type(one) is nn.Linear), None)


def _int8_weight(weight_OI: Tensor, strategy: Strategy) -> Tensor:
    scale = absmax_scale(weight_OI, (1,) if scheme_of(strategy).weight_per_channel else None)
    return dequantize(quantize(weight_OI, scale), scale)


def _int8_input(x_TI: Tensor, strategy: Strategy, largest: Tensor) -> Tensor:
    activation = scheme_of(strategy).activation
    if activation is Granularity.TENSOR_STATIC:
        return fake_quantize(x_TI, scale_of(largest))
    return fake_quantize(x_TI, absmax_scale(x_TI, (1,) if activation is Granularity.TOKEN_DYNAMIC else None))


def _costs(
    model: nn.Module,
    strategy: Strategy,
    seen: Sequence[Seen],
    found: dict[str, Inputs],
    held_out: Windows,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Perplexity above float, in percent, with one linear in int8 at a time: the costliest first."""
    linear_strategy = next(one for one in LINEAR_STRATEGIES if strategy.value.startswith(one.value))
    there = [one for one in seen if one.path in found and linear_strategy in found[one.path].noise]
    worst = sorted(there, key=lambda one: found[one.path].decibels(linear_strategy))[:COSTLY]
    floating = nll_per_window(logits_of(model), held_out)
    reference, predicted = sum(floating.nll), sum(floating.counts)
    rows = []
    for number, one in enumerate(worst):
        progress("quantize one at a time", number, len(worst))
        with _int8_alone(_owner(model, one.path), linear_strategy, found[one.path].channels.max()):
            nll = sum(nll_per_window(logits_of(model), held_out).nll)
        percent = 100 * float(torch.expm1(torch.tensor((nll - reference) / predicted, dtype=torch.float64)))
        rows.append(
            {
                "path": one.path,
                "percent": _rounded(percent),
                "decibels": _rounded(found[one.path].decibels(linear_strategy)),
            }
        )
    return sorted(rows, key=lambda row: -(row["percent"] or 0.0))


@contextmanager
def _int8_alone(owner: Any, strategy: Strategy, largest: Tensor) -> Iterator[None]:
    kept = owner.weight.data
    hook = owner.register_forward_pre_hook(
        lambda module, args: (_int8_input(args[0].float(), strategy, largest), *args[1:])
    )
    owner.weight.data = _int8_weight(kept.float(), strategy)
    try:
        yield
    finally:
        owner.weight.data = kept
        hook.remove()


def _rounded(value: float | None) -> float | None:
    """Four digits, which is what a figure shows; what is not finite is not shown."""
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return None
    return float(f"{value:.4g}")

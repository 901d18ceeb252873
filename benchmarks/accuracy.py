"""What each knob of issue 6 does: python benchmarks/accuracy.py MODEL CONFIG --data TEST --calibration VALID -o DIR

One row is one set of knobs; each cell is its perplexity on the whole test text, kept as a file, so that rows can be
made by several processes (--rows) and an interrupted run goes on. `--table` prints what is there.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from tables import short
from torch import Tensor, nn
from torch.nn import functional

from autoquant.calibration.texts import read_text
from autoquant.calibration.windows import (
    CalibrationOptions,
    Windows,
    calibration_windows,
    cut_windows,
    rebatched,
    tokenize,
)
from autoquant.checkpoint.quantize import load_float32
from autoquant.config.file import config_text, load_config
from autoquant.config.format import (
    ActivationQuantization,
    Config,
    QuantizationOverride,
    Rounding,
    SmoothingMethod,
    StaticClip,
    Strategy,
    WeightQuantization,
    edited,
)
from autoquant.evaluation.compare import shares_scale
from autoquant.evaluation.perplexity import Estimate, exp_estimate, logits_of, nll_per_window, ratio_estimate
from autoquant.io.files import write_text
from autoquant.models.tokenizer import load_tokenizer
from autoquant.pipeline.quantize import quantize_model_
from autoquant.pipeline.select import EVERYTHING, Transforms
from autoquant.pipeline.transform import prepare_
from autoquant.quantizer import int8
from autoquant.quantizer.linear import Int8Linear
from autoquant.quantizer.prefix import fix_prefix_
from autoquant.quantizer.strategies import plan_linears, scheme_of
from autoquant.quantizer.weight import input_scale

BATCH = 16
Change = Callable[[Config], Config]
OUTPUT = ActivationQuantization(clip=StaticClip.OUTPUT)


def quantization(**update: Any) -> Change:
    return lambda config: edited(config, quantization=edited(config.quantization, **update))


def smoothing(**update: Any) -> Change:
    return lambda config: edited(config, smoothing=edited(config.smoothing, **update))


def rotation(**update: Any) -> Change:
    return lambda config: edited(config, rotation=edited(config.rotation, **update))


def online(kind: str) -> Change:
    def change(config: Config) -> Config:
        entries = tuple(edited(e, enable=e.kind == kind or e.enable) for e in config.rotation.online)
        return rotation(online=entries)(config)

    return change


def query_key(config: Config) -> Config:
    groups = tuple(edited(g, enable=True) if g.kind == "query_key" else g for g in config.smoothing.groups)
    return smoothing(groups=groups)(config)


def without_r2(config: Config) -> Config:
    spaces = tuple(edited(s, enable=False) if s.kind == "R2" else s for s in config.rotation.spaces)
    return rotation(spaces=spaces)(config)


def learned(config: Config) -> Config:
    spaces = tuple(edited(s, method="learned") if s.kind == "R1" else s for s in config.rotation.spaces)
    return rotation(spaces=spaces)(config)


def down_per_token(config: Config) -> Config:
    """The input of every down_proj per token: the spikiest inputs of these models."""
    linears = {e.path for e in plan_linears(config)}
    new = tuple(
        QuantizationOverride(path=path, strategy=Strategy.PER_CHANNEL_PER_TOKEN)
        for path in sorted(linears)
        if path.endswith(("layers.0.mlp.down_proj", "layers.4.mlp.down_proj"))
    )
    return quantization(overrides=new)(config)


def both(*changes: Change) -> Change:
    def change(config: Config) -> Config:
        for one in changes:
            config = one(config)
        return config

    return change


GPTQ = quantization(weights=WeightQuantization(rounding=Rounding.GPTQ))
QRONOS = quantization(weights=WeightQuantization(rounding=Rounding.QRONOS))
CLIPPED = quantization(activations=OUTPUT)
SEED = Transforms.parse("fc_fc:0.5+rotation")
NONE = Transforms.parse("none")

# Rows whose knob does nothing elsewhere.
STATIC_ONLY = ("alone: static scales", "alone: spikes")
CACHE_ONLY = ("alone: query-key", "alone: online R3")

LIMITS = {"weights alone (W8A16)": "weights", "activations alone (W16A8)": "activations"}


class Activations(nn.Module):
    """A linear whose inputs are rounded and whose weight is not."""

    def __init__(self, quantized: Int8Linear, plain: nn.Linear) -> None:
        super().__init__()
        self.quantized, self.plain = quantized, plain

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        kept = int8.fake_quantize(rows, input_scale(rows, self.quantized.weight.view()))
        return functional.linear(kept, self.plain.weight, self.plain.bias).reshape(*x.shape[:-1], -1)


def halve_(model: nn.Module, before: nn.Module, side: str) -> None:
    """Leave one side of every int8 linear in floating point."""
    for name, part in list(model.named_modules()):
        if not isinstance(part, Int8Linear):
            continue
        plain = before.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        if side == "weights":
            new: nn.Module = copy.deepcopy(plain)
            new.weight.data = part.weight.dequantize()
        else:
            new = Activations(part, plain)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)


def rows_of(bos: int) -> Mapping[str, tuple[Transforms, Change]]:
    """Row -> what is enabled, and the knobs. "alone": on top of the seed's recipe, fc_fc + R1 + R2 at alpha 0.5."""
    sink = quantization(prefix=(bos,))
    return {
        "none": (NONE, both()),
        "seed's recipe: fc_fc 0.5 + R1 + R2": (SEED, both()),
        "alone: alpha 0.7": (EVERYTHING, smoothing(alpha=0.7)),
        "alone: alpha 0.85, no rotation": (EVERYTHING, both(smoothing(alpha=0.85), rotation(enable=False))),
        "alone: scales by descent": (EVERYTHING, smoothing(method=SmoothingMethod.DESCENT)),
        "alone: R1 without R2": (EVERYTHING, without_r2),
        "alone: other signs of R1 (seed 1)": (EVERYTHING, rotation(seed=1)),
        "alone: learned R1": (EVERYTHING, learned),
        "alone: online R4": (EVERYTHING, online("R4")),
        "alone: static scales, least input error": (
            EVERYTHING,
            quantization(activations=ActivationQuantization(clip=StaticClip.MSE)),
        ),
        "alone: static scales, 99.99 percentile": (
            EVERYTHING,
            quantization(activations=ActivationQuantization(clip=StaticClip.PERCENTILE)),
        ),
        "alone: static scales, least output error": (EVERYTHING, CLIPPED),
        "alone: spikes (down_proj of layers 0 and 4 per token)": (EVERYTHING, down_per_token),
        "alone: prefix": (EVERYTHING, sink),
        "alone: weights, least error": (EVERYTHING, quantization(weights=WeightQuantization(clip="mse"))),
        "alone: weights by GPTQ": (EVERYTHING, GPTQ),
        "alone: weights by Qronos": (EVERYTHING, QRONOS),
        "alone: bias correction": (EVERYTHING, quantization(weights=WeightQuantization(bias_correction=True))),
        "alone: query-key scales": (EVERYTHING, query_key),
        "alone: online R3": (EVERYTHING, online("R3")),
        "prefix + output error": (EVERYTHING, both(sink, CLIPPED)),
        "prefix + output error + alpha 0.7": (EVERYTHING, both(sink, CLIPPED, smoothing(alpha=0.7))),
        "prefix + output error + alpha 0.7 + descent": (
            EVERYTHING,
            both(sink, CLIPPED, smoothing(alpha=0.7, method=SmoothingMethod.DESCENT)),
        ),
        "prefix + output error + alpha 0.7 + Qronos": (EVERYTHING, both(sink, CLIPPED, smoothing(alpha=0.7), QRONOS)),
        "prefix + output error + alpha 0.7 + descent + Qronos": (
            EVERYTHING,
            both(sink, CLIPPED, smoothing(alpha=0.7, method=SmoothingMethod.DESCENT), QRONOS),
        ),
    }


def applies(row: str, strategy: Strategy) -> bool:
    scheme = scheme_of(strategy)
    if row.startswith(STATIC_ONLY):
        return scheme.activation.is_static
    return scheme.kv_cache is not None or not row.startswith(CACHE_ONLY)


def cell_path(folder: Path, row: str, strategy: str) -> Path:
    return folder / "cells" / f"{hashlib.sha256(row.encode()).hexdigest()[:12]}.{strategy}.json"


def measure(
    folder: Path, row: str, strategy: str, config: Config, make: Callable[[], nn.Module], windows: Windows
) -> None:
    """One cell, unless it is there."""
    path = cell_path(folder, row, strategy)
    digest = hashlib.sha256(config_text(config).encode()).hexdigest()
    if path.exists() and json.loads(path.read_text())["digest"] == digest:
        return
    try:
        shown = windows if shares_scale(strategy) else rebatched(windows, BATCH)
        nll = nll_per_window(logits_of(make()), shown).nll
    except Exception as error:  # one cell must not end the others
        click.echo(f"{row} / {strategy}: {type(error).__name__}: {error}", err=True)
        return
    versions = {"torch": torch.__version__, "transformers": version("transformers")}
    content = {"row": row, "strategy": strategy, "digest": digest, "nll": nll, "counts": windows.counts, **versions}
    write_text(path, json.dumps(content) + "\n", force=True)
    click.echo(f"{row} / {short(strategy) if strategy in list(Strategy) else strategy}", err=True)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--calibration", type=click.Path(path_type=Path), required=True)
@click.option("--searched", multiple=True, metavar="STRATEGY=CONFIG", help="Rows 'searched': configs of the search.")
@click.option("--tokens", type=int, help="Only the first so many tokens.")
@click.option("--sequences", default=64, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--rows", help="i/n: every n-th row, from the i-th.")
@click.option("--only", help="Only rows that hold one of these texts, separated by |.")
@click.option("--strategies", help="Only these, by their short names (c/t static), separated by |.")
@click.option("--device", default="cpu")
@click.option("--table", is_flag=True, help="Print the table of what is there.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(
    model: Path,
    config: Path,
    data: Path,
    calibration: Path,
    searched: tuple[str, ...],
    tokens: int | None,
    sequences: int,
    length: int,
    rows: str | None,
    only: str | None,
    strategies: str | None,
    device: str,
    table: bool,
    output: Path,
) -> None:
    """Perplexity of every knob, for the eight strategies."""
    if table:
        click.echo(table_of(output, model.name), nl=False)
        return
    base = load_config(config)
    tokenizer = load_tokenizer(model)
    windows = cut_windows(tokenize(tokenizer, read_text(data)), length, tokenizer.bos_token_id, tokens)
    fit = calibration_windows(tokenizer, CalibrationOptions(calibration, sequences, length, 0))
    loaded = load_float32(model).to(device)

    def fresh() -> nn.Module:
        return copy.deepcopy(loaded)

    def quantized(changed: Config, transforms: Transforms, strategy: Strategy, side: str | None = None) -> nn.Module:
        made = fresh()
        prepared = prepare_(made, changed, strategy, transforms, fit, cache=scheme_of(strategy).kv_cache is not None)
        before = copy.deepcopy(made) if side else made
        quantize_model_(made, changed, strategy, prepared.swept, fit)
        if side:
            halve_(made, before, side)
        return made

    def with_prefix() -> nn.Module:
        made = fresh()
        fix_prefix_(made, (tokenizer.bos_token_id,))
        return made

    (output / "cells").mkdir(parents=True, exist_ok=True)
    first, number = (int(part) for part in (rows or "0/1").split("/"))
    if first == 0:
        measure(output, "float", "float", base, fresh, windows)
        measure(output, "float + prefix", "float", base, with_prefix, windows)
    wanted: list[tuple[str, Transforms, Config, Strategy, str | None]] = []
    for row, (transforms, change) in rows_of(tokenizer.bos_token_id).items():
        wanted += [(row, transforms, change(base), strategy, None) for strategy in Strategy if applies(row, strategy)]
    for entry in searched:
        name, _, path = entry.partition("=")
        found = load_config(Path(path))
        matching = [s for s in Strategy if short(s.value) in name.split("|")]
        wanted += [("searched", EVERYTHING, found, strategy, None) for strategy in matching]
        wanted += [
            (f"searched, {row}", EVERYTHING, found, strategy, side)
            for row, side in LIMITS.items()
            for strategy in matching
            if scheme_of(strategy).kv_cache is None
        ]
    chosen = strategies.split("|") if strategies else None
    mine = [
        entry
        for entry in wanted
        if (only is None or any(text in entry[0] for text in only.split("|")))
        and (chosen is None or short(entry[3].value) in chosen)
    ]
    for row, transforms, changed, strategy, side in mine[first::number]:
        measure(
            output,
            row,
            strategy.value,
            changed,
            lambda changed=changed, transforms=transforms, strategy=strategy, side=side: quantized(  # type: ignore[misc]  # bound now
                changed, transforms, strategy, side
            ),
            windows,
        )


def table_of(folder: Path, name: str) -> str:
    """Rows of perplexity above float's in percent, with the standard error of the paired difference."""
    cells = {
        (cell["row"], cell["strategy"]): cell
        for cell in (json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*.json")))
    }
    reference = cells["float", "float"]
    perplexity = exp_estimate(ratio_estimate(reference["nll"], reference["counts"]))
    total = sum(reference["counts"])
    names = [*rows_of(0), "searched", *(f"searched, {row}" for row in LIMITS)]
    lines = [
        f"**{name}**, float {perplexity.mean:.3f} ± {perplexity.standard_error:.3f}: {total:,} tokens, "
        f"{len(reference['counts'])} windows; torch {reference['torch']}, transformers {reference['transformers']}",
        "",
        "| | " + " | ".join(short(strategy.value) for strategy in Strategy) + " |",
        "| --- |" + " ---: |" * len(Strategy),
    ]
    control = cells.get(("float + prefix", "float"))
    if control is not None:
        lines.append(f"| float + prefix | {percent(control, reference)} |" + " |" * (len(Strategy) - 1))
    for row in names:
        found = [cells.get((row, strategy.value)) for strategy in Strategy]
        if any(found):
            lines.append(f"| {row} | " + " | ".join(percent(cell, reference) if cell else "" for cell in found) + " |")
    return "\n".join(lines) + "\n"


def percent(cell: dict[str, Any], reference: dict[str, Any]) -> str:
    ratio = ratio_of(cell, reference)
    return f"{round(100 * (ratio.mean - 1), 2) + 0.0:+.2f} ± {100 * ratio.standard_error:.2f}"  # 0.0: no "-0.00"


def ratio_of(cell: dict[str, Any], reference: dict[str, Any]) -> Estimate:
    differences = [mine - theirs for mine, theirs in zip(cell["nll"], reference["nll"], strict=True)]
    return exp_estimate(ratio_estimate(differences, cell["counts"]))


if __name__ == "__main__":
    main()

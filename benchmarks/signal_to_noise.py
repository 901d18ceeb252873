"""What scales and rotations do to FP8, INT8 and INT4: python benchmarks/signal_to_noise.py MODEL --data TEXT ...

For each kind of linear the signal to noise of what it computes, weights and inputs rounded, in the model as it is, with
scales of SmoothQuant and with rotations; then the perplexity in FP8 over several draws of scales and rotations, which
tells what a transform does from what one rounding happens to do. Writes signal_to_noise.md.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import autoquant
from autoquant.calibration.texts import read_text
from autoquant.calibration.windows import CalibrationOptions, Windows, calibration_windows, cut_windows, tokenize
from autoquant.config.file import load_config
from autoquant.evaluation.perplexity import perplexity_of
from autoquant.models.load import load_language_model
from autoquant.models.tokenizer import load_tokenizer
from autoquant.recipes.audit import scale_
from autoquant.recipes.matching import MatchedPair
from autoquant.recipes.pairs import scale_pairs

PAGE = Path(__file__).with_suffix(".md")
LENGTH = 512
GROUP = 128
PREPARED = {"as it is": "", "scales, 0.5": "smooth:0.5+fc_fc:0.5", "rotation": "rotation"}


def rounded_fp8(x: Tensor, largest: Tensor) -> Tensor:
    """E4M3 with the scale that puts ``largest`` at 448: three bits of mantissa, whatever the size of an element."""
    scale = largest / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale


def rounded(x: Tensor, largest: Tensor, bits: int = 8) -> Tensor:
    """Symmetric integers: the same step for every element."""
    top = 2 ** (bits - 1) - 1
    scale = largest / top
    return (x / scale).round().clamp(-top, top) * scale


def int4_groups(weight: Tensor, _: Tensor) -> Tensor:
    """Groups of 128 along the input, a scale each; a last one may be shorter."""
    parts = [rounded(part, part.abs().amax(1, keepdim=True), 4) for part in weight.split(GROUP, dim=1)]
    return torch.cat(parts, dim=1)


Rounding = Callable[[Tensor, Tensor], Tensor]
FORMATS: dict[str, tuple[Rounding, Rounding | None]] = {
    "FP8": (rounded_fp8, rounded_fp8),
    "INT8": (rounded, rounded),
    "W4A16": (int4_groups, None),
}
"""How weights and inputs are rounded, per tensor, inputs by the largest of the calibration; None leaves them alone."""


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Those that are quantized, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")}


@torch.no_grad()
def largest_inputs(model: nn.Module, rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """The largest magnitude of each linear's input over the calibration."""
    found: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            found[name] = torch.maximum(found[name], args[0].abs().max())

        return hook

    handles = [linear.register_forward_pre_hook(note(name)) for name, linear in linears_of(model).items()]
    for row in rows:
        model(row[None])
    for handle in handles:
        handle.remove()
    return dict(found)


@torch.no_grad()
def signals(
    model: nn.Module, largest: Mapping[str, Tensor], rows: Sequence[Tensor], gains: Mapping[str, str]
) -> dict[tuple[str, str], float]:
    """Decibels by format and kind of linear, the mean over layers; BOS is left out. ``gains``: the norm of a linear.

    "expected": with the norm's gain in the weights, how far the noise of a rounding that is relative to each element,
    ``sum x^2 w^2``, lies below ``|x|^2 |w|^2 / d``, which it is where weights and inputs know nothing of each other:
    a rotation makes them so.
    """
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])

    def note(name: str) -> Callable[..., None]:
        def hook(linear: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
            x, weight = args[0][0, 1:].double(), linear.weight.double()
            exact = x @ weight.T
            for form, (of_weight, of_input) in FORMATS.items():
                inputs = x if of_input is None else of_input(x, largest[name].double())
                error = inputs @ of_weight(weight, weight.abs().max()).T - exact
                _add(sums[name, form], exact.square().sum(), error.square().sum())
            gain = model.get_submodule(gains[name]).weight.double() if name in gains else torch.ones(x.shape[1])
            mixed = (x / gain).square().sum(1)[:, None] * (weight * gain).square().sum(1) / x.shape[1]
            _add(sums[name, "expected"], mixed.sum(), (x.square() @ weight.square().T).sum())

        return hook

    handles = [linear.register_forward_hook(note(name)) for name, linear in linears_of(model).items()]
    for row in rows:
        model(row[None])
    for handle in handles:
        handle.remove()
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (name, form), (signal, noise) in sums.items():
        found[form, name.rpartition(".")[2]].append(10 * math.log10(signal / noise))
    return {key: statistics.fmean(values) for key, values in found.items()}


def _add(sums: list[float], signal: Tensor, noise: Tensor) -> None:
    sums[0] += float(signal)
    sums[1] += float(noise)


def in_fp8_(model: nn.Module, largest: Mapping[str, Tensor]) -> nn.Module:
    """The model with weights and inputs rounded to FP8, per tensor and static."""
    for name, linear in linears_of(model).items():
        linear.weight.data = rounded_fp8(linear.weight.data, linear.weight.data.abs().max())
        linear.register_forward_pre_hook(lambda _, args, top=largest[name]: (rounded_fp8(args[0], top),))
    return model


@dataclass(frozen=True, slots=True)
class Bed:
    """A model, its config and the texts."""

    model: Path
    config: Path
    calibration: Path
    rows: Sequence[Tensor]
    windows: Windows

    def prepared(self, transforms: str, seed: int = 0) -> Any:
        """The model with ``transforms`` applied, as `autoquant apply` writes it."""
        if not transforms:
            return load_language_model(self.model, dtype=torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            how = {"calibration": self.calibration, "sequences": len(self.rows), "length": LENGTH, "seed": seed}
            autoquant.apply(self.model, self.config, Path(folder) / "m", dtype="float32", transforms=transforms, **how)
            return load_language_model(Path(folder) / "m", dtype=torch.float32)

    def scaled(self, seed: int) -> Any:
        """The model with scales between 0.37 and 2.7, drawn at random, in every pair."""
        model = self.prepared("")
        for number, pair in enumerate(scale_pairs(load_config(self.config))[0]):
            for smooth, balance in pair.filled():
                scale_(model, MatchedPair(smooth, balance), "llm-compressor", 1000 * seed + number)
        return model

    def loss(self, model: Any) -> float:
        """What FP8 adds to the perplexity, in percent."""
        largest, plain = largest_inputs(model, self.rows), perplexity_of(model, self.windows)
        return 100 * (perplexity_of(in_fp8_(model, largest), self.windows) / plain - 1)


HEAD = """# What scales and rotations do to FP8, INT8 and INT4

```
{command}
```

**{model}**, torch {torch}, CPU, float32, {sequences} windows of {length} tokens of {calibration}. Signal to noise of
what each kind of linear computes, in decibels, the mean over layers, BOS left out; weights and inputs rounded per
tensor (inputs static), W4A16 in groups of {group} and weights alone. Higher is better; 3 dB is half the noise.
"""
WHY = """
FP8 rounds each element by the same part of itself. A scale that is undone changes nothing of that: FP8 as it is and
with scales are the same. A rotation does. It needs the norm's gain in the weights, and as trained that gain is small
where the normalised input is large: large inputs meet small weights, so that the noise of their products is small.
Mixed, each channel takes a share of the largest one's. "expected" is that alone, without any rounding: how far the
noise lies below the one of inputs and weights that know nothing of each other. What a rotation takes away there is what
FP8 loses. INT8 has one step for all elements, set by the largest of them: there the same mixing gains.

## FP8 over {draws} draws

Perplexity above float's on {tokens:,} tokens of {data}. One rounding is one draw, and its windows' standard error does
not say how another would have fallen: scales and rotations drawn anew leave the model as it is in float.

| | mean | standard deviation | draws |
|---|---:|---:|---|
"""


def page(head: str, tables: Mapping[str, Mapping[tuple[str, str], float]], why: str) -> Iterator[str]:
    yield head
    kinds = sorted({kind for table in tables.values() for _, kind in table})
    yield f"| | | {' | '.join(kinds)} |"
    yield "|---|---|" + "---:|" * len(kinds)
    for form in (*FORMATS, "expected"):
        for said, table in tables.items():
            yield f"| {form} | {said} | {' | '.join(f'{table[form, kind]:.1f}' for kind in kinds)} |"
    yield why


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Test text.")
@click.option("--calibration", type=click.Path(path_type=Path), required=True)
@click.option("--tokens", default=8192, show_default=True, help="The first so many of the text.")
@click.option("--sequences", default=8, show_default=True, help="Windows of calibration.")
@click.option("--draws", default=6, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=PAGE, show_default=True)
def main(model: Path, data: Path, calibration: Path, tokens: int, sequences: int, draws: int, output: Path) -> None:
    """Write the tables."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(model)
    windows = cut_windows(tokenize(tokenizer, read_text(data)), LENGTH, tokenizer.bos_token_id, tokens)
    rows = [ids[0] for ids in calibration_windows(tokenizer, CalibrationOptions(calibration, sequences, LENGTH, None))]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        autoquant.save_config(autoquant.analyze(model).config, config)
        bed = Bed(model, config, calibration, rows, windows)
        pairs = [found for pair in scale_pairs(load_config(config))[0] for found in pair.filled()]
        gains = {name: norm for norm, readers in pairs if norm.endswith("norm") for name in readers}
        tables = {}
        for said, transforms in PREPARED.items():
            made = bed.prepared(transforms)
            tables[said] = signals(made, largest_inputs(made, rows), rows[: sequences // 2], gains)
        losses = {
            "as it is": [bed.loss(bed.prepared(""))],
            "scales": [bed.loss(bed.scaled(seed)) for seed in range(draws)],
            "rotation": [bed.loss(bed.prepared("rotation", seed)) for seed in range(draws)],
        }
    command = (
        f"python benchmarks/signal_to_noise.py {model.name} --data {data.name} \\\n"
        f"    --calibration {calibration.name} --tokens {tokens} --sequences {sequences} --draws {draws}"
    )
    said = {"model": model.name, "torch": torch.__version__, "sequences": sequences, "calibration": calibration.name}
    head = HEAD.format(command=command, length=LENGTH, group=GROUP, **said)
    lines = [*page(head, tables, WHY.format(draws=draws, tokens=windows.predicted, data=data.name).rstrip())]
    for name, found in losses.items():
        spread = f"{statistics.stdev(found):.2f} %" if len(found) > 1 else ""
        each = ", ".join(f"{loss:+.2f}" for loss in found)
        lines.append(f"| {name} | {statistics.fmean(found):+.2f} % | {spread} | {each} |")
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(output.read_text())


if __name__ == "__main__":
    main()

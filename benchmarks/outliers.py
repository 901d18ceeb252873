"""Give a model activation outliers without changing its function: python benchmarks/outliers.py MODEL CONFIG -o DIR ...

Small models often lack the outliers that make large ones hard to quantize. Scale symmetry puts them in exactly as
SmoothQuant takes them out: a channel is multiplied in its source (norm weight, rows of up_proj) and divided in all
its targets, in float64, by the executor's own code. What was published of OPT-1.3b is imitated: among the inputs fed
by a norm the worst channel reaches 13 times the median channel, 25 times in the worst layer; inputs of down_proj
reach 20 times. The same channels are outliers in every layer, as in large models. Figures obtained this way are
synthetic and every table that holds them has to say so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from autoquant.calibration.group_maxima import collect_activation_maxima
from autoquant.config.format import Config, SmoothingKind
from autoquant.errors import AutoQuantError
from autoquant.executor.apply import apply_
from autoquant.executor.resolve import resolve
from autoquant.executor.resolved import Resolved, ResolvedGroup
from autoquant.models.structure import structure_of

Key = tuple[str, int | None]


@dataclass(frozen=True, slots=True)
class Profile:
    """Largest channel over the median channel, as multiples, and the share of channels that are outliers."""

    norm_fed: float = 13.0
    norm_fed_worst_layer: float = 25.0
    down: float = 20.0
    share: float = 0.01


def add_outliers_(
    model: nn.Module, config: Config, batches: Iterable[Tensor], profile: Profile = Profile(), seed: int = 0
) -> dict[Key, float]:
    """Scale channels of ``model`` in place; returns the measured worst / median of each group and layer afterwards.

    ``config`` names the groups. Used are those of repeated layers, from norms and, where they are wider than the hidden
    state (up -> down, fc1 -> fc2), between linears. A group that has larger outliers already keeps them.
    """
    batches = list(batches)
    resolved = _chosen(resolve(config, structure_of(model), rotate=False, smooth="all"), config)
    if not resolved.groups:
        raise AutoQuantError("the config has no norm -> linear or up -> down group in repeated layers")
    maxima = collect_activation_maxima(model, resolved, batches)
    scales = outlier_scales(resolved.groups, maxima, profile, seed)
    apply_(model, config, rotate=False, only={group.name for group in resolved.groups}, scales=scales)
    after = collect_activation_maxima(model, resolved, batches)
    return {key: worst_to_median(maximum) for key, maximum in after.items()}


def outlier_scales(
    groups: Iterable[ResolvedGroup], maxima: Mapping[Key, Tensor], profile: Profile, seed: int
) -> dict[Key, Tensor]:
    """Scales [channels] that bring the outlier channels to their multiple of the median channel, and 1 for all others.

    Multiples fall geometrically from the profile's figure to a third of it.
    """
    groups = list(groups)
    layers = sorted({group.layer for group in groups if group.layer is not None})
    generator = torch.Generator().manual_seed(seed)
    worst_layer = layers[int(torch.randint(len(layers), (), generator=generator))]
    order = {n: torch.randperm(n, generator=generator) for n in sorted({group.channels for group in groups})}
    scales = {}
    for group in groups:
        maximum = maxima[group.name, group.layer].double()
        if group.kind is SmoothingKind.NORM_LINEAR:
            top = profile.norm_fed_worst_layer if group.layer == worst_layer else profile.norm_fed
        else:
            top = profile.down
        count = max(1, round(profile.share * group.channels))
        chosen = order[group.channels][:count]
        multiples = top * 3.0 ** -torch.linspace(0, 1, count, dtype=torch.float64) if count > 1 else torch.tensor([top])
        # The median as it will be: the outliers will all lie above it.
        median = maximum.index_fill(0, chosen, torch.inf).median()
        wanted = multiples.double() * median
        s = torch.ones(group.channels, dtype=torch.float64)
        s[chosen] = torch.where(maximum[chosen] > 0, (wanted / maximum[chosen]).clamp_min(1.0), 1.0)
        scales[group.name, group.layer] = s
    return scales


def worst_to_median(maximum: Tensor) -> float:
    """Largest channel over the median channel."""
    return float(maximum.max() / maximum.median())


def _chosen(resolved: Resolved, config: Config) -> Resolved:
    hidden = config.model.hidden_size or 0

    def use(group: ResolvedGroup) -> bool:
        wide = group.kind is SmoothingKind.LINEAR_LINEAR and group.channels > hidden
        return group.layer is not None and (group.kind is SmoothingKind.NORM_LINEAR or wide)

    return Resolved((), tuple(group for group in resolved.groups if use(group)), ())


@click.command()
@click.argument("model")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--calibration", type=click.Path(path_type=Path), required=True, help="Text file.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--windows", default=16, show_default=True)
@click.option("--window", default=512, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(model: str, config: Path, calibration: Path, output: Path, windows: int, window: int, seed: int) -> None:
    """Write MODEL, float32, with synthetic outliers."""
    from transformers import AutoTokenizer

    from autoquant.calibration.windows import calibration_batches, cut_windows, tokenize
    from autoquant.checkpoint.load import load
    from autoquant.config.file import load_config

    if output.exists():
        raise click.ClickException(f"{output} exists already")
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded: Any = load(model, torch.float32)
    ids = tokenize(tokenizer, calibration.read_text(encoding="utf-8"))
    batches = list(calibration_batches(cut_windows(ids, window, tokenizer.bos_token_id), windows))
    with torch.no_grad():
        before = loaded(batches[0]).logits
        figures = add_outliers_(loaded, load_config(config), batches, seed=seed)
        change = ((loaded(batches[0]).logits - before).abs().max() / before.abs().max()).item()
    loaded.save_pretrained(output)
    tokenizer.save_pretrained(output)
    report = {"synthetic": True, "seed": seed, "source": model, "relative change of the logits": change}
    report["worst channel / median channel"] = {f"{name} {layer}": value for (name, layer), value in figures.items()}
    (output / "outliers.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

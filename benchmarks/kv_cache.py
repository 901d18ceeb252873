"""Where a static int8 cache loses: python benchmarks/kv_cache.py MODEL CONFIG --data TEST --calibration VALID

CONFIG is one that was searched for a static cache. Each row changes one thing of it; perplexity above float in percent,
with the standard error of the paired difference over windows.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
from accuracy import BATCH, Change, both, online, percent, quantization, smoothing
from torch import Tensor

from autoquant.calibration.texts import read_text
from autoquant.calibration.windows import CalibrationOptions, calibration_windows, cut_windows, rebatched, tokenize
from autoquant.checkpoint.quantize import load_float32
from autoquant.config.file import load_config
from autoquant.config.format import Config, SmoothingKind, Strategy, edited
from autoquant.evaluation.perplexity import logits_of, nll_per_window
from autoquant.models.tokenizer import load_tokenizer
from autoquant.pipeline.quantize import quantize_model_
from autoquant.pipeline.select import EVERYTHING
from autoquant.pipeline.transform import prepare_
from autoquant.quantizer import kv_cache
from autoquant.quantizer.strategies import scheme_of

INT8 = Strategy.PER_CHANNEL_STATIC_KV
CLIP = 0.8


def without_query_key(config: Config) -> Config:
    groups = tuple(edited(g, enable=False) if g.kind is SmoothingKind.QUERY_KEY else g for g in config.smoothing.groups)
    return smoothing(groups=groups)(config)


def rounded(layer: Any, plain: type[Any], keys: Tensor, values: Tensor, only: str) -> tuple[Tensor, Tensor]:
    """What a layer's cache gives back for one pass over whole windows, with only keys or only values in int8."""
    states, scale = (keys, layer.key_scale) if only == "keys" else (values, layer.value_scale)
    rows = kv_cache.pack(states, layer.granularity, scale)
    back = kv_cache.unpack(rows, states.shape[1], states.dtype, layer.granularity, scale)
    return (back, values) if only == "keys" else (keys, back)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--calibration", type=click.Path(path_type=Path), required=True)
@click.option("--tokens", default=65536, show_default=True)
def main(model: Path, config: Path, data: Path, calibration: Path, tokens: int) -> None:
    """Print the table."""
    tokenizer, base, loaded = load_tokenizer(model), load_config(config), load_float32(model)
    windows = rebatched(cut_windows(tokenize(tokenizer, read_text(data)), 512, tokenizer.bos_token_id, tokens), BATCH)
    fit = calibration_windows(tokenizer, CalibrationOptions(calibration, 64, 512, 0))
    reference = {"nll": nll_per_window(logits_of(loaded), windows).nll}
    same = both()
    r3 = both(without_query_key, online("R3"))
    rows: dict[str, tuple[Change, Strategy, str | None, float]] = {
        "float cache": (same, Strategy.PER_CHANNEL_STATIC, None, 1),
        "int8 cache": (same, INT8, None, 1),
        "int8 keys, float values": (same, INT8, "keys", 1),
        "float keys, int8 values": (same, INT8, "values", 1),
        "without query-key scales": (without_query_key, INT8, None, 1),
        "R3 instead of them": (r3, INT8, None, 1),
        "with a prefix": (quantization(prefix=(tokenizer.bos_token_id,)), INT8, None, 1),
        f"keys clipped to {CLIP} of their range": (same, INT8, None, CLIP),
        "per token, float cache": (same, Strategy.PER_CHANNEL_PER_TOKEN, None, 1),
        "per token, int8 cache": (same, Strategy.PER_CHANNEL_PER_TOKEN_KV, None, 1),
    }
    click.echo("| | above float, % |\n| --- | ---: |")
    for name, (change, strategy, only, clip) in rows.items():
        made, changed = copy.deepcopy(loaded), change(base)
        cached = scheme_of(strategy).kv_cache is not None
        swept = prepare_(made, changed, strategy, EVERYTHING, fit, cache=cached).swept
        quantize_model_(made, changed, strategy, swept, fit)
        if clip != 1:
            made.get_submodule(kv_cache.MODULE).key.mul_(clip)
        update = partial(rounded, only=only) if only else kv_cache._update
        with mock.patch.object(kv_cache, "_update", update):
            nll = nll_per_window(logits_of(made), windows).nll
        click.echo(f"| {name} | {percent({'nll': nll, 'counts': windows.counts}, reference)} |")


if __name__ == "__main__":
    main()

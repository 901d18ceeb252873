from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from autoquant.errors import AutoQuantError

if TYPE_CHECKING:
    from torch import Tensor

    from autoquant.config.format import Config
    from autoquant.executor.resolved import Resolved

Key = tuple[str, int | None]


@click.command()
@click.argument("model")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--rotate/--no-rotate", default=True, show_default=True, help="Apply the config's enabled rotations.")
@click.option(
    "--smooth",
    type=click.Choice(["fc_fc", "all", "none"]),
    default="all",
    show_default=True,
    help="fc_fc: only v -> o, up -> down, fc1 -> fc2; all: also norm -> linear where no rotation took the norm's gain.",
)
@click.option("--alpha", type=click.FloatRange(0, 1), help="SmoothQuant's alpha for every group.  [default: config]")
@click.option("--calibration", type=click.Path(path_type=Path), help="Text, JSONL or dataset folder for smoothing.")
@click.option("--maxima", type=click.Path(path_type=Path), help="Activation maxima of an earlier --save-maxima.")
@click.option("--save-maxima", type=click.Path(path_type=Path), help="Keep the activation maxima (safetensors).")
@click.option("--sequences", type=click.IntRange(1), default=128, show_default=True, help="Calibration sequences.")
@click.option("--length", type=click.IntRange(2), default=512, show_default=True, help="Tokens each, BOS included.")
@click.option("--seed", type=click.IntRange(0), help="Replaces rotation.seed and picks the calibration sequences.")
@click.option(
    "--dtype",
    type=click.Choice(["as-stored", "float32", "bfloat16", "float16", "float64"]),
    default="as-stored",
    show_default=True,
    help="Of the weights written; folding is in float64 always.",
)
@click.option("--force", is_flag=True, help="Replace the folder if it exists.")
@click.option("--quiet", is_flag=True, help="No progress bars, no summary.")
def command(
    model: str,
    config: Path,
    output: Path,
    rotate: bool,
    smooth: Literal["fc_fc", "all", "none"],
    alpha: float | None,
    calibration: Path | None,
    maxima: Path | None,
    save_maxima: Path | None,
    sequences: int,
    length: int,
    seed: int | None,
    dtype: str,
    force: bool,
    quiet: bool,
) -> None:
    """Rotate and smooth a checkpoint by a config, its function unchanged.

    MODEL is a folder with safetensors, or a hub id. The result loads with plain transformers.
    """
    from autoquant.config.file import load_config

    loaded = load_config(config)
    source = _folder(model)

    import torch

    from autoquant.algorithms.smoothquant import group_scales
    from autoquant.checkpoint.apply import apply_checkpoint, build_skeleton, check_plain_resolved
    from autoquant.executor.resolve import resolve
    from autoquant.io.folders import check_target
    from autoquant.io.safetensors_stream import open_shards
    from autoquant.models.inventory import take_inventory

    check_target(source, output, force)
    open_shards(source)
    resolved = resolve(loaded, take_inventory(build_skeleton(source)), rotate=rotate, smooth=smooth, seed=seed)
    check_plain_resolved(resolved)
    scales = None
    if resolved.groups:
        if calibration is None and maxima is None:
            raise AutoQuantError("smoothing needs --calibration FILE (or --maxima FILE); --smooth none goes without")
        rotated = _load(source, loaded, resolved, seed)
        if maxima is not None:
            found = _read_maxima(maxima)
        else:
            assert calibration is not None
            ids = _token_ids(source, calibration)
            with _bar("calibrate", sequences, quiet) as advance:
                found = _calibrate(rotated, resolved, ids, sequences, length, seed or 0, advance)
        if save_maxima is not None:
            _write_maxima(save_maxima, found)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scales = group_scales(resolved, found, rotated.get_parameter, alpha)
        for warning in caught:
            click.echo(f"warning: {warning.message}", err=True)
        del rotated
    options = {
        "rotate": rotate,
        "smooth": smooth,
        "alpha": alpha,
        "seed": seed,
        "sequences": sequences,
        "length": length,
        "dtype": dtype,
        "calibration": calibration and str(calibration),
        "maxima": maxima and str(maxima),
    }
    with _bar("apply", None, quiet) as advance:
        applied = apply_checkpoint(
            source,
            loaded,
            output,
            rotate=rotate,
            smooth=smooth,
            scales=scales,
            seed=seed,
            force=force,
            dtype=None if dtype == "as-stored" else getattr(torch, dtype),
            options=options,
            progress=advance,
        )
    if not quiet:
        for space, construction in applied.constructions.items():
            click.echo(f"{space}: {construction}")
        untied = f", untied: {', '.join(applied.untied)}" if applied.untied else ""
        click.echo(f"{output}: {applied.tensors} tensors changed, {len(resolved.groups)} groups smoothed{untied}")


def _folder(model: str) -> Path:
    """The checkpoint's folder: a local one, or a hub id's snapshot."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise AutoQuantError(f"{model}: not a folder; expected a checkpoint of transformers")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # offline, unknown, gated: the hub client has many exceptions of its own
        raise AutoQuantError(
            f"{model}: not a folder, and not to be had from the hub ({type(error).__name__})"
        ) from error


def _load(source: Path, config: Config, resolved: Resolved, seed: int | None) -> Any:
    """The model in float32, rotated as it will be: the activations that smoothing will meet."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from autoquant.executor.apply import apply_
    from autoquant.models.load import class_of

    disable_progress_bar()
    if (auto := class_of(source)) is not AutoModelForCausalLM:
        raise AutoQuantError(
            f"{source}: smoothing is calibrated on text, which does not reach all of a model of {auto.__name__}; "
            "use --smooth none"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise AutoQuantError(f"{source}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if torch.cuda.is_available():
        model = model.cuda()
    if resolved.spaces:
        apply_(model, config, smooth="none", seed=seed)
    return model


def _token_ids(source: Path, calibration: Path) -> tuple[list[int], int | None]:
    """Token ids of the calibration texts, and the BOS token where the tokenizer has one."""
    from transformers import AutoTokenizer

    from autoquant.calibration.texts import read_text
    from autoquant.calibration.windows import tokenize

    text = read_text(calibration)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise AutoQuantError(f"{source}: no tokenizer: {' '.join(str(error).split())}") from error
    return tokenize(tokenizer, text), tokenizer.bos_token_id


def _calibrate(
    model: Any,
    resolved: Resolved,
    ids: tuple[list[int], int | None],
    sequences: int,
    length: int,
    seed: int,
    advance: Callable[[int, int], None],
) -> dict[Key, Tensor]:
    from autoquant.calibration.group_maxima import collect_activation_maxima
    from autoquant.calibration.windows import calibration_batches, cut_windows

    tokens, bos = ids
    windows = cut_windows(tokens, length - (bos is not None), bos)
    batches = calibration_batches(windows, sequences, seed)
    return collect_activation_maxima(model, resolved, batches, progress=advance)


def _write_maxima(path: Path, maxima: dict[Key, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name if layer is None else f"{name}@{layer}": tensor for (name, layer), tensor in maxima.items()}, path)


def _read_maxima(path: Path) -> dict[Key, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AutoQuantError(f"{path}: no activation maxima ({error})") from error
    split = {key: key.rpartition("@") for key in stored}
    return {(name, int(layer)) if name else (key, None): stored[key] for key, (name, _, layer) in split.items()}


@contextmanager
def _bar(label: str, total: int | None, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with the time left on a terminal's stderr, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=quiet or not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done, of: progress.update(task, completed=done, total=of)

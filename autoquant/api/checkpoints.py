"""Models transformed and quantized, and the way back from a folder to a runnable one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant.api.arguments import (
    IMPORTING,
    analyzed_config,
    batches_of,
    by_line,
    config_of,
    dtype_of,
    proof_of,
    transforms_of,
)
from autoquant.config.strategies import parse_strategy
from autoquant.errors import AutoQuantError
from autoquant.steps import Progress, silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from autoquant.checkpoint.quantize import Done, Recipe
    from autoquant.checkpoint.transform import TransformOptions
    from autoquant.config.format import Config, Strategy
    from autoquant.models.reading import Example
    from autoquant.pipeline.select import Transforms
    from autoquant.report.results import Written

ALL_TRANSFORMS = "smooth+fc_fc+rotation"
"""Everything that the config enables."""
_NEEDS = "needs a config and takes no output, media, format, target, device or dtype"
WEIGHTS = (".safetensors", ".onnx", ".data")
"""How files end that hold weights, of a checkpoint and of what is made of it."""
_REASONS = 3
"""Why the format is another than the usual one: so many sentences at most."""


@by_line
def apply(
    model: str | Path | nn.Module,
    config: str | Path | Config,
    output: str | Path | None = None,
    *,
    transforms: str | Transforms = ALL_TRANSFORMS,
    calibration: str | Path | Sequence[Tensor] | None = None,
    media: str | Path | None = None,
    tokenizer: Any = None,
    maxima: str | Path | None = None,
    save_maxima: str | Path | None = None,
    field: str = "text",
    sequences: int = 16,
    length: int = 512,
    seed: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str = "auto",
    workers: int | None = None,
    inplace: bool = False,
    force: bool = False,
    example_inputs: Any = None,
    unproved: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Any:
    """Rotate and smooth by a config, the function unchanged: a checkpoint to the folder ``output``, or a module.

    Of a folder or hub id the result says what was written, which loads with plain transformers; of a module it is the
    changed module, a copy unless ``inplace``. ``calibration``: batches of token ids [1, S], or a text, for a module
    with the ``tokenizer`` that reads it; only smoothing needs one. ``field``: the column of a text that has columns. A
    folder without one is calibrated on a packaged text, which the result says. For folders alone: ``media``, a folder
    of images or sounds that calibrate beside the text, each with its words in a .txt of its name; ``maxima`` kept by an
    earlier ``save_maxima``, in place of calibration, the ``dtype`` of the weights written (None: as stored), the
    ``device`` that calibrates and folds ('auto': a GPU where there is one) and the ``workers`` beside it (None: one for
    each core).

    Claims that were edited since they were proved are proved again, of a module on what ``example_inputs`` call (as for
    :func:`analyze`); ``unproved`` goes on without, which is recorded.

    Raises AutoQuantError, with nothing written, where anything does not fit or is not proved, and where smoothing has
    nothing to calibrate on.
    """
    loaded = config_of(config)
    progress(IMPORTING, 0, 0)
    chosen = transforms_of(transforms)
    if isinstance(model, str | Path):
        if output is None:
            raise AutoQuantError(f"{model}: a folder needs an output")
        from autoquant.calibration.windows import CalibrationOptions
        from autoquant.checkpoint.transform import TransformOptions

        if calibration is None and maxima is None and chosen.alphas:
            calibration = _default_text(model, media, trust_remote_code)
        text = Path(calibration) if isinstance(calibration, str | Path) else None
        part = CalibrationOptions(text, sequences, length, seed, field)
        given = part if calibration is None or isinstance(calibration, str | Path) else calibration
        shown, kept, keep = (None if path is None else Path(path) for path in (media, maxima, save_maxima))
        wanted = TransformOptions(chosen, given, shown, kept, keep, seed, dtype_of(dtype), device, workers)
        recorded = {"calibration": text, "maxima": maxima, "sequences": sequences, "length": length, "seed": seed}
        how = (force, unproved, trust_remote_code, progress)
        return _applied(str(model), Path(output), loaded, wanted, {**recorded, **_named(media)}, *how)
    if (output, media, maxima, save_maxima, dtype, device, workers) != (None, None, None, None, None, "auto", None):
        raise AutoQuantError("a module in memory takes no output, media, maxima, save_maxima, dtype, device or workers")
    from autoquant.capture.copies import copied
    from autoquant.models.structure import structure_of
    from autoquant.pipeline.of_text import of_text_said
    from autoquant.pipeline.quantize import select
    from autoquant.pipeline.transform import prepare_

    batches = batches_of(calibration, tokenizer, field, sequences, length, seed)
    selected = select(loaded, structure_of(model), chosen, seed)
    if selected.resolved.groups and not batches:
        raise AutoQuantError("smoothing needs calibration; the transforms 'rotation' and 'none' go without")
    proof_of(loaded, model, example_inputs, unproved, trust_remote_code, progress)
    changed = model if inplace else copied(model)
    if batches:
        loaded = of_text_said(loaded, changed)
    prepare_(changed, loaded, loaded.quantization.strategy, chosen, batches, seed, cache=False, tell=progress)
    return changed


def _applied(
    model: str,
    target: Path,
    config: Config,
    wanted: TransformOptions,
    recorded: dict[str, Any],
    force: bool,
    unproved: bool,
    trust_remote_code: bool,
    progress: Progress,
) -> Written:
    from autoquant.calibration.texts import PACKAGED
    from autoquant.checkpoint.transform import transform_checkpoint
    from autoquant.io.folders import check_target
    from autoquant.models.checkpoint_source import checkpoint_folder
    from autoquant.report.results import Written

    dtype = "as-stored" if wanted.dtype is None else str(wanted.dtype).removeprefix("torch.")
    options = {name: str(value) if isinstance(value, Path) else value for name, value in recorded.items()}
    options |= {"transforms": str(wanted.transforms), "dtype": dtype}
    folder = checkpoint_folder(model, trust_remote_code=trust_remote_code)
    check_target(folder, target, force)
    wanted = replace(wanted, proof=proof_of(config, folder, None, unproved, trust_remote_code, progress))
    done = transform_checkpoint(
        folder,
        config,
        target,
        wanted,
        recorded=options,
        force=force,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    applied = done.applied
    untied = f", untied: {', '.join(applied.untied)}" if applied.untied else ""
    counts = f"{target}: {applied.tensors} tensors changed, {done.smoothed} groups smoothed{untied}"
    said = [*(f"{space}: {text}" for space, text in applied.constructions.items()), counts]
    said += [packaged_text(recorded)] if done.smoothed and recorded["calibration"] == PACKAGED else []
    facts = {"tensors_changed": applied.tensors, "groups_smoothed": done.smoothed, "untied": list(applied.untied)}
    return Written(target, tuple(said), {**options, "rotations": dict(applied.constructions), **facts})


def _named(media: str | Path | None) -> dict[str, Any]:
    """What is recorded of a folder of images or sounds."""
    return {} if media is None else {"media": Path(media).name}


def _default_text(model: str | Path, media: str | Path | None, trust_remote_code: bool) -> Path | None:
    """The packaged text; None beside images or sounds for a model that does not run without them."""
    from autoquant.calibration.texts import PACKAGED
    from autoquant.models.checkpoint_source import checkpoint_folder
    from autoquant.models.inputs import reads_text
    from autoquant.models.load import load_skeleton

    if media is None:
        return PACKAGED
    folder = checkpoint_folder(model, trust_remote_code=trust_remote_code)
    return PACKAGED if reads_text(load_skeleton(folder, trust_remote_code=trust_remote_code)) else None


@by_line
def quantize(
    model: str | Path | nn.Module,
    config: str | Path | Config | None = None,
    output: str | Path | None = None,
    *,
    strategy: str | None = None,
    transforms: str | Transforms = ALL_TRANSFORMS,
    calibration: str | Path | Sequence[Tensor] | None = None,
    media: str | Path | None = None,
    tokenizer: Any = None,
    field: str = "text",
    sequences: int = 16,
    length: int = 512,
    seed: int | None = None,
    format: str | None = None,
    target: str | None = None,
    low_memory: bool = False,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    inplace: bool = False,
    force: bool = False,
    example_inputs: Any = None,
    unproved: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Any:
    """Rotate, smooth and quantize to int8: a folder to the folder ``output``, or a module in memory.

    Of a folder the result says what was written (``load`` makes a runnable model of it); of a module it is the changed
    module, a copy unless ``inplace``, whose ``save_pretrained`` writes a native folder. Without a ``config`` a folder
    is analyzed first; without ``calibration`` it is calibrated on a packaged text, which the result says. ``field``:
    the column of a text that has columns. ``media``: a folder of images or sounds that calibrate a folder's model
    beside the text, each with its words in a .txt of its name; what text alone does not reach stays in floating point
    without. Claims that were edited since they were proved are proved again, of a module on what ``example_inputs``
    call; ``unproved`` goes on without, which is recorded.

    ``format``: 'compressed-tensors', which servers load, 'native', which holds everything, or 'onnx'; None: the first
    where it can hold the result. ``target``: what is to serve it, 'vllm', 'sglang', 'transformers', 'any' or
    'onnxruntime'; None: vllm, if it can. ``low_memory``: refuse what needs more than one layer in memory. ``device``:
    where a folder's model is run and changed; ``dtype``: of its sweep, None or 'auto': bfloat16 on a GPU where the
    folder has it, else float32. Raises AutoQuantError, with nothing written, where anything does not fit.
    """
    chosen, used = transforms_of(transforms), None if strategy is None else parse_strategy(strategy)
    progress(IMPORTING, 0, 0)
    from autoquant.checkpoint.formats import Wish
    from autoquant.checkpoint.quantize import Recipe, quantize_checkpoint

    wish = Wish(format, target)
    if not isinstance(model, str | Path):
        if config is None or (output, media, dtype, device) != (None, None, None, "auto") or wish != Wish():
            raise AutoQuantError(f"a module in memory {_NEEDS}; save_pretrained writes it")
        batches = batches_of(calibration, tokenizer, field, sequences, length, seed)
        loaded = config_of(config)
        recipe = Recipe(loaded, used or loaded.quantization.strategy, chosen, batches, seed)
        return _quantized_module(model, inplace, recipe, example_inputs, unproved, trust_remote_code, progress)
    if output is None:
        raise AutoQuantError(f"{model}: a folder needs an output")
    from autoquant.models.device import device_of
    from autoquant.models.tokenizer import load_tokenizer

    place = device_of(device)
    source, folder = _folders(model, Path(output), force, trust_remote_code)
    loaded = analyzed_config(config, source, trust_remote_code, progress)
    needed, examples = _calibrates(source, loaded, used, chosen, media, trust_remote_code)
    packaged = calibration is None and needed
    if packaged:
        calibration = _default_text(source, media, trust_remote_code)
    if isinstance(calibration, str | Path):
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    text = batches_of(calibration, tokenizer, field, sequences, length, seed)
    proof = proof_of(loaded, source, None, unproved, trust_remote_code, progress)
    recipe = Recipe(loaded, used or loaded.quantization.strategy, chosen, (*examples, *text), seed, proof)
    name = Path(calibration).name if isinstance(calibration, str | Path) else None
    options = {"strategy": recipe.strategy.value, "transforms": str(chosen), "seed": seed}
    options |= {"sequences": sequences, "length": length, "calibration": name, **_named(media)}
    how: dict[str, Any] = {"low_memory": low_memory, "force": force, "dtype": dtype_of(dtype), "device": place}
    how |= {"wish": wish, "trust_remote_code": trust_remote_code, "progress": progress}
    done = quantize_checkpoint(source, folder, recipe, options, **how)
    return _quantized(done, source, folder, f"{recipe.strategy.value} after {chosen}", options, packaged and bool(text))


def _folders(model: str | Path, output: Path, force: bool, trust_remote_code: bool) -> tuple[Path, Path]:
    """The folder that is read, and the one that may be written."""
    from autoquant.calibration.processes import is_first
    from autoquant.io.folders import check_target
    from autoquant.models.checkpoint_source import checkpoint_folder

    source = checkpoint_folder(model, trust_remote_code=trust_remote_code)
    if is_first():
        check_target(source, output, force)
    return source, output


def _quantized_module(
    model: nn.Module,
    inplace: bool,
    recipe: Recipe,
    example_inputs: Any,
    unproved: bool,
    trust_remote_code: bool,
    progress: Progress,
) -> nn.Module:
    from autoquant.capture.copies import copied
    from autoquant.checkpoint.in_memory import quantize_module_

    changed = model if inplace else copied(model)
    proof = proof_of(recipe.config, changed, example_inputs, unproved, trust_remote_code, progress)
    return quantize_module_(changed, replace(recipe, proof=proof), progress)


def _calibrates(
    source: Path, config: Config, used: Strategy | None, chosen: Transforms, media: str | Path | None, trust: bool
) -> tuple[bool, tuple[Example, ...]]:
    """Whether this cannot be done without calibration, and the images and sounds of it. Raises AutoQuantError for what
    cannot calibrate the model.
    """
    from autoquant.calibration.media import read_media
    from autoquant.models.load import load_skeleton
    from autoquant.models.reading import check_reads_text
    from autoquant.models.structure import structure_of
    from autoquant.pipeline.quantize import needs_sweep, select

    skeleton = load_skeleton(source, trust_remote_code=trust)
    selected = select(config, structure_of(skeleton), chosen, None)
    needed = needs_sweep(config, used or config.quantization.strategy, selected)
    if needed and media is None:
        check_reads_text(skeleton)
    return needed, () if media is None else read_media(Path(media), source, skeleton, trust_remote_code=trust)


def packaged_text(options: Mapping[str, Any]) -> str:
    """One line that says what was calibrated on where no text was given."""
    tokens = options["sequences"] * options["length"]
    return f"calibrated on {tokens:,} tokens of the packaged text; better on text of its use: --calibration TEXT"


def _quantized(done: Done, source: Path, folder: Path, what: str, options: dict[str, Any], packaged: bool) -> Written:
    from autoquant.calibration.idle_experts import idle_text
    from autoquant.report.results import Written

    idle, form = done.quantized.idle, done.chosen.form
    before, after = (
        sum(path.stat().st_size for path in place.iterdir() if path.suffix in WEIGHTS) for place in (source, folder)
    )
    said = [f"{folder}: {what}, {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB, {form}"]
    said += [f"format native, not compressed-tensors: {reason}" for reason in done.chosen.against[:_REASONS]]
    said += [packaged_text(options)] if packaged else []
    said += [idle_text(idle)] if idle else []
    facts = {"format": form, "bytes_before": before, "bytes_after": after, "idle_experts": dict(idle)}
    return Written(folder, tuple(said), {**options, **facts})


def convert(
    model: str | Path,
    output: str | Path,
    *,
    to: str,
    target: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Written:
    """Write a folder of :func:`quantize` in another format, where nothing is lost; back again gives the same bytes.

    ``target``: what is to serve it, as for :func:`quantize`. Raises AutoQuantError, with nothing written, where it is
    no such folder or the format or the target cannot take it.
    """
    from autoquant.checkpoint.convert import convert_checkpoint
    from autoquant.checkpoint.formats import Wish
    from autoquant.report.results import Written

    was = convert_checkpoint(
        Path(model), Path(output), Wish(to, target), force=force, trust_remote_code=trust_remote_code
    )
    return Written(Path(output), (f"{output}: {was} -> {to}",), {"source": str(model), "format": to})


def load(
    model: str | Path,
    dtype: str | torch.dtype | None = None,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """A runnable model from a folder of :func:`quantize`, or any causal LM that transformers loads.

    ``dtype`` is that of everything that is not int8, None or 'auto': as stored. ``trust_remote_code``: run the code
    that the folder brings along. ``save_pretrained`` of a quantized one writes such a folder again. Raises
    AutoQuantError where there is no such model.
    """
    from autoquant.checkpoint.in_memory import saved_again_
    from autoquant.checkpoint.load import load as read
    from autoquant.models.device import device_of

    loaded = read(model, dtype_of(dtype), trust_remote_code=trust_remote_code).to(device_of(device))
    saved_again_(loaded, Path(model))
    return loaded

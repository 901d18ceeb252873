"""What ``import autoquant`` offers; the commands are options in front of it and a report behind it.

torch and transformers are imported when a function needs them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autoquant.config.file import load_config as _load_config
from autoquant.config.file import save_config as _save_config
from autoquant.config.format import SCHEMA_NAME
from autoquant.config.jsonschema import schema_text
from autoquant.config.spelling import did_you_mean
from autoquant.config.strategies import parse_strategies, parse_strategy
from autoquant.errors import AutoQuantError
from autoquant.io.files import write_text
from autoquant.models.tasks import Kind
from autoquant.steps import Progress, silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from autoquant.config.format import Config
    from autoquant.models.source import ModelSource
    from autoquant.pipeline.select import Transforms
    from autoquant.report.results import Analysis, Checked, Compared, Evaluated, Found, Verification

ALL_TRANSFORMS = "smooth+fc_fc+rotation"
"""Everything that the config enables."""
COMPARED_TRANSFORMS = "none,smooth:0.85,smooth:0.5,smooth:0.5+fc_fc,fc_fc:0.5+rotation"
KNOBS = "prefix,clip,rotation,online,alpha,descent,cache,weights,bias,spikes"
JUDGED_TOGETHER = 8
"""Held-out windows in one forward pass, where no scale spans them."""
IMPORTING = "importing torch and transformers"


def load_config(path: str | Path) -> Config:
    """Read and check a config file. Raises AutoQuantError for every problem in it."""
    return _load_config(Path(path))


def save_config(config: Config, path: str | Path, *, force: bool = False) -> None:
    """Write a config, whole or not at all; ``force`` replaces a file. Raises AutoQuantError.

    The schema is put beside it where its ``$schema`` says so: an editor completes and checks the file offline.
    """
    path = Path(path)
    _save_config(config, path, force=force)
    if config.schema_ in (None, SCHEMA_NAME):
        write_text(path.parent / SCHEMA_NAME, schema_text(), force=True)


def analyze(
    model: str | Path | nn.Module,
    *,
    example_inputs: Any = None,
    layers: int | None = None,
    full: bool = False,
    capture: Literal["auto", "dynamo", "export"] = "auto",
    task: Kind | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> Analysis:
    """What can be smoothed and rotated in a model, read off its graph and proved on a small one; no weights are read.

    ``model``: a model type of transformers, a folder or config.json, a hub id, ``package.module:factory``, or a module,
    with ``example_inputs`` (a tuple, a dict or ``(args, kwargs)``) unless it is one of transformers. ``layers``: so
    many only; ``full``: trace every layer; ``task``: where a type has several; ``verify`` False leaves the proof out.

    Raises AutoQuantError where the model cannot be built or captured, or a claim does not hold.
    """
    progress(IMPORTING, 0, 0)
    from autoquant.analyzer.analyze import analyze as find
    from autoquant.analyzer.explain import explain
    from autoquant.certificate.certify import certify
    from autoquant.config.format import Certificate, edited
    from autoquant.report.explanation import explanation_text
    from autoquant.report.results import Analysis

    source = _source(model, example_inputs, layers, task, trust_remote_code)
    tell = _steps(progress)
    found = find(source, how=capture, full=full, progress=tell)
    unproved = edited(found.config, certificate=Certificate(proved=False))
    config = certify(found, source, progress=tell) if verify else unproved
    return Analysis(
        config,
        found.captured.how,
        found.seconds,
        tuple(found.findings.unknown_operators),
        lambda path: explanation_text(explain(found.analysis, found.stacks, path), path),
    )


def check(
    config: str | Path | Config,
    model: str | Path | nn.Module | None = None,
    *,
    example_inputs: Any = None,
    layers: int | None = None,
    task: Kind | None = None,
    trust_remote_code: bool = False,
) -> Checked:
    """Check a config and, given a ``model`` (as for :func:`analyze`; no weights), every path, shape, range and tie.

    Raises AutoQuantError with all problems, each as one line.
    """
    from autoquant.report.results import Checked

    file, loaded = _name(config, "config"), _config(config)
    if model is None:
        return Checked(loaded, file)
    from autoquant.config.check import json_path
    from autoquant.executor.resolve import problems
    from autoquant.models.fit import MAX_EXPLAINED, problems_error
    from autoquant.models.source import build_structure
    from autoquant.models.structure import structure_of

    name = _name(model, type(model).__name__)
    source = _source(model, example_inputs, layers, task, trust_remote_code)
    found = problems(loaded, structure_of(build_structure(source)))
    if found and isinstance(config, str | Path):
        raise problems_error(Path(config), name, found)
    if found:  # no file, so no lines to point to
        details = tuple(f"{json_path(problem.path)}: {problem.message}" for problem in found[:MAX_EXPLAINED])
        raise AutoQuantError(f"the config does not fit {name}: {len(found)} problems", details)
    return Checked(loaded, file, name)


def verify(
    model: str | Path | nn.Module,
    config: str | Path | Config,
    *,
    example_inputs: Any = None,
    dtype: Literal["float64", "float32"] = "float64",
    seed: int = 0,
    small: bool = False,
    layers: int | None = None,
    task: Kind | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Verification:
    """Try every claim of a config alone and all together, with random scales and rotations, and compare the logits.

    On a folder's own weights where it has some, else (and with ``small``) on a small random model of the same
    structure. Whether all hold is in the result. Raises AutoQuantError where the config is for another structure.
    """
    loaded = _config(config)
    progress(IMPORTING, 0, 0)
    import torch

    from autoquant.certificate.verify import verify_small, verify_weights
    from autoquant.report.results import Verification

    name, tell, precision = _name(model, type(model).__name__), _steps(progress), getattr(torch, dtype)
    folder = Path(name).expanduser()
    own = not small and isinstance(model, str | Path) and folder.is_dir() and any(folder.glob("*.safetensors*"))
    if own:
        verified = verify_weights(
            folder, loaded, dtype=precision, seed=seed, trust_remote_code=trust_remote_code, progress=tell
        )
    else:
        source = _source(model, example_inputs, layers, task, trust_remote_code)
        verified = verify_small(source, loaded, dtype=precision, seed=seed, progress=tell)
    proof = verified.proof
    return Verification(name, own, proof.trials, verified.refused, proof.tolerance, proof.coverage)


def apply(
    module: nn.Module,
    config: str | Path | Config,
    *,
    transforms: str | Transforms = ALL_TRANSFORMS,
    calibration: str | Path | Sequence[Tensor] | None = None,
    tokenizer: Any = None,
    sequences: int = 16,
    length: int = 512,
    seed: int | None = None,
    inplace: bool = False,
    progress: Progress = silent,
) -> nn.Module:
    """A module rotated and smoothed by a config, its function unchanged; a copy unless ``inplace``.

    ``calibration``: batches of token ids [1, S], or a text with the ``tokenizer`` that reads it; only smoothing needs
    one. Raises AutoQuantError where the config does not fit, and where smoothing has nothing to calibrate on.
    """
    loaded, chosen = _config(config), _transforms(transforms)
    from autoquant.models.structure import structure_of
    from autoquant.pipeline.quantize import select
    from autoquant.pipeline.transform import prepare_

    batches = _batches(calibration, tokenizer, sequences, length, seed)
    selected = select(loaded, structure_of(module), chosen, seed)
    if selected.resolved.groups and not batches:
        raise AutoQuantError("smoothing needs calibration; the transforms 'rotation' and 'none' go without")
    changed = module if inplace else copy.deepcopy(module)
    prepare_(changed, loaded, loaded.quantization.strategy, chosen, batches, seed, cache=False, tell=progress)
    return changed


def quantize(
    model: str | Path | nn.Module,
    config: str | Path | Config | None = None,
    output: str | Path | None = None,
    *,
    strategy: str | None = None,
    transforms: str | Transforms = ALL_TRANSFORMS,
    calibration: str | Path | Sequence[Tensor] | None = None,
    tokenizer: Any = None,
    sequences: int = 16,
    length: int = 512,
    seed: int | None = None,
    low_memory: bool = False,
    inplace: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> Any:
    """Rotate, smooth and quantize to int8: a folder to the folder ``output``, or a module in memory.

    Of a folder the result says what was written (``load`` makes a runnable model of it); of a module it is the changed
    module, a copy unless ``inplace``, whose ``save_pretrained`` writes such a folder. Without a ``config`` a folder is
    analyzed first. Raises AutoQuantError, with nothing written, where anything does not fit.
    """
    chosen, used = _transforms(transforms), None if strategy is None else parse_strategy(strategy)
    progress(IMPORTING, 0, 0)
    from autoquant.checkpoint.quantize import Recipe, config_for, quantize_checkpoint

    if not isinstance(model, str | Path):
        if config is None or output is not None:
            raise AutoQuantError("a module in memory needs a config and takes no output; save_pretrained writes it")
        loaded = _config(config)
        batches = _batches(calibration, tokenizer, sequences, length, seed)
        recipe = Recipe(loaded, used or loaded.quantization.strategy, chosen, batches, seed)
        from autoquant.checkpoint.in_memory import quantize_module_

        return quantize_module_(model if inplace else copy.deepcopy(model), recipe, progress)
    if output is None:
        raise AutoQuantError(f"{model}: a folder needs an output")
    from autoquant.calibration.idle_experts import idle_text
    from autoquant.io.folders import check_target
    from autoquant.models.tokenizer import load_tokenizer
    from autoquant.report.results import Written

    source, target = Path(model), Path(output)
    check_target(source, target, force)
    loaded = _config(config) if config is not None else config_for(str(source), None, _steps(progress))
    reads = isinstance(calibration, str | Path)
    batches = _batches(calibration, load_tokenizer(source) if reads else None, sequences, length, seed)
    recipe = Recipe(loaded, used or loaded.quantization.strategy, chosen, batches, seed)
    options = {
        "strategy": recipe.strategy.value,
        "transforms": str(chosen),
        "seed": seed,
        "sequences": sequences,
        "length": length,
        "calibration": Path(calibration).name if isinstance(calibration, str | Path) else None,
    }
    done = quantize_checkpoint(source, target, recipe, options, low_memory=low_memory, force=force, progress=progress)
    before, after = (sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (source, target))
    said = f"{target}: {recipe.strategy.value} after {chosen}, {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB"
    idle = (idle_text(done.idle),) if done.idle else ()
    facts = {"bytes_before": before, "bytes_after": after, "idle_experts": dict(done.idle)}
    return Written(target, (said, *idle), {**options, **facts})


def search(
    model: str | Path,
    config: str | Path | Config,
    *,
    calibration: str | Path,
    strategy: str | None = None,
    budget: float = 30.0,
    sequences: int = 64,
    held_out: int = 32,
    length: int = 512,
    knobs: str | Collection[str] = KNOBS,
    per_token: int = 0,
    offline: bool = False,
    seed: int = 0,
    device: str = "auto",
    tell: Callable[[str], None] = lambda line: None,
) -> Found:
    """Set a config's knobs for one strategy by what they do on held-out calibration text.

    ``model`` is a folder. ``sequences`` windows of ``length`` tokens are fitted on, ``held_out`` further ones judge;
    ``budget``: minutes. ``tell`` is told of each candidate. Raises AutoQuantError.
    """
    loaded = _config(config)
    chosen = loaded.quantization.strategy if strategy is None else parse_strategy(strategy)
    from autoquant.calibration.windows import CalibrationOptions, Windows, calibration_windows, rebatched
    from autoquant.checkpoint.quantize import load_float32
    from autoquant.evaluation.compare import shares_scale
    from autoquant.models.device import device_of
    from autoquant.models.tokenizer import load_tokenizer
    from autoquant.report.results import Found
    from autoquant.searcher.candidates.knobs import KNOBS as KNOWN
    from autoquant.searcher.judge import Task
    from autoquant.searcher.search import search as find

    names = knobs.split(",") if isinstance(knobs, str) else list(knobs)
    for name in names:
        if name not in KNOWN:
            raise AutoQuantError(f"no knob '{name}'{did_you_mean(name, list(KNOWN))}; there are {', '.join(KNOWN)}")
    folder, text, place = Path(model), Path(calibration), device_of(device)
    tokenizer = load_tokenizer(folder)
    lower = "--sequences, --held-out or --length"
    windows = calibration_windows(tokenizer, CalibrationOptions(text, sequences + held_out, length, seed, lower=lower))
    judging = Windows(windows[sequences:], tokenizer.bos_token_id is not None)
    if not shares_scale(chosen):
        judging = rebatched(judging, JUDGED_TOGETHER)
    task = Task(
        load=lambda: load_float32(folder).to(place),
        strategy=chosen,
        fit=windows[:sequences],
        held_out=judging.batches,
        calibration=text.name,
        seed=seed,
        per_token=per_token,
        bos=tokenizer.bos_token_id,
        offline=offline,
        knobs=frozenset(names),
    )
    return Found(find(task, loaded, budget, tell))


def evaluate(
    models: str | Path | Sequence[str | Path],
    data: str | Path,
    *,
    reference: str | Path | None = None,
    length: int = 512,
    tokens: int | None = None,
    batch: int = 1,
    dtype: str = "float32",
    device: str = "auto",
    progress: Progress = silent,
) -> Evaluated:
    """Perplexity of models on a text, with standard errors over windows of ``length`` tokens.

    ``models``: folders of :func:`quantize` or whatever transformers loads; ``reference``: also compare the logits with
    this model's; ``tokens``: use the first so many only. Raises AutoQuantError where tokenizers differ.
    """
    from autoquant.calibration.texts import read_text

    text = read_text(Path(data))
    progress(IMPORTING, 0, 0)
    from autoquant.calibration.windows import cut_windows, tokenize
    from autoquant.evaluation.perplexity import Evaluation, logits_of
    from autoquant.evaluation.perplexity import evaluate as measure
    from autoquant.models.tokenizer import load_tokenizer
    from autoquant.report.results import Evaluated

    def tokens_of(name: str) -> tuple[list[int], int | None]:
        tokenizer = load_tokenizer(name)
        return tokenize(tokenizer, text), tokenizer.bos_token_id

    names = [str(m) for m in ([models] if isinstance(models, str | Path) else models)]
    wanted = None if reference is None else tokens_of(str(reference))
    expected = None if reference is None else logits_of(load(reference, dtype, device=device))
    results: dict[str, Evaluation] = {}
    for name in names:
        ids, bos = tokens_of(name)
        if wanted is not None and wanted != (ids, bos):
            raise AutoQuantError(f"{name}: its tokenizer differs from that of {reference}, so their logits do too")
        windows = cut_windows(ids, length, bos, tokens, batch)
        model, done, total = logits_of(load(name, dtype, device=device)), 0, len(windows.counts)

        def advance(count: int, name: str = name, total: int = total) -> None:
            nonlocal done
            done += count
            progress(name, done, total)

        progress(name, 0, total)
        results[name] = measure(model, windows, expected, advance)
    settings = {"data": str(data), "length": length, "tokens": tokens, "batch": batch}
    return Evaluated(results, {**settings, "reference": None if reference is None else str(reference)})


def compare(
    model: str | Path,
    output: str | Path,
    *,
    data: str | Path,
    calibration: str | Path,
    config: str | Path | Config | None = None,
    strategies: str = "all",
    transforms: str = COMPARED_TRANSFORMS,
    sequences: int = 16,
    length: int = 512,
    tokens: int | None = None,
    batch: int = 1,
    seed: int | None = None,
    device: str = "auto",
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda line: None,
) -> Compared:
    """Perplexity of every strategy after every combination of transforms, as one table.

    The folder ``output`` takes report.md, report.json and a file for each finished cell: after an interruption the
    same call goes on where it stopped. ``strategies`` and ``transforms`` are lists with commas. Raises AutoQuantError.
    """
    chosen = parse_strategies(strategies)
    folder, target, text = Path(model), Path(output), Path(calibration)
    wanted = tuple(_transforms(part) for part in transforms.split(","))
    if not (folder / "config.json").is_file():
        raise AutoQuantError(f"{folder}: no config.json; expected a checkpoint folder of transformers")
    progress(IMPORTING, 0, 0)
    import json

    from autoquant.calibration.texts import read_text
    from autoquant.calibration.windows import CalibrationOptions, calibration_windows, cut_windows, tokenize
    from autoquant.checkpoint.quantize import config_for, load_float32
    from autoquant.evaluation.compare import Task, describe_inputs, markdown, report
    from autoquant.evaluation.compare import compare as measure
    from autoquant.io.files import write_text
    from autoquant.models.device import device_of
    from autoquant.models.tokenizer import load_tokenizer
    from autoquant.report.results import Compared

    place, tokenizer = device_of(device), load_tokenizer(folder)
    windows = cut_windows(tokenize(tokenizer, read_text(Path(data))), length, tokenizer.bos_token_id, tokens)
    batches = calibration_windows(tokenizer, CalibrationOptions(text, sequences, length, seed))
    loaded = _config(config) if config is not None else config_for(str(folder), None, _steps(progress))
    settings = {"tokens": tokens, "window": length, "sequences": sequences, "seed": seed, "device": str(place)}
    inputs = describe_inputs(folder, Path(data), text, **settings)
    task = Task(loaded, wanted, chosen, windows, batches, seed, inputs, batch)
    cells = measure(task, lambda: load_float32(folder).to(place), target / "cells", tell)
    found = Compared(markdown(task, cells), report(task, cells))
    write_text(target / "report.json", json.dumps(found.as_dict(), indent=2) + "\n", force=True)
    write_text(target / "report.md", found.markdown, force=True)
    return found


def load(model: str | Path, dtype: str | torch.dtype | None = None, *, device: str = "cpu") -> Any:
    """A runnable model from a folder of :func:`quantize`, or any causal LM that transformers loads.

    ``dtype`` is that of everything that is not int8, None or 'auto': as stored. ``save_pretrained`` of a quantized one
    writes such a folder again. Raises AutoQuantError where there is no such model.
    """
    import torch

    from autoquant.checkpoint.in_memory import saved_again_
    from autoquant.checkpoint.load import load as read
    from autoquant.models.device import device_of

    named = None if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    loaded = read(model, named).to(device_of(device))
    saved_again_(loaded, Path(model))
    return loaded


def _config(config: str | Path | Config) -> Config:
    return load_config(config) if isinstance(config, str | Path) else config


def _name(given: object, otherwise: str) -> str:
    return str(given) if isinstance(given, str | Path) else otherwise


def _transforms(transforms: str | Transforms) -> Transforms:
    from autoquant.pipeline.select import Transforms

    return Transforms.parse(transforms) if isinstance(transforms, str) else transforms


def _steps(progress: Progress) -> Callable[[str], None]:
    return lambda step: progress(step, 0, 0)


def _source(
    model: str | Path | nn.Module, example_inputs: Any, layers: int | None, task: Kind | None, trust_remote_code: bool
) -> ModelSource:
    if isinstance(model, str | Path):
        from autoquant.models.repair import resolve

        return resolve(str(model), layers=layers, trust_remote_code=trust_remote_code, kind=task)
    from autoquant.models.example import module_source

    return module_source(model, example_inputs)


def _batches(
    calibration: str | Path | Sequence[Tensor] | None, tokenizer: Any, sequences: int, length: int, seed: int | None
) -> tuple[Tensor, ...]:
    """Calibration windows of a text, or the batches that were given."""
    if calibration is None:
        return ()
    if not isinstance(calibration, str | Path):
        return tuple(calibration)
    if tokenizer is None:
        raise AutoQuantError(f"{calibration}: a text needs the tokenizer that reads it; or give batches of token ids")
    from autoquant.calibration.windows import CalibrationOptions, calibration_windows

    return calibration_windows(tokenizer, CalibrationOptions(Path(calibration), sequences, length, seed))

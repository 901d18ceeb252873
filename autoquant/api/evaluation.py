"""What a strategy costs, measured, and the settings with which it costs least."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autoquant.api.arguments import IMPORTING, analyzed_config, by_line, config_of, proof_of, transforms_of
from autoquant.api.checkpoints import load
from autoquant.config.spelling import did_you_mean_or
from autoquant.config.strategies import parse_strategies, parse_strategy
from autoquant.errors import AutoQuantError
from autoquant.steps import Progress, silent
from autoquant.version import __version__

if TYPE_CHECKING:
    from torch import nn

    from autoquant.calibration.windows import Windows
    from autoquant.config.format import Config, Strategy
    from autoquant.evaluation.perplexity import Examples
    from autoquant.report.results import Compared, Evaluated, Found
    from autoquant.report.served import ServeCheck

COMPARED_TRANSFORMS = "none,smooth:0.85,smooth:0.5,smooth:0.5+fc_fc,fc_fc:0.5+rotation"
SAMPLE = Path(__file__).parents[1] / "data" / "sample.evaluation.txt"
KNOBS = "prefix,spikes,clip,rotation,online,alpha,descent,cache,weights,bias,float"
PER_TOKEN = 4
"""Linears that may get per-token scales where a server takes both."""
LOWER = "--sequences, --held-out or --length"
JUDGED_TOGETHER = 8
"""Held-out windows in one forward pass, where no scale spans them."""


@by_line
def search(
    model: str | Path,
    config: str | Path | Config,
    *,
    calibration: str | Path,
    field: str = "text",
    strategy: str | None = None,
    budget: float = 30.0,
    sequences: int = 64,
    held_out: int = 32,
    length: int = 512,
    knobs: str | Collection[str] = KNOBS,
    per_token: int | None = None,
    in_float: int = 0,
    offline: bool = False,
    target: str | None = None,
    seed: int = 0,
    device: str = "auto",
    unproved: bool = False,
    trust_remote_code: bool = False,
    kept: str | Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> Found:
    """Set a config's knobs for one strategy by what they do on held-out calibration text.

    ``model`` is a folder; ``field``: the column of a text that has columns. ``sequences`` windows of ``length`` tokens
    are fitted on, ``held_out`` further ones judge; ``budget``: minutes. ``target``: what is to serve the result, as for
    :func:`quantize`: only what it takes is tried. ``per_token``: how many linears of a static strategy may get
    per-token scales, None: with a target 4, else none; ``in_float``: how many linears may stay in floating point, the
    knob 'float'. ``tell`` is told of each candidate, ``progress`` of what is done for it; ``kept``: a file that takes
    what was judged, with which the same search goes on after an interruption. Claims that were edited since they were
    proved are proved again; ``unproved`` goes on without. Raises AutoQuantError.
    """
    loaded = config_of(config)
    chosen = loaded.quantization.strategy if strategy is None else parse_strategy(strategy)
    progress(IMPORTING, 0, 0)
    from autoquant.calibration.windows import CalibrationOptions, calibration_windows, together
    from autoquant.checkpoint.quantize import load_float32
    from autoquant.checkpoint.trial import open_trials
    from autoquant.evaluation.compare import shares_scale
    from autoquant.models.checkpoint_source import checkpoint_folder, open_checkpoint
    from autoquant.models.device import device_of
    from autoquant.models.tokenizer import load_tokenizer
    from autoquant.report.results import Found
    from autoquant.searcher.judge import ANYWHERE, Task
    from autoquant.searcher.kept import open_kept
    from autoquant.searcher.search import search as find
    from autoquant.searcher.servable import served_by

    names = _knob_names(knobs)
    folder = checkpoint_folder(model, trust_remote_code=trust_remote_code)
    trust, served = trust_remote_code, ANYWHERE
    if target is not None:  # refused before the work
        served = served_by(target, folder, loaded, chosen, trust_remote_code=trust)
    text, place, (taken, _) = Path(calibration), device_of(device), _by_text(folder, loaded, [chosen], trust)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust)
    proof_of(loaded, folder, None, unproved, trust, progress)
    options = CalibrationOptions(text, sequences + held_out, length, seed, field, LOWER)
    windows = calibration_windows(tokenizer, options)
    judging = windows[sequences:] if shares_scale(chosen) else together(windows[sequences:], JUDGED_TOGETHER)
    said = (__version__, str(folder.resolve()), open_checkpoint(folder).stamps(), chosen, sequences, place.type)
    task = Task(
        load=lambda: load_float32(folder, trust_remote_code=trust_remote_code).to(place),
        strategy=chosen,
        fit=windows[:sequences],
        held_out=judging,
        calibration=text.name,
        seed=seed,
        per_token=per_token if per_token is not None else PER_TOKEN * (target is not None),
        in_float=in_float,
        bos=tokenizer.bos_token_id,
        offline=offline,
        served=served,
        knobs=frozenset(names),
        kept=open_kept(kept, (*said, [ids.tolist() for ids in windows])),
        trials=open_trials(folder, chosen, windows[:sequences], place, small_too=False, trust_remote_code=trust),
    )
    return Found(find(task, taken, budget, tell, progress))


def _by_text(folder: Path, config: Config, strategies: Iterable[Strategy], trust: bool) -> tuple[Config, bool]:
    """The config for what text goes through, and whether it goes there in halves. Raises AutoQuantError for a model
    that does not run on text, and where a strategy has a cache that it cannot have.
    """
    from autoquant.models.load import load_skeleton
    from autoquant.models.reading import check_reads_text, reads_in_halves
    from autoquant.pipeline.of_text import of_text_said
    from autoquant.quantizer.kv_cache import check_one_stack
    from autoquant.quantizer.strategies import kv_granularity

    model = load_skeleton(folder, trust_remote_code=trust)
    check_reads_text(model)
    if any(kv_granularity(config, strategy) is not None for strategy in strategies):
        check_one_stack(model)
    return of_text_said(config, model), reads_in_halves(model)


def _knob_names(knobs: str | Collection[str]) -> list[str]:
    """The knobs that are asked for. Raises AutoQuantError for one that there is not."""
    from autoquant.searcher.candidates.knobs import KNOBS as KNOWN

    names = knobs.split(",") if isinstance(knobs, str) else list(knobs)
    for name in names:
        if name not in KNOWN:
            raise AutoQuantError(f"no knob '{name}'{did_you_mean_or(name, list(KNOWN))}")
    return names


def evaluate(
    models: str | Path | Sequence[str | Path],
    data: str | Path | None = None,
    *,
    field: str = "text",
    media: str | Path | None = None,
    reference: str | Path | None = None,
    length: int = 512,
    tokens: int | None = None,
    batch: int = 1,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Evaluated:
    """Perplexity of models on a text, with standard errors over windows of ``length`` tokens.

    ``models``: folders of :func:`quantize` or whatever transformers loads; ``reference``: also compare the logits with
    this model's; ``tokens``: use the first so many only. Of an encoder-decoder the second half of each window is
    predicted, behind the first in its encoder. ``media``, in place of ``data``: a folder of images or sounds, the words
    beside which (a .txt of the same name) are predicted, one of them in a pass. Raises AutoQuantError where tokenizers
    differ, and for a model that does not run on this.
    """
    if (data is None) is (media is None):
        raise AutoQuantError("give either a text (--data) or a folder of images or sounds (--media) to measure on")
    if media is not None and (tokens is not None or batch != 1):
        raise AutoQuantError("images and sounds are measured whole and one by one: leave --tokens and --batch out")
    names = [str(m) for m in ([models] if isinstance(models, str | Path) else models)]
    beside = [] if reference is None else [str(reference)]
    progress(IMPORTING, 0, 0)
    from autoquant.evaluation.perplexity import Evaluation, logits_of
    from autoquant.evaluation.perplexity import evaluate as measure
    from autoquant.models.reading import reads_in_halves
    from autoquant.report.results import Evaluated

    windows: dict[str, Windows | Examples] = {}
    if data is not None:
        windows |= _windows_of((*beside, *names), Path(data), field, length, tokens, batch, trust_remote_code)
        _check_same(windows, beside)

    def runnable(name: str) -> nn.Module:
        loaded: nn.Module = load(name, dtype, device=device, trust_remote_code=trust_remote_code)
        if media is not None:
            windows[name] = _worded(name, Path(media), loaded, trust_remote_code)
            _check_same(windows, beside)
        return loaded

    other = runnable(beside[0]) if beside else None
    expected = None if other is None else logits_of(other)
    results: dict[str, Evaluation] = {}
    in_halves: list[str] = []
    for name in names:
        module = runnable(name)
        in_halves += [name] * (media is None and reads_in_halves(module))
        if other is not None and reads_in_halves(module) != reads_in_halves(other):
            raise AutoQuantError(f"{name}: of it and {reference} one has an encoder: they predict different tokens")
        model, done, total = logits_of(module), 0, len(windows[name].counts)

        def advance(count: int, name: str = name, total: int = total) -> None:
            nonlocal done
            done += count
            progress(name, done, total)

        progress(name, 0, total)
        results[name] = measure(model, windows[name], expected, advance)
    settings: dict[str, Any] = {"data": None if data is None else str(data), "length": length, "tokens": tokens}
    settings |= {"batch": batch} | ({} if media is None else {"media": str(media)})
    settings["reference"] = None if reference is None else str(reference)
    return Evaluated(results, settings, tuple(in_halves))


def _windows_of(
    names: Sequence[str], data: Path, field: str, length: int, tokens: int | None, batch: int, trust: bool
) -> dict[str, Windows]:
    """A text by the tokenizer of each model."""
    from autoquant.calibration.texts import read_text
    from autoquant.calibration.windows import cut_windows, tokenize
    from autoquant.models.tokenizer import load_tokenizer

    text, found = read_text(data, field), {}
    for name in names:
        tokenizer = load_tokenizer(name, trust_remote_code=trust)
        found[name] = cut_windows(tokenize(tokenizer, text), length, tokenizer.bos_token_id, tokens, batch)
    return found


def _worded(name: str, media: Path, model: nn.Module, trust: bool) -> Examples:
    """Images or sounds by the processor of a model. Raises AutoQuantError for one without words, which are scored."""
    from autoquant.calibration.media import read_media
    from autoquant.evaluation.perplexity import Examples
    from autoquant.models.checkpoint_source import checkpoint_folder

    folder = checkpoint_folder(name, trust_remote_code=trust)
    found = read_media(media, folder, model, trust_remote_code=trust)
    for example in found:
        if not example.words:
            raise AutoQuantError(f"{media / example.name}: has no words in a .txt of its name, and they are measured")
    return Examples(found)


def _check_same(windows: Mapping[str, Windows | Examples], reference: Sequence[str]) -> None:
    """Raise AutoQuantError for a model whose tokens are not those of the reference, if there is one."""
    from autoquant.models.reading import ids_of

    for name, found in windows.items() if reference else ():
        ids, wanted = ([ids_of(one).tolist() for one in w.batches] for w in (found, windows[reference[0]]))
        if ids != wanted:
            raise AutoQuantError(f"{name}: its tokenizer differs from that of {reference[0]}, so their logits do too")


def serve_check(
    folders: str | Path | Sequence[str | Path],
    *,
    data: str | Path | None = None,
    length: int = 64,
    tokens: int | None = None,
    engine: Literal["vllm", "transformers"] = "vllm",
    python: str | Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    progress: Progress = silent,
) -> ServeCheck:
    """What vLLM (or transformers) computes from quantized folders, compared with what is computed here.

    ``data``: a text, None: a packaged sample; ``python``: the interpreter of an environment that has the engine, None:
    this one; ``dtype``: of floats in the engine. All folders have the tokenizer of the first. Raises AutoQuantError
    where the engine cannot be run.
    """
    from autoquant.calibration.texts import read_text

    given = [folders] if isinstance(folders, str | Path) else list(folders)
    text = read_text(Path(data) if data is not None else SAMPLE)
    progress(IMPORTING, 0, 0)
    from autoquant.calibration.windows import cut_windows, tokenize
    from autoquant.evaluation.serving import agreements
    from autoquant.models.tokenizer import load_tokenizer
    from autoquant.report.served import ServeCheck

    tokenizer = load_tokenizer(given[0])
    windows = cut_windows(tokenize(tokenizer, text), length, tokenizer.bos_token_id, tokens)
    progress(engine, 0, 0)
    found = agreements([Path(folder) for folder in given], windows, engine, python or sys.executable, dtype)
    return ServeCheck(found)


@by_line
def compare(
    model: str | Path,
    output: str | Path,
    *,
    data: str | Path,
    calibration: str | Path,
    field: str = "text",
    config: str | Path | Config | None = None,
    strategies: str = "all",
    transforms: str = COMPARED_TRANSFORMS,
    sequences: int = 16,
    length: int = 512,
    tokens: int | None = None,
    batch: int = 1,
    seed: int | None = None,
    device: str = "auto",
    unproved: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda line: None,
) -> Compared:
    """Perplexity of every strategy after every combination of transforms, as one table.

    The folder ``output`` takes report.md, report.json and a file for each finished cell: after an interruption the
    same call goes on where it stopped. ``strategies`` and ``transforms`` are lists with commas. Claims that were edited
    since they were proved are proved again; ``unproved`` goes on without, which is reported. Raises AutoQuantError.
    """
    chosen = parse_strategies(strategies)
    from autoquant.models.checkpoint_source import checkpoint_folder

    folder = checkpoint_folder(model, trust_remote_code=trust_remote_code)
    target, text = Path(output), Path(calibration)
    wanted = tuple(transforms_of(part) for part in transforms.split(","))
    if not (folder / "config.json").is_file():
        raise AutoQuantError(f"{folder}: no config.json; expected a checkpoint folder of transformers")
    from autoquant.io.folders import check_report
    from autoquant.io.locks import release

    check_report(target)
    progress(IMPORTING, 0, 0)
    import json

    from autoquant.calibration.texts import read_text
    from autoquant.calibration.windows import CalibrationOptions, calibration_windows, cut_windows, tokenize
    from autoquant.checkpoint.quantize import load_float32
    from autoquant.evaluation.compare import Task, describe_inputs, markdown, report
    from autoquant.evaluation.compare import compare as measure
    from autoquant.io.files import write_text
    from autoquant.models.device import device_of
    from autoquant.models.tokenizer import load_tokenizer
    from autoquant.report.results import Compared

    place, tokenizer = device_of(device), load_tokenizer(folder, trust_remote_code=trust_remote_code)
    windows = cut_windows(
        tokenize(tokenizer, read_text(Path(data), field, tokenizer)), length, tokenizer.bos_token_id, tokens
    )
    batches = calibration_windows(tokenizer, CalibrationOptions(text, sequences, length, seed, field))
    loaded = analyzed_config(config, folder, trust_remote_code, progress)
    taken, in_halves = _by_text(folder, loaded, chosen, trust_remote_code)
    proof = proof_of(loaded, folder, None, unproved, trust_remote_code, progress)
    settings = {"tokens": tokens, "window": length, "sequences": sequences, "seed": seed, "device": str(place)}
    settings |= {} if proof.proved else {"proof": proof.how}
    inputs = describe_inputs(folder, Path(data), text, **settings)
    task = Task(taken, wanted, chosen, windows, batches, seed, inputs, batch, in_halves)
    progress("cells", 0, 0)
    cells = measure(
        task,
        lambda: load_float32(folder, trust_remote_code=trust_remote_code).to(place),
        target / "cells",
        tell,
    )
    found = Compared(markdown(task, cells), report(task, cells))
    write_text(target / "report.json", json.dumps(found.as_dict(), indent=2) + "\n", force=True)
    write_text(target / "report.md", found.markdown, force=True)
    release(target)
    return found

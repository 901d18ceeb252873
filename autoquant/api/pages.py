"""A config, and what it does to a model, as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant.api.arguments import IMPORTING, by_line, config_of
from autoquant.errors import AutoQuantError
from autoquant.io.files import check_target, write_text
from autoquant.steps import Progress, silent

if TYPE_CHECKING:
    from autoquant.config.format import Config
    from autoquant.report.results import Written

HELD_OUT = 8
"""Windows that single linears are judged on, behind those that calibrate."""


def write_page(
    config: str | Path | Config,
    output: str | Path,
    *,
    model: str | Path | None = None,
    calibration: str | Path | None = None,
    compare: str | Path | None = None,
    field: str = "text",
    sequences: int = 8,
    length: int = 256,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Written:
    """Write the report of a config: one HTML file that loads nothing.

    ``model``, a folder: also what goes into its linears before and after the transforms, on ``sequences`` windows of
    ``length`` tokens of ``calibration`` (None: a packaged text), and what each costs. ``compare``: the report.json of
    :func:`compare`, or its folder. Raises AutoQuantError, with nothing written.
    """
    target = Path(output)
    check_target(target, force=force)
    loaded = config_of(config)
    compared = None if compare is None else _compared(Path(compare))
    if model is None and calibration is not None:
        raise AutoQuantError("a calibration text needs a model to run it through: --model")
    from autoquant.report.page import page
    from autoquant.report.results import Written

    measured = None
    if model is not None:
        text = None if calibration is None else Path(calibration)
        measured = _measured(model, config, text, field, sequences, length, trust_remote_code, progress)
    html = page(loaded, measured, compared)
    write_text(target, html, force=force)
    size = len(html.encode())
    facts = {"bytes": size, "measured": model is not None, "compared": compare is not None}
    return Written(target, (f"{target}: {size / 1e6:.1f} MB; open it in a browser",), facts)


@by_line
def _measured(
    model: str | Path,
    config: str | Path | Config,
    text: Path | None,
    field: str,
    sequences: int,
    length: int,
    trust_remote_code: bool,
    progress: Progress,
) -> Mapping[str, Any]:
    progress(IMPORTING, 0, 0)
    from autoquant.calibration.texts import PACKAGED
    from autoquant.calibration.windows import CalibrationOptions, Windows, calibration_windows
    from autoquant.checkpoint.quantize import load_float32
    from autoquant.models.checkpoint_source import checkpoint_folder
    from autoquant.models.tokenizer import load_tokenizer
    from autoquant.report.measure import measure

    folder = checkpoint_folder(model, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    options = CalibrationOptions(text or PACKAGED, sequences + HELD_OUT, length, field=field)
    windows = calibration_windows(tokenizer, options)
    words = [tokenizer.decode([token]) for token in windows[0][0].tolist()]
    held_out = Windows(windows[sequences:], tokenizer.bos_token_id is not None)
    progress("load", 0, 1)
    loaded = load_float32(folder, trust_remote_code=trust_remote_code)
    return measure(loaded, config_of(config), windows[:sequences], held_out, words, progress)


def _compared(path: Path) -> Mapping[str, Any]:
    path = path / "report.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AutoQuantError(
            f"{path}: cannot be read: {error.strerror}; expected what `autoquant compare` wrote"
        ) from error
    except ValueError as error:
        raise AutoQuantError(f"{path}: not JSON ({error}); expected the report.json of `autoquant compare`") from error
    if not isinstance(found, dict) or not {"cells", "tokens"} <= found.keys() or not found["cells"]:
        raise AutoQuantError(f"{path}: no table in it; expected the report.json of `autoquant compare`")
    return found

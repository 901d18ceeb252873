"""Options that several commands share: one name, one meaning, one wording. A parameter of the API has the same name."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from autoquant.cli.output import remark, show, show_json, width
from autoquant.models.tasks import KINDS

Function = TypeVar("Function", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]

FILE = click.Path(path_type=Path)


DRAWN = "Draws windows and rotations.  [default: first windows, config]"


def output(help: str, required: bool = True) -> Decorator:
    """``-o``: what is written."""
    return click.option("-o", "--output", type=FILE, required=required, metavar="PATH", help=help)


field = click.option(
    "--field", default="text", show_default=True, help="The column with the texts, where the file has columns."
)


def calibration(required: bool = False) -> Decorator:
    """Which text calibrates, and which column of it where it has columns."""
    default = "" if required else "  [default: a packaged text]"

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        return click.option(
            "--calibration",
            type=FILE,
            required=required,
            metavar="TEXT",
            help=f"To calibrate on: text, JSON, JSONL, CSV, Parquet, a folder of these, a dataset's hub id.{default}",
        )(field(function))

    return decorate


def media(
    help: str = "Images or sounds to calibrate on beside the text, each with its words in a .txt of its name.",
) -> Decorator:
    """A folder of images or sounds."""
    return click.option("--media", type=FILE, metavar="FOLDER", help=help)


length = click.option(
    "--length", type=click.IntRange(1), default=512, show_default=True, help="Tokens of text in a window, BOS apart."
)
force = click.option("--force", is_flag=True, help="Replace what is there.")
unproved = click.option(
    "--unproved", is_flag=True, help="Go on with claims that were edited and do not hold or cannot be proved; recorded."
)
quiet = click.option("--quiet", is_flag=True, help="Print nothing but errors and, as JSON, results.")
layers = click.option("--layers", type=click.IntRange(1), help="Take a model with so many layers only.")
trust_remote_code = click.option(
    "--trust-remote-code", is_flag=True, help="Run the code that a checkpoint brings along."
)
strategy = click.option("--strategy", metavar="NAME", help="One of the eight.  [default: the config's]")
batch = click.option(
    "--batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Windows per forward pass, where no scale spans them.",
)
workers = click.option(
    "--workers", type=click.IntRange(1), help="Threads that transform tensors.  [default: one for each core]"
)
tokens = click.option(
    "--tokens", type=click.IntRange(1), help="Measure on the first so many tokens only.  [default: all]"
)


def sequences(default: int) -> Decorator:
    """How much calibration text."""
    return click.option(
        "--sequences", type=click.IntRange(1), default=default, show_default=True, help="Windows to calibrate on."
    )


def seed(
    default: int | None = None, help: str = "Draws windows and rotations.  [default: first windows, config]"
) -> Decorator:
    """What is drawn."""
    return click.option("--seed", type=click.IntRange(0), default=default, show_default=default is not None, help=help)


def dtype(names: Sequence[str], help: str) -> Decorator:
    """The type of floats; the first of ``names`` is the default."""
    return click.option("--dtype", type=click.Choice(names), default=names[0], show_default=True, help=help)


def device(function: Function) -> Function:
    """Where models run."""

    def known(context: click.Context, parameter: click.Parameter, value: str) -> str:
        if re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is None:
            raise click.BadParameter(f"expected auto, cpu, cuda or cuda:N, got '{value}'")
        return value

    return click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="[auto|cpu|cuda|cuda:N]",
        callback=known,
        help="Where models run; auto: on a GPU where there is one.",
    )(function)


def format(help: str = "Of the result on standard output.") -> Decorator:
    """Text or JSON; ``table`` is the old name of text."""

    def known(context: click.Context, parameter: click.Parameter, value: str) -> str:
        value = {"table": "text"}.get(value, value)
        if value not in ("text", "json"):
            raise click.BadParameter(f"expected text or json, got '{value}'")
        return value

    return click.option(
        "--format", "form", default="text", show_default=True, metavar="[text|json]", callback=known, help=help
    )


def checkpoint_format(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--format`` of a folder that is written, and ``--result`` of what is printed, which once was ``--format``."""

    @functools.wraps(function)
    def wrapper(format: str | None, form: str, **options: Any) -> Any:
        if format in ("text", "table", "json"):
            remark([f"warning: --format {format} is now --result {format}; the old option goes with the next release"])
            format, form = None, "json" if format == "json" else "text"
        return function(format=format, form=form, **options)

    choice = click.Choice(["text", "json"])
    said = "Of the result on standard output."
    text = click.option("--result", "form", type=choice, default="text", show_default=True, help=said)(wrapper)
    return click.option(
        "--format",
        metavar="[compressed-tensors|native|onnx]",
        help="Of the folder.  [default: compressed-tensors where it holds the result, else native]",
    )(text)


target = click.option(
    "--target",
    metavar="[vllm|sglang|transformers|any|onnxruntime]",
    help="What is to serve the folder; what it does not take is refused.  [default: vllm, if it takes the result]",
)


def renamed(old: str, new: str, type: Any = None) -> Decorator:
    """``old`` is a hidden alias of the option ``new`` for one release."""
    old_key, new_key = (name.removeprefix("--").replace("-", "_") for name in (old, new))

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(**options: Any) -> Any:
            given = options.pop(old_key)
            if given is not None:
                remark([f"warning: {old} is now {new}; the old name goes with the next release"])
                options[new_key] = given
            return function(**options)

        return click.option(old, old_key, type=type, hidden=True, default=None)(wrapper)

    return decorate


def task(function: Function) -> Function:
    """Which kind of model, for commands that once called it ``--kind``."""
    return which_task(renamed("--kind", "--task")(function))  # type: ignore[no-any-return]  # its own type


def which_task(function: Function) -> Function:
    """Which kind of model."""
    choice = click.Choice(KINDS)
    decorated = click.option("--task", type=choice, help="What to take MODEL for, where its type is of several kinds.")
    return decorated(function)


def transforms(default: str, help: str) -> Decorator:
    """What is done before quantization; ``--rotate``, ``--smooth`` and ``--alpha`` are its old names."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(rotate: bool | None, smooth: str | None, alpha: float | None, **options: Any) -> Any:
            if (rotate, smooth, alpha) != (None, None, None):
                text = _transforms(rotate is not False, smooth or "all", alpha)
                remark([f"warning: --rotate, --smooth and --alpha are now --transforms {text}; they go next release"])
                options["transforms"] = text
            return function(**options)

        wrapper = click.option("--alpha", type=click.FloatRange(0, 1), hidden=True)(wrapper)
        choice = click.Choice(["fc_fc", "all", "none"])
        wrapper = click.option("--smooth", type=choice, hidden=True)(wrapper)
        wrapper = click.option("--rotate/--no-rotate", default=None, hidden=True)(wrapper)
        return click.option("--transforms", default=default, show_default=True, metavar="EXPR", help=help)(wrapper)

    return decorate


TRANSFORMS = (
    "none, or parts joined by +: smooth[:ALPHA] (norm -> linear), fc_fc[:ALPHA] (v -> o, up -> down), rotation or "
    "rotation:R1. Without ALPHA that of the part before, else the config's."
)


def _transforms(rotate: bool, smooth: str, alpha: float | None) -> str:
    """The expression for the old options."""
    value = "" if alpha is None else f":{alpha:g}"
    parts = {"none": [], "fc_fc": [f"fc_fc{value}"], "all": [f"smooth{value}", f"fc_fc{value}"]}[smooth]
    return "+".join([*parts, *(["rotation"] if rotate else [])]) or "none"


def print_result(result: Any, form: str, quiet: bool = False) -> None:
    """A result as it was asked for; JSON is asked for in so many words, so ``quiet`` leaves it."""
    if form == "json":
        show_json(result.as_dict())
    elif not quiet:
        show(result.lines(width()))

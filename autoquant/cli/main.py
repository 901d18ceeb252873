"""The command line: finds a command, runs it, turns an AutoQuantError into one line and exit code 1.

Each command is a module of ``autoquant.cli`` and is imported when it is asked for; what takes long to import
(torch, transformers) is imported inside the command's function. So ``autoquant --help`` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import click

from autoquant.cli.output import remark
from autoquant.config.spelling import did_you_mean
from autoquant.errors import INTERRUPTED, AutoQuantError
from autoquant.io.inert import inert
from autoquant.version import __version__

# In the order of --help. `name` is the object `command` of autoquant/cli/name.py.
GROUPS = {
    "Everyday": ("analyze", "quantize", "eval", "report", "apply", "convert", "serve-check"),
    "Configs": ("show", "check", "verify", "set", "diff", "merge", "init-group", "export", "import"),
    "Research": ("search", "compare", "audit"),
    "Maintenance": ("schema", "survey"),
}
COMMANDS = tuple(name for names in GROUPS.values() for name in names)

EPILOG = """
MODEL is a model type of transformers, a folder, a config.json, a hub id, or package.module:factory. What reads weights
(quantize, apply, search, eval, compare) takes a folder or a hub id.

\b
  autoquant quantize my-model -o my-int8            # analyzes and calibrates on its own; for vLLM
  autoquant eval my-model my-int8 --data text.txt   # what it costs
  autoquant report my.json -o my.html               # what the graph allows, as a page

The eight strategies are w_int8_per_W_a_int8_per_A, with or without an int8 KV cache of the same kind. Take the default,
channel / token_dynamic, where it is served: it costs least. tensor_static computes no scale while the model runs, and
its outliers want rotation, or `autoquant search`.

\b
  W         A                 and with an int8 cache
  channel   token_dynamic     _kv_cache_int8_per_token_dynamic
  channel   tensor_dynamic    _kv_cache_int8_per_tensor_dynamic
  channel   tensor_static     _kv_cache_int8_per_tensor_static
  tensor    tensor_static     _kv_cache_int8_per_tensor_static

Shell completion: eval "$(_AUTOQUANT_COMPLETE=bash_source autoquant)" in ~/.bashrc; zsh_source or fish_source there.
"""

PIPE_CLOSED = 141  # 128 + SIGPIPE


class LazyGroup(click.Group):
    """Imports a command when it is asked for. A subclass because click knows no other way to do that."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"autoquant.cli.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Commands by what they are for."""
        for title, names in GROUPS.items():
            commands = {name: self.get_command(ctx, name) for name in names}
            rows = [(name, one.get_short_help_str(200)) for name, one in commands.items() if one is not None]
            with formatter.section(title):
                formatter.write_dl(rows, col_max=12)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not ctx.resilient_parsing:
            ctx.fail(f"no command '{inert(args[0])}'{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _in_one_line()
                return super().invoke(ctx)
        except AutoQuantError as error:
            remark([*error.details, f"error: {error.message}"])
            ctx.exit(1)
        except KeyboardInterrupt:
            remark(["error: interrupted"])
            ctx.exit(INTERRUPTED)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and end quietly where nobody reads the output, in one line where it cannot be written."""
        stdout = sys.stdout
        try:
            return super().main(*args, **kwargs)
        except SystemExit:
            if sys.stdout is not stdout:  # click replaces it where a pipe is closed, and knows no code for that
                sys.exit(PIPE_CLOSED)
            raise
        except OSError as error:
            if error.filename is not None:  # not a stream: a bug
                raise
            remark([f"error: standard output cannot be written: {error.strerror}"])
            _leave(1)


def _in_one_line() -> Callable[..., None]:
    """What shows warnings: each text once, as one line on standard error."""
    shown: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = str(message)
        if text not in shown:
            shown.add(text)
            remark([f"warning: {text}"])

    return show


def _leave(code: int) -> NoReturn:
    """Exit with nothing left in a stream that cannot be written, of which Python would complain."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for what is printed at exit
    sys.exit(code)


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    # A fixed width, so that the help is the same in every terminal and in the tests.
    context_settings={"help_option_names": ["-h", "--help"], "terminal_width": 100},
)
@click.version_option(__version__, prog_name="autoquant")
def main() -> None:
    """Read the quantization symmetries of a causal language model off its graph, prove and apply them."""

"""Regenerates the committed configs: ``python -m autoquant.survey.generate [FOLDER] [MODEL ...]``.

Without MODEL every config of the folder is made anew; the file ``NAME.json`` is that of the model type NAME
(``llama``, ``seq2seq-lm/t5``), at its default size. An index of them all is written beside them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from autoquant.config.file import load_config, save_config
from autoquant.config.format import SCHEMA_NAME, Config, edited
from autoquant.errors import AutoQuantError
from autoquant.io.files import write_text
from autoquant.models.tasks import KINDS, full_name, split_name
from autoquant.report.summary import reached

FOLDER = Path("generated_configs")
SCHEMA = f"../schemas/{SCHEMA_NAME}"
COMMAND = "make configs"


def generate(name: str) -> Config:
    """The config of a model type by its full name, with its certificate and the path of the committed schema."""
    from autoquant.analyzer.analyze import analyze
    from autoquant.certificate.certify import certify
    from autoquant.models.repair import find_source

    model_type, kind = split_name(name)
    source = find_source(model_type, kind=kind)
    return with_schema(certify(analyze(source), source), name)


def with_schema(config: Config, name: str) -> Config:
    """The config as it is committed, with the path of the committed schema."""
    return edited(config, schema_="../" * name.count("/") + SCHEMA)


def offers(config: Config) -> bool:
    """Whether at least one group or space is claimed and proved."""
    proved = config.certificate is not None and config.certificate.proved
    return proved and bool(config.smoothing.groups or config.rotation.spaces)


def save(config: Config, folder: Path, name: str) -> None:
    """Write the config as it is committed."""
    path = folder / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    save_config(with_schema(config, name), path, force=True)


def names_in(folder: Path) -> list[str]:
    """Full names of the model types that ``folder`` has a config of, the kinds in their order."""
    return [
        full_name(path.stem, kind)
        for kind in KINDS
        for path in sorted((folder / full_name("x", kind)).parent.glob("*.json"))
    ]


def write_index(folder: Path) -> None:
    """Write ``README.md`` from the configs of ``folder``."""
    configs = {name: load_config(folder / f"{name}.json") for name in names_in(folder)}
    write_text(folder / "README.md", index_text(configs), force=True)


def index_text(configs: Mapping[str, Config]) -> str:
    """``README.md`` of the folder: what each config offers, in Markdown."""
    lines = [
        "# Generated configs",
        "",
        "One config for the default size of each model type for which at least one group is proved, written by",
        f"`{COMMAND}`. A test fails where a config is not what the analyzer finds. A type in a folder is taken as the",
        "kind of model that the folder names: `autoquant analyze t5 --task seq2seq-lm`.",
    ]
    for kind in KINDS:
        mine = {name: config for name, config in configs.items() if split_name(name)[1] == kind}
        if mine:
            lines += ["", f"## {kind}", "", *_table(mine)]
    return "\n".join([*lines, ""])


def _table(configs: Mapping[str, Config]) -> list[str]:
    lines = [
        "| config | layers | parameters | linears smoothed | groups | residual rotation | other spaces | online |",
        "|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for name, config in sorted(configs.items()):
        flags = [whole for linear in config.model.linears for whole in reached(config, linear).values()]
        cells = [
            f"[{split_name(name)[0]}]({name}.json)",
            str(config.model.layers),
            f"{config.model.parameters:,}",
            f"{sum(flags)} of {len(flags)}",
            str(len(config.smoothing.groups)),
            _residual(config),
            str(sum(space.kind != "R1" for space in config.rotation.spaces)),
            str(len(config.rotation.online)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _residual(config: Config) -> str:
    spaces = [space for space in config.rotation.spaces if space.kind == "R1"]
    if spaces:
        return ", ".join(f"{space.size}{', centred first' if space.centre else ''}" for space in spaces)
    blocked = next((blocked for blocked in config.blocked if blocked.what == "rotation"), None)
    return f"blocked by {blocked.operator} at {blocked.at}" if blocked is not None else "none"


def main(arguments: Sequence[str]) -> int:
    """Write the configs and the index; 1 where a model failed, whose old config then stays."""
    folder = Path(arguments[0]) if arguments else FOLDER
    names = list(arguments[1:]) or names_in(folder)
    failed = 0
    for name in names:
        start = time.perf_counter()
        try:
            save(generate(name), folder, name)
            print(f"{folder / name}.json ({time.perf_counter() - start:.1f} s)", flush=True)
        except AutoQuantError as error:
            failed += 1
            print(f"error: {name}: {error}", file=sys.stderr, flush=True)
    write_index(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

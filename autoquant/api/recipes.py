"""Other tools' recipes: written from a config, read into one, and judged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autoquant.api.arguments import IMPORTING, config_of, source_of, steps_of
from autoquant.errors import AutoQuantError
from autoquant.models.tasks import Kind
from autoquant.steps import Progress, silent

if TYPE_CHECKING:
    from torch import nn

    from autoquant.config.format import Config
    from autoquant.report.recipes import Audited, Imported, Recipe


def export_recipe(config: str | Path | Config, to: str, *, algorithm: str | None = None) -> Recipe:
    """``config`` as a recipe of another tool, and what of it that tool cannot say.

    ``to``: llm-compressor, quark, modelopt, brevitas or auto-round; ``algorithm``: which of the tool's own gets the
    smoothing groups. Imports no torch. Raises AutoQuantError for an unknown tool or algorithm.
    """
    from autoquant.recipes.tools import write_recipe
    from autoquant.report.recipes import Recipe

    text, refused = write_recipe(config_of(config), to, algorithm)
    return Recipe(to, text, tuple(refused))


def import_recipe(
    recipe: str | Path,
    tool: str,
    model: str | Path,
    *,
    layers: int | None = None,
    task: Kind | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Imported:
    """The proved config of ``model`` in which the smoothing groups of a hand-made recipe are on and all others off.

    Raises AutoQuantError where a mapping of the recipe does not hold (``audit`` says more), or none is one of a group.
    """
    progress(IMPORTING, 0, 0)
    from autoquant.api.analysis import analyze
    from autoquant.recipes.audit import bench_for
    from autoquant.recipes.importing import imported
    from autoquant.recipes.reading import read_recipe
    from autoquant.report.recipes import Imported

    mappings = read_recipe(Path(recipe), tool)
    source = source_of(model, None, layers, task, trust_remote_code)
    how = {"layers": layers, "task": task, "trust_remote_code": trust_remote_code}
    config = analyze(model, progress=progress, **how).config  # type: ignore[arg-type]  # each of its own type
    config, used, unused = imported(bench_for(source, progress=steps_of(progress)), config, mappings, tool)
    return Imported(config, tuple(used), tuple(unused))


def audit(
    recipe: str | Path,
    tool: str,
    model: str | Path | nn.Module | None = None,
    *,
    task: Kind | None = None,
    trust_remote_code: bool = False,
    python: str | Path | None = None,
    progress: Progress = silent,
) -> Audited:
    """Judge hand-made mappings: right, incomplete, wrong, and what each changes.

    ``recipe``: a file of ``tool``'s, put to ``model``; or a class of the tool's registry, or ``all`` of it, as
    installed in the environment of ``python``, put to the type of transformers that has the class, or to ``model``. The
    result has the ``patch`` that mends the registry, for the tools of which one is written.

    Raises AutoQuantError where a file holds no mapping, a class is in no registry, or the registry cannot be read.
    """
    progress(IMPORTING, 0, 0)
    from autoquant.recipes.auditing import audit_file, audit_registry
    from autoquant.report.recipes import Audited

    tell = steps_of(progress)
    source = None if model is None else source_of(model, None, None, task, trust_remote_code)
    if source is not None and python is None:
        if str(recipe).isidentifier() and not Path(recipe).exists():
            raise AutoQuantError(f"'{recipe}': no such file; for a class name the --python that has {tool}")
        return Audited(tool, "", (audit_file(Path(recipe), tool, source, tell),))
    if python is None:
        raise AutoQuantError(f"'{recipe}': name the MODEL to put a file to, or --python, where {tool} is installed")
    version, found, patch = audit_registry(str(recipe), tool, Path(python), source, tell)
    return Audited(tool, version, tuple(found), patch)

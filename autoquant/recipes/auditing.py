"""What is put to the proof: a recipe file and a model, or the registry of an installed tool, class by class."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from autoquant.config.spelling import did_you_mean
from autoquant.errors import AutoQuantError
from autoquant.models.auto_classes import types_of_class
from autoquant.models.repair import find_source
from autoquant.models.source import ModelSource, named_type
from autoquant.recipes.audit import Audit, Bench, audit, bench_for
from autoquant.recipes.matching import WrittenMapping
from autoquant.recipes.mending import HOLDS, mended
from autoquant.recipes.patching import Mend, Source, patch
from autoquant.recipes.reading import mappings_in, read_recipe

Progress = Callable[[str], None]
_REGISTRIES = {"llm-compressor": "registry_llm_compressor.py", "quark": "registry_quark.py"}
MENDED = ("llm-compressor",)
"""Tools whose registry a patch is written for."""
ALL = "all"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a registry put to one type of model; ``audit`` is None where it could not be, and why.

    ``mend``: what it becomes in the patch; None where every mapping holds.
    """

    name: str
    modifier: str
    model: str
    audit: Audit | None
    why: str = ""
    mend: Mend | None = None


def audit_file(path: Path, tool: str, source: ModelSource, progress: Progress) -> Entry:
    """A recipe file put to a model."""
    mappings = read_recipe(path, tool)
    return Entry(str(path), "", source.name, audit(bench_for(source, progress=progress), mappings, tool))


def audit_registry(
    name: str, tool: str, python: Path, source: ModelSource | None, progress: Progress
) -> tuple[str, list[Entry], str]:
    """The version of an installed tool, its registry's entry for a class or a model type, or ``all`` of them, judged,
    and the patch that mends the registry. ``source``: what an entry is put to, in place of its type's default model.

    Raises AutoQuantError where the registry cannot be read or has no such entry.
    """
    content = registry_of(tool, python)
    names = names_of(content)
    if name != ALL and name not in names:
        raise AutoQuantError(f"{tool} {content['version']} has no entry '{name}'{did_you_mean(name, names)}")
    entries = [
        entry
        for one in (names if name == ALL else [name])
        for entry in entries_of(one, content, tool, source, progress)
    ]
    return content["version"], entries, mending_patch(content, entries)


def names_of(content: Mapping[str, Any]) -> list[str]:
    """The classes or types that a registry has entries for, those last whose mappings it makes at run time."""
    found = (*content["registries"].values(), *content.get("made_at_run_time", {}).values())
    return list(dict.fromkeys(entry for names in found for entry in names))


def mending_patch(content: Mapping[str, Any], entries: Sequence[Entry]) -> str:
    """A unified diff of the files that hold the registries; empty where nothing is to be mended."""
    sources = {modifier: Source(**found) for modifier, found in content.get("sources", {}).items()}
    return patch(sources, [entry.mend for entry in entries if entry.mend is not None])


def entries_of(
    name: str, content: Mapping[str, Any], tool: str, source: ModelSource | None, progress: Progress
) -> Iterator[Entry]:
    """One entry of each registry, put to ``source`` or the type that has the class; the small model is built once."""
    made: Mapping[str, Sequence[str]] = content.get("made_at_run_time", {})
    for modifier in (modifier for modifier, names in made.items() if name in names):
        yield Entry(name, modifier, "", None, "its mappings are made from the model at run time")
    registries = {m: found for m, found in content["registries"].items() if name not in made.get(m, ())}
    if not any(name in found for found in registries.values()):
        return
    types = (
        types_of_class(name) if tool == "llm-compressor" else ([(name, None)] if named_type(name) is not None else [])
    )
    if not types and source is None:
        for modifier in (m for m, found in registries.items() if name in found):
            yield Entry(name, modifier, "", None, "this transformers has no such class")
        return
    bench: Bench | None = None
    model, why = "" if source is None else source.name, ""
    try:
        if source is None:
            model, kind = types[0]
            source = find_source(model, kind=kind)
        bench = bench_for(source, progress=progress)
    except AutoQuantError as error:
        why = error.message
    for modifier, found in registries.items():
        if name in found:
            yield _judged(name, modifier, model, written(found[name], modifier, tool), tool, bench, why)


def _judged(
    name: str,
    modifier: str,
    model: str,
    mappings: Sequence[WrittenMapping],
    tool: str,
    bench: Bench | None,
    why: str,
) -> Entry:
    if bench is None:
        return Entry(name, modifier, model, None, why)
    found = audit(bench, mappings, tool)
    if tool not in MENDED or all(one.verdict in HOLDS for one in found.judged):
        return Entry(name, modifier, model, found)
    return Entry(name, modifier, model, found, mend=Mend(name, modifier, *mended(bench, found)))


def written(content: Any, modifier: str, tool: str) -> list[WrittenMapping]:
    """The mappings of a registry's entry."""
    section = {modifier: {"mappings": content}} if tool == "llm-compressor" else {"name": modifier, **content}
    return mappings_in(section, tool)


def registry_of(tool: str, python: Path) -> dict[str, Any]:
    """The registry of the tool that is installed for ``python``. Raises AutoQuantError where that cannot be read."""
    if tool not in _REGISTRIES:
        raise AutoQuantError(f"no registry of '{tool}' is read; known: {', '.join(_REGISTRIES)}")
    script = files("autoquant.recipes").joinpath(_REGISTRIES[tool]).read_text()
    try:  # from standard input: a script's folder would come first in the path of what it imports
        run = subprocess.run([python, "-"], input=script, capture_output=True, text=True, check=False, timeout=600)
    except OSError as error:
        raise AutoQuantError(f"{python}: cannot be run: {error.strerror}; name the Python that has {tool}") from error
    except subprocess.TimeoutExpired as error:
        raise AutoQuantError(f"{python}: the registry of {tool} was not read within {error.timeout:g} s") from error
    lines = [line for line in run.stdout.splitlines() if line.startswith('{"version"')]
    if not lines:
        last = run.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        raise AutoQuantError(f"{python}: the registry of {tool} cannot be read: {last[0]}")
    content: dict[str, Any] = json.loads(lines[-1])
    return content

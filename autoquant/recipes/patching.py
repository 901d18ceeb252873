"""The patch that mends a registry of LLM Compressor's: entries of which mappings do not hold, written anew."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from autoquant.errors import AutoQuantError
from autoquant.recipes.matching import WrittenMapping

INDENT = " " * 4


@dataclass(frozen=True, slots=True)
class Source:
    """Where a registry stands: ``path`` in the tool's repository, the file's ``text``, the ``name`` of the table."""

    path: str
    text: str
    name: str


@dataclass(frozen=True, slots=True)
class Mend:
    """What an entry of a registry becomes; ``dropped``: mappings that nothing replaces."""

    entry: str
    modifier: str
    mappings: tuple[WrittenMapping, ...]
    dropped: tuple[WrittenMapping, ...] = ()


def patch(sources: Mapping[str, Source], mends: Sequence[Mend]) -> str:
    """A unified diff, for ``git apply``. ``sources`` by modifier. Raises AutoQuantError where an entry is not found."""
    texts = {source.path: source.text for source in sources.values()}
    for modifier, source in sources.items():
        lines = texts[source.path].splitlines(keepends=True)
        values = _values(source)
        for mend in sorted((one for one in mends if one.modifier == modifier), key=lambda one: -_at(values, one)[0]):
            first, last = _at(values, mend)
            lines[first:last] = [f"{INDENT}{line}\n" for line in _entry(mend)]
        texts[source.path] = "".join(lines)
    return "".join(
        line
        for source in {one.path: one for one in sources.values()}.values()
        for line in difflib.unified_diff(
            source.text.splitlines(keepends=True),
            texts[source.path].splitlines(keepends=True),
            f"a/{source.path}",
            f"b/{source.path}",
        )
    )


def _values(source: Source) -> dict[str, tuple[int, int]]:
    """The lines of each entry of the table, the first and the one behind the last, counted from 0."""
    for node in ast.walk(ast.parse(source.text)):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Dict):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == source.name for target in targets):
            return {
                str(key.value): (key.lineno - 1, value.end_lineno or key.lineno)
                for key, value in zip(node.value.keys, node.value.values, strict=True)
                if isinstance(key, ast.Constant)
            }
    raise AutoQuantError(f"{source.path}: no table {source.name}")


def _at(values: Mapping[str, tuple[int, int]], mend: Mend) -> tuple[int, int]:
    if mend.entry not in values:
        raise AutoQuantError(f"the table of {mend.modifier} has no line for '{mend.entry}'")
    return values[mend.entry]


def _entry(mend: Mend) -> Iterator[str]:
    """The lines of an entry, as the tool's own are laid out."""
    yield f'"{mend.entry}": ['
    for mapping in mend.dropped:
        yield f"{INDENT}# {mapping.smooth} has no mapping that holds in all of the layers"
    for mapping in mend.mappings:
        balance = [f'{INDENT * 3}"{_quoted(name)}",' for name in mapping.balance]
        if mapping.modifier == "SmoothQuantModifier":
            yield f"{INDENT}LayerMap("
            yield f"{INDENT * 2}balance_layers=["
            yield from balance
            yield f"{INDENT * 2}],"
            yield f'{INDENT * 2}smooth_layers="{_quoted(mapping.smooth)}",'
        else:
            yield f"{INDENT}AWQMapping("
            yield f'{INDENT * 2}"{_quoted(mapping.smooth)}",'
            yield f"{INDENT * 2}["
            yield from balance
            yield f"{INDENT * 2}],"
            if mapping.observed:
                yield f'{INDENT * 2}activation_hook_target="{_quoted(mapping.observed)}",'
        yield f"{INDENT}),"
    yield "],"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')

"""What a mapping takes, here and by LLM Compressor itself: python benchmarks/bridges_matching.py --llm-compressor PY

Every mapping of its registries, put to the names of a small model of the class, is resolved by our copy of its rule
(autoquant/recipes/matching.py) and by its own function (compressed_tensors.utils.match_modules_set) in the environment
of PY. The sets of modules, or that it stops, have to be the same: exit code 1 where they are not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from autoquant.errors import AutoQuantError
from autoquant.models.auto_classes import types_of_class
from autoquant.models.reduce import small
from autoquant.models.repair import find_source
from autoquant.recipes.auditing import names_of, registry_of, written
from autoquant.recipes.experts import modules_of
from autoquant.recipes.matching import match_sets

CHILD = Path(__file__).with_name("bridges_matching_child.py")
TOOL = "llm-compressor"


def cases_of(name: str, registries: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each mapping of a class: the names of a small model, the expressions, and the sets that we take."""
    types = types_of_class(name)
    if not types:
        return
    model_type, kind = types[0]
    try:
        modules = modules_of(small(find_source(model_type, kind=kind), 0, each=2).module)
    except AutoQuantError:  # no small model of it can be built: the audit says so
        return
    for modifier, found in registries.items():
        for mapping in written(found[name], modifier, TOOL) if name in found else ():
            targets = [mapping.smooth, *mapping.balance]
            try:
                sets = list(match_sets(modules, targets))
            except AutoQuantError:
                sets = None
            yield {"entry": f"{name} {modifier}", "modules": modules, "targets": targets, "sets": sets}


@click.command()
@click.option("--llm-compressor", "python", type=click.Path(path_type=Path), required=True)
@click.option("--entry", "only", multiple=True, help="Only these.  [default: all]")
def main(python: Path, only: tuple[str, ...]) -> None:
    content = registry_of(TOOL, python)
    names = [name for name in names_of(content) if not only or name in only]
    cases = [case for name in names for case in cases_of(name, content["registries"])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.json"
        path.write_text(json.dumps(cases))
        run = subprocess.run([python, CHILD, path], capture_output=True, text=True, check=True)
    theirs = json.loads(run.stdout.splitlines()[-1])
    differ = [(case, found) for case, found in zip(cases, theirs, strict=True) if case["sets"] != found]
    for case, found in differ:
        print(f"{case['entry']} {case['targets'][0]}: {case['sets']} here, {found} there")
    stops = sum(case["sets"] is None for case in cases)
    print(f"{len(cases)} mappings, {stops} of which stop the tool's matching: {len(differ)} differ")
    sys.exit(1 if differ or not cases else 0)


if __name__ == "__main__":
    main()

"""Hand-made registries of other tools, class by class: python benchmarks/audit.py --llm-compressor PY --quark PY

PY is the Python of an environment in which the tool is installed. Each mapping is applied with random scales to a small
float64 model of the class, as the tool applies it, and the logits are compared. Writes docs/audit.md and, where
mappings of LLM Compressor's do not hold, docs/audit.patch, which mends its registries.
"""

from __future__ import annotations

import pickle
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from autoquant.models.repair import find_source
from autoquant.recipes.audit import Verdict
from autoquant.recipes.auditing import Entry, entries_of, mending_patch, names_of, registry_of
from autoquant.report.recipes import Audited, change_of

PAGE = Path(__file__).parents[1] / "docs" / "audit.md"
GEMMA4 = {"model_type": "gemma4_text", "enable_moe_block": True}
HEAD = """# Registries of other tools, audited

`{command}`, with torch {torch}, transformers {transformers}. Facts only: each mapping is applied with random scales
to a small random float64 model of the class, as the tool applies it, and the logits are compared at several
lengths. How to read the verdicts, and how to audit a mapping of your own: [recipes.md](recipes.md). A class whose
mappings are all right may still leave groups unused: those are idle. "wrong" and "incomplete" say that the function
of the model changes, by how much with scales between 0.37 and 2.7, and why; they do not say by how much a tuned
checkpoint suffers. Some of it is known to the authors: comments beside LLM Compressor's mappings of mixtures with
leading dense layers say that the router is left out since those layers have none.

[audit.patch](audit.patch) has the entries of LLM Compressor's registries that do not hold written anew, each new
mapping judged right on the same models; what cannot be said for all layers at once is dropped with a comment.
`autoquant audit all --tool llm-compressor --python PYTHON --patch FILE` writes it.
"""
OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"first_k_dense_replace": 1, "num_experts_per_tok": 6},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "gemma4": {"text_config": {**GEMMA4, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}},
}
"""Settings of types whose default configuration lacks the layers that an entry of Quark's is for."""


def command_of(tools: Iterable[str]) -> str:
    return "python benchmarks/audit.py " + " ".join(f"--{tool} PYTHON" for tool in tools)


def page(found: list[Audited]) -> str:
    head = HEAD.format(
        command=command_of(audited.tool for audited in found),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    return "\n".join([head, *(line for audited in found for line in section(audited))])


def section(audited: Audited) -> Iterator[str]:
    yield f"## {audited.tool} {audited.version}"
    yield ""
    entries = [entry for entry in audited.entries if entry.audit is not None]
    counts = Counter(entry.audit.verdict.value for entry in entries if entry.audit is not None)
    left = len(audited.entries) - len(entries)
    said = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    yield f"{len(entries)} entries judged: {said}. Not judged: {left}."
    yield ""
    yield "| entry | algorithm | verdict | what does not hold, or is left out | change of the logits | idle groups |"
    yield "|---|---|---|---|---|---:|"
    yield from (row(entry) for entry in audited.entries)
    yield ""


def row(entry: Entry) -> str:
    if entry.audit is None:
        return f"| {entry.name} | {entry.modifier} | not judged | {cell(entry.why)} | | |"
    bad = [one for one in entry.audit.judged if one.verdict is not Verdict.RIGHT]
    why = "<br>".join(cell(f"{one.verdict.value}: {one.mapping}: {one.why}") for one in bad)
    changes = "<br>".join(change_of(one) or "-" for one in bad)
    name = entry.name + (f" ({changed})" if (changed := ", ".join(OTHERS.get(entry.name, ()))) else "")
    cells = (name, entry.modifier, entry.audit.verdict.value, why, changes, str(len(entry.audit.idle)))
    return f"| {' | '.join(cells)} |"


def cell(text: str) -> str:
    """Text in a cell: no column, no markup of its own."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


@click.command()
@click.option("--llm-compressor", "llm_compressor", type=click.Path(path_type=Path))
@click.option("--quark", type=click.Path(path_type=Path))
@click.option("--entry", "only", multiple=True, help="Only these.  [default: all]")
@click.option("--workers", default=1, show_default=True, help="Processes, an entry at a time each.")
@click.option("--kept", type=click.Path(path_type=Path), help="Folder of what is judged: a second run goes on from it.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=PAGE, show_default=True)
def main(
    llm_compressor: Path | None,
    quark: Path | None,
    only: tuple[str, ...],
    workers: int,
    kept: Path | None,
    output: Path,
) -> None:
    found, patches = [], []
    for tool, python in (("llm-compressor", llm_compressor), ("quark", quark)):
        if python is None:
            continue
        content = registry_of(tool, python)
        names = [name for name in names_of(content) if not only or name in only]
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            made = pool.map(judged, names, repeat(content), repeat(tool), repeat(kept))
            entries = [entry for of_name in made for entry in of_name]
        patches.append(mending_patch(content, entries))
        found.append(Audited(tool, content["version"], tuple(entries), patches[-1]))
    output.write_text(page(found), encoding="utf-8")
    if any(patches):
        output.with_suffix(".patch").write_text("".join(patches), encoding="utf-8")


def judged(name: str, content: Mapping[str, Any], tool: str, kept: Path | None) -> list[Entry]:
    """The entries of a class; those of OTHERS put to a model that has the layers they are for."""
    place = None if kept is None else kept / f"{tool}-{content['version']}-{name}.pickle"
    if place is not None and place.exists():
        before: list[Entry] = pickle.loads(place.read_bytes())
        return before
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = None
        if tool == "quark" and name in OTHERS:
            transformers.AutoConfig.for_model(name, **OTHERS[name]).save_pretrained(folder)
            source = find_source(folder)
        entries = list(entries_of(name, content, tool, source, lambda step: None))
    print(
        *(f"{tool} {one.name} {one.modifier}: {one.audit and one.audit.verdict}" for one in entries),
        sep="\n",
        flush=True,
    )
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(pickle.dumps(entries))
    return entries


if __name__ == "__main__":
    main()

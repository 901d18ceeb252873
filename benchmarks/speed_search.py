"""Measure ``autoquant search`` of a Llama of random bfloat16 weights: candidates layer by layer and in memory.

    python benchmarks/speed_search.py -o DIR --shape 8b --device cuda

DIR takes the model and its config, made once and the same as those of speed_quantize.py, what each way measured (a JSON
file each) and the page, a section for each run, by its title. Each way is one process: the search with the knobs given,
which begins nothing new after its budget (minutes), with the seconds that each candidate took and the KL divergence it
was judged by: random weights make that no figure of a model, but it has to be the same both ways. ``--way``: one of
them; a later call puts the other beside it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click
from speed_quantize import STATIC, TEXT, cards, measured, put

KNOBS = "rotation,alpha"
WAYS = {"layers": "layer by layer", "memory": "in memory"}


def search(model: Path, config: Path, way: str, found: Path, **options: Any) -> None:
    """In a process of its own: search, and write down what each candidate took."""
    import torch

    from autoquant import api
    from autoquant.checkpoint import trial
    from autoquant.searcher.judge import Searcher

    opened = trial.open_trials

    def as_asked(*arguments: Any, **named: Any) -> Any:
        return opened(*arguments, **{**named, "small_too": True}) if way == "layers" else None

    trial.open_trials = as_asked
    candidates: list[dict[str, Any]] = []
    whole: list[str] = []
    start, tried, load, begin = time.monotonic(), Searcher._tried, Searcher.load, Searcher.__init__
    took = {"before": 0.0, "float": 0.0}

    def timed(self: Searcher, config: Any, said: str) -> Any:
        began, loads = time.monotonic(), len(whole)
        result = tried(self, config, said)
        kl = sum(result[0].kl) / sum(result[0].counts)
        seconds = time.monotonic() - began
        candidates.append({"what": said, "s": seconds, "kl": kl, "in memory": len(whole) > loads})
        return result

    def loaded(self: Searcher, said: str) -> Any:
        whole.append(said)
        return load(self, said)

    def begun(self: Searcher, *arguments: Any) -> None:
        took["before"] = time.monotonic() - start
        begin(self, *arguments)
        took["float"] = time.monotonic() - start - took["before"]

    Searcher._tried, Searcher.load, Searcher.__init__ = timed, loaded, begun  # type: ignore[method-assign]  # to time them
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    api.search(model, config, calibration=TEXT, strategy=STATIC, unproved=True, tell=tell, **options)
    gpu = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None
    searched = time.monotonic() - start
    result = {
        **took,
        "searched": searched,
        "candidates": candidates,
        "gpu": gpu,
        "used up": "the budget is used up" in lines,
    }
    found.write_text(json.dumps(result, indent=1))


def typical(result: dict[str, Any], *, fresh: bool) -> float | None:
    """The median seconds of candidates that sweep a rotation of their own, or of those that need not."""
    own = ("rotation", "as it is")
    seconds = [one["s"] for one in result["candidates"] if one["what"].startswith(own) == fresh and one["what"]]
    return statistics.median(seconds) if seconds else None


def table(title: str, results: dict[str, dict[str, Any]]) -> str:
    """A section of the page."""
    rows = {
        "candidates judged": [f"{len(one['candidates'])}" for one in results.values()],
        "before the search, s (imports, tokenizer, windows)": [f"{one['before']:.1f}" for one in results.values()],
        "the float model, s": [f"{one['float']:.1f}" for one in results.values()],
        "a candidate with a rotation of its own, s (median)": [
            said(typical(one, fresh=True)) for one in results.values()
        ],
        "any other, s (median)": [said(typical(one, fresh=False)) for one in results.values()],
        "the whole search, s": [
            f"{one['searched']:.1f}{', budget used up' if one['used up'] else ''}" for one in results.values()
        ],
        "process start to end, s": [f"{one['seconds']:.1f}" for one in results.values()],
        "CPU s": [f"{one['cpu']:.1f}" for one in results.values()],
        "host memory, MB, mapped files included": [f"{one['host']:,.0f}" for one in results.values()],
        "GPU memory, MB, allocated by torch": [
            "" if one["gpu"] is None else f"{one['gpu']:,.0f}" for one in results.values()
        ],
    }
    lines = [f"## {title}", "", f"| | {' | '.join(WAYS[way] for way in results)} |", "|---|" + "---:|" * len(results)]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    if len(results) == 2:
        lines += ["", *compared(*results.values())]
    for way, one in results.items():
        each = "; ".join(
            f"{c['what']}{' (in memory)' if c['in memory'] and way != 'memory' else ''} {c['s']:.1f}"
            for c in one["candidates"]
        )
        lines += ["", f"{WAYS[way]}, s: {each}"]
    return "\n".join(lines) + "\n"


def compared(layers: dict[str, Any], memory: dict[str, Any]) -> list[str]:
    """What both have judged: the time, and how far the figures are apart."""
    mine = {one["what"]: one for one in layers["candidates"]}
    both = [(mine[one["what"]], one) for one in memory["candidates"] if one["what"] in mine]
    if not both:
        return ["No candidate was judged both ways."]
    ratio = sum(one["s"] for one, _ in both) / sum(other["s"] for _, other in both)
    apart = max(abs(one["kl"] - other["kl"]) / other["kl"] for one, other in both)
    return [
        f"The {len(both)} candidates that were judged both ways took {ratio:.2f} of the time layer by layer; their KL "
        f"divergences differ by {apart:.1e} of themselves at most."
    ]


def said(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f}"


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--shape", default="8b", show_default=True)
@click.option("--layers", type=int, help="Of the shape's layers the first so many.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--knobs", default=KNOBS, show_default=True)
@click.option("--sequences", default=16, show_default=True)
@click.option("--held-out", default=8, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--budget", default=3.0, show_default=True, help="Minutes, layer by layer.")
@click.option("--memory-budget", default=0.5, show_default=True, help="Minutes, in memory.")
@click.option("--way", type=click.Choice([*WAYS, "both"]), default="both", show_default=True)
@click.option("--page", type=click.Path(path_type=Path), help="[default: speed_search.md in the output]")
@click.option("--child", is_flag=True, hidden=True)
def main(
    output: Path,
    shape: str,
    layers: int | None,
    device: str,
    knobs: str,
    sequences: int,
    held_out: int,
    length: int,
    budget: float,
    memory_budget: float,
    way: str,
    page: Path | None,
    child: bool,
) -> None:
    """Measure, print and write the page."""
    from make_llama import make_llama

    model, config = output / f"model-{shape}-{layers or 'all'}", output / f"config-{shape}-{layers or 'all'}.json"
    how = {"device": device, "knobs": knobs, "sequences": sequences, "held_out": held_out, "length": length}
    if child:
        search(model, config, way, output / f"search-{way}.json", budget=budget, **how)
        return
    output.mkdir(parents=True, exist_ok=True)
    if not (model / "model.safetensors.index.json").is_file():
        start = time.monotonic()
        total = make_llama(model, shape, layers, "cpu" if device == "cpu" else "cuda")
        print(f"{model}: {total:,} parameters, made in {time.monotonic() - start:.1f} s", flush=True)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))}
    if not config.is_file():
        analyze = [sys.executable, "-m", "autoquant", "analyze", str(model), "-o", str(config), "--force"]
        measured("analyze", analyze, environment)
    results: dict[str, dict[str, Any]] = {}
    named = f"{shape}{f', {layers} layers' if layers else ''}, {sequences} + {held_out} x {length}, {knobs}"
    for one, minutes in (("layers", budget), ("memory", memory_budget)):
        found = output / f"search-{one}.json"
        if way in (one, "both"):
            found.unlink(missing_ok=True)
            arguments = [sys.executable, __file__, "-o", str(output), "--way", one, "--budget", str(minutes)]
            arguments += ["--shape", shape, *(("--layers", str(layers)) if layers else ()), "--child"]
            arguments += [part for name, value in how.items() for part in (f"--{name.replace('_', '-')}", str(value))]
            row = measured(WAYS[one], arguments, environment)
            if row.failed is None:
                figures = {"seconds": row.seconds, "cpu": row.cpu, "host": row.host, "named": named}
                found.write_text(json.dumps({**json.loads(found.read_text()), **figures}, indent=1))
        if found.is_file() and (read := json.loads(found.read_text())).get("named") == named:
            results[one] = read
    if not results:
        raise click.ClickException("nothing was measured")
    text = table(f"{named}, {cards(device)}", results)
    print(text, flush=True)
    put(page or output / "speed_search.md", f"{named}, {cards(device)}", text, "# autoquant search, measured\n")


if __name__ == "__main__":
    main()

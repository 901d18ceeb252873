"""Patterns of public model code, before and after: ``python benchmarks/reach.py CASES [--before CHECKOUT] [NAMES]``.

``--results FOLDER`` keeps what was found as patterns end (``now.jsonl``, ``before.jsonl``); a run that is stopped goes
on from there.

CASES is a folder of small models written after what public repositories do (``reach/minimal.py``, ``odd2.py``,
``odd3.py``, and the factories of ``soundness/missed.py``), with ``reach/oracle.py`` as their judge, which imports
nothing of the project. It is no part of the project. Each pattern is analysed, proved and judged in a process of its
own that is ended after two minutes; what was found before is not judged. Writes ``benchmarks/reach.md`` unless NAMES
are given; exits with 1 where a claim is false.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from soundness import paths

ROOT = Path(__file__).resolve().parent.parent
FILES = ("minimal", "odd2", "odd3", "missed")

DRIVER = """
import importlib, importlib.util, json, logging, os, pathlib, signal, sys, time, types, warnings
warnings.simplefilter("ignore"); logging.disable(logging.CRITICAL)
cases, out, limit = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
judged, only = sys.argv[4] == "judge", sys.argv[5:]
sys.path[:0] = [str(cases / "reach"), str(cases / "soundness")]
import torch
torch.set_num_threads(1)

def home(name, *places):  # which module holds it has changed over time
    for place in places:
        try:
            return getattr(importlib.import_module(f"autoquant.{place}"), name)
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(name)

if importlib.util.find_spec("autoquant.analyze") is None:  # where the cases' own main parts look for it
    sys.modules["autoquant.analyze"] = importlib.import_module("autoquant.analyzer.analyze")
analyze = home("analyze", "analyzer.analyze", "analyze")
certify = home("certify", "certificate.certify", "certify")
ModelSource = home("ModelSource", "models.source", "models")
AutoQuantError = home("AutoQuantError", "errors")
import oracle

def found():
    for file in ("minimal", "odd2", "odd3"):
        module = importlib.import_module(file)
        for key in vars(module):
            if key.startswith("f_"):
                yield file, key, getattr(module, key)
    text = (cases / "soundness" / "missed.py").read_text()
    for file in ("m3", "m4"):
        module = importlib.import_module(file)
        for key in vars(module):
            if key.startswith("f_") and f"{file}.{key}" in text:
                yield "missed", key, longer(getattr(module, key))

def longer(factory):
    def make():
        torch.manual_seed(0)
        module, args = factory()
        tokens = lambda seed: torch.randint(0, 16, (3, 40), generator=torch.Generator().manual_seed(7 + seed))
        module.oracle_runs = lambda m, seed: [m(tokens(seed))]
        return module, args
    return make

def covered(made, module):
    listed = {linear["weight"] for linear in made["model"]["linears"]}
    slots = [s for g in made["smoothing"]["groups"] for s in (*g["sources"], *g["targets"])]
    for space in made["rotation"]["spaces"]:
        slots += [*space["writers"], *(r for read in space["reads"] for r in read["readers"])]
    paths = {b["path"] for b in made["blocked"]}
    claimed = {s["path"] for s in slots}
    owners = lambda name: {name.rsplit(".", n)[0] for n in range(name.count(".") + 1)}
    layered = lambda names, own: own in names or any(matches(one, own) for one in names)
    names = [n for n, p in module.named_parameters() if p.dim() > 1]
    missing = [n for n in names if not layered(listed, n) and not layered(claimed, n)
               and not any(layered(paths, owner) for owner in owners(n))]
    return len(names), sum(layered(listed, n) for n in names), missing

def matches(pattern, name):
    parts, own = pattern.split("."), name.split(".")
    return len(parts) == len(own) and all(p == o or ("{" in p and o.isdecimal()) for p, o in zip(parts, own))

def one(file, key, factory):
    line = {"file": file, "name": key.removeprefix("f_")}
    source = ModelSource(f"{file}:{key}", factory=factory)
    try:
        analyzed = analyze(source)
    except AutoQuantError as error:
        return {**line, "failed": error.message[:400]}
    config, line["how"] = analyzed.config, analyzed.captured.how
    try:
        config = certify(analyzed, source)
    except AutoQuantError as error:
        line["refused"] = error.message[:400]
    made = json.loads(config.model_dump_json(by_alias=True))
    line["groups"] = [g["name"] for g in made["smoothing"]["groups"]]
    line["spaces"] = [s["kind"] + " " + s["name"] for s in made["rotation"]["spaces"]]
    line["blocked"] = [(b["path"], b["what"], b["reason"], b["operator"]) for b in made["blocked"]]
    line["matrices"], line["listed"], line["missing"] = covered(made, factory()[0])
    if not judged:
        return line
    try:
        rows = oracle.check(made, factory, 2)
        line["false"] = [r[:3] for r in rows if not (isinstance(r[2], float) and r[2] <= 1e-6)]
        line["judged"] = len(rows)
    except Exception as error:
        line["judge"] = repr(error)[:300]
    return line

done = {(line["file"], line["name"]) for line in map(json.loads, open(out))}
for file, key, factory in found():
    if (only and key.removeprefix("f_") not in only) or (file, key.removeprefix("f_")) in done:
        continue
    child = os.fork()
    if child == 0:
        signal.alarm(limit)
        try:
            line = one(file, key, factory)
        except BaseException as error:
            line = {"file": file, "name": key.removeprefix("f_"), "crash": repr(error)[:400]}
        with open(out, "a") as stream:
            stream.write(json.dumps(line, default=str) + chr(10))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        line = {"file": file, "name": key.removeprefix("f_"), "crash": f"ended by {status}"}
        with open(out, "a") as stream:
            stream.write(json.dumps(line) + chr(10))
"""


def run(
    cases: Path, checkout: Path, names: list[str], limit: int, kept: Path | None = None, *, judged: bool = True
) -> dict[tuple[str, str], dict[str, Any]]:
    """What ``checkout`` finds in each pattern, by file and name; patterns whose results are ``kept`` are not run.

    ``judged``: every claim is carried out, too.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = kept or Path(folder) / "found.jsonl"
        out.touch()
        subprocess.run(
            [sys.executable, "-c", DRIVER, str(cases), str(out), str(limit), "judge" if judged else "-", *names],
            env={**os.environ, "PYTHONPATH": paths(checkout), "OMP_NUM_THREADS": "1"},
            cwd=checkout,
            check=True,
        )
        lines = [json.loads(line) for line in out.read_text().splitlines()]
    order = {file: number for number, file in enumerate(FILES)}
    lines.sort(key=lambda line: order[line["file"]])
    return {(line["file"], line["name"]): line for line in lines}


def claims(line: dict[str, Any] | None) -> str:
    """``6 groups, R1 R2``: what was found, or why nothing was."""
    if line is None:
        return "-"
    for key in ("failed", "crash"):
        if key in line:
            return f"{key}: {line[key][:90]}".replace("|", "/")
    spaces = " ".join(sorted(space.partition(" ")[0] for space in line["spaces"]))
    found = f"{len(line['groups'])} groups" + f", {spaces}" * bool(spaces)
    return found + " (refused by the proof)" * ("refused" in line)


def matrices(line: dict[str, Any] | None) -> str:
    """``9 of 10, e blocked``: parameters of two or more dimensions among the linears, and in no list at all."""
    if line is None or "matrices" not in line:
        return "-"
    missing = f", in no list: {', '.join(line['missing'])}" if line["missing"] else ""
    return f"{line['listed']} of {line['matrices']}{missing}"


def verdict(line: dict[str, Any] | None) -> str:
    """What the judge says of the claims."""
    if line is None or "matrices" not in line:
        return "-"
    if "judge" in line:
        return f"not judged: {line['judge'][:60]}".replace("|", "/")
    return f"{len(line['false'])} of {line['judged']} false" if line["false"] else f"{line['judged']} hold"


def table(after: dict[tuple[str, str], Any], before: dict[tuple[str, str], Any]) -> str:
    """The patterns as a markdown table."""
    rows = ["| pattern | before | now | matrices listed before | now | judge |", "|---|---|---|---|---|---|"]
    for key, line in after.items():
        old = before.get(key)
        cells = (f"{key[0]} {key[1]}", claims(old), claims(line), matrices(old), matrices(line), verdict(line))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def summary(found: dict[tuple[str, str], Any]) -> str:
    """One sentence with the totals."""
    lines = found.values()
    captured = [line for line in lines if "matrices" in line]
    groups, spaces = (sum(len(line[key]) for line in captured) for key in ("groups", "spaces"))
    missing = sum(len(line["missing"]) for line in captured)
    judged = [line for line in captured if "judged" in line]
    trials = sum(line["judged"] for line in judged)
    verdict = f"{sum(len(line['false']) for line in judged)} of the judge's {trials} trials false, " if judged else ""
    return (
        f"{len(captured)} of {len(found)} captured, {groups} groups and {spaces} spaces, {verdict}"
        f"{missing} matrices in no list"
    )


def main() -> int:
    """Run the patterns and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--before", type=Path, help="a checkout of an older version")
    parser.add_argument("--limit", type=int, default=120, help="seconds for one pattern")
    parser.add_argument("--json", type=Path, help="where to put what was found")
    parser.add_argument("--results", type=Path, help="a folder for what is found, pattern by pattern, to go on from")
    args = parser.parse_args()
    cases, kept = args.cases.resolve(), args.results.resolve() if args.results else None
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
    after = run(cases, ROOT, args.names, args.limit, kept and kept / "now.jsonl")
    before = {}
    if args.before:
        out = kept and kept / "before.jsonl"
        before = run(cases, args.before.resolve(), args.names, args.limit, out, judged=False)
    if args.json:
        args.json.write_text(json.dumps(list(after.values()), indent=1))
    text = f"Before: {summary(before)}.\n\n" * bool(before) + f"Now: {summary(after)}.\n\n{table(after, before)}\n"
    if args.names:
        print(text)
    else:
        command = "`python benchmarks/reach.py CASES --before CHECKOUT`"
        head = f"# Patterns of public model code\n\nWritten by {command}.\n\n"
        (ROOT / "benchmarks" / "reach.md").write_text(head + text)
    return any(line.get("false") for line in after.values())


if __name__ == "__main__":
    sys.exit(main())

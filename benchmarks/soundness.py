"""Adversarial modules, before and after: ``python benchmarks/soundness.py CASES --before CHECKOUT``.

CASES is a folder of modules that were written against the project by others, with judges that share no code with it
(``soundness/run_adv.py``, ``reach/oracle.py``); it is no part of the project. CHECKOUT is a worktree of an older one.
Each file of cases is copied and run in a process of its own: analysed, proved, and every claim that is left is carried
out by the file's judge in float64. Writes ``benchmarks/soundness.md``; exits with 1 where a claim with a certificate is
false, a case ends in a traceback, or a model loses all its claims to one that is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
JUDGED = ("m1.py", "m2.py", "m3.py", "m4.py", "m5.py")
REACH = ("minimal.py", "odd2.py", "odd3.py")
DEPTH = "hf_depth.py"
LIMIT = 1800
REFUSED = "claimed by the analysis, refused by the proof"

DRIVER = """
import importlib, importlib.util, json, logging, runpy, sys, types, warnings
warnings.simplefilter("ignore"); logging.disable(logging.CRITICAL)
import torch
torch.set_num_threads(1)
sys.path.insert(0, ".")
# The cases name modules as they were called before the packages were built.
if importlib.util.find_spec("autoquant.analyze") is None:
    import autoquant.models
    from autoquant.models.repair import find_source
    from autoquant.models.source import ModelSource
    autoquant.models.ModelSource, autoquant.models.resolve = ModelSource, find_source
    for old, new in (("analyze", "analyzer.analyze"), ("certify", "certificate.certify")):
        sys.modules["autoquant." + old] = importlib.import_module("autoquant." + new)
from autoquant.analyze import analyze
from autoquant.certify import certify
from autoquant.models import ModelSource
from autoquant.errors import AutoQuantError

def judged(path):
    sys.argv = ["run_adv.py", path]
    runpy.run_path("run_adv.py", run_name="__main__")

def reach(path):
    import oracle
    name = path.removesuffix(".py")
    cases = importlib.import_module(name)
    for case in [key for key in vars(cases) if key.startswith("f_")]:
        factory, line = getattr(cases, case), {}
        try:
            source = ModelSource(name + ":" + case, factory=factory)
            analyzed = analyze(source)
            config = analyzed.config
            try:
                config = certify(analyzed, source)
                line["cert"] = "ok"
            except AutoQuantError as error:
                line["cert"] = "REFUSED " + error.message
            except Exception as error:
                line["cert"] = "CRASH " + repr(error)
            made = json.loads(config.model_dump_json(by_alias=True))
            line["groups"] = [g["name"] for g in made["smoothing"]["groups"]]
            line["spaces"] = [s["name"] for s in made["rotation"]["spaces"]]
            line["online"] = [o["path"] for o in made["rotation"]["online"]]
            line["blocked"] = [(b["path"], b["what"], b["reason"], b["operator"]) for b in made["blocked"]]
            try:
                rows = oracle.check(made, factory, 2)
            except Exception as error:
                line["judge"], rows = repr(error), []
            line["bad"] = [row[:3] for row in rows if not (isinstance(row[2], float) and row[2] <= 1e-6)]
        except AutoQuantError as error:
            line["error"] = error.message
        except Exception as error:
            line["CRASH"] = repr(error)
        json.dump(line, open("out/" + case + ".json", "w"), default=str)

def depth(path):
    judge = importlib.import_module("adv_exec")
    found, change = [], judge.change
    judge.change = lambda *args: found.append(change(*args)) or found[-1]
    line = {"cert": "ok", "groups": ["all"], "blocked": []}
    try:
        runpy.run_path(path, run_name="__main__")
        line["bad"] = [f"{value:.1e}" for value in found if not value < 1e-6]
    except AutoQuantError as error:
        line["cert"] = "REFUSED " + error.message
    except Exception as error:
        line["CRASH"] = repr(error)
    json.dump(line, open("out/f_hf_depth.json", "w"), default=str)

{"judged": judged, "reach": reach, "depth": depth}[sys.argv[1]](sys.argv[2])
"""


@dataclass(frozen=True, slots=True)
class Case:
    """What became of one module; ``false``: claims that its judge found wrong, ``certified`` or not."""

    name: str
    false: tuple[str, ...]
    certified: bool
    lost: str | None
    """Why all of its claims were given up, None where they were not."""
    traceback: str | None
    error: str | None
    """A message of one line in place of a config."""
    refused: int
    claims: int
    unjudged: str | None
    """What the judge says where it cannot run the module."""


def read(path: Path) -> Case:
    line = json.loads(path.read_text())
    certificate = line.get("cert", "")
    crash = line.get("CRASH") or line.get("HANG") or (certificate if certificate.startswith("CRASH") else None)
    claims = [*line.get("groups", ()), *line.get("spaces", ()), *line.get("online", ())]
    return Case(
        path.stem.removeprefix("f_"),
        tuple(
            str(bad[1] if isinstance(bad, list) and bad[0] in ("group", "space", "online") else bad)
            for bad in line.get("bad", ())
        ),
        certificate == "ok",
        certificate.removeprefix("REFUSED ") if certificate.startswith("REFUSED") and claims else None,
        crash,
        line.get("error"),
        sum(str(entry[2]).startswith(REFUSED) for entry in line.get("blocked", ())),
        len(claims),
        line.get("judge"),
    )


def paths(checkout: Path) -> str:
    """``PYTHONPATH`` with a checkout before whatever else it names."""
    return os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])


def run(cases: Path, checkout: Path, how: str, name: str) -> list[Case]:
    """The cases of a file, by the code of a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        shutil.copytree(cases / ("reach" if how == "reach" else "soundness"), work)
        work.chmod(0o755)
        for made in ("out", "ck"):
            (work / made).mkdir(exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": paths(checkout), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", DRIVER, how, name]
        ended = subprocess.run(command, cwd=work, env=environment, timeout=LIMIT, capture_output=True, text=True)
        found = [read(path) for path in sorted((work / "out").glob("*.json"))]
        if ended.returncode or not found:
            raise SystemExit(f"{name}: {ended.stderr[-2000:]}")
        return found


def files(cases: Path) -> Iterator[tuple[str, str]]:
    yield from (("judged", name) for name in JUDGED)
    yield "depth", DEPTH
    yield from (("reach", name) for name in REACH)


ROWS = (
    "modules",
    "with a false claim that carries a certificate",
    "with a claim of the analysis that the proof takes out, the rest kept",
    "that lose all claims to one that is refused",
    "that end in a traceback",
    "that end in one line instead of a config",
    "claims that are written and hold",
)


def counted(found: Sequence[Case]) -> Counter[str]:
    return Counter(
        dict(
            zip(
                ROWS,
                (
                    len(found),
                    sum(bool(case.false) and case.certified for case in found),
                    sum(case.refused > 0 and case.certified for case in found),
                    sum(case.lost is not None for case in found),
                    sum(case.traceback is not None for case in found),
                    sum(case.error is not None for case in found),
                    sum(case.claims for case in found if case.certified and not case.false),
                ),
                strict=True,
            )
        )
    )


def remarks(found: Sequence[Case]) -> list[str]:
    """What is not as it should be, or worth a look, case by case."""
    said = []
    for case in found:
        if case.false and case.certified:
            said.append(f"`{case.name}`: false with a certificate: {', '.join(dict.fromkeys(case.false))}")
        if case.lost is not None:
            wrong = "the judge finds claims wrong too" if case.false else "the judge finds none wrong"
            said.append(f"`{case.name}`: nothing is written ({wrong}): {case.lost[:200]}")
        if case.traceback is not None:
            said.append(f"`{case.name}`: {case.traceback[:200]}")
        if case.error is not None:
            said.append(f"`{case.name}`: one line: {case.error[:200]}")
        if case.unjudged is not None:
            said.append(f"`{case.name}`: the judge cannot run it: {case.unjudged[:200]}")
        if case.refused and case.certified:
            said.append(f"`{case.name}`: {case.refused} claims taken out by the proof, {case.claims} written")
    return [" ".join(line.split()) for line in said]


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--before", type=Path, help="a worktree of an older commit")
    parser.add_argument("--file", action="append", help="this file of cases alone, may be repeated")
    parser.add_argument("--output", type=Path, help="a file for the table, which is printed anyway")
    options = parser.parse_args()
    if not options.cases.is_dir():
        print(f"skipped: no folder of cases at {options.cases}")
        return 0
    checkouts = [path for path in (options.before, ROOT) if path is not None]
    found: dict[tuple[Path, str], list[Case]] = {}
    chosen = [(how, name) for how, name in files(options.cases) if name in (options.file or [name])]
    for how, name in chosen:
        for checkout in checkouts:
            found[checkout, name] = run(options.cases, checkout, how, name)
            print(name, commit_of(checkout), dict(counted(found[checkout, name])), file=sys.stderr, flush=True)
    names = [name for _, name in chosen]
    table = text(checkouts, names, found)
    if options.output is not None:
        options.output.write_text(table)
    print(table, end="")
    last = counted([case for name in names for case in found[ROOT, name]])
    return any(last[row] for row in (ROWS[1], ROWS[3], ROWS[4]))


def text(checkouts: Sequence[Path], names: Sequence[str], found: dict[tuple[Path, str], list[Case]]) -> str:
    heads = [commit_of(checkout) for checkout in checkouts]
    lines = ["# Adversarial modules, before and after", ""]
    lines += [
        "`python benchmarks/soundness.py CASES --before CHECKOUT --output benchmarks/soundness.md`: " + scope(),
        "",
    ]
    lines += [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    sums = [counted([case for name in names for case in found[checkout, name]]) for checkout in checkouts]
    lines += [f"| {row} | {' | '.join(str(each[row]) for each in sums)} |" for row in ROWS]
    lines += [
        "",
        f"By file, {' -> '.join(heads)}:",
        "",
        "| file | modules | false | lost whole | tracebacks |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in names:
        each = [counted(found[checkout, name]) for checkout in checkouts]
        shown = (" -> ".join(str(one[row]) for one in each) for row in (ROWS[1], ROWS[3], ROWS[4]))
        lines.append(f"| {name} | {each[-1][ROWS[0]]} | {' | '.join(shown)} |")
    said = remarks([case for name in names for case in found[checkouts[-1], name]])
    lines += ["", f"At {heads[-1]}, case by case:", "", *(f"- {line}" for line in said or ["nothing to say"])]
    return "\n".join([*lines, ""])


def scope() -> str:
    return (
        "modules written against the project by others, with judges that share no code with it; "
        "every claim that is written is carried out in float64."
    )


if __name__ == "__main__":
    sys.exit(main())

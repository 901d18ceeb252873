"""What the fuzzer counted: ``python benchmarks/fuzz.py --programs 10000 --seed 0 --output benchmarks/fuzz.md``.

Random programs over the operators of the table (``tests/analyzer/programs.py``); every group and every space that the
analyzer claims is carried out, alone and all together, in float64. Exits with 1 where one is wrong or a planted one is
not found; the smallest program that shows it is printed. The file is written anew after every 50 programs, so that a
run that is stopped leaves what it counted.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "analyzer")]
CHUNK = 50


def part(first: int, last: int) -> tuple[Counter[str], Counter[str], set[str], float, float, list[str]]:
    """Some seeds: counts, steps by kind, operators, the worst change, CPU seconds, and failures as text."""
    import torch
    from fuzzer import check, report
    from program_blocks import CATALOGUE, WEIGHTS
    from programs import draw

    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not searched for garbage again and again
    total: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    met: set[str] = set()
    worst, failures = 0.0, []
    start = time.process_time()
    for seed in range(first, last):
        built = draw(CATALOGUE, WEIGHTS, seed)
        steps.update(step.kind for step in built.program.steps)
        checked = check(built)
        total += checked.counts
        met |= checked.operators
        worst = max(worst, checked.worst)
        if checked.failure is not None:
            failures.append(f"seed {seed}\n{report(built.program, checked.failure)}")
    return total, steps, met, worst, time.process_time() - start, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a file for the table, which is printed anyway")
    options = parser.parse_args()
    last = options.seed + options.programs
    starts = range(options.seed, last, CHUNK)
    total: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    met: set[str] = set()
    worst, seconds, failures = 0.0, 0.0, []
    table = ""
    with ProcessPoolExecutor(options.processes) as pool:
        for found in pool.map(part, starts, (min(s + CHUNK, last) for s in starts)):
            total, steps = total + found[0], steps + found[1]
            met |= found[2]
            worst, seconds = max(worst, found[3]), seconds + found[4]
            failures += found[5]
            table = text(options.seed, total, steps, met, worst, seconds, failures)
            if options.output is not None:
                options.output.write_text(table)
    print(table, end="")
    return bool(failures)


def text(
    seed: int,
    total: Counter[str],
    steps: Counter[str],
    met: set[str],
    worst: float,
    seconds: float,
    failures: list[str],
) -> str:
    """The counts as Markdown."""
    from fuzzer import NOT_COVERED, TOLERANCE, table
    from program_blocks import CATALOGUE

    known, programs = table(), total["programs"]
    rows = (
        ("programs", programs),
        ("of them exported by torch, since they write into tensors", total["exported"]),
        ("of them refused by torch.export", total["uncaptured"]),
        ("steps", steps.total()),
        (f"kinds of steps drawn, of {len(CATALOGUE)}", len(steps)),
        (f"operators of the table in the graphs, of {len(known)}", len(known & met)),
        ("operators without a rule in the graphs", len(met - known - {"getitem"})),
        ("groups claimed", total["groups"]),
        ("spaces claimed", total["spaces"]),
        ("trials: each group and each space alone, all groups, everything", total["carried out"]),
        (f"trials that change an output by more than {TOLERANCE:g}", total["wrong"]),
        ("largest change of an output", f"{worst:.1e}"),
        ("groups and spaces planted", total["planted"]),
        ("of them found", total["found"]),
        ("CPU seconds", f"{seconds:.0f}"),
    )
    lines = ["# What the fuzzer counted", "", f"`python benchmarks/fuzz.py --programs {programs} --seed {seed}`", ""]
    lines += ["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)]
    lines += ["", "Operators of the table that no program contains:", "", "| operator | why |", "|---|---|"]
    lines += [f"| {name} | {NOT_COVERED.get(name, 'not drawn in this run')} |" for name in sorted(known - met)]
    for failure in failures:
        lines += ["", "```", failure, "```"]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())

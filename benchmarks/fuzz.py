"""What the fuzzer counted: ``python benchmarks/fuzz.py --programs 10000 --seed 0 > benchmarks/fuzz.md``.

Random programs over the operators of the table (``tests/analyzer/programs.py``); every group and every space that the
analyzer claims is carried out, alone and all together, in float64. Exits with 1 where one is wrong or a planted one is
not found, after printing the smallest program that shows it.
"""

from __future__ import annotations

import argparse
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
    options = parser.parse_args()
    last = options.seed + options.programs
    starts = range(options.seed, last, CHUNK)
    total: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    met: set[str] = set()
    worst, seconds, failures = 0.0, 0.0, []
    started = time.perf_counter()
    with ProcessPoolExecutor(options.processes) as pool:
        for found in pool.map(part, starts, (min(s + CHUNK, last) for s in starts)):
            total, steps = total + found[0], steps + found[1]
            met |= found[2]
            worst, seconds = max(worst, found[3]), seconds + found[4]
            failures += found[5]
            print(f"{total['programs']} programs, {len(failures)} failures", file=sys.stderr, flush=True)
    write(options.programs, options.seed, total, steps, met, worst, seconds, time.perf_counter() - started, failures)
    return bool(failures)


def write(
    programs: int,
    seed: int,
    total: Counter[str],
    steps: Counter[str],
    met: set[str],
    worst: float,
    seconds: float,
    wall: float,
    failures: list[str],
) -> None:
    """The counts as Markdown."""
    from fuzzer import NOT_COVERED, TOLERANCE, table
    from program_blocks import CATALOGUE

    known = table()
    print(f"# What the fuzzer counted\n\n`python benchmarks/fuzz.py --programs {programs} --seed {seed}`\n")
    print("| | |\n|---|---:|")
    for name, value in (
        ("programs", total["programs"]),
        ("of them exported by torch, since they write into tensors", total["exported"]),
        ("of them refused by torch.export", total["uncaptured"]),
        ("steps", steps.total()),
        (f"kinds of steps drawn, of {len(CATALOGUE)}", len(steps)),
        (f"operators of the table in the graphs, of {len(known)}", len(known & met)),
        ("operators without a rule in the graphs", len(met - known - {"getitem"})),
        ("groups claimed", total["groups"]),
        ("spaces claimed", total["spaces"]),
        ("claims carried out, alone and all together", total["carried out"]),
        (f"claims that change an output by more than {TOLERANCE:g}", sum("wrong" in f for f in failures)),
        ("largest change of an output", f"{worst:.1e}"),
        ("groups and spaces planted", total["planted"]),
        ("of them found", total["found"]),
        ("CPU seconds for each program", f"{seconds / max(total['programs'], 1):.3f}"),
        ("seconds", f"{wall:.0f}"),
    ):
        print(f"| {name} | {value} |")
    print("\nOperators of the table that no program contains:\n\n| operator | why |\n|---|---|")
    for name in sorted(known - met):
        print(f"| {name} | {NOT_COVERED.get(name, 'not drawn in this run')} |")
    for failure in failures:
        print(f"\n```\n{failure}\n```")


if __name__ == "__main__":
    sys.exit(main())

"""What the fuzzer counted: ``python benchmarks/fuzz.py --programs 10000 --seed 0 --output benchmarks/fuzz.md``.

Random programs over the operators of the table (``tests/analyzer/programs.py``); every group and every space that the
analyzer claims is carried out, alone and all together, in float64. Exits with 1 where one is wrong or a planted one is
not found; the smallest program that shows it is printed. The file is written anew as programs end, so that a run that
is stopped leaves what it counted.

``--scenarios N``: beside these, N small models on each axis of ``tests/analyzer/scenario_axes.py`` (other lengths and
offsets, layers that differ in the middle, buffers, roles shared by one parameter, prefill and decode, experts not hit),
by default a tenth of the programs. Each is analysed and proved as a person's own, and what would be written is judged
in other runs than the traced one. Traps are claims that the traced run alone bears out: none may be written.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import time
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "analyzer")]
CHUNK = 50
SCENARIOS = 5
"""Scenarios that one process runs at a time: they take seconds each."""


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


def axis_part(axis: str, first: int, last: int) -> tuple[Counter[str], float, float, list[str]]:
    """Some scenarios of an axis: counts, the worst change of what holds, CPU seconds, and failures as text."""
    import torch
    from scenario_check import run

    torch.set_num_threads(1)
    total: Counter[str] = Counter()
    worst, failures = 0.0, []
    start = time.process_time()
    for seed in range(first, last):
        judged = run(axis, seed)
        total += judged.counts
        worst = max(worst, judged.worst)
        failures += judged.failures
        torch._dynamo.reset()  # what it keeps of one model is of no use to the next
    return total, worst, time.process_time() - start, failures


@dataclass(slots=True)
class Counted:
    """What was counted so far."""

    seed: int
    total: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    met: set[str] = field(default_factory=set)
    worst: float = 0.0
    seconds: float = 0.0
    axes: dict[str, Counter[str]] = field(default_factory=dict)
    axes_worst: float = 0.0
    axes_seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def add(self, axis: str | None, found: Any) -> None:
        if axis is None:
            self.total, self.steps = self.total + found[0], self.steps + found[1]
            self.met |= found[2]
            self.worst, self.seconds = max(self.worst, found[3]), self.seconds + found[4]
        else:
            self.axes[axis] = self.axes.get(axis, Counter()) + found[0]
            self.axes_worst, self.axes_seconds = max(self.axes_worst, found[1]), self.axes_seconds + found[2]
        self.failures += found[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--scenarios", type=int, help="small models on each axis; default: a tenth of the programs")
    parser.add_argument("--axis", action="append", help="this axis alone, may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a file for the tables, which are printed anyway")
    options = parser.parse_args()
    first, last = options.seed, options.seed + options.programs
    each = options.programs // 10 if options.scenarios is None else options.scenarios
    counted = Counted(options.seed)
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks: dict[Future[Any], str | None] = {}
        for start in range(first, first + each, SCENARIOS):
            for axis in options.axis or axes():
                end = min(start + SCENARIOS, first + each)
                tasks[pool.submit(axis_part, axis, start, end)] = axis
        for start in range(first, last, CHUNK):
            tasks[pool.submit(part, start, min(start + CHUNK, last))] = None
        for done in as_completed(tasks):
            counted.add(tasks[done], done.result())
            if options.output is not None:
                options.output.write_text(text(counted))
    print(text(counted), end="")
    return bool(counted.failures)


def axes() -> tuple[str, ...]:
    from scenario_axes import AXES

    return tuple(AXES)


def text(counted: Counted) -> str:
    """The counts as Markdown."""
    each = max((found["programs"] for found in counted.axes.values()), default=0)
    command = f"--programs {counted.total['programs']} --scenarios {each} --seed {counted.seed}"
    lines = ["# What the fuzzer counted", "", f"`python benchmarks/fuzz.py {command}`", ""]
    if counted.total["programs"]:
        lines += program_lines(counted)
    if counted.axes:
        lines += axis_lines(counted)
    for failure in counted.failures:
        lines += ["", "```", failure, "```"]
    return "\n".join([*lines, ""])


AXIS_ROWS = (
    ("models", "programs"),
    ("groups written", "groups"),
    ("spaces written", "spaces"),
    ("claims carried out, in every run", "carried out"),
    ("of them wrong", "wrong"),
    ("groups and spaces planted", "planted"),
    ("of them found", "found"),
    ("traps", "traps"),
    ("of them sharp: made, the claim changes an output", "traps that are sharp"),
    ("of them refused", "traps refused"),
    ("of these by the analysis, before the proof", "traps seen by the analysis"),
    ("claims of the analysis that the proof took out", "refused"),
    ("models of which nothing is written", "lost"),
)


def axis_lines(counted: Counted) -> list[str]:
    """The table of the axes; the order is that of the catalogue."""
    names = [name for name in axes() if name in counted.axes]
    total: Counter[str] = sum(counted.axes.values(), Counter())
    lines = ["", "## Other runs than the traced one", "", f"| | {' | '.join(names)} | all |"]
    lines.append("|---|" + "---:|" * (len(names) + 1))
    for name, key in AXIS_ROWS:
        lines.append(f"| {name} | {' | '.join(str(counted.axes[axis][key]) for axis in names)} | {total[key]} |")
    lines += ["", f"Traps refused: {total['traps refused']} of {total['traps']}. "]
    lines[-1] += f"Largest change of an output by what holds: {counted.axes_worst:.1e}. "
    lines[-1] += f"CPU seconds: {counted.axes_seconds:.0f}."
    return lines


def program_lines(counted: Counted) -> list[str]:
    from fuzzer import NOT_COVERED, TOLERANCE, table
    from program_blocks import CATALOGUE

    total, steps, met = counted.total, counted.steps, counted.met
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
        ("trials not judged, since rounding alone changes what the program computes", total["not judged"]),
        ("largest change of an output", f"{counted.worst:.1e}"),
        ("groups and spaces planted", total["planted"]),
        ("of them found", total["found"]),
        ("CPU seconds", f"{counted.seconds:.0f}"),
    )
    lines = ["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)]
    lines += ["", "Operators of the table that no program contains:", "", "| operator | why |", "|---|---|"]
    lines += [f"| {name} | {NOT_COVERED.get(name, 'not drawn in this run')} |" for name in sorted(known - met)]
    return lines


if __name__ == "__main__":
    sys.exit(main())

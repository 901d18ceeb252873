"""Damaged config files: each loads or ends in one clean error, soon and small.

``python benchmarks/config_fuzz.py --files 10000 --seed 0 --output benchmarks/config_fuzz.md``

The files of ``generated_configs/`` with bytes changed, and with values, keys and whole parts changed, moved, repeated
and removed. Each is loaded in the process of a chunk: CPU seconds of the load, and the growth of the process beyond
what the chunk's largest file took before. Every file is read the long way too, which keeps positions: both ways have
to say the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "generated_configs"
CHUNK = 250
SECONDS, MEBIBYTES = 2.0, 300.0
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**62, 10**30, 0.5, -0.0, 1e308, "", "0", "0-3", "3-0", "0-999999", "{layer}",
    "0-99999:1", "model", "é", "\x00", "a" * 5000, [], {}, [[]], [0] * 3000, {"a": 1}, {"layer": {"a": []}},
]  # fmt: skip
TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b"null",
    b"1e999",
    b"NaN",
    b"\xff",
    b"\x00",
    b"\n",
    b"9" * 40,
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        for key, item in value.items():
            found += places(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            found += places(item, (*path, number))
    return found


def holder(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def by_structure(text: str, rng: random.Random) -> bytes:
    """One to three values replaced, removed, repeated, renamed or exchanged."""
    content = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        found = places(content)
        path = rng.choice(found)
        at, last = holder(content, path), path[-1]
        kind = rng.randrange(6)
        if kind == 0:
            at[last] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 1:
            del at[last]
        elif kind == 2 and isinstance(at, list):
            at[last:last] = copy.deepcopy([at[last]] * rng.choice([1, 2, 50, 300]))
        elif kind == 3 and isinstance(at, dict):
            at[rng.choice([str(last) + "s", str(last)[:-1], "x"])] = at.pop(last)
        elif kind == 4:
            other = rng.choice(found)
            at[last] = copy.deepcopy(holder(content, other)[other[-1]])
        elif type(at[last]) is int:
            at[last] += rng.choice([-1, 1, 7, 10**6, -(10**9)])
        elif isinstance(at[last], str):
            cut = rng.randrange(len(at[last]) + 1)
            at[last] = at[last][:cut] + rng.choice(["", "x", ".", "{layer}", "-", ",", "0"]) + at[last][cut + 1 :]
    return json.dumps(content).encode()


def by_bytes(text: str, rng: random.Random) -> bytes:
    """One to five bytes or pieces replaced, removed, inserted, repeated; or the file cut off."""
    data = bytearray(text.encode())
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.choice([1, 1, 2, 40, 2000])]
        elif kind == 2:
            data[at:at] = rng.choice(TOKENS)
        elif kind == 3:
            data[at:at] = data[at : at + rng.choice([1, 10, 500, 5000])]
        elif kind == 4:
            data[at:at] = rng.choice(TOKENS) * rng.choice([2, 100, 3000])
        elif rng.random() < 0.1:
            del data[at:]
        data = data or bytearray(b" ")
    return bytes(data)


KINDS: dict[str, Callable[[str, random.Random], bytes]] = {"structure": by_structure, "bytes": by_bytes}


def peak() -> int:
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def part(first: int, last: int, seed: int) -> tuple[Counter[str], float, float, list[str]]:
    """Some files: counts, the most CPU seconds and MiB of one, and faults as text."""
    from autoquant.config import file as reading
    from autoquant.errors import AutoQuantError

    sources = sorted(path for path in CONFIGS.rglob("*.json") if "recipes" not in path.parts)
    path = Path(f"/tmp/autoquant_config_fuzz_{first}.json")
    counts: Counter[str] = Counter()
    slowest, largest, faults = 0.0, 0.0, []
    short = reading._read_quickly

    def outcome() -> str:
        try:
            return reading.config_text(reading.load_config(path))
        except AutoQuantError as error:
            return f"error: {error}"

    for number in range(first, last):
        rng = random.Random(f"{seed} {number}")
        kind = ("structure", "bytes")[number % 2]
        path.write_bytes(KINDS[kind](rng.choice(sources).read_text(encoding="utf-8"), rng))
        before, started = peak(), time.process_time()
        try:
            said = outcome()
            seconds, mebibytes = time.process_time() - started, (peak() - before) / 1024
            reading._read_quickly = lambda text: None
            if said != outcome():
                faults.append(f"file {number} ({kind}): the two ways of reading differ")
        except Exception as error:  # anything else than a clean error is what is looked for
            faults.append(f"file {number} ({kind}): {type(error).__name__}: {str(error)[:200]}")
            continue
        finally:
            reading._read_quickly = short
        counts[f"{kind}, {'refused' if said.startswith('error: ') else 'loaded'}"] += 1
        slowest, largest = max(slowest, seconds), max(largest, mebibytes)
        if seconds > SECONDS or mebibytes > MEBIBYTES:
            faults.append(f"file {number} ({kind}): {seconds:.1f} s, {mebibytes:.0f} MiB")
    path.unlink(missing_ok=True)
    return counts, slowest, largest, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a file for the table, which is printed anyway")
    options = parser.parse_args()
    starts = range(0, options.files, CHUNK)
    ends = [min(start + CHUNK, options.files) for start in starts]
    total: Counter[str] = Counter()
    slowest, largest, faults = 0.0, 0.0, []
    with ProcessPoolExecutor(options.processes, max_tasks_per_child=1) as pool:
        for counts, seconds, mebibytes, found in pool.map(part, starts, ends, [options.seed] * len(ends)):
            total += counts
            slowest, largest = max(slowest, seconds), max(largest, mebibytes)
            faults += found
            print(sum(total.values()), len(faults), f"{slowest:.2f} s, {largest:.0f} MiB", flush=True)
    lines = [
        "# Damaged config files",
        "",
        f"`python benchmarks/config_fuzz.py {' '.join(sys.argv[1:])}`",
        "",
        "Files of `generated_configs/` with bytes, or values, keys and parts, changed; each loads or ends in one clean",
        "error, and is read in two ways that have to say the same. Most CPU seconds and most growth of one load.",
        "",
        "| damage | loaded | refused with one error |",
        "|---|---:|---:|",
        *(f"| {kind} | {total[f'{kind}, loaded']} | {total[f'{kind}, refused']} |" for kind in KINDS),
        "",
        f"{sum(total.values()):,} files, {len(faults)} faults; at most {slowest:.2f} s and {largest:.0f} MiB.",
        *(f"- {fault}" for fault in faults[:50]),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

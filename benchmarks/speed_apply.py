"""``autoquant apply`` against copying the same files through safetensors: ``python benchmarks/speed_apply.py MODEL``.

MODEL is a folder (``benchmarks/make_llama.py``), DIR (``-o``) takes three copies of it. Both are a Python process
that has imported what it needs, and are timed from there: ``copy`` loads each file with ``load_file``, writes it with
``save_file``, and flushes it to disk as ``apply`` does. The whole process, from its start, is in the last columns. Each
is measured ``--rounds`` times by turns, the least counts; ``busy`` is beside ten processes that compute. Sections of
speed_apply.md are replaced by their title.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

HERE = Path(__file__).resolve()
PAGE = HERE.with_suffix(".md")
LOAD = 10
NOISE = "x = 1.0\nwhile True: x = x * 1.0000001 % 7"


@dataclass(frozen=True, slots=True)
class Cost:
    """Of the work alone (seconds, CPU seconds), and of the whole process (seconds, CPU seconds with its workers', the
    MB of the largest process).
    """

    seconds: float
    cpu: float
    whole: float
    whole_cpu: float
    megabytes: float


def copy(source: Path, target: Path) -> None:
    """Each file read whole, written and flushed."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        save_file(load_file(path), target / path.name, {"format": "pt"})
        descriptor = os.open(target / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def work(what: str, source: Path, target: Path, config: Path, workers: int, device: str) -> None:
    """In a process of its own: import, then do it and print what it cost."""
    if what == "copy":
        import safetensors.torch  # noqa: F401  # before the clock
        import torch
    else:
        import torch

        from autoquant.checkpoint.transform import TransformOptions, transform_checkpoint
        from autoquant.config.file import load_config
        from autoquant.models.load import load_skeleton
        from autoquant.pipeline.select import Transforms

        load_skeleton(source)
        if device != "cpu" and torch.cuda.is_available():
            torch.zeros(1, device="cuda").cpu()
        loaded = load_config(config)
        options = TransformOptions(Transforms.parse("rotation"), device=device, workers=workers)
    begun, before = time.monotonic(), processor_seconds()
    if what == "copy":
        copy(source, target)
    else:
        transform_checkpoint(source, loaded, target, options)
    print(json.dumps([time.monotonic() - begun, processor_seconds() - before]))


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    every = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in every)


def measured(arguments: list[str], target: Path) -> Cost:
    """A process that does the work, and what the system counted of it."""
    shutil.rmtree(target, ignore_errors=True)
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, str(HERE), "--work", *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments}: exit status {status}")
    seconds, cpu = json.loads(lines[-1])
    whole = time.monotonic() - begun
    return Cost(seconds, cpu, whole, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Others that compute beside."""
    others = [subprocess.Popen([sys.executable, "-c", NOISE]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def least(costs: list[Cost]) -> Cost:
    return min(costs, key=lambda cost: cost.seconds)


def section(title: str, gigabytes: float, rows: dict[str, Cost], note: str) -> str:
    lines = [f"## {title}", "", note, ""]
    lines += ["| | s | GB/s | of copy's speed | CPU s | peak MB | whole process s | CPU s |", "|---|" + "---:|" * 7]
    for name, cost in rows.items():
        against = rows["copy" + (", busy" if name.endswith(", busy") else "")]
        lines.append(
            f"| {name} | {cost.seconds:.1f} | {gigabytes / cost.seconds:.2f} | {against.seconds / cost.seconds:.0%} | "
            f"{cost.cpu:.1f} | {cost.megabytes:,.0f} | {cost.whole:.1f} | {cost.whole_cpu:.1f} |"
        )
    return "\n".join(lines) + "\n"


def put(page: Path, text: str) -> None:
    """Write a section into the page, in place of the one of its title."""
    old = page.read_text(encoding="utf-8") if page.is_file() else "# autoquant apply, measured\n"
    head, *sections = re.split(r"^(?=## )", old, flags=re.M)
    title = text.partition("\n")[0]
    kept = [one.rstrip("\n") for one in sections if one.partition("\n")[0] != title]
    page.write_text("\n\n".join([head.rstrip("\n"), *kept, text.rstrip("\n")]) + "\n", encoding="utf-8")


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR")
@click.option("--config", type=click.Path(path_type=Path), help="Of autoquant analyze.  [default: made now]")
@click.option("--workers", default="1,2", show_default=True, help="Numbers, each measured.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--no-busy", is_flag=True, help="Measure on the machine as it is alone.")
@click.option("--page", type=click.Path(path_type=Path), default=PAGE)
def main(
    model: Path, output: Path, config: Path | None, workers: str, device: str, rounds: int, no_busy: bool, page: Path
) -> None:
    """Measure, and put the table into the page."""
    output.mkdir(parents=True, exist_ok=True)
    if config is None:
        config = output / "config.json"
        analyze = ["-m", "autoquant", "analyze", str(model), "-o", str(config), "--force"]
        subprocess.run([sys.executable, *analyze], check=True, capture_output=True)
    given = {"copy": "1"} | {
        f"apply, {n} worker{'s' * (n != '1')}{'' if device == 'cpu' else ', ' + device}": n for n in workers.split(",")
    }
    rows: dict[str, Cost] = {}
    for label, processes in [("", 0)] if no_busy else [("", 0), (", busy", LOAD)]:
        costs: dict[str, list[Cost]] = {}
        with busy(processes):
            for _ in range(1 if processes else rounds):
                for name, n in given.items():
                    what = "copy" if name == "copy" else "apply"
                    target = output / what
                    cost = measured([what, str(model), str(target), str(config), n, device], target)
                    click.echo(f"{name}{label}: {cost}", err=True)
                    costs.setdefault(name + label, []).append(cost)
        rows |= {name: least(found) for name, found in costs.items()}
    for what in ("copy", "apply"):
        shutil.rmtree(output / what, ignore_errors=True)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e9
    import torch

    place = platform.processor() or platform.machine()
    if device != "cpu":
        place += f", {torch.cuda.get_device_name(device if ':' in device else None)}"
    title = f"{model.name}, {size:.1f} GB, {device}"
    idle = f"load {os.getloadavg()[0]:.1f} at the end" if not no_busy else "no others"
    cores = f"{len(os.sched_getaffinity(0))} cores of {place}, torch {torch.__version__}"
    line = f"`python benchmarks/speed_apply.py {' '.join(sys.argv[1:])}`, {cores}; the least of {rounds}, {idle}."
    text = section(title, size, rows, line)
    put(page, text)
    click.echo(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        kind, *paths, count, where = sys.argv[2:]
        work(kind, Path(paths[0]), Path(paths[1]), Path(paths[2]), int(count), where)
    else:
        main()

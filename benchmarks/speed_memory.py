"""Peak memory of ``autoquant apply`` and ``quantize`` at the 8 B shape: ``python benchmarks/speed_memory.py -o DIR``.

DIR takes a Llama of random weights with few of the shape's layers (the token table is its largest tensor) and what is
made of it; speed_memory.md takes the table. Each is a process of its own, whose largest resident memory the system
counts: libraries and the pages of mapped files included.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click

HERE = Path(__file__).parent
PAGE = HERE / "speed_memory.md"
TEXT = HERE.parent / "autoquant" / "data" / "default.calibration.txt"
OURS = [sys.executable, "-m", "autoquant"]


def peak(arguments: list[str]) -> float:
    """MB of a command that has to succeed."""
    process = subprocess.Popen([*OURS, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    told = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments}: exit status {status}: {told[-500:]}")
    return usage.ru_maxrss * 1024 / 1e6


def largest(model: Path) -> float:
    """MB of the largest tensor."""
    from autoquant.io.safetensors_stream import open_shards

    entries = open_shards(model).entries.values()
    return max(entry.dtype.itemsize * math.prod(entry.shape) for entry in entries) / 1e6


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR")
@click.option("--shape", default="8b", show_default=True)
@click.option("--layers", default=2, show_default=True)
@click.option("--sequences", default=16, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--page", type=click.Path(path_type=Path), default=PAGE)
def main(output: Path, shape: str, layers: int, sequences: int, length: int, page: Path) -> None:
    """Measure, print and write the page."""
    from make_llama import make_llama

    model, config, made = output / f"memory-{shape}-{layers}", output / f"memory-{shape}.json", output / "made"
    if not (model / "model.safetensors.index.json").is_file():
        make_llama(model, shape, layers)
    subprocess.run([*OURS, "analyze", str(model), "-o", str(config), "--force"], check=True, capture_output=True)
    apply = ["apply", str(model), str(config), "-o", str(made), "--force", "--transforms", "rotation", "--unproved"]
    quantize = ["quantize", str(model), str(config), "-o", str(made), "--force", "--device", "cpu", "--unproved"]
    quantize += ["--transforms", "smooth+fc_fc+rotation", "--calibration", str(TEXT)]
    quantize += ["--sequences", str(sequences), "--length", str(length), "--low-memory"]
    static = "w_int8_per_channel_a_int8_per_tensor_static"
    runs = {
        "apply, 1 worker": [*apply, "--workers", "1"],
        "apply, 2 workers": [*apply, "--workers", "2"],
        "quantize, static, float32": [*quantize, "--strategy", static],
        "quantize, static, bfloat16": [*quantize, "--strategy", static, "--dtype", "bfloat16"],
    }
    most = largest(model)
    lines = ["# Peak memory on a CPU", ""]
    lines += [
        f"`python benchmarks/speed_memory.py {' '.join(sys.argv[1:])}`: {shape} shape, {layers} layers, {sequences}"
    ]
    lines[-1] += f" windows of {length}; the largest tensor has {most:,.0f} MB, of which 2.5 and 1,500 MB are allowed."
    lines += ["", "| | peak MB | allowed | times the largest tensor |", "|---|---:|---:|---:|"]
    for name, arguments in runs.items():
        found = peak(arguments)
        lines.append(f"| {name} | {found:,.0f} | {2.5 * most + 1500:,.0f} | {found / most:.2f} |")
        click.echo(lines[-1])
        shutil.rmtree(made, ignore_errors=True)
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Seconds and memory of autoquant quantize on a model of random weights, and of LLM Compressor in the same run.

python benchmarks/speed_quantize.py -o DIR --shape 8b --device cuda --llm-compressor PYTHON
python benchmarks/speed_quantize.py -o DIR --shape 1.1b --device cpu --dtype bfloat16 --llm-compressor PYTHON

DIR takes the model and the results; benchmarks/speed_quantize.md takes a table for each run, by its title.
``--processes 2``: once more with torchrun, whose checkpoint must be the same; both again with 16 windows, so that what
a further window takes is known apart from reading, rotating and writing. ``--layers``: so many of the shape's, the
seconds of the others being extrapolated from those that each took.
"""

from __future__ import annotations

import filecmp
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import click

HERE = Path(__file__).parent
TEXT = HERE.parent / "autoquant" / "data" / "default.calibration.txt"
STATIC = "w_int8_per_channel_a_int8_per_tensor_static"
PAGE = HERE / "speed_quantize.md"
FEW = 16


@dataclass(slots=True)
class Measured:
    """A process from its start to its end: seconds, CPU seconds, the largest memory of host and GPU in MB."""

    what: str
    seconds: float = 0.0
    cpu: float = 0.0
    host: float = 0.0
    gpu: float | None = None
    steps: list[str] = field(default_factory=list)
    failed: str | None = None


def gpu_memory() -> float | None:
    """MB in use on all GPUs; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return max(float(line) for line in lines)


def measured(what: str, arguments: list[str], environment: dict[str, str] | None = None) -> Measured:
    """Run a command to its end."""
    result, before, ended = Measured(what), gpu_memory(), threading.Event()

    def watch() -> None:
        while before is not None and not ended.wait(0.25):
            result.gpu = max(result.gpu or 0.0, (gpu_memory() or 0.0) - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        if not line.strip() or "it/s]" in line:  # bars of progress
            continue
        lines.append(line.rstrip())
        print(f"  [{time.monotonic() - start:6.1f}] {line.rstrip()[:200]}", flush=True)
    _, status, usage = os.wait4(process.pid, 0)
    result.seconds = time.monotonic() - start
    ended.set()
    watcher.join()
    result.cpu = usage.ru_utime + usage.ru_stime
    result.host = usage.ru_maxrss * 1024 / 1e6
    result.steps = [line for line in lines if re.search(r": [\d.]+ s$", line)]
    result.failed = f"exit {status}: {lines[-1] if lines else ''}" if status else None
    print(f"{what}: {result.seconds:.1f} s, {result.cpu:.1f} CPU s, {result.host:.0f} MB, GPU {result.gpu}", flush=True)
    return result


def cards(device: str) -> str:
    """What it ran on."""
    name = platform.processor() or platform.machine()
    if device != "cpu":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        name = ", ".join(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def windows_file(model: Path, target: Path, text: Path, sequences: int, length: int) -> None:
    """The windows that ours calibrates on, for the other."""
    from autoquant.calibration.windows import CalibrationOptions, calibration_windows
    from autoquant.models.tokenizer import load_tokenizer

    found = calibration_windows(load_tokenizer(model), CalibrationOptions(text, sequences, length))
    target.write_text(json.dumps([window[0].tolist() for window in found]))


def same_files(one: Path, other: Path) -> bool:
    """True if two folders hold the same tensors, byte for byte."""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    return names == sorted(path.name for path in other.glob("*.safetensors")) and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in names
    )


def calibrating(row: Measured) -> float:
    """The seconds of the layers: read, rotated, swept, quantized."""
    return sum(float(step.rsplit(": ", 1)[1][:-2]) for step in row.steps if "calibrate" in step)


def further_windows(rows: list[Measured], few: list[Measured], sequences: int, processes: int) -> str:
    """What a window more takes, with one process and with several."""
    more = sequences - FEW
    one, several = ((calibrating(row) - calibrating(less)) / more for row, less in zip(rows, few, strict=True))
    if min(one, several) <= 0 or any(row.failed for row in (*rows, *few)):
        return f"What a further window takes could not be measured: {[calibrating(row) for row in (*rows, *few)]}"
    took = ", ".join(f"{calibrating(row):.1f} s" for row in (*few, *rows))
    return (
        f"Each window beyond {FEW} takes {one * 1e3:.1f} ms in one process, {several * 1e3:.1f} ms in {processes}: "
        f"the sweep is {one / several:.2f}x faster (all layers: {took})."
    )


def table(title: str, rows: list[Measured], notes: list[str]) -> str:
    """A section of the page."""
    last = rows[-1] if len(rows) > 1 and rows[-1].failed is None else None
    lines = [f"## {title}", "", "| | s | ratio | CPU s | ratio | host MB | ratio | GPU MB |", "|---|" + "---:|" * 7]
    for row in rows:
        if row.failed is not None:
            lines.append(f"| {row.what} | failed: {row.failed[:150]} | | | | | | |")
            continue
        pairs = [(row.seconds, last and last.seconds), (row.cpu, last and last.cpu), (row.host, last and last.host)]
        cells = [f"{value:,.1f} | {'' if not other else f'{value / other:.2f}'}" for value, other in pairs]
        lines.append(f"| {row.what} | {' | '.join(cells)} | {'' if row.gpu is None else f'{row.gpu:,.0f}'} |")
    lines += ["", *notes]
    for row in rows:
        lines += ["", f"{row.what}: {'; '.join(row.steps)}"] if row.steps else []
    return "\n".join(lines) + "\n"


def put(page: Path, title: str, text: str, head: str = "# autoquant quantize, measured\n") -> None:
    """Write a section into the page, in place of the one of its title; ``head``: of a page that is new."""
    old = page.read_text(encoding="utf-8") if page.is_file() else head
    head, *sections = re.split(r"^(?=## )", old, flags=re.M)
    kept = [section.rstrip() + "\n\n" for section in sections if section.splitlines()[0] != f"## {title}"]
    page.write_text("".join([head.rstrip() + "\n\n", *kept, text]), encoding="utf-8")


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--shape", default="8b", show_default=True)
@click.option("--layers", type=int, help="Of the shape's layers the first so many.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--sequences", default=16, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--transforms", default="smooth+fc_fc+rotation", show_default=True)
@click.option("--calibration", type=click.Path(path_type=Path), default=TEXT, help="[default: the packaged text]")
@click.option("--processes", default=1, show_default=True)
@click.option("--llm-compressor", metavar="PYTHON", help="Of an environment with llmcompressor.")
@click.option("--llm-compressor-path", help="Its PYTHONPATH.")
@click.option("--page", type=click.Path(path_type=Path), default=PAGE, show_default=True)
def main(
    output: Path,
    shape: str,
    layers: int | None,
    device: str,
    dtype: str,
    sequences: int,
    length: int,
    transforms: str,
    calibration: Path,
    processes: int,
    llm_compressor: str | None,
    llm_compressor_path: str | None,
    page: Path,
) -> None:
    """Measure, print and write the page."""
    from make_llama import SHAPES, make_llama

    model, config = output / f"model-{shape}-{layers or 'all'}", output / f"config-{shape}-{layers or 'all'}.json"
    if not (model / "model.safetensors.index.json").is_file():
        start = time.monotonic()
        total = make_llama(model, shape, layers, "cpu" if device == "cpu" else "cuda")
        print(f"{model}: {total:,} parameters, made in {time.monotonic() - start:.1f} s", flush=True)
    ours = [sys.executable, "-m", "autoquant"]
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))}
    notes = []
    if not config.is_file():
        analysed = measured("analyze", [*ours, "analyze", str(model), "-o", str(config), "--force"], environment)
        notes.append(f"`autoquant analyze` of the model, once: {analysed.seconds:.1f} s, not in the table.")
    made = output / "ours"
    quantize = ["quantize", str(model), str(config), "-o", str(made), "--force", "--strategy", STATIC]
    quantize += ["--transforms", transforms, "--calibration", str(calibration), "--sequences", str(sequences)]
    quantize += ["--length", str(length), "--device", device, "--dtype", dtype]
    rows = [measured(f"autoquant, {transforms}", [*ours, *quantize], environment)]
    if layers is not None and rows[0].failed is None:
        whole = SHAPES[shape]["num_hidden_layers"]
        each = calibrating(rows[0]) / layers
        notes.append(f"{each:.2f} s a layer; {each * whole:.0f} s extrapolated to the {whole} layers of the shape.")
    if processes > 1:
        several = output / "several"
        quantize[quantize.index(str(made))] = str(several)
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "-m", "autoquant"]
        rows.append(measured(f"the same in {processes} processes", [*torchrun, *quantize], environment))
        same = rows[-1].failed is None and same_files(made, several)
        notes.append(f"{processes} processes write {'the same' if same else 'OTHER'} tensors, byte for byte.")
        shutil.rmtree(several, ignore_errors=True)
        if sequences > FEW:
            quantize[quantize.index("--sequences") + 1] = str(FEW)
            few = [measured("few windows", [*start, *quantize], environment) for start in (ours, torchrun)]
            notes.append(further_windows(rows, few, sequences, processes))
            shutil.rmtree(several, ignore_errors=True)
    shutil.rmtree(made, ignore_errors=True)
    if llm_compressor is not None:
        windows_file(model, output / "windows.json", calibration, sequences, length)
        script = [llm_compressor, str(HERE / "smoothquant_llmc.py"), str(model), str(output / "windows.json")]
        path = {"PYTHONPATH": llm_compressor_path or "", **environment}
        other = output / "llmc"
        rows.append(measured("LLM Compressor, SmoothQuant", [*script, str(other), device], path))
        shutil.rmtree(other, ignore_errors=True)
    title = f"{shape}{f', {layers} layers' if layers else ''}, {sequences} x {length}, {dtype}, {cards(device)}"
    text = table(title, rows, notes)
    print(text, flush=True)
    put(page, title, text)


if __name__ == "__main__":
    main()

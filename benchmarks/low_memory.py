"""Peak memory, seconds and bytes of autoquant quantize, with and without --low-memory.

python benchmarks/low_memory.py MODEL CALIBRATION -o DIR [--sequences 4] [--length 256] [--strategy NAME]
"""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import click


def measured(arguments: list[str]) -> dict[str, float]:
    """Run a command; its wall-clock seconds and the largest resident set that the kernel saw of it."""
    start = time.monotonic()
    process = subprocess.Popen(arguments)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments}: exit status {status}")
    return {"seconds": round(time.monotonic() - start, 1), "peak_memory_mb": round(usage.ru_maxrss * 1024 / 1e6)}


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("calibration", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--config", type=click.Path(path_type=Path), required=True, help="Of autoquant analyze.")
@click.option("--sequences", default=4, show_default=True)
@click.option("--length", default=256, show_default=True)
@click.option(
    "--strategy",
    default="w_int8_per_channel_a_int8_per_tensor_static_kv_cache_int8_per_tensor_static",
    show_default=True,
)
def main(
    model: Path, calibration: Path, output: Path, config: Path, sequences: int, length: int, strategy: str
) -> None:
    """Quantize MODEL twice and compare every file."""
    results: dict[str, object] = {"model_mb": round(sum(p.stat().st_size for p in model.glob("*.safetensors")) / 1e6)}
    for name, options in (("low-memory", ["--low-memory"]), ("in-memory", [])):
        results[name] = measured(
            [
                *(sys.executable, "-m", "autoquant", "quantize", str(model), str(config), "-o", str(output / name)),
                *("--strategy", strategy, "--calibration", str(calibration), "--force"),
                *("--sequences", str(sequences), "--length", str(length), *options),
            ]
        )
        click.echo(f"{name}: {results[name]}", err=True)
    one, other = output / "low-memory", output / "in-memory"
    names = sorted(path.name for path in one.iterdir())
    same, different, _ = filecmp.cmpfiles(one, other, names, shallow=False)
    results["same bytes"] = sorted(same) == names == sorted(path.name for path in other.iterdir())
    results["different files"] = different
    click.echo(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

"""What an analysis costs: seconds and peak memory by depth and size. ``python benchmarks/analysis_cost.py``.

Each row is a process of its own, measured from its start; the proof on the small model is not in it. The last column
compares CPU seconds, which other work on the machine hardly changes, with those of the same architecture at 2 layers.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

LARGE = {
    "model_type": "llama",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
ROWS = (
    ("Llama 7B shape", {"model_type": "llama"}, (2, 32, 126)),
    ("Llama 405B shape", LARGE, (2, 32, 126)),
    ("DeepSeek-V3, 671 B", {"model_type": "deepseek_v3"}, (61,)),
    (
        "Qwen3-MoE 235 B",
        {
            "model_type": "qwen3_moe",
            "hidden_size": 4096,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1536,
            "vocab_size": 151936,
        },
        (94,),
    ),
)


def measure(folder: str) -> None:
    """One analysis in this process; prints seconds and peak memory as JSON."""
    import time

    start = time.perf_counter()
    from autoquant.analyzer.analyze import analyze
    from autoquant.models.repair import find_source

    analyzed = analyze(find_source(folder))
    total = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_SELF)
    nodes = sum(len(subgraph.graph.graph.nodes) for subgraph in analyzed.captured.subgraphs)
    figures = {"total": total, "nodes": nodes, "cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss / 1024}
    print(json.dumps({**figures, "parameters": analyzed.config.model.parameters} | analyzed.seconds))


def measured(config: Mapping[str, object], layers: int) -> dict[str, float]:
    """Of a process that analyses ``config`` with so many layers: seconds, nodes of its graphs, MiB at the peak."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, folder], capture_output=True, text=True, check=True
        )
    figures: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Print the table."""
    print(
        "| model | layers | parameters | seconds | capture | analysis | CPU seconds | peak memory | against 2 layers |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, config, depths in ROWS:
        base: float | None = None
        for layers in depths:
            row = measured(config, layers)
            base = base or (row["cpu"] if layers == 2 else None)
            ratio = f"{row['cpu'] / base:.2f}x" if base else ""
            print(
                f"| {name} | {layers} | {row['parameters'] / 1e9:.1f} B | {row['total']:.1f} | {row['capture']:.1f} "
                f"| {row['analysis']:.1f} | {row['cpu']:.1f} | {row['peak']:.0f} MiB | {ratio} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", help="a folder with a config.json to analyse alone, printed as JSON")
    folder = parser.parse_args().folder
    main() if folder is None else measure(folder)

"""Time of int8 linears, quantizing included, against bf16: python benchmarks/speed_int8.py [--device cuda|cpu]

Writes its device's section of speed_int8.md and leaves the other's. CUDA: weights in turn, more than the cache holds;
replayed as a CUDA graph, and launched one by one. CPU: processor seconds of one thread, the least of several rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import click
import torch
from torch import Tensor
from torch.nn import functional

from autoquant.quantizer import cuda_linear, int8
from autoquant.quantizer.strategies import Granularity
from autoquant.quantizer.weight import Int8Weight, linear

SHAPES = {"cuda": ((4096, 14336), (14336, 4096), (4096, 6144)), "cpu": ((2048, 5632), (5632, 2048), (2048, 2048))}
ROWS = {"cuda": (1, 16, 128, 512, 2048, 8192), "cpu": (1, 16, 128, 512)}
BEYOND_L2 = 160_000_000
"""Bytes of int8 weights that are gone through in turn: more than three times the 50 MB of an H100's L2."""
Call = Callable[[], Tensor]


def int8_weight(inputs: int, outputs: int, device: str, activation: Granularity) -> Int8Weight:
    values = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
    scale = torch.rand(outputs, 1, device=device) * 1e-3 + 1e-4
    static = torch.tensor(0.03, device=device) if activation.is_static else None
    return Int8Weight(values, scale, static, activation, torch.bfloat16, transposed=False)


def int8_linear(x: Tensor, weight: Int8Weight) -> Tensor:
    return linear(x, weight.view())


def replayed(calls: Sequence[Call], rounds: int = 20) -> float:
    """Microseconds of one call, all of them captured as one CUDA graph: the median of the rounds."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in events) * 1000 / len(calls)


def launched(calls: Sequence[Call], least: int = 60) -> float:
    """Microseconds of one call from Python, on the clock of the wall: the least of three rounds."""
    rounds = -(-least // len(calls))
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(rounds):
            for call in calls:
                call()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) * 1e6 / (rounds * len(calls)))
    return best


def on_cuda(activation: Granularity) -> list[str]:
    head = (
        "K x N",
        "M",
        "bf16, µs",
        "int8, µs",
        "**ratio**",
        "bf16 launched",
        "int8 launched",
        "ratio",
        "exact",
        "tiles",
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for inputs, outputs in SHAPES["cuda"]:
        copies = max(2, -(-BEYOND_L2 // (inputs * outputs)))
        weights = [int8_weight(inputs, outputs, "cuda", activation) for _ in range(copies)]
        floats = [torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
        for rows in ROWS["cuda"]:
            x = torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda")
            ours: list[Call] = [partial(int8_linear, x, w) for w in weights]
            theirs: list[Call] = [partial(functional.linear, x, w) for w in floats]
            exact = torch.equal(ours[0](), in_torch(x, weights[0], "cpu" if rows <= 512 else "cuda"))
            before, after, again = replayed(theirs), replayed(ours), replayed(theirs)
            slow, fast = launched(theirs), launched(ours)
            bf16 = min(before, again)
            chosen = [tiling for key, tiling in cuda_linear.CHOSEN.items() if key[1:3] == (outputs, inputs)][-1]
            cells = (
                f"{inputs} x {outputs}",
                str(rows),
                f"{bf16:.1f}",
                f"{after:.1f}",
                f"**{bf16 / after:.2f}x**",
                f"{slow:.1f}",
                f"{fast:.1f}",
                f"{slow / fast:.2f}x",
                "yes" if exact else "NO",
                "" if chosen is None else f"{chosen.rows}x{chosen.outputs}x{chosen.depth}/{chosen.split}",
            )
            lines.append("| " + " | ".join(cells) + " |")
            click.echo(lines[-1])
    return lines


def in_torch(x: Tensor, weight: Int8Weight, device: str) -> Tensor:
    """The linear through torch's own operations on a device, brought back."""
    x, weight = x.to(device), Int8Weight(*_buffers(weight, device), weight.activation, torch.bfloat16, False)
    static = weight.input_scale
    token = weight.activation is Granularity.TOKEN_DYNAMIC
    scale = int8.absmax_scale(x, (1,) if token else None) if static is None else static
    return int8.linear(x, weight.values, weight.scale, scale, None).cuda()


def _buffers(weight: Int8Weight, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    static = weight.input_scale
    return weight.values.to(device), weight.scale.to(device), None if static is None else static.to(device)


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda" if torch.cuda.is_available() else "cpu")
@click.option(
    "--activation", type=click.Choice([g.value for g in Granularity]), default=Granularity.TOKEN_DYNAMIC.value
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_suffix(".md"))
@torch.no_grad()
def main(device: str, activation: str, output: Path) -> None:
    """Print the table of a device and write it to its section."""
    torch.manual_seed(0)
    lines = on_cuda(Granularity(activation))
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()

"""Time of int8 linears, quantizing included, against others: python benchmarks/speed_int8.py [--device cuda|cpu]

Writes the section of its kind of device in speed_int8.md and leaves the others.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import click
import torch
from torch import Tensor
from torch.nn import functional

from autoquant.quantizer import cpu_linear, cuda_linear, int8
from autoquant.quantizer.strategies import Granularity
from autoquant.quantizer.weight import Int8Weight, linear

SHAPES = {"cuda": ((4096, 14336), (14336, 4096), (4096, 6144)), "cpu": ((2048, 5632), (5632, 2048), (2048, 2048))}
ROWS = {"cuda": (1, 16, 128, 512, 2048, 8192), "cpu": (1, 16, 128, 512)}
BEYOND_L2 = 160_000_000
"""Bytes of int8 weights that are gone through in turn: more than three times the 50 MB of an H100's L2."""
STATIC = 0.03
Call = Callable[[], Tensor]

ABOUT = {
    "cuda": """{where}. `{command}`

bf16 is `torch.nn.functional.linear`; both go through the same weights in turn, more of them than the L2 holds.
First replayed as CUDA graphs, 100 ms at a time and by turns, then launched one by one from Python, where the processor
is the limit of small ones.
"exact": equal to torch's own operations bit for bit, on the CPU up to 512 rows. Tiles: rows x outputs x depth, parts
of the sum, chunks of rows.
""",
    "cpu": """{where}, one thread. `{command}`

Processor milliseconds, the least of {rounds} rounds in which all take turns, backwards every other time. "qlinear" is
what torch has: quantized by torch's operations (times the reciprocal of a static scale; divided by a token's) to uint8
with a zero point of 128, `onednn.qlinear_pointwise` with the weight's scales and a static one in the product, the
token's behind it. "product" is qlinear alone, its input uint8 already; it is left out without VNNI, where it saturates.
Ours gives the numbers of `int8.linear` bit for bit, which divides.
""",
}


def weights(
    inputs: int, outputs: int, device: str, activation: Granularity, copies: int
) -> list[tuple[Int8Weight, Tensor]]:
    """Int8 weights and the bf16 ones that they come from."""
    made = []
    for _ in range(copies):
        weight = torch.randn(outputs, inputs, dtype=torch.bfloat16, device=device)
        scale = int8.absmax_scale(weight, (1,))
        static = torch.tensor(STATIC, device=device) if activation.is_static else None
        values = int8.quantize(weight, scale)
        made.append((Int8Weight(values, scale, static, activation, torch.bfloat16, transposed=False), weight))
    return made


def int8_linear(x: Tensor, weight: Int8Weight) -> Tensor:
    return linear(x, weight.view())


def replayed(*each: Sequence[Call], rounds: int = 5, block: float = 100.0) -> list[float]:
    """Microseconds of one call of each sequence, captured as one CUDA graph: medians over rounds that take turns.

    In a round each is replayed for ``block`` milliseconds: a card that draws all the power it may slows down some time
    after it began, so that in short turns one would pay for the other.
    """
    graphs = [captured(calls) for calls in each]
    times: list[list[float]] = [[] for _ in each]
    replays = [1 + int(block / 1000 / max(graph_seconds(graph, 3), 1e-7)) for graph in graphs]
    for _ in range(rounds):
        for graph, calls, count, taken in zip(graphs, each, replays, times, strict=True):
            taken.append(graph_seconds(graph, count) * 1e6 / len(calls))
    return [median(taken) for taken in times]


def graph_seconds(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """Of one replay in so many."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / count


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
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
    return graph


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


def on_cuda(activation: Granularity, counts: Sequence[int]) -> list[str]:
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
    lines = table_head(head)
    for inputs, outputs in SHAPES["cuda"]:
        pairs = weights(inputs, outputs, "cuda", activation, max(2, -(-BEYOND_L2 // (inputs * outputs))))
        for rows in counts:
            x = torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda")
            ours: list[Call] = [partial(int8_linear, x, weight) for weight, _ in pairs]
            theirs: list[Call] = [partial(functional.linear, x, weight) for _, weight in pairs]
            exact = torch.equal(ours[0](), in_torch(x, pairs[0][0], "cpu" if rows <= 512 else "cuda"))
            bf16, after = replayed(theirs, ours)
            slow, fast = launched(theirs), launched(ours)
            ran = [tiling for key, tiling in cuda_linear.CHOSEN.items() if key[1:3] == (outputs, inputs)][-1]
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
                "" if ran is None else f"{ran.rows}x{ran.outputs}x{ran.depth}, {ran.split}, {ran.chunks}",
            )
            lines.append(line(cells))
            click.echo(lines[-1])
    return lines


def in_torch(x: Tensor, weight: Int8Weight, device: str) -> Tensor:
    """The linear through torch's own operations on a device, brought back."""
    x, values, scale = x.to(device), weight.values.to(device), weight.scale.to(device)
    token = weight.activation is Granularity.TOKEN_DYNAMIC
    given = int8.absmax_scale(x, (1,) if token else None) if weight.input_scale is None else weight.input_scale
    return int8.linear(x, values, scale, given.to(device), None).cuda()


def on_cpu(rounds: int) -> list[str]:
    head = ("K x N", "M", "bf16", "product")
    lines = table_head((*head, *CELLS, *(f"{cell}, static" for cell in CELLS)))
    for inputs, outputs in SHAPES["cpu"]:
        token, weight = weights(inputs, outputs, "cpu", Granularity.TOKEN_DYNAMIC, 1)[0]
        static = Int8Weight(
            token.values, token.scale, torch.tensor(STATIC), Granularity.TENSOR_STATIC, torch.bfloat16, False
        )
        assert token.packed is not None
        packed = token.packed.of(token.values)  # one for all: what went before leaves another in the cache
        for rows in ROWS["cpu"]:
            x = torch.randn(rows, inputs, dtype=torch.bfloat16)
            q = unsigned(x * (1 / STATIC))
            calls: dict[str, Call] = {
                "bf16": partial(functional.linear, x, weight),
                "ours, token": partial(int8_linear, x, token),
                "ours, static": partial(int8_linear, x, static),
            }
            if cpu_linear.zero_point() != cpu_linear.HALVES:  # without VNNI it saturates, and bf16 results take a loop
                calls |= {
                    "product": partial(qlinear, q, packed, STATIC, token.scale, torch.bfloat16),
                    "qlinear, token": partial(qlinear_token, x, packed, token.scale),
                    "qlinear, static": partial(qlinear_static, x, packed, token.scale),
                }
            ms = {name: math.nan for name in ("product", "qlinear, token", "qlinear, static")}
            ms |= taking_turns(calls, -(-64 // rows), rounds)
            cells = [f"{inputs} x {outputs}", str(rows), f"{ms['bf16']:.2f}", f"{ms['product']:.2f}"]
            for kind in ("token", "static"):
                theirs, ours = ms[f"qlinear, {kind}"], ms[f"ours, {kind}"]
                cells += [f"{theirs:.2f}", f"{ours:.2f}", f"**{theirs / ours:.2f}x**", f"{ms['bf16'] / ours:.2f}x"]
            cells = [cell.replace("**nanx**", "").replace("nan", "") for cell in cells]
            lines.append(line(cells))
            click.echo(lines[-1])
    return lines


CELLS = ("qlinear", "ours", "against qlinear", "against bf16")


def taking_turns(calls: Mapping[str, Call], repeats: int, rounds: int) -> dict[str, float]:
    """Processor milliseconds of each call, the least of the rounds. Every other round goes backwards: what ran just
    before leaves caches and clocks as it does.
    """
    best = dict.fromkeys(calls, float("inf"))
    for number in range(rounds):
        for name, call in reversed(calls.items()) if number % 2 else calls.items():
            for _ in range(2):  # of the weight before, one call leaves some in the cache
                call()
            start = time.process_time()
            for _ in range(repeats):
                call()
            best[name] = min(best[name], (time.process_time() - start) * 1e3 / repeats)
    return best


def qlinear(q: Tensor, packed: Tensor, scale: float, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    scales, zeros = weight_scale.flatten(), torch.zeros(len(weight_scale), dtype=torch.int32)
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        q, scale, 128, packed, scales, zeros, None, 1.0, 0, dtype, "none", [], ""
    )
    return out


def unsigned(y: Tensor) -> Tensor:
    """uint8 with a zero point of 128: int8 rows are multiplied in a loop over elements where there is no AMX."""
    return y.round_().add_(128).clamp_(0, 255).to(torch.uint8)


def qlinear_static(x: Tensor, packed: Tensor, weight_scale: Tensor) -> Tensor:
    return qlinear(unsigned(x * (1 / STATIC)), packed, STATIC, weight_scale, x.dtype)


def qlinear_token(x: Tensor, packed: Tensor, weight_scale: Tensor) -> Tensor:
    scale = x.abs().amax(1, keepdim=True).float() / 127
    return qlinear(unsigned(x / scale), packed, 1.0, weight_scale, torch.float32).mul_(scale).to(x.dtype)


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table_head(names: Sequence[str]) -> list[str]:
    return [line(names), "|" + "---|" * len(names)]


def where(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [text.split(": ")[1].strip() for text in lines if text.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, torch {torch.__version__}"


def kind(device: str) -> str:
    """The name of a device's section: processors with AVX2 alone have other kernels."""
    return "cpu, avx2" if device == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2" else device


def written(output: Path, device: str, section: str) -> str:
    """The file's text with the section of one kind of device replaced."""
    parts = {"cuda": "", "cpu": "", "cpu, avx2": ""}
    if output.is_file():
        for part in output.read_text(encoding="utf-8").split("\n## ")[1:]:
            parts[part.split("\n")[0].lower()] = part.partition("\n")[2].strip()
    parts[device] = section.strip()
    text = ["# Int8 linears", *(f"## {name.upper()}\n{part}" for name, part in parts.items() if part)]
    return "\n\n".join(text) + "\n"


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda" if torch.cuda.is_available() else "cpu")
@click.option(
    "--activation", type=click.Choice([g.value for g in Granularity]), default=Granularity.TOKEN_DYNAMIC.value
)
@click.option("--rounds", default=30, show_default=True, help="Of a CPU; more on a busy one.")
@click.option(
    "--rows", "counts", type=int, multiple=True, help="On a GPU; may be repeated.  [default: all of the table]"
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_suffix(".md"))
@torch.no_grad()
def main(device: str, activation: str, rounds: int, counts: tuple[int, ...], output: Path) -> None:
    """Print the table of a device and write it to its section."""
    torch.manual_seed(0)
    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    command = " ".join([f"python benchmarks/speed_int8.py --device {device}", *(f"--rows {count}" for count in counts)])
    lines = on_cuda(Granularity(activation), counts or ROWS["cuda"]) if device == "cuda" else on_cpu(rounds)
    about = ABOUT[device].format(where=where(device), command=command, rounds=rounds)
    output.write_text(written(output, kind(device), about + "\n" + "\n".join(lines)), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Quantize, write, load: ``python benchmarks/round_trips.py``.

For each of twelve architectures and each of the eight strategies a small random model is rotated, smoothed and
quantized in memory, written by its ``save_pretrained`` in the native format and loaded again. The logits must be equal
bit for bit to those of the model before saving. Then each folder goes to compressed-tensors and back, where that format
can hold it: the logits of the folder in between must be equal as well, and the bytes those of the native one. Exits
with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

TYPES = (
    *("llama", "qwen2", "qwen3", "phi3", "gemma2", "gpt2", "opt", "gpt_neox", "falcon", "mixtral", "qwen3_moe"),
    "bloom",
)
TRANSFORMS = "smooth+fc_fc+rotation"
REASONS = {
    "no server reads an int8 key/value cache": "int8 cache",
    "takes the head of": "head is not the embedding table",
    "Conv1D": "Conv1D",
    "this norm was folded away": "folded norm",
    "loads no experts": "experts",
    "static inputs of experts": "experts static",
    "takes no int8 experts": "experts not per token",
}
"""Parts of reasons, and what the table says."""


def trips(kind: str, folder: Path) -> dict[str, tuple[bool, str]]:
    """Whether a model came back the same, by strategy, and what came of the way over compressed-tensors."""
    import torch
    import transformers

    import autoquant
    from autoquant.config.format import Strategy
    from autoquant.models.reduce import small
    from autoquant.models.repair import find_source

    made: Any = small(find_source(kind)).module.float()
    made.config.dtype = torch.float32
    made.save_pretrained(folder / "float")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "float")
    model.set_experts_implementation("eager")
    config = autoquant.analyze(folder / "float").config
    generator = torch.Generator().manual_seed(0)
    words = model.get_input_embeddings().weight.shape[0]
    text = [torch.randint(3, words, (1, 12), generator=generator) for _ in range(2)]
    same = {}
    for strategy in Strategy:
        changed = autoquant.quantize(
            copy.deepcopy(model), config, strategy=strategy.value, transforms=TRANSFORMS, calibration=text, inplace=True
        )
        with torch.no_grad():
            before = changed(text[0]).logits
            changed.save_pretrained(folder / strategy.value)
            loaded = autoquant.load(folder / strategy.value)
            loaded.set_experts_implementation("eager")
            after = loaded(text[0]).logits
        equal = before.dtype == after.dtype and bool(before.isfinite().all()) and before.equal(after)
        same[strategy.value] = equal, converted(folder, strategy.value, text[0], before)
    return same


def converted(folder: Path, name: str, ids: Any, expected: Any) -> str:
    """What came of folder / name -> compressed-tensors -> native; ``expected``: logits for ``ids``."""
    import torch

    import autoquant
    from autoquant.errors import AutoQuantError

    served, back = folder / f"{name}-served", folder / f"{name}-back"
    target = "transformers" if name.endswith("per_tensor_dynamic") else "vllm"
    try:
        autoquant.convert(folder / name, served, to="compressed-tensors", target=target)
    except AutoQuantError as error:
        return f"refused: {reason(error)}"
    model = autoquant.load(served)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        if not model(ids).logits.equal(expected):
            return "DIFFERENT logits"
    autoquant.convert(served, back, to="native")
    return "same bytes" if files(back) == files(folder / name) else "DIFFERENT bytes"


def reason(error: Any) -> str:
    """The first reason of a refusal, without the name of the linear that it names."""
    said = str(error.details[0] if error.details else error.message)
    for start, short in REASONS.items():
        if start in said:
            return short
    return said


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cells_of(kind: str) -> tuple[list[str], list[str]]:
    """The two rows of a type: whether its folders load the same, and what came of the further way."""
    import torch

    from autoquant.config.format import Strategy
    from autoquant.errors import AutoQuantError

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="autoquant-trips-") as temporary:
        try:
            same = trips(kind, Path(temporary))
        except AutoQuantError as error:
            refused = [f"refused: {error.message}"] * len(Strategy)
            return refused, refused
    cells = ["equal" if same[strategy.value][0] else "DIFFERENT" for strategy in Strategy]
    return cells, [same[strategy.value][1] for strategy in Strategy]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--jobs", type=int, default=1, help="processes, a thread each")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch
    import transformers

    from autoquant.config.format import Strategy

    rows, ways, wrong, broken, start = [], [], 0, 0, time.monotonic()
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for kind, (cells, further) in zip(options.types, pool.map(cells_of, options.types), strict=True):
            wrong += len(cells) - cells.count("equal")
            broken += sum(cell.startswith("DIFFERENT") for cell in further)
            ways.append(f"| {kind} | {' | '.join(further)} |")
            print(ways[-1])
            rows.append(f"| {kind} | {' | '.join(cells)} |")
            print(rows[-1], f"{time.monotonic() - start:.0f} s", flush=True)
    names = [strategy.value.removeprefix("w_int8_").replace("_a_int8_", " / ") for strategy in Strategy]
    lines = [
        "# Round trips",
        "",
        f"`python benchmarks/round_trips.py`, torch {torch.__version__}, transformers {transformers.__version__}, CPU. "
        f"Small random models, `{TRANSFORMS}`, float32 beside int8; the logits of the model in memory against those of "
        f"what `autoquant.load` makes of its folder: equal bit for bit or not. {wrong} of "
        f"{len(options.types) * len(names)} differ.",
        "",
        f"| model | {' | '.join(names)} |",
        "|---" * (1 + len(names)) + "|",
        *rows,
        "",
        "## native -> compressed-tensors -> native",
        "",
        'The same folders by `autoquant convert`, for vLLM, tensor dynamic for transformers: "same bytes" if all files '
        "of the folder that came back are those of the first, and the logits of the one in between are the same bits. "
        f"{sum(row.count('same bytes') for row in ways)} are, {broken} differ, the others are refused with a reason.",
        "",
        f"| model | {' | '.join(names)} |",
        "|---" * (1 + len(names)) + "|",
        *ways,
    ]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if wrong or broken else 0


if __name__ == "__main__":
    sys.exit(main())

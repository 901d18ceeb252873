"""Quantize, write, load: ``python benchmarks/round_trips.py``.

For each of twelve architectures and each of the eight strategies a small random model is rotated, smoothed and
quantized in memory, written by its ``save_pretrained`` in the native format and loaded again. The logits must be equal
bit for bit to those of the model before saving. Exits with 1 where one differs.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

TYPES = (
    *("llama", "qwen2", "qwen3", "phi3", "gemma2", "gpt2", "opt", "gpt_neox", "falcon", "mixtral", "qwen3_moe"),
    "bloom",
)
TRANSFORMS = "smooth+fc_fc+rotation"


def trips(kind: str, folder: Path) -> dict[str, bool]:
    """Whether a model came back the same, by strategy."""
    import torch

    import autoquant
    from autoquant.config.format import Strategy
    from autoquant.models.reduce import small
    from autoquant.models.repair import find_source

    model: Any = small(find_source(kind)).module.float()
    model.config.dtype = torch.float32
    model.set_experts_implementation("eager")
    model.save_pretrained(folder / "float")
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
        same[strategy.value] = before.dtype == after.dtype and bool(before.isfinite().all()) and before.equal(after)
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch
    import transformers

    from autoquant.config.format import Strategy
    from autoquant.errors import AutoQuantError

    torch.set_num_threads(1)
    rows, wrong, start = [], 0, time.monotonic()
    for kind in options.types:
        with tempfile.TemporaryDirectory(prefix="autoquant-trips-") as temporary:
            try:
                same = trips(kind, Path(temporary))
                cells = ["equal" if same[strategy.value] else "DIFFERENT" for strategy in Strategy]
            except AutoQuantError as error:
                cells = [f"refused: {error.message}"] * len(Strategy)
        wrong += len(Strategy) - cells.count("equal")
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
    ]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

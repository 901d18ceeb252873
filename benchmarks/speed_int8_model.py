"""Forward passes of a 1.1 B model on a CPU, int8 against bf16: python benchmarks/speed_int8_model.py

A Llama of the shape of TinyLlama with random weights; every linear but the head is int8, per channel and per token.
Writes speed_int8_model.md.
"""

from __future__ import annotations

import copy
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from speed_int8 import line, table_head, where
from torch import nn

from autoquant.config.format import Strategy
from autoquant.quantizer.linear import quantize_
from autoquant.quantizer.strategies import PlannedLinear, scheme_of

SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def models(layers: int) -> tuple[nn.Module, nn.Module]:
    """The bf16 model and the int8 one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", num_hidden_layers=layers, **SHAPE)
    torch.set_default_dtype(torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    torch.set_default_dtype(torch.float32)
    twin = copy.deepcopy(model)
    scheme = scheme_of(Strategy.PER_CHANNEL_PER_TOKEN)
    planned = [
        PlannedLinear(name, f"{name}.weight", None, one.in_features, one.out_features, None, 1, scheme)
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear) and name != "lm_head"
    ]
    quantize_(twin, planned)
    return model, twin


def forward(model: nn.Module, ids: torch.Tensor) -> float:
    """Processor seconds of one pass, logits of the last token only."""
    start = time.process_time()
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return time.process_time() - start


@click.command()
@click.option("--layers", default=22, show_default=True)
@click.option("--rounds", default=8, show_default=True, help="Passes of each at 512 tokens; more of shorter ones.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_suffix(".md"))
@torch.no_grad()
def main(layers: int, rounds: int, output: Path) -> None:
    """Print the table and write it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    bf16, int8 = models(layers)
    lines = table_head(("tokens", "bf16, s", "int8, s", "ratio"))
    for tokens in (1, 16, 512):
        ids = torch.randint(0, SHAPE["vocab_size"], (1, tokens))
        runs = {"bf16": partial(forward, bf16, ids), "int8": partial(forward, int8, ids)}
        best = {name: run() for name, run in runs.items()}
        for _ in range(rounds * (1 if tokens > 16 else 4)):
            for name, run in runs.items():
                best[name] = min(best[name], run())
        ratio = best["bf16"] / best["int8"]
        lines.append(line((str(tokens), f"{best['bf16']:.3f}", f"{best['int8']:.3f}", f"**{ratio:.2f}x**")))
        click.echo(lines[-1])
    head = bf16.lm_head.weight.numel() / 1e9
    body = sum(one.weight.numel() for one in bf16.modules() if isinstance(one, nn.Linear)) / 1e9 - head
    text = f"""# A 1.1 B model on a CPU, int8 against bf16

{where("cpu")}, one thread, {layers} layers: processor seconds of a forward pass, the least of several rounds in which
both take turns; logits of the last token. `python benchmarks/speed_int8_model.py`

For one token each weight is read once from memory: {2 * body:.2f} GB in bf16 or {body:.2f} GB in int8, and
{2 * head:.2f} GB of the head, which is bf16 in both: {(body + head) / (body / 2 + head):.2f} times fewer bytes, and
twice as few were it int8 too.

"""
    output.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

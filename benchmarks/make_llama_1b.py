"""A Llama of 1.1 B random parameters on disk, bfloat16, sharded: python benchmarks/make_llama_1b.py DIR

The sizes are TinyLlama's. Norm weights are random too. The tokenizer is the packaged model's, whose 2,048 tokens are
among the 32,000.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

PACKAGED = Path(__file__).parents[1] / "autoquant" / "data" / "wikinano1m"


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--layers", default=22, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(directory: Path, layers: int, seed: int) -> None:
    """Write the model to DIRECTORY."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.5 + torch.rand_like(parameter))
    model.save_pretrained(directory, max_shard_size="500MB")
    AutoTokenizer.from_pretrained(PACKAGED).save_pretrained(directory)
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    click.echo(f"{directory}: {sum(p.numel() for p in model.parameters()):,} parameters in {len(shards)} shards")


if __name__ == "__main__":
    main()

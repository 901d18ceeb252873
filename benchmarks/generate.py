"""Text and cache memory with an int8 key/value cache: python benchmarks/generate.py QUANTIZED FLOAT [--prompt TEXT]

QUANTIZED is a folder of `autoquant quantize` with a kv_cache strategy, FLOAT the model that it was made from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch


@click.command()
@click.argument("quantized", type=click.Path(path_type=Path))
@click.argument("reference", type=click.Path(path_type=Path))
@click.option("--prompt", default="The city of London is", show_default=True)
@click.option("--tokens", default=96, show_default=True)
def main(quantized: Path, reference: Path, prompt: str, tokens: int) -> None:
    """Greedy continuations of both models, and the bytes of their caches."""
    from transformers import AutoTokenizer, DynamicCache

    import autoquant
    from autoquant.quantizer.kv_cache import MODULE, cache_bytes, new_cache

    tokenizer = AutoTokenizer.from_pretrained(reference)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    for name, folder, dtype in (("float", reference, torch.bfloat16), ("int8", quantized, torch.float32)):
        model: Any = autoquant.load(folder, dtype)
        if name == "int8":
            cache: Any = new_cache(model, model.get_submodule(MODULE))
        else:
            cache = DynamicCache(config=model.config)
        with torch.no_grad():
            out = model.generate(
                ids,
                past_key_values=cache,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                repetition_penalty=1.3,
                pad_token_id=tokenizer.eos_token_id,
            )
        held = cache.get_seq_length()
        click.echo(f"{name}: {tokenizer.decode(out[0, 1:])}")
        label = "bfloat16" if name == "float" else "int8"
        click.echo(
            f"  {label} cache of {held} tokens: {cache_bytes(cache):,} bytes, {cache_bytes(cache) / held:.0f} a token"
        )


if __name__ == "__main__":
    main()

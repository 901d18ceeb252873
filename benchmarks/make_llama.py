"""A Llama of random bfloat16 parameters on disk, a shard a layer: python benchmarks/make_llama.py DIR --shape 8b

Norm weights are random too. The tokenizer is the packaged model's, whose 2,048 tokens are among the model's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

PACKAGED = Path(__file__).parents[1] / "autoquant" / "data" / "wikinano1m"
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
SHAPES: dict[str, dict[str, int]] = {
    shape: dict(zip(_SIZES, sizes, strict=True))
    for shape, sizes in {
        "tiny": (4096, 64, 192, 3, 4, 2),
        "1.1b": (32_000, 2048, 5632, 22, 32, 4),
        "8b": (128_256, 4096, 14336, 32, 32, 8),
        "70b": (128_256, 8192, 28672, 80, 64, 8),
    }.items()
}
"""By what the sizes are of."""


def make_llama(folder: Path, shape: str, layers: int | None = None, device: str = "cpu", seed: int = 0) -> int:
    """Write the model; the number of its parameters."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    sizes = dict(SHAPES[shape])
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    config = LlamaConfig(
        **sizes,
        max_position_embeddings=2048,
        bos_token_id=0,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(seed)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    files: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        numbers = [part for part in name.split(".") if part.isdecimal()]
        file = f"model-{numbers[0] if numbers else name.split('.')[-2]}.safetensors"
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        tensor = (
            tensor.uniform_(0.5, 1.5, generator=generator)
            if "norm" in name
            else tensor.normal_(0, 0.02, generator=generator)
        )
        if file not in shards:
            _save(folder, shards)
        shards.setdefault(file, {})[name] = tensor.cpu()
        files[name] = file
    _save(folder, shards)
    total = sum(parameter.numel() for parameter in model.parameters())
    index = {"metadata": {"total_size": 2 * total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    AutoTokenizer.from_pretrained(PACKAGED).save_pretrained(folder)
    return total


def _save(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> None:
    """Write and forget what is complete."""
    for file, tensors in shards.items():
        save_file(tensors, folder / file, {"format": "pt"})
    shards.clear()


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(list(SHAPES)), default="1.1b", show_default=True)
@click.option("--layers", type=int)
@click.option("--device", default="cpu", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(directory: Path, shape: str, layers: int | None, device: str, seed: int) -> None:
    """Write the model to DIRECTORY."""
    total = make_llama(directory, shape, layers, device, seed)
    click.echo(f"{directory}: {total:,} parameters in {len(list(directory.glob('*.safetensors')))} shards")


if __name__ == "__main__":
    main()

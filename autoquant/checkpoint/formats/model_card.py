"""The README.md of a served folder: what it is, how it was made, how it is run."""

from __future__ import annotations

from autoquant.checkpoint.formats import Contents
from autoquant.quantizer.strategies import plan_linears

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [int8, w8a8, compressed-tensors, autoquant]
{base}---

# {name}, INT8 (W8A8)

{source} in symmetric int8, weights and activations: `{strategy}`, {quantized} matrices. Written by AutoQuant {version}
(`autoquant quantize`, {transforms}). Embeddings, norms, `lm_head` and what `config.json` lists under `ignore` are in
{dtype}.

```
vllm serve <this folder>
```

With transformers (and the package compressed-tensors) `AutoModelForCausalLM.from_pretrained` loads it too and computes
in floating point on the rounded values; `autoquant.load` computes in int8. `autoquant_config.json` is the configuration
that was used, `autoquant_provenance.json` says how the folder was made.
"""


def model_card(contents: Contents) -> str:
    """The text, from the record of how the folder was made."""
    made = contents.provenance
    source = str(made.get("source") or "A model in memory")
    name = source.rstrip("/").rpartition("/")[2]
    on_hub = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    options = made.get("options", {})
    return _CARD.format(
        base=f"base_model: {source}\n" if on_hub else "",
        name=name,
        source=f"[{source}](https://huggingface.co/{source})" if on_hub else name,
        strategy=contents.config.quantization.strategy.value,
        quantized=sum(linear.stack or 1 for linear in plan_linears(contents.config)),
        version=made.get("versions", {}).get("autoquant", "of another version"),
        transforms=f"transforms {options['transforms']}" if "transforms" in options else "no transforms",
        dtype=str(contents.dtype).removeprefix("torch."),
    )

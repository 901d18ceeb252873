"""The README.md of a served folder: what it is, how it was made, how it is run."""

from __future__ import annotations

from autoquant.checkpoint.formats import COMPRESSED_TENSORS, ONNX, Contents
from autoquant.quantizer.qdq import OPSET
from autoquant.quantizer.strategies import plan_linears

_HEAD = """---
library_name: {library}
pipeline_tag: text-generation
tags: [int8, w8a8, {form}, autoquant]
{base}---

# {name}, INT8 (W8A8)

{source} in symmetric int8, weights and activations: `{strategy}`, {quantized} matrices. Written by AutoQuant {version}
(`autoquant quantize`, {transforms}). """
_TAIL = """`autoquant_config.json` is the configuration
that was used, `autoquant_provenance.json` says how the folder was made.
"""
_SERVED = """Embeddings, norms, `lm_head` and what `config.json` lists under `ignore` are in
{dtype}.

```
vllm serve <this folder>
```

With transformers (and the package compressed-tensors) `AutoModelForCausalLM.from_pretrained` loads it too and computes
in floating point on the rounded values; `autoquant.load` computes in int8. """
_ONNX = """`model.onnx` has them as
QuantizeLinear and DequantizeLinear around MatMul (opset {opset}), with static scales per tensor of activations and no
zero points; all else is float32. `model.onnx.data` holds the weights and belongs beside it.

| inputs | |
|---|---|
| `input_ids`, `position_ids` | int64 [batch, new] |
| `attention_mask` | int64 [batch, earlier + new], 1 for tokens and 0 for padding |
| `past_key_values.N.key`, `.value` | float32 [batch, heads, earlier, size] of layer N; earlier may be 0 |

Outputs are `logits` [batch, new, vocabulary] and `present.N.key`, `.value`, the cache for the next step. onnxruntime
runs all of it on int8 kernels with the session's entry `session.qdqisint8allowed` set to `1`. """


def model_card(contents: Contents) -> str:
    """The text for a folder of compressed-tensors, from the record of how it was made."""
    return _card(contents, _SERVED, COMPRESSED_TENSORS, "transformers")


def onnx_card(contents: Contents) -> str:
    """The text for an ONNX folder."""
    return _card(contents, _ONNX, ONNX, "onnx")


def _card(contents: Contents, text: str, form: str, library: str) -> str:
    made = contents.provenance
    source = str(made.get("source") or "A model in memory")
    name = source.rstrip("/").rpartition("/")[2]
    on_hub = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    options = made.get("options", {})
    return (_HEAD + text + _TAIL).format(
        library=library,
        form=form,
        opset=OPSET,
        base=f"base_model: {source}\n" if on_hub else "",
        name=name,
        source=f"[{source}](https://huggingface.co/{source})" if on_hub else name,
        strategy=contents.config.quantization.strategy.value,
        quantized=sum(linear.stack or 1 for linear in plan_linears(contents.config)),
        version=made.get("versions", {}).get("autoquant", "of another version"),
        transforms=f"transforms {options['transforms']}" if "transforms" in options else "no transforms",
        dtype=str(contents.dtype).removeprefix("torch."),
    )

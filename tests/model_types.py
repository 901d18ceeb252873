"""The model types that every part is tested on: one of each way to build a decoder."""

from __future__ import annotations

TYPES = tuple(
    """llama mistral qwen2 granite olmo qwen3 phi3 gemma gemma2 gemma3_text glm4 olmo2 cohere opt gpt2
    gpt_neox falcon phi stablelm nemotron starcoder2 bloom mixtral qwen3_moe qwen2_moe deepseek_v3 mamba
    falcon_h1 bamba""".split()
)
ONE_OF_EACH = tuple("llama gpt2 gpt_neox opt phi3 gemma2 mixtral qwen3_moe mamba falcon bloom".split())
"""Fewer of them: where a test takes long."""

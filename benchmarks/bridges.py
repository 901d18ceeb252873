"""Our recipes run by the tools themselves: python benchmarks/bridges.py --llm-compressor PY --quark PY

PY is the Python of an environment in which the tool is installed (`make bridges`). For each architecture a small
random model is written, analyzed and proved; the recipe, its quantization left out, is run by the tool on that model in
float64, and the logits before and after are compared. Norms compute in float32 in most models, so that 1e-6 is equal.
Writes bridges.md; exit code 1 where a recipe changes the function.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from serve import COMMON, EXPERTS, PACKAGED

import autoquant as aq
from autoquant.models.reduce import randomise_

PAGE = Path(__file__).parent / "bridges.md"
CHILD = Path(__file__).parent / "bridges_child.py"
EQUAL = 1e-6
KNOWN = (("quark", "mixtral", "rotation/rotation.py:1005"),)
"""Errors of a tool, a model and a line of the tool's code. Quark takes config.head_dim for the size of a head where the
config has that field, and Mixtral's is None (rotation/rotation.py:999); given a number, the same recipe holds.
"""
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "final_logit_softcapping": None},
    "phi3": {},
    "cohere": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral, head_dim given": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
    "qwen3_moe": {"num_experts": 4, **EXPERTS},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "num_key_value_heads": 4,
    },
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128},
    "bloom": {"n_head": 4, "n_layer": 2},
}


@dataclass(frozen=True, slots=True)
class Ran:
    """A recipe that a tool ran. ``change``: of the logits, relative; None where it ended with an error, in ``why``."""

    tool: str
    version: str
    model: str
    said: str
    left_out: int
    change: float | None
    why: str = ""
    changed: str = ""

    @property
    def holds(self) -> bool:
        return self.change is not None and self.change <= EQUAL

    @property
    def at_fault(self) -> bool:
        """True if the tool itself ends with an error that is known: KNOWN says where."""
        return any(name == self.tool and kind == self.model and text in self.why for name, kind, text in KNOWN)


def model_of(kind: str, folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    if not folder.is_dir():
        torch.manual_seed(0)
        made: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind.partition(",")[0], **(COMMON | SIZES[kind]))
        )
        randomise_(made, 0)
        made.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):  # LLM Compressor wants one, whatever it is given
            shutil.copyfile(PACKAGED / name, folder / name)
    return folder


def unquantized(tool: str, text: str) -> tuple[str, str]:
    """A recipe without its quantization, and what is in it."""
    if tool == "quark":
        sections = json.loads(text)["algo_config"]
        return json.dumps({"algo_config": sections}), ", ".join(section["name"] for section in sections)
    stage = yaml.safe_load(text)["autoquant_stage"]
    stage.pop("quantization_modifiers", None)
    names = [name for group in stage.values() for name in group]
    return yaml.safe_dump({"autoquant_stage": stage}, sort_keys=False), ", ".join(names)


def run(tool: str, python: Path, kind: str, work: Path) -> Ran:
    name = kind.replace(", ", "-").replace(" ", "-")
    folder = model_of(kind, work / name)
    config = work / f"{name}.config.json"
    if not config.exists():
        aq.save_config(aq.analyze(folder).config, config)
    written = aq.export_recipe(config, tool)
    text, said = unquantized(tool, written.text)
    recipe, output = work / f"{name}.{tool}.yaml", work / f"{name}.{tool}.out"
    recipe.write_text(text)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, CHILD, tool, folder, recipe, output]
    child = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work, env=environment)
    if child.returncode or not output.exists():
        last = child.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        return Ran(tool, "", kind, said, len(written.refused), None, last[0])
    found = json.loads(output.read_text())
    if "why" in found:
        return Ran(tool, found["version"], kind, said, len(written.refused), None, found["why"])
    changed = f"{found['changed']} of {found['tensors']}"
    return Ran(tool, found["version"], kind, said, len(written.refused), found["change"], changed=changed)


def page(found: list[Ran]) -> Iterator[str]:
    yield "# Recipes run by the tools themselves"
    yield ""
    tools = " ".join(f"--{tool} PYTHON" for tool in dict.fromkeys(one.tool for one in found))
    yield f"`python benchmarks/bridges.py {tools}`, torch {torch.__version__}: relative change of the logits of a small"
    yield "random model (float64) after the tool ran our recipe, quantization left out. Up to 1e-6 is equal: norms are"
    yield "computed in float32, and round the difference of two float64 sums away. What the recipe leaves out,"
    yield "`autoquant export` lists; how many tensors the tool changed says that it did something. An error"
    yield "is the tool's own, with the places in its code. Quark takes `config.head_dim` for the size of a head where"
    yield "the config has that field (`rotation.py`, line 999), and Mixtral's is None; given one, the recipe holds."
    yield ""
    yield "| tool | model | in the recipe | left out | tensors changed | change of the logits |"
    yield "|---|---|---|---:|---:|---:|"
    for one in found:
        change = one.why.replace("|", "\\|") if one.change is None else f"{one.change:.1e}"
        yield f"| {one.tool} {one.version} | {one.model} | {one.said} | {one.left_out} | {one.changed} | {change} |"


@click.command()
@click.option("--llm-compressor", "llm_compressor", type=click.Path(path_type=Path))
@click.option("--quark", type=click.Path(path_type=Path))
@click.option("--model", "models", multiple=True, default=tuple(SIZES), help="Only these.  [default: all]")
@click.option("--work", type=click.Path(path_type=Path), help="Where models and recipes are kept.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=PAGE, show_default=True)
def main(
    llm_compressor: Path | None, quark: Path | None, models: tuple[str, ...], work: Path | None, output: Path
) -> None:
    torch.set_num_threads(1)
    found: list[Ran] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (work or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        for tool, python in (("llm-compressor", llm_compressor), ("quark", quark)):
            for kind in models if python is not None else ():
                assert python is not None
                found.append(run(tool, python.absolute(), kind, folder))
                print(found[-1], flush=True)
    output.write_text("\n".join(page(found)) + "\n", encoding="utf-8")
    sys.exit(0 if all(one.holds or one.at_fault for one in found) else 1)


if __name__ == "__main__":
    main()

"""Models of public code bases, analysed and judged: ``python benchmarks/public_code.py CHECKOUTS [NAMES]``.

CHECKOUTS is a folder with a checkout of each repository at the commit named here, in a folder of the repository's name
(``--fetch`` prints the commands that make them, and the packages that they import), those that are not there are left
out. No code of others is part of the project: :mod:`public_factories` builds small models of theirs with random
weights. Each is analysed and proved, and every claim is carried out on its own in float64 by :mod:`oracle`, which
shares nothing with the project, and compared on 200 tokens of three sequences, the last ten one by one where the code
has a cache. Each runs in a process of its own; ``--results FILE`` keeps what was found, and runs what is not in it.
Writes ``benchmarks/public_code.md`` unless NAMES are given; exits with 1 where a claim is false.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 900
"""Seconds for one model."""
PACKAGES = (
    "einops omegaconf antlr4-python3-runtime==4.9.3 simple_parsing docstring_parser einx frozendict loguru tiktoken "
    "torch-einops-utils importlib_resources"
)


@dataclass(frozen=True, slots=True)
class Model:
    """A model of a repository. ``groups`` and ``spaces``: how many there are by reading the code, layers and experts
    counted once; ``why``: what they are, and what stands in the way of more.
    """

    factory: str
    repository: str
    commit: str
    licence: str
    groups: int
    spaces: int
    why: str


LIKE_LLAMA = "both norms, q and k, v -> o, up -> down, the last norm; R1, R2"
LIKE_GPT2 = "both norms, q and k, v -> o, the last norm; GELU holds up -> down; R1, R2"
MODELS = (
    Model("nanogpt", "karpathy/nanoGPT", "3adf61e", "MIT", 5, 2, LIKE_GPT2),
    Model("mingpt", "karpathy/minGPT", "37baab7", "MIT", 5, 2, LIKE_GPT2),
    Model("llama2c", "karpathy/llama2.c", "350e04f", "MIT", 6, 2, LIKE_LLAMA),
    Model(
        "nanochat",
        "karpathy/nanochat",
        "92d63d4",
        "MIT",
        3,
        5,
        "norms without weights; v -> o, with tables of values, and relu^2; gates read the first 12 and "
        "24 channels, so R1 falls into three",
    ),
    Model("llama", "meta-llama/llama", "689c7f2", "Llama 2", 6, 2, LIKE_LLAMA + "; caches in plain attributes"),
    Model("llama3", "meta-llama/llama3", "a0940f9", "Llama 3", 6, 2, LIKE_LLAMA + "; caches in plain attributes"),
    Model("pytorch_llama", "hkproj/pytorch-llama", "067f8a3", "MIT", 6, 2, LIKE_LLAMA + "; one token at a time"),
    Model("gpt_fast", "pytorch-labs/gpt-fast", "32971d3", "BSD-3", 6, 2, LIKE_LLAMA + "; caches in buffers"),
    Model(
        "gpt_fast_moe", "pytorch-labs/gpt-fast", "32971d3", "BSD-3", 6, 2, LIKE_LLAMA + "; experts gathered from stacks"
    ),
    Model(
        "deepseek_v3",
        "deepseek-ai/DeepSeek-V3",
        "9b4e978",
        "MIT",
        12,
        5,
        "five norms and kv_norm with the absorbed wkv_b, q and k with and without positions, v -> o, up "
        "-> down thrice; R1, R2, heads without positions, both latents",
    ),
    Model(
        "gpt_oss",
        "openai/gpt-oss",
        "7b58334",
        "Apache-2.0",
        5,
        2,
        "both norms, q and k, v -> o, the last norm; 1 is added to up; R1, R2",
    ),
    Model(
        "whisper",
        "openai/whisper",
        "c0d2f62",
        "MIT",
        12,
        3,
        "four in the encoder, its last norm, seven in the decoder; R2 thrice; the encoder's residual "
        "begins with GELU, the decoder's table is its head, into which the last norm does not fold",
    ),
    Model(
        "gemma2",
        "google/gemma_pytorch",
        "014acb7",
        "Apache-2.0",
        5,
        1,
        "two norms, q and k, v -> o, up -> down; the table is the head; norms behind attention and MLP "
        "have gains: R2 alone",
    ),
    Model(
        "gemma3",
        "google/gemma_pytorch",
        "014acb7",
        "Apache-2.0",
        5,
        1,
        "as Gemma 2, q and k by the gains of their norms",
    ),
    Model("mistral", "mistralai/mistral-inference", "2557e12", "Apache-2.0", 6, 2, LIKE_LLAMA),
    Model(
        "mistral_moe", "mistralai/mistral-inference", "2557e12", "Apache-2.0", 6, 2, LIKE_LLAMA + "; experts in a loop"
    ),
    Model("litgpt", "Lightning-AI/litgpt", "2685705", "Apache-2.0", 6, 2, LIKE_LLAMA),
    Model("litgpt_moe", "Lightning-AI/litgpt", "2685705", "Apache-2.0", 6, 2, LIKE_LLAMA + "; experts in a loop"),
    Model("torchtune", "meta-pytorch/torchtune", "bd2a0fc", "BSD-3", 6, 2, LIKE_LLAMA),
    Model("lingua", "facebookresearch/lingua", "437d680", "BSD-3", 6, 2, LIKE_LLAMA),
    Model("olmo", "allenai/OLMo", "59a53e3", "Apache-2.0", 6, 2, LIKE_LLAMA),
    Model("x_transformers", "lucidrains/x-transformers", "9252ed7", "MIT", 6, 2, LIKE_LLAMA),
    Model("raschka_gpt", "rasbt/LLMs-from-scratch", "28c65cd", "Apache-2.0", 5, 2, LIKE_GPT2),
    Model("raschka_llama3", "rasbt/LLMs-from-scratch", "28c65cd", "Apache-2.0", 6, 2, LIKE_LLAMA),
    Model(
        "raschka_qwen3",
        "rasbt/LLMs-from-scratch",
        "28c65cd",
        "Apache-2.0",
        6,
        2,
        LIKE_LLAMA + "; q and k by the gains of their norms",
    ),
    Model(
        "raschka_qwen3_moe",
        "rasbt/LLMs-from-scratch",
        "28c65cd",
        "Apache-2.0",
        6,
        2,
        "as Qwen3; the loop goes over the experts that occur, whose number the data say",
    ),
    Model(
        "mamba_minimal",
        "johnma2006/mamba-minimal",
        "03de542",
        "Apache-2.0",
        5,
        2,
        "both norms, in_proj -> convolution, dt, B and C; SiLU holds the rest; R1, dt",
    ),
    Model(
        "mamba_py",
        "alxndrTL/mamba.py",
        "2cc168c",
        "MIT",
        5,
        2,
        "both norms, in_proj -> convolution, dt, B and C; SiLU holds the rest; R1, dt",
    ),
    Model(
        "jamba_py",
        "alxndrTL/mamba.py",
        "2cc168c",
        "MIT",
        10,
        3,
        "four norms, in_proj -> convolution, dt, B and C, q and k, v -> o, experts; R1, R2, dt; experts "
        "take lists of the data",
    ),
)


def analysed(name: str) -> dict[str, Any]:
    """What the project finds in one model and what the judge says of it."""
    import oracle
    import public_factories

    from autoquant.analyzer.analyze import analyze
    from autoquant.certificate.certify import certify
    from autoquant.errors import AutoQuantError
    from autoquant.models.source import ModelSource

    factory = getattr(public_factories, name)
    line: dict[str, Any] = {"name": name}
    source = ModelSource(f"public_factories:{name}", factory=factory)
    try:
        found = analyze(source)
    except AutoQuantError as error:
        return {**line, "failed": error.message[:400]}
    config, line["how"] = found.config, found.captured.how
    try:
        config = certify(found, source)
    except AutoQuantError as error:
        line["refused"] = error.message[:400]
    made = json.loads(config.model_dump_json(by_alias=True))
    line["groups"] = [(g["name"], g["kind"]) for g in made["smoothing"]["groups"]]
    line["spaces"] = [(s["kind"], s["name"]) for s in made["rotation"]["spaces"]]
    line["blocked"] = [(b["path"], b["what"], b["reason"], b["operator"]) for b in made["blocked"]]
    line["linears"] = [x["weight"] for x in made["model"]["linears"]]
    line["matrices"], line["missing"] = unlisted(made, factory()[0])
    claims = [(f"group {g['name']}", partial(oracle.group_, group=g, seed=3)) for g in made["smoothing"]["groups"]]
    claims += [
        (f"space {s['name']}", partial(oracle.space_, space=s, seed=3, level=True)) for s in made["rotation"]["spaces"]
    ]
    line["changes"] = judged(factory, claims)
    return line


def judged(factory: Any, claims: list[tuple[str, Any]]) -> dict[str, float]:
    """How far the output of a model is from what it was when each claim is carried out on a model made anew."""
    import oracle
    import torch

    def outcome(change: Any) -> Any:
        torch.manual_seed(0)
        model = factory()[0].eval().double()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        oracle.randomise_(model, 1)
        change(oracle.Cells(model))
        return model.judged(model, 5)

    changes = {}
    with torch.no_grad(), oracle.InFloat64():
        before = outcome(lambda cells: None)
        assert bool(before.isfinite().all()) and bool(torch.equal(before, outcome(lambda cells: None)))
        for name, change in claims:
            try:
                after = outcome(change)
                changes[name] = float((after - before).norm() / before.norm())
            except Exception:  # a claim that cannot be carried out, in whatever way
                changes[name] = float("inf")
    return changes


def unlisted(made: dict[str, Any], module: Any) -> tuple[int, list[str]]:
    """How many matrices a model has, and which stand neither among the linears, nor in a claim, nor below a path that
    has a reason.
    """
    names = {name for name, parameter in module.named_parameters() if parameter.dim() > 1}
    slots = [slot for group in made["smoothing"]["groups"] for slot in (*group["sources"], *group["targets"])]
    for space in made["rotation"]["spaces"]:
        slots += [*space["writers"], *(reader for read in space["reads"] for reader in read["readers"])]
    listed = {linear["weight"] for linear in made["model"]["linears"]} | {slot["path"] for slot in slots}
    reasons = {blocked["path"] for blocked in made["blocked"]}

    def stands(name: str, paths: set[str]) -> bool:
        own = name.split(".")
        return any(
            len(own) == len(parts)
            and all(o == p or (p == "{layer}" and o.isdecimal()) for o, p in zip(own, parts, strict=True))
            for parts in (path.split(".") for path in paths)
        )

    owners = {name: [name.rsplit(".", n)[0] for n in range(name.count(".") + 1)] for name in names}
    missing = {name for name in names if not stands(name, listed)}
    missing = {name for name in missing if not any(stands(owner, reasons) for owner in owners[name])}
    return len(names), sorted(missing)


def counted(names: list[str]) -> int:
    """How many names there are with layers and experts counted once."""
    return len({re.sub(r"(?<=\.)(\d+|{layer})(?=\.|$| )", "N", re.sub(r"(, \S+)+$", "", name)) for name in names})


def row(model: Model, line: dict[str, Any]) -> str:
    """One line of the table."""
    repository = f"[{model.repository}](https://github.com/{model.repository}/tree/{model.commit}) {model.licence}"
    cells = [repository, f"`{model.factory}`"]
    if "groups" not in line:
        return (
            "| "
            + " | ".join([*cells, "no: " + str(line.get("failed", "crashed"))[:150].replace("|", "/"), *[""] * 6])
            + " |"
        )
    false = {name: change for name, change in line["changes"].items() if not change <= 1e-6}
    verdict = f"{len(line['changes'])} hold" if not false else f"false: {', '.join(false)}"
    found = [
        counted([name for name, _ in line["groups"]]),
        counted([f"{kind} {name}" for kind, name in line["spaces"]]),
    ]
    missed = "" if found[0] >= model.groups and found[1] >= model.spaces else "; " + reasons(line)
    cells += ["yes", f"{found[0]} of {model.groups}", f"{found[1]} of {model.spaces}"]
    cells += [f"{line['matrices'] - len(line['missing'])} of {line['matrices']}", verdict, model.why + missed]
    return "| " + " | ".join(cells) + " |"


def reasons(line: dict[str, Any]) -> str:
    """What is said of modules that cannot be traced, and of claims that the proof refused."""
    said = [
        f"{path}: {reason}"
        for path, _, reason, kind in line["blocked"]
        if kind != "R3" and re.search("traced,|refused", reason)
    ]
    short = [
        re.sub(r"\s*\(?(unhinted|at \S+:|Size-like).*", "", one).replace("|", "/")[:160] for one in dict.fromkeys(said)
    ]
    return "**missed**" + (": " + "; ".join(short[:3]) if short else "")


def summary(lines: dict[str, dict[str, Any]]) -> str:
    """One sentence with the totals."""
    models = [model for model in MODELS if model.factory in lines]
    captured = [model for model in models if "groups" in lines[model.factory]]
    changes = [change for model in captured for change in lines[model.factory]["changes"].values()]
    whole = [
        model
        for model in captured
        if counted([n for n, _ in lines[model.factory]["groups"]]) >= model.groups
        and counted([f"{k} {n}" for k, n in lines[model.factory]["spaces"]]) >= model.spaces
    ]
    true = [change for change in changes if change <= 1e-6]
    left = [f"`{model.factory}`" for model in MODELS if model.factory not in lines]
    return (
        f"{len(captured)} of {len(models)} models of {len({model.repository for model in models})} repositories are "
        f"captured, {len(whole)} with all that reading the code finds. {len(changes)} claims were judged, "
        f"{len(changes) - len(true)} are false; the others change the output by {max(true, default=0):.1e} at most."
        + f" Not run: {', '.join(left)}."
        * bool(left)
    )


def found_in(checkouts: Path, names: list[str], results: Path) -> dict[str, dict[str, Any]]:
    """What is found in each model, by factory; what ``results`` holds is not run again."""
    there = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    lines = {line["name"]: line for line in there}
    for model in MODELS:
        name, folder = model.factory, checkouts / model.repository.partition("/")[2]
        if name in lines or not folder.is_dir() or (names and name not in names):
            continue
        command = [sys.executable, __file__, str(checkouts), "--one", name, "--results", str(results)]
        environment = {
            **os.environ,
            "AUTOQUANT_PUBLIC": str(checkouts),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
            said = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        except subprocess.TimeoutExpired:
            said = [f"more than {LIMIT} s"]
        written = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        lines |= {line["name"]: line for line in written}
        lines.setdefault(name, {"name": name, "failed": said[0]})
    return {name: line for name, line in lines.items() if not names or name in names}


def fetching() -> str:
    """The commands that make the checkouts."""
    lines = []
    for repository, commit in dict.fromkeys((model.repository, model.commit) for model in MODELS):
        name = repository.partition("/")[2]
        lines.append(f"git clone https://github.com/{repository} {name} && git -C {name} checkout {commit}")
    return "\n".join([*lines, f"pip install --no-deps --target packages {PACKAGES}"])


def main() -> int:
    """Run the models and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", type=Path, nargs="?", default=Path())
    parser.add_argument("names", nargs="*")
    parser.add_argument("--fetch", action="store_true", help="print how to get the checkouts")
    parser.add_argument("--results", type=Path, default=Path("public_code.jsonl"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fetch:
        print(fetching())
        return 0
    if args.one:
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        line = analysed(args.one)
        with open(args.results, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        return 0
    lines = found_in(args.checkouts.resolve(), args.names, args.results.resolve())
    head = "| repository | factory | captured | groups | spaces | matrices listed | judge | by reading the code |"
    rows = [row(model, lines[model.factory]) for model in MODELS if model.factory in lines]
    text = "\n".join([summary(lines), "", head, "|---|---|---|---|---|---|---|---|", *rows]) + "\n"
    if args.names:
        print(text)
    else:
        title = "# Models of public code bases\n\nWritten by `python benchmarks/public_code.py CHECKOUTS`.\n\n"
        (ROOT / "benchmarks" / "public_code.md").write_text(title + text, encoding="utf-8")
    return any(not change <= 1e-6 for line in lines.values() for change in line.get("changes", {}).values())


if __name__ == "__main__":
    sys.exit(main())

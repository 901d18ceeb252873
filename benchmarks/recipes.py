"""Recipes there and back, and broken ones: python benchmarks/recipes.py

First the recipe of every config in generated_configs/, for LLM Compressor, Quark and Brevitas, is read back: the groups
that it holds, in their layers and with their alpha, have to be those that are not listed as left out. Then 300
mutations of exported recipes, of all five tools, are imported. What is accepted is judged by code that shares nothing
with the project: the mutated recipe is carried out on the small model by expressions and products of its own, beside
the oracle of benchmarks/mutations.py. Writes recipes.md; exit code 1 where a recipe that changes the model is accepted,
or a round trip ends elsewhere.
"""

from __future__ import annotations

import ast
import copy
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import oracle
import torch
import yaml
from torch import Tensor, nn

from autoquant.config.file import load_config
from autoquant.errors import AutoQuantError
from autoquant.models.repair import find_source
from autoquant.recipes.audit import Bench, bench_for
from autoquant.recipes.importing import imported, taken_by
from autoquant.recipes.pairs import scale_pairs
from autoquant.recipes.reading import TOOLS as READ
from autoquant.recipes.reading import mappings_of
from autoquant.recipes.tools import TOOLS, write_recipe

HERE = Path(__file__).parent
PAGE = HERE / "recipes.md"
CONFIGS = HERE.parent / "generated_configs"
TYPES = ("llama", "qwen3", "gemma2", "phi3", "cohere", "mixtral", "qwen3_moe", "deepseek_v3", "opt", "bloom")
PER_TOOL = {"llm-compressor": 120, "quark": 90, "brevitas": 50, "modelopt": 20, "auto-round": 20}
EQUAL = 1e-6
OFFSET = re.compile(r"(^Gemma|Qwen3Next|Qwen3_5|Centered).*RMSNorm$")
Pair = tuple[str, list[str]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A mutated recipe. ``change``: of the logits by the judge, None where it was refused, with what was said."""

    tool: str
    model: str
    mutation: str
    said: str = ""
    change: float | None = None

    @property
    def wrongly_accepted(self) -> bool:
        return self.change is not None and not self.change <= EQUAL


# Mutations: each changes a list of (smooth, [balance, ...]) in place, and says False where it cannot.


def forget(pairs: list[Pair], names: Sequence[str], dice: random.Random) -> bool:
    held = [pair for pair in pairs if len(pair[1]) > 1]
    if held:
        balance = dice.choice(held)[1]
        balance.pop(dice.randrange(len(balance)))
    return bool(held)


def add(pairs: list[Pair], names: Sequence[str], dice: random.Random) -> bool:
    dice.choice(pairs)[1].append(dice.choice(names))
    return True


def other_source(pairs: list[Pair], names: Sequence[str], dice: random.Random) -> bool:
    at = dice.randrange(len(pairs))
    pairs[at] = (dice.choice(names), pairs[at][1])
    return True


def other_reader(pairs: list[Pair], names: Sequence[str], dice: random.Random) -> bool:
    balance = dice.choice(pairs)[1]
    balance[dice.randrange(len(balance))] = dice.choice(names)
    return True


def turned_round(pairs: list[Pair], names: Sequence[str], dice: random.Random) -> bool:
    at = dice.randrange(len(pairs))
    smooth, balance = pairs[at]
    pairs[at] = (balance[0], [smooth, *balance[1:]])
    return True


def crossed(pairs: list[Pair], names: Sequence[str], dice: random.Random) -> bool:
    if len(pairs) < 2:
        return False
    one, other = dice.sample(range(len(pairs)), 2)
    pairs[one], pairs[other] = (pairs[one][0], pairs[other][1]), (pairs[other][0], pairs[one][1])
    return True


def merged(pairs: list[Pair], names: Sequence[str], dice: random.Random) -> bool:
    if len(pairs) < 2:
        return False
    one, other = dice.sample(range(len(pairs)), 2)
    pairs[one][1].extend(pairs[other][1])
    return True


def twice(pairs: list[Pair], names: Sequence[str], dice: random.Random) -> bool:
    pairs.append(copy.deepcopy(dice.choice(pairs)))
    return True


def shuffled(pairs: list[Pair], names: Sequence[str], dice: random.Random) -> bool:
    dice.shuffle(pairs)
    dice.shuffle(dice.choice(pairs)[1])
    return True


def loosened(pairs: list[Pair], names: Sequence[str], dice: random.Random) -> bool:
    """An expression that takes more, or no longer what it took: without its start, its end or one letter."""
    pair = dice.choice(pairs)
    at = dice.randrange(len(pair[1]))
    text = pair[1][at]
    cuts = [text.replace("^model", ".*"), text.removesuffix("$"), re.sub(r"(self_attn|mlp)\\?\.", ".*", text)]
    place = dice.randrange(len(text))
    pair[1][at] = dice.choice([cut for cut in cuts if cut != text] + [text[:place] + text[place + 1 :]])
    return True


def of_one_layer(pairs: list[Pair], names: Sequence[str], dice: random.Random) -> bool:
    """The readers of one layer, the source of all."""
    pair = dice.choice(pairs)
    before = list(pair[1])
    pair[1][:] = [re.sub(r"\\d\+|(?<=\.)\d+(?=\.)", str(dice.randrange(2)), name) for name in before]
    return pair[1] != before


def emptied(pairs: list[Pair], names: Sequence[str], dice: random.Random) -> bool:
    dice.choice(pairs)[1].clear()
    return True


MUTATIONS: tuple[Callable[[list[Pair], Sequence[str], random.Random], bool], ...] = (
    forget,
    add,
    other_source,
    other_reader,
    turned_round,
    crossed,
    merged,
    twice,
    shuffled,
    loosened,
    of_one_layer,
    emptied,
)


def pairs_of(tool: str, text: str) -> tuple[list[Pair], str]:
    """What a recipe scales, and the module list that its names are in."""
    if tool == "brevitas":
        tree = ast.parse(text)
        found = next(node.value for node in tree.body if isinstance(node, ast.Assign))
        return [(source, list(sinks)) for source, sinks in ast.literal_eval(found)], ""
    if tool == "quark":
        sections = [one for one in json.loads(text)["algo_config"] if one["name"] == "smooth"]
        layers = sections[0]["model_decoder_layers"] if sections else ""
        return [(one["prev_op"], list(one["layers"])) for part in sections for one in part["scaling_layers"]], layers
    stage = yaml.safe_load(text)["autoquant_stage"]
    parts = [group["SmoothQuantModifier"] for group in stage.values() if "SmoothQuantModifier" in group]
    return [(smooth, list(balance)) for part in parts for balance, smooth in part["mappings"]], ""


def text_of(tool: str, pairs: Sequence[Pair], layers: str) -> str:
    if tool == "brevitas":
        return f"PAIRS = {[(smooth, tuple(balance)) for smooth, balance in pairs]!r}\n"
    if tool == "quark":
        scaling = [{"prev_op": s, "layers": b, "inp": b[0] if b else ""} for s, b in pairs]
        section = {"name": "smooth", "alpha": 0.5, "scaling_layers": scaling, "model_decoder_layers": layers}
        return json.dumps({"algo_config": [section]})
    body = {"smoothing_strength": 0.5, "mappings": [[balance, smooth] for smooth, balance in pairs]}
    return yaml.safe_dump({"a_stage": {"b_modifiers": {"SmoothQuantModifier": body}}})


def garbled(text: str, dice: random.Random) -> str:
    """Some letters gone, doubled or others; in a tool's text that has no pairs too."""
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(max(len(text) - 1, 1))
        text = text[:at] + dice.choice(["", text[at] * 2, dice.choice("{}[]:,-\"'0aé\\")]) + text[at + 1 :]
    return text


# The judge: which modules a recipe takes and what that does, by code of its own.


def sets_of(tool: str, pairs: Sequence[Pair], layers: str, names: Sequence[str], linears: Set[str]) -> list[Pair]:
    """The sets of modules that a recipe scales: for each module to scale the readers nearest to it."""
    if tool == "quark":
        found = []
        for prefix in dict.fromkeys(m[0] for name in names if (m := re.match(re.escape(layers) + r"\.\d+\.", name))):
            for smooth, balance in pairs:
                observed = prefix + balance[0] in linears  # of others it sees no input, and leaves the mapping out
                if observed and prefix + smooth in names and all(prefix + one in names for one in balance):
                    found.append((prefix + smooth, [prefix + one for one in balance]))
        return found

    def taken(text: str) -> list[str]:
        return [n for n in names if (re.match(text[3:], n) if text.startswith("re:") else n == text)]

    found = []
    for smooth, balance in pairs:
        reading = [one for text in balance for one in taken(text)]
        sources = taken(smooth)
        for source in sources:
            best = max((_shared(source, one) for one in reading), default=0)
            near = [one for one in reading if _shared(source, one) == best or len(sources) == 1]
            if near:
                found.append((source, near))
    return found


def _shared(one: str, other: str) -> int:
    """How many numbers of two names, of the layer and the expert, are the same from the first on."""
    parts = 0
    for mine, theirs in zip(re.findall(r"\.(\d+)\.", one), re.findall(r"\.(\d+)\.", other), strict=False):
        if mine != theirs:
            break
        parts += 1
    return parts


def weight_of(model: nn.Module, name: str) -> tuple[Tensor, Tensor | None, str]:
    """The weight, the bias and the class of a module; of an expert its part of the stack."""
    expert = re.match(r"(.*experts)\.(\d+)\.(gate|up|down)_proj$", name)
    if expert:
        owner, number, part = expert[1], int(expert[2]), expert[3]
        if part == "down":
            return model.get_parameter(f"{owner}.down_proj").data[number], None, "Linear"
        both = model.get_parameter(f"{owner}.gate_up_proj").data[number]
        half = len(both) // 2
        return (both[:half] if part == "gate" else both[half:]), None, "Linear"
    module: Any = model.get_submodule(name)
    return (
        module.weight.data,
        None if getattr(module, "bias", None) is None else module.bias.data,
        type(module).__name__,
    )


def carry_out_(model: nn.Module, tool: str, sets: Sequence[Pair], heads: int) -> None:
    """Scale as the tool does; ValueError where it would stop."""
    generator = torch.Generator().manual_seed(7)
    for smooth, balance in sets:
        weight, bias, kind = weight_of(model, smooth)
        readers = [weight_of(model, name)[0] for name in balance]
        width = readers[0].shape[1]
        scales = 0.5 + torch.rand(width, generator=generator, dtype=torch.float64)
        rows = scales
        if tool == "quark" and weight.dim() == 2 and len(weight) < width:
            size = width // heads
            each = scales.view(len(weight) // size, -1, size)[:, 0]
            rows, scales = each.reshape(-1), each[:, None].expand(-1, width // len(weight), -1).reshape(-1)
        target = weight[-len(rows) :] if tool == "quark" else weight
        offset = 1.0 if OFFSET.search(kind) and tool != "brevitas" else 0.0
        if len(target) != len(rows):
            raise ValueError("another number of channels")
        target.copy_((target + offset) / rows.view(-1, *[1] * (target.dim() - 1)) - offset)
        if bias is not None:
            bias.div_(rows)
        for reader in readers:
            reader.mul_(scales)


def judged(bench: Bench, tool: str, pairs: Sequence[Pair], layers: str) -> float:
    """The relative change of the outputs when the recipe is carried out; infinite where that cannot be done."""
    model: Any = bench.loaded.module
    run = bench.reference.runs[0]
    names = [name for name, _ in model.named_modules()]
    experts = []
    for owner in [name for name in names if name.endswith(".experts")]:
        count = len(getattr(model.get_submodule(owner), "down_proj", ()))
        experts += [f"{owner}.{expert}.{part}_proj" for expert in range(count) for part in ("up", "gate", "down")]
    linears = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)} | {*experts}
    sets = sets_of(tool, pairs, layers, [*names, *experts], linears)
    heads = model.config.get_text_config().num_attention_heads

    def call(module: nn.Module) -> Tensor:
        return run(module)[0]

    with torch.no_grad(), oracle.InFloat64():
        before = call(model)
    return oracle.distance(call, model, before, lambda changed: carry_out_(changed, tool, sets, heads))


def outcome(bench: Bench, tool: str, number: int) -> Outcome:
    """One mutation of the recipe of ``bench`` for a tool."""
    dice = random.Random(number)
    name = bench.source.name
    text, _ = write_recipe(bench.config, tool)
    names = [name for name, _ in bench.loaded.module.named_modules() if name]
    mutation = dice.choice([*MUTATIONS, None]) if tool in READ else None
    pairs, layers = pairs_of(tool, text) if tool in READ else ([], "")
    if mutation is None or not pairs:
        said, text = "letters", garbled(text, dice)
    else:
        inner = [name.partition(layers + ".0.")[2] for name in names] if layers else names
        while not mutation(pairs, [name for name in inner if name], dice):
            mutation = dice.choice(MUTATIONS)
        said, text = mutation.__name__, text_of(tool, pairs, layers)
    try:
        mappings = mappings_of(text, tool)
        imported(bench, bench.config, mappings, tool)
    except AutoQuantError as error:
        return Outcome(tool, name, said, error.message.partition(":")[0][:60])
    read = [(mapping.smooth, list(mapping.balance)) for mapping in mappings]
    return Outcome(tool, name, said, "accepted", judged(bench, tool, read, mappings[0].layers))


def fuzzed(at: int, types: Sequence[str], per_tool: Mapping[str, int], seed: int) -> list[Outcome]:
    """Mutations of the recipes of one of the types; its small model is built once for all of them."""
    torch.set_num_threads(1)
    bench = bench_for(find_source(types[at]))
    numbers = [(tool, number) for tool, count in per_tool.items() for number in range(at, count, len(types))]
    found = [outcome(bench, tool, 1000 * seed + number) for tool, number in numbers]
    print(types[at], len(found), flush=True)
    return found


@dataclass(frozen=True, slots=True)
class Trip:
    """A config whose recipe was read back: groups in the recipe, those left out, and what came back otherwise."""

    tool: str
    name: str
    there: int
    left_out: int
    problem: str = ""


def trip(tool: str, name: str) -> Trip:
    """The groups of a config after a recipe, in their layers and with their alpha. ``name``: its path, no suffix."""
    config = load_config(CONFIGS / f"{name}.json")
    text, _ = write_recipe(config, tool)
    pairs, refused = scale_pairs(config, repeats=tool == "quark")
    if tool == "quark":  # what is no part of every decoder layer is left out there
        inner, layers = pairs_of(tool, text)
        held = {f"{layers}.{{layer}}.{smooth}" for smooth, _ in inner}
        pairs = [p for p in pairs if p.smooth in held and p.layers == tuple(range(config.model.layers))]
    expected = {frozenset((smooth, *balance)): pair.alpha for pair in pairs for smooth, balance in pair.filled()}
    try:
        found = taken_by(mappings_of(text, tool), config) if pairs else {}
    except AutoQuantError as error:
        return Trip(tool, name, len(pairs), len(refused), error.message)
    if tool == "brevitas":  # its regions know no alpha
        expected = dict.fromkeys(expected)
    different = {*expected.items()} ^ {*found.items()}
    return Trip(tool, name, len(pairs), len(refused), f"{len(different)} sets differ" if different else "")


HEAD = """# Recipes there and back, and broken ones

`python benchmarks/recipes.py`

## There and back

Every config of generated_configs/, written for a tool and read again: the same modules in the same layers with the same
alpha (Brevitas is told none), or not. A config all of whose groups the tool cannot hold has no round trip.
"""
BROKEN = """
## Broken ones

{count} mutations of the recipes of {models}, imported.
What is accepted is carried out by code of its own on the small model in float64: a change of its logits by more than
1e-6 is accepted wrongly. Accepted rightly are those that change nothing: a mapping said twice, in another order, or
naming nothing that is there. ModelOpt's and auto-round's settings hold no pairs: every import of them is refused.
"""


def page(trips: Sequence[Trip], outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield from HEAD.splitlines()
    yield ""
    yield "| tool | configs | with groups in the recipe | groups there and back | left out | end elsewhere |"
    yield "|---|---:|---:|---:|---:|---:|"
    for tool in READ:
        own = [one for one in trips if one.tool == tool]
        wrong = [one for one in own if one.problem]
        groups = sum(one.there for one in own if not one.problem)
        held = sum(one.there > 0 for one in own)
        yield f"| {tool} | {len(own)} | {held} | {groups} | {sum(one.left_out for one in own)} | {len(wrong)} |"
    yield from ("", *(f"- {one.tool} {one.name}: {one.problem}" for one in trips if one.problem))
    models = ", ".join(dict.fromkeys(one.model for one in outcomes))
    yield from BROKEN.format(count=len(outcomes), models=models).splitlines()
    yield ""
    yield "| tool | mutation | | refused | accepted, function kept | accepted wrongly |"
    yield "|---|---|---:|---:|---:|---:|"
    for tool in TOOLS:
        for mutation in dict.fromkeys(one.mutation for one in outcomes if one.tool == tool):
            own = [one for one in outcomes if (one.tool, one.mutation) == (tool, mutation)]
            yield f"| {tool} | {mutation.replace('_', ' ')} | {counted(own)} |"
    yield f"| all | | {counted(outcomes)} |"


def counted(outcomes: Sequence[Outcome]) -> str:
    refused, wrong = sum(one.change is None for one in outcomes), sum(one.wrongly_accepted for one in outcomes)
    return f"{len(outcomes)} | {refused} | {len(outcomes) - refused - wrong} | {wrong}"


@click.command()
@click.option("--seed", default=0, show_default=True)
@click.option("--workers", default=1, show_default=True, help="Processes, a type or a tool at a time each.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=PAGE, show_default=True)
def main(seed: int, workers: int, output: Path) -> None:
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        made = pool.map(fuzzed, range(len(TYPES)), repeat(TYPES), repeat(PER_TOOL), repeat(seed))
        trips = [one for found in pool.map(trips_of, READ) for one in found]
        outcomes = [one for found in made for one in found]
    output.write_text("\n".join(page(trips, outcomes)) + "\n", encoding="utf-8")
    wrong = [one for one in outcomes if one.wrongly_accepted]
    print(*wrong, *(one for one in trips if one.problem), sep="\n")
    sys.exit(1 if wrong or any(one.problem for one in trips) else 0)


def trips_of(tool: str) -> list[Trip]:
    paths = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.json"))
    return [trip(tool, str(path.with_suffix(""))) for path in paths if path.parts[0] != "recipes"]


if __name__ == "__main__":
    main()

"""Wrong and harmless edits of a config's JSON, as a person or a program may make them; :mod:`mutations` draws them."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from oracle import Json, layer_numbers

Edit = Callable[[Json, random.Random], bool]
"""Changes the config in place; False where it has no such place."""
EDITS: dict[str, Edit] = {}


def edit(function: Edit) -> Edit:
    EDITS[function.__name__.replace("_", " ")] = function
    return function


def groups(config: Json) -> list[Json]:
    return config["smoothing"]["groups"]  # type: ignore[no-any-return]  # JSON


def spaces(config: Json) -> list[Json]:
    return config["rotation"]["spaces"]  # type: ignore[no-any-return]  # JSON


def slots(config: Json) -> Iterator[tuple[Json, Json]]:
    """(claim, slot) of every member of every claim."""
    for group in groups(config):
        yield from ((group, slot) for slot in (*group["sources"], *group["targets"]))
    for space in spaces(config):
        yield from ((space, writer) for writer in space["writers"])
        yield from ((space, reader) for read in space["reads"] for reader in read["readers"])


def one_of(rng: random.Random, found: Any) -> Any:
    found = list(found)
    return rng.choice(found) if found else None


def peers(config: Json, slot: Json) -> list[str]:
    """Paths of other slots of the same size and axis."""
    key = (slot["size"], slot.get("dim", 0), slot.get("stack"))
    same = {s["path"] for _, s in slots(config) if (s["size"], s.get("dim", 0), s.get("stack")) == key}
    return sorted(same - {slot["path"]})


@edit
def drop_target(config: Json, rng: random.Random) -> bool:
    group = one_of(rng, (g for g in groups(config) if len(g["targets"]) > 1))
    return group is not None and group["targets"].pop(rng.randrange(len(group["targets"]))) is not None


@edit
def drop_source(config: Json, rng: random.Random) -> bool:
    group = one_of(rng, (g for g in groups(config) if len(g["sources"]) > 1))
    return group is not None and group["sources"].pop(rng.randrange(len(group["sources"]))) is not None


@edit
def duplicate_target(config: Json, rng: random.Random) -> bool:
    group = one_of(rng, groups(config))
    group["targets"].append(copy.deepcopy(rng.choice(group["targets"])))
    return True


@edit
def swap_target(config: Json, rng: random.Random) -> bool:
    slot = rng.choice(rng.choice(groups(config))["targets"])
    path = one_of(rng, peers(config, slot))
    slot["path"] = path or slot["path"]
    return path is not None


@edit
def swap_source(config: Json, rng: random.Random) -> bool:
    slot = rng.choice(rng.choice(groups(config))["sources"])
    path = one_of(rng, peers(config, slot))
    slot["path"] = path or slot["path"]
    return path is not None


@edit
def add_target(config: Json, rng: random.Random) -> bool:
    group = one_of(rng, groups(config))
    further = [
        s for g in groups(config) for s in g["targets"] if s not in group["targets"] and g["layers"] == group["layers"]
    ]
    if not further:
        return False
    group["targets"].append(copy.deepcopy(rng.choice(further)))
    return True


@edit
def move_a_target_to_the_sources(config: Json, rng: random.Random) -> bool:
    group = one_of(rng, (g for g in groups(config) if len(g["targets"]) > 1))
    if group is None:
        return False
    group["sources"].append(group["targets"].pop(rng.randrange(len(group["targets"]))))
    return True


@edit
def sides_exchanged(config: Json, rng: random.Random) -> bool:
    group = one_of(rng, (g for g in groups(config) if g["kind"] != "query_key"))
    if group is None:
        return False
    group["sources"], group["targets"] = group["targets"], group["sources"]
    return True


@edit
def targets_of_the_next_layer(config: Json, rng: random.Random) -> bool:
    group = one_of(rng, (g for g in groups(config) if g.get("layers") and len(layer_numbers(g["layers"])) > 1))
    if group is None:
        return False
    first, second = layer_numbers(group["layers"])[:2]
    group["layers"] = str(first)
    for slot in group["targets"]:
        slot["path"] = slot["path"].replace("{layer}", str(second))
    return True


@edit
def sources_of_the_layer_before(config: Json, rng: random.Random) -> bool:
    group = one_of(rng, (g for g in groups(config) if g.get("layers") and len(layer_numbers(g["layers"])) > 1))
    if group is None:
        return False
    first, second = layer_numbers(group["layers"])[:2]
    group["layers"] = str(second)
    for slot in group["sources"]:
        slot["path"] = slot["path"].replace("{layer}", str(first))
    return True


@edit
def other_layers(config: Json, rng: random.Random) -> bool:
    """All layers for a claim of some; those of another claim; one more than there are."""
    claim = one_of(rng, (c for c in (*groups(config), *spaces(config)) if c.get("layers")))
    if claim is None:
        return False
    count = config["model"]["layers"]
    wider = [f"0-{count - 1}", f"0-{count}", *(c["layers"] for c in groups(config) if c.get("layers"))]
    wider = [text for text in wider if not set(layer_numbers(text)) <= set(layer_numbers(claim["layers"]))]
    if not wider:
        return False
    claim["layers"] = rng.choice(wider)
    return True


@edit
def another_power(config: Json, rng: random.Random) -> bool:
    group = rng.choice(groups(config))
    slot = rng.choice([*group["sources"], *group["targets"]])
    slot["power"] = rng.choice([p for p in (-1, 1, 2) if p != slot.get("power", 1)])
    return True


@edit
def another_offset(config: Json, rng: random.Random) -> bool:
    slot = rng.choice(rng.choice(groups(config))["sources"])
    slot["offset"] = 1 - slot.get("offset", 0)
    return True


@edit
def another_axis(config: Json, rng: random.Random) -> bool:
    _, slot = rng.choice(list(slots(config)))
    slot["dim"] = 1 - slot.get("dim", 0) if slot.get("dim", 0) < 2 else 1
    return True


@edit
def channels_shifted(config: Json, rng: random.Random) -> bool:
    """Positions one further, as a wrong cut of a fused weight has them."""
    found = one_of(rng, (s for _, s in slots(config) if s.get("index")))
    if found is None:
        return False
    block = rng.choice(found["index"])
    block["start"] = max(0, block.get("start", 0) + rng.choice([-8, -1, 1, 8]))
    return True


@edit
def query_groups_forgotten(config: Json, rng: random.Random) -> bool:
    found = one_of(rng, (b for _, s in slots(config) for b in s.get("index") or () if 0 in b["channel_stride"]))
    if found is None:
        return False
    found["shape"] = [1 if not step else n for n, step in zip(found["shape"], found["channel_stride"], strict=True)]
    return True


@edit
def strides_exchanged(config: Json, rng: random.Random) -> bool:
    found = [b for _, s in slots(config) for b in s.get("index") or () if len(set(b["channel_stride"])) > 1]
    if not found:
        return False
    block = rng.choice(found)
    block["channel_stride"] = block["channel_stride"][::-1]
    return True


@edit
def fewer_channels(config: Json, rng: random.Random) -> bool:
    """A group over its first half of channels, written out consistently."""
    group = one_of(rng, (g for g in groups(config) if all(not s.get("index") for s in (*g["sources"], *g["targets"]))))
    if group is None or group["channels"] % 2:
        return False
    group["channels"] //= 2
    for slot in (*group["sources"], *group["targets"]):
        half = group["channels"]
        blocks = [{"start": 0, "shape": [half], "stride": [1], "channel_stride": [1]}]
        slot["index"] = blocks
    slot["index"] = [{**blocks[0], "start": half if slot["size"] >= 2 * half else 0}]
    return True


def matrices(config: Json) -> list[Json]:
    return [slot for group in groups(config) for slot in (*group["sources"], *group["targets"]) if slot.get("stack")]


def written_out(slot: Json) -> list[int]:
    """The channel of each position of a stacked slot."""
    if not slot.get("index"):
        return list(range(slot["size"]))
    found = [-1] * slot["size"]
    for block in slot["index"]:
        places = [(block.get("start", 0), block.get("channel_start", 0))]
        for extent, step, other in zip(block["shape"], block["stride"], block["channel_stride"], strict=True):
            places = [(p + i * step, c + i * other) for p, c in places for i in range(extent)]
        for position, channel in places:
            found[position] = channel
    return found


def as_blocks(channels: list[int]) -> list[Json]:
    blocks: list[Json] = []
    for position, channel in enumerate(channels):
        last = blocks[-1] if blocks else None
        run = last["shape"][0] if last else 0
        if channel < 0:
            continue
        if last and position == last["start"] + run and channel == last["channel_start"] + run:
            last["shape"][0] += 1
        else:
            blocks.append(
                {"start": position, "shape": [1], "stride": [1], "channel_start": channel, "channel_stride": [1]}
            )
    return blocks


@edit
def one_expert_rolled(config: Json, rng: random.Random) -> bool:
    slot = one_of(rng, matrices(config))
    if slot is None:
        return False
    found, each = written_out(slot), slot["size"] // slot["stack"]
    first = each * rng.randrange(slot["stack"])
    part = found[first : first + each]
    slot["index"] = as_blocks(found[:first] + part[1:] + part[:1] + found[first + each :])
    return True


@edit
def one_expert_as_another(config: Json, rng: random.Random) -> bool:
    slot = one_of(rng, matrices(config))
    if slot is None:
        return False
    found, each = written_out(slot), slot["size"] // slot["stack"]
    one, other = rng.sample(range(slot["stack"]), 2)
    found[one * each : (one + 1) * each] = found[other * each : (other + 1) * each]
    slot["index"] = as_blocks(found)
    return True


@edit
def one_expert_left_out(config: Json, rng: random.Random) -> bool:
    slot = one_of(rng, matrices(config))
    if slot is None:
        return False
    found, each = written_out(slot), slot["size"] // slot["stack"]
    first = each * rng.randrange(slot["stack"])
    slot["index"] = as_blocks(found[:first] + [-1] * each + found[first + each :])
    return True


@edit
def another_number_of_an_expert(config: Json, rng: random.Random) -> bool:
    found = [s for _, s in slots(config) if re.search(r"experts\.\d+\.", s["path"])]
    if not found:
        return False
    slot = rng.choice(found)
    head, _, tail = slot["path"].partition("experts.")
    number, _, rest = tail.partition(".")
    slot["path"] = f"{head}experts.{(int(number) + rng.choice([1, 2])) % 4}.{rest}"
    return True


@edit
def one_numbered_expert_left_out(config: Json, rng: random.Random) -> bool:
    held = [(g["targets"], s) for g in groups(config) for s in g["targets"]]
    found = [(side, s) for side, s in held if re.search(r"experts\.\d+\.", s["path"])]
    found = [(side, s) for side, s in found if len(side) > 1]
    if not found:
        return False
    side, slot = rng.choice(found)
    side.remove(slot)
    return True


@edit
def drop_writer(config: Json, rng: random.Random) -> bool:
    space = one_of(rng, (s for s in spaces(config) if len(s["writers"]) > 1))
    return space is not None and space["writers"].pop(rng.randrange(len(space["writers"]))) is not None


@edit
def drop_reader(config: Json, rng: random.Random) -> bool:
    read = one_of(rng, (r for s in spaces(config) for r in s["reads"] if len(r["readers"]) > 1))
    return read is not None and read["readers"].pop(rng.randrange(len(read["readers"]))) is not None


@edit
def drop_read(config: Json, rng: random.Random) -> bool:
    space = one_of(rng, (s for s in spaces(config) if len(s["reads"]) > 1))
    return space is not None and space["reads"].pop(rng.randrange(len(space["reads"]))) is not None


@edit
def swap_reader(config: Json, rng: random.Random) -> bool:
    reader = one_of(rng, (x for s in spaces(config) for r in s["reads"] for x in r["readers"]))
    path = None if reader is None else one_of(rng, peers(config, reader))
    if path is None:
        return False
    reader["path"] = path
    return True


@edit
def swap_writer(config: Json, rng: random.Random) -> bool:
    writer = one_of(rng, (w for s in spaces(config) for w in s["writers"]))
    path = None if writer is None else one_of(rng, peers(config, writer))
    if path is None:
        return False
    writer["path"] = path
    return True


@edit
def another_size(config: Json, rng: random.Random) -> bool:
    """Blocks of twice the size, which takes the heads of R2 together; half of it is a claim that holds."""
    space = one_of(rng, spaces(config))
    if space is None:
        return False
    size, blocks = space["size"], space.get("blocks", 1)
    if blocks % 2 == 0 and rng.random() < 0.8:
        space["size"], space["blocks"] = size * 2, blocks // 2
    elif size % 2 == 0:
        space["size"], space["blocks"] = size // 2, blocks * 2
    else:
        return False
    return True


@edit
def another_centre(config: Json, rng: random.Random) -> bool:
    space = one_of(rng, spaces(config))
    if space is None:
        return False
    space["centre"] = not space.get("centre", False)
    return True


def with_norm(config: Json) -> list[tuple[Json, Json]]:
    return [(s, r) for s in spaces(config) for r in s["reads"] if r.get("norm") and r["norm"].get("weight")]


@edit
def norms_exchanged(config: Json, rng: random.Random) -> bool:
    found = with_norm(config)
    if len(found) < 2:
        return False
    (_, one), (_, other) = rng.sample(found, 2)
    one["norm"], other["norm"] = other["norm"], one["norm"]
    return one["norm"] != other["norm"]


@edit
def norm_forgotten(config: Json, rng: random.Random) -> bool:
    found = one_of(rng, with_norm(config))
    if found is None:
        return False
    found[1]["norm"] = None
    return True


@edit
def norm_of_another_offset(config: Json, rng: random.Random) -> bool:
    found = one_of(rng, with_norm(config))
    if found is None:
        return False
    found[1]["norm"]["offset"] = 1 - found[1]["norm"].get("offset", 0)
    return True


@edit
def norm_without_its_bias(config: Json, rng: random.Random) -> bool:
    found = one_of(rng, ((s, r) for s, r in with_norm(config) if r["norm"].get("bias")))
    if found is None:
        return False
    found[1]["norm"]["bias"] = None
    return True


@edit
def reader_without_its_bias(config: Json, rng: random.Random) -> bool:
    reader = one_of(
        rng, (x for _, r in with_norm(config) if r["norm"].get("bias") for x in r["readers"] if x.get("bias"))
    )
    if reader is None:
        return False
    reader["bias"] = None
    return True


@edit
def layers_of_one_member(config: Json, rng: random.Random) -> bool:
    count = config["model"]["layers"]
    found = [m for s in spaces(config) if s["kind"] == "R1" for m in (*s["writers"], *s["reads"])]
    found = [m for m in found if "{layer}" in str(m)]
    if not found or count < 2:
        return False
    member = rng.choice(found)
    member["layers"] = rng.choice([f"1-{count - 1}", f"0-{count - 2}", "0"])
    return True


@edit
def linear_of_another_axis(config: Json, rng: random.Random) -> bool:
    linear = one_of(rng, config["model"]["linears"])
    linear["in_dim"] = 1 - linear["in_dim"] if linear["in_dim"] < 2 else 1
    return True


@edit
def linear_of_another_weight(config: Json, rng: random.Random) -> bool:
    linears = config["model"]["linears"]
    keys = ("in_features", "out_features", "stack", "in_dim", "layers")
    pairs = [(a, b) for a in linears for b in linears if a is not b and all(a.get(k) == b.get(k) for k in keys)]
    if not pairs:
        return False
    one, other = rng.choice(pairs)
    one["weight"], other["weight"] = other["weight"], one["weight"]
    return True


@edit
def linear_without_its_bias(config: Json, rng: random.Random) -> bool:
    linear = one_of(rng, (x for x in config["model"]["linears"] if x.get("bias")))
    if linear is None:
        return False
    linear["bias"] = None
    return True


@edit
def linear_without_in_dim(config: Json, rng: random.Random) -> bool:
    return one_of(rng, config["model"]["linears"]).pop("in_dim") is not None


@edit
def linear_of_other_features(config: Json, rng: random.Random) -> bool:
    linear = one_of(rng, config["model"]["linears"])
    linear["in_features"], linear["out_features"] = linear["out_features"], linear["in_features"]
    return linear["in_features"] != linear["out_features"]


@edit
def linear_left_out(config: Json, rng: random.Random) -> bool:
    linears = config["model"]["linears"]
    return linears.pop(rng.randrange(len(linears))) is not None


@edit
def online_of_another_linear(config: Json, rng: random.Random) -> bool:
    online = one_of(rng, (x for x in config["rotation"]["online"] if x["kind"] != "R3"))
    if online is None:
        return False
    online["path"] = rng.choice([x["path"] for x in config["model"]["linears"] if x["path"] != online["path"]])
    return True


@edit
def online_of_another_size(config: Json, rng: random.Random) -> bool:
    online = one_of(rng, (x for x in config["rotation"]["online"] if x["kind"] != "R3"))
    if online is None:
        return False
    online["size"] = rng.choice([online["size"] * 2, online["size"] + 1, max(1, online["size"] - 3)])
    return True


@edit
def drop_online(config: Json, rng: random.Random) -> bool:
    found = config["rotation"]["online"]
    return bool(found) and found.pop(rng.randrange(len(found))) is not None


@edit
def drop_a_claim(config: Json, rng: random.Random) -> bool:
    found = rng.choice([groups(config), spaces(config)])
    return bool(found) and found.pop(rng.randrange(len(found))) is not None


@edit
def fewer_layers(config: Json, rng: random.Random) -> bool:
    group = one_of(rng, (g for g in groups(config) if g.get("layers") and len(layer_numbers(g["layers"])) > 1))
    if group is None:
        return False
    group["layers"] = str(rng.choice(layer_numbers(group["layers"])))
    return True


@edit
def a_knob(config: Json, rng: random.Random) -> bool:
    """alpha, enable and seed are choices of a person, and cost no proof."""
    kind = rng.choice(["alpha", "enable", "seed", "name"])
    group = rng.choice(groups(config))
    if kind == "alpha":
        group["alpha"] = round(rng.random(), 3)
    elif kind == "enable":
        group["enable"] = rng.random() < 0.5
    elif kind == "seed":
        config["rotation"]["seed"] = rng.randrange(1, 1000)
    else:
        group["name"] = f"mine {rng.randrange(1000)}"
    return True


RARE = {"drop online", "drop a claim", "fewer layers", "a knob"}
"""Edits that are harmless by themselves; each is proved on the small model, which takes seconds."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator

import pytest
import torch
from block_nets import Block, Net, settings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from autoquant.analyzer.analyze import analyze
from autoquant.analyzer.findings import Findings
from autoquant.analyzer.layers import find_stacks, represent, whole
from autoquant.analyzer.templates import canonical, fold, unfold
from autoquant.config.format import Linear
from autoquant.models.source import ModelSource

# type: (path of the stack, layers, originals of each representative in short: its own number and how many it stands for)
TYPES = {
    "llama": ("model.layers", 32, [(0, 31), (31, 1)]),
    "deepseek_v3": ("model.layers", 61, [(0, 2), (2, 1), (3, 57), (60, 1)]),
    "qwen3_moe": ("model.layers", 24, [(0, 23), (23, 1)]),
    "gemma2": ("model.layers", 26, [(0, 12), (1, 12), (24, 1), (25, 1)]),
    "gemma3_text": ("model.layers", 26, [(0, 21), (5, 3), (23, 1), (25, 1)]),
    "falcon_h1": ("model.layers", 32, [(0, 31), (31, 1)]),
    "bamba": ("model.layers", 32, [(0, 31), (31, 1)]),
    "jamba": ("model.layers", 32, [(0, 11), (1, 15), (4, 3), (28, 1), (30, 1), (31, 1)]),
    # in bfloat16, the first layer widens the embeddings, which the others find wide
    "mamba": ("backbone.layers", 32, [(0, 1), (1, 30), (31, 1)]),
    "opt": ("model.decoder.layers", 12, [(0, 11), (11, 1)]),
    "gpt2": ("transformer.h", 12, [(0, 11), (11, 1)]),
    "gpt_neox": ("gpt_neox.layers", 44, [(0, 43), (43, 1)]),
    "qwen3_next": ("model.layers", 48, [(0, 35), (3, 11), (46, 1), (47, 1)]),
    "longcat_flash": ("model.layers", 28, [(0, 27), (27, 1)]),
    "lfm2": ("model.layers", 32, [(0, 31), (31, 1)]),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def build(model_type: str, **settings: object) -> nn.Module:
    config = CONFIG_MAPPING[model_type](**settings)
    with torch.device("meta"):
        # bfloat16: the meta kernel of the experts' grouped product takes nothing else
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def forward(model: nn.Module) -> object:
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        return model(input_ids=torch.zeros(1, 3, dtype=torch.long, device="meta"), use_cache=False)


@pytest.mark.parametrize("model_type", TYPES)
def test_kinds_of_known_types(model_type: str) -> None:
    path, length, expected = TYPES[model_type]
    model = build(model_type)
    before = {id(m): dict(vars(m)) for m in model.modules()}, model.config.to_dict()
    stacks = find_stacks(model)
    assert [(stack.path, stack.length, stack.whole) for stack in stacks] == [(path, length, None)]
    pruned, (stack_map,) = represent(model, stacks, forward)
    assert [(originals[0], len(originals)) for originals in stack_map.originals] == expected
    assert sorted(i for originals in stack_map.originals for i in originals) == list(range(length))
    assert pruned is not model
    assert len(pruned.get_submodule(path)) == len(expected)  # type: ignore[arg-type]
    kept, parameters = dict(pruned.named_parameters()), dict(model.named_parameters())
    for new, (old, _) in enumerate(expected):
        for name, parameter in model.get_submodule(f"{path}.{old}").named_parameters():
            assert kept[f"{path}.{new}.{name}"] is parameters[f"{path}.{old}.{name}"] is parameter
    assert ({id(m): dict(vars(m)) for m in model.modules()}, model.config.to_dict()) == before


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gemma3_text", "jamba", "qwen3_next"])
def test_what_is_read_off_representatives_holds_for_all_layers(model_type: str) -> None:
    model = build(model_type)
    pruned, maps = represent(model, find_stacks(model), forward)
    whole_maps = whole(find_stacks(model))
    found, seen = linears(model), linears(pruned)
    assert len(seen.linears) < len(found.linears) / 3
    assert canonical(unfold(fold(seen, maps))) == canonical(found)
    assert canonical(fold(seen, maps)) == canonical(fold(found, whole_maps))


def linears(model: nn.Module) -> Findings:
    """A Linear for every matrix and stack of matrices in a model."""
    matrices = tuple(
        Linear(
            path=name.removesuffix(".weight"),
            weight=name,
            in_features=p.shape[-1],
            out_features=p.shape[-2],
            stack=p.shape[0] if p.dim() == 3 else None,
            in_dim=p.dim() - 1,
        )
        for name, p in model.named_parameters()
        if p.dim() >= 2
    )
    return Findings(linears=matrices, groups=(), spaces=(), online=(), blocked=(), unknown_operators=())


def test_config_and_layers_are_made_to_fit() -> None:
    model = build("jamba")
    pruned, _ = represent(model, find_stacks(model))
    config = pruned.config
    assert config.num_hidden_layers == 6
    assert config.num_attention_heads == 32  # as many heads as there were layers
    assert list(config.layer_types) == ["linear_attention"] * 2 + ["full_attention"] * 2 + ["linear_attention"] * 2
    assert all(module.config is config for module in pruned.modules() if hasattr(module, "config"))
    numbers = {name: m.layer_idx for name, m in pruned.named_modules() if hasattr(m, "layer_idx")}
    assert numbers
    assert all(int(name.split(".")[2]) == number for name, number in numbers.items())


def test_two_attentions_in_a_layer_count_by_two() -> None:
    model = build("longcat_flash")
    pruned, _ = represent(model, find_stacks(model))
    assert [m.layer_idx for name, m in pruned.named_modules() if name.endswith(("self_attn.0", "self_attn.1"))] == [
        0,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        # What it says first depends on the version: per-layer inputs, or layers that share keys with earlier ones.
        (
            "gemma3n_text",
            (
                "the model does not run with fewer layers",
                "layer 20 refers to layer 18",
                "the model does something of its own after layer",
            ),
        ),
    ],
)
def test_models_that_depend_on_their_depth_stay_whole(model_type: str, reason: str | tuple[str, ...]) -> None:
    model = build(model_type)
    stacks = find_stacks(model)
    pruned, (stack_map,) = represent(model, stacks, forward)
    assert pruned is model
    assert stack_map.originals == tuple((i,) for i in range(stacks[0].length))
    assert (stack_map.whole or "").startswith(reason)


def test_layers_that_share_parameters_stand_for_themselves() -> None:
    model = build("zamba2")
    hybrids = list(model.config.hybrid_layer_ids)
    pruned, (stack_map,) = represent(model, find_stacks(model), forward)
    alone = [originals[0] for originals in stack_map.originals if len(originals) == 1]
    assert alone == [*hybrids, 53]
    assert (stack_map.originals[0][:7], len(stack_map.originals[0])) == ((0, 1, 2, 3, 4, 5, 7), 44)
    assert pruned.config.hybrid_layer_ids == list(range(1, 10))
    numbers = {new: position for position, new in enumerate(range(1, 10))}  # which adapter each of them takes
    assert [m.layer_dic for m in pruned.modules() if hasattr(m, "layer_dic")] == [numbers] * 2 * len(hybrids)
    tied = [name for name, p in pruned.named_parameters(remove_duplicate=False) if name.endswith("q_proj.weight")]
    assert len(tied) == len(hybrids)
    assert len({id(pruned.get_parameter(name)) for name in tied}) == model.config.num_mem_blocks


def test_one_layer_model_is_a_stack() -> None:
    model = build("llama", num_hidden_layers=1)
    stacks = find_stacks(model)
    assert [(stack.path, stack.kinds) for stack in stacks] == [("model.layers", (0,))]
    pruned, maps = represent(model, stacks)
    assert pruned is model
    assert maps == whole(stacks)


def test_depth_costs_nothing() -> None:
    model = build("llama", hidden_size=64, num_hidden_layers=126)
    pruned, (stack_map,) = represent(model, find_stacks(model))
    assert stack_map.originals == (tuple(range(125)), (125,))
    assert sum(1 for _ in pruned.modules()) < 40


def test_experts_and_lists_of_plain_modules_are_no_stacks() -> None:
    net = Net([Block(0), Block(1)])
    net.heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 2)])
    net.tail = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    net.second = nn.Sequential(Block(0), Block(1))
    assert [stack.path for stack in find_stacks(net)] == ["blocks", "second"]


@pytest.mark.parametrize(
    ("blocks", "kinds"),
    [
        ([Block(i) for i in range(4)], (0, 0, 0, 0)),
        ([Block(i, 16 if i < 2 else 32) for i in range(4)], (0, 0, 1, 1)),
        ([Block(i, window=4 if i % 2 else None) for i in range(4)], (0, 1, 0, 1)),
        ([Block(i, window=4 + 4 * i) for i in range(3)], (0, 1, 2)),
        ([Block(i).to(torch.float16 if i == 1 else torch.float32) for i in range(3)], (0, 1, 0)),
    ],
    ids=["same", "shape", "attribute", "attribute that grows", "dtype"],
)
def test_what_makes_a_kind(blocks: list[nn.Module], kinds: tuple[int, ...]) -> None:
    assert find_stacks(Net(blocks))[0].kinds == kinds


def test_a_tie_within_a_layer_makes_a_kind() -> None:
    net = Net([Block(i, 8) for i in range(3)])
    net.blocks[1].mixer.up.weight = net.blocks[1].mixer.down.weight
    assert find_stacks(net)[0].kinds == (0, 1, 0)


def test_lists_of_the_config_make_kinds() -> None:
    config = settings(num_layers=4, layer_types=["a", "b", "b", "b"], special_layers=[3], sizes=[1, 2])
    net = Net([Block(i) for i in range(4)], config)
    (stack,) = find_stacks(net)
    assert stack.kinds == (0, 1, 1, 2)
    net = Net([Block(i) for i in range(5)], settings(num_layers=5, layer_types=list("abbba"), special_layers=[1, 4]))
    pruned, (stack_map,) = represent(net, find_stacks(net))
    assert stack_map.originals == ((0,), (1,), (2,), (3,), (4,))
    assert pruned is net
    net = Net([Block(i) for i in range(6)], settings(num_layers=6, layer_types=list("abbbaa"), special_layers=[4, 5]))
    pruned, (stack_map,) = represent(net, find_stacks(net))
    assert stack_map.originals == ((0,), (1, 2), (3,), (4,), (5,))
    assert (pruned.config.num_layers, pruned.config.layer_types, pruned.config.special_layers) == (
        5,
        list("abbaa"),
        [3, 4],
    )
    assert net.config.special_layers == [4, 5]


def test_reasons_to_keep_every_layer() -> None:
    shared = Net([Block(i) for i in range(5)])
    shared.blocks[2].mixer.up.weight = shared.blocks[0].mixer.up.weight
    assert (find_stacks(shared)[0].whole, find_stacks(shared)[0].kinds) == (None, (0, 1, 2, 1, 1))
    for block in shared.blocks:
        block.mixer.up.weight = shared.blocks[0].mixer.up.weight
    assert find_stacks(shared)[0].whole == "layer 1 and layer 0 share the parameter mixer.up.weight"

    outward = Net([Block(i) for i in range(3)])
    outward.blocks[1].mixer.up.weight = outward.stem.weight
    assert find_stacks(outward)[0].whole == "layer 1 and the model share the parameter mixer.up.weight"

    pointing = Net([Block(i) for i in range(3)])
    for block in pointing.blocks:
        block.mixer.kv_layer_idx = 1
    assert find_stacks(pointing)[0].whole == "layer 0 refers to layer 1 (mixer.kv_layer_idx)"
    for block in pointing.blocks:
        block.mixer.kv_layer_idx = -1
    assert find_stacks(pointing)[0].whole is None

    gains = Net([Block(i) for i in range(3)])
    gains.gains = nn.Parameter(torch.ones(3))
    assert find_stacks(gains)[0].whole == "gains may hold one entry for each layer"

    boundary = Net([Block(i) for i in range(3)])
    boundary.insert_layer_id = 1
    assert find_stacks(boundary)[0].whole == "the model does something of its own at layer 1 (insert_layer_id)"

    around = Net([Block(i) for i in range(3)])
    outer = nn.Module()
    outer.config, outer.language_model = settings(spatial_target_layers=[1]), around
    assert find_stacks(outer)[0].whole is None, "the nearest settings are made to fit"
    around.config = settings(num_hidden_layers=3)
    reason = "the model gives something of its own to some of the layers (spatial_target_layers)"
    assert find_stacks(outer)[0].whole == reason
    outer.config = settings(spatial_target_layers=[])
    assert find_stacks(outer)[0].whole is None


class Looking(Block):
    """Takes a factor by the number of its layer."""

    def __init__(self, index: int, factors: dict[int, float]) -> None:
        super().__init__(index)
        self.layer_factors = factors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer_factors[self.mixer.layer_idx] * self.mixer.down(self.mixer.up(x))


def test_what_is_looked_up_by_layer_numbers_is_renumbered() -> None:
    factors = {0: 1.0, 3: 2.0, 4: 4.0}
    net = Net([Looking(i, factors) if i in factors else Block(i) for i in range(7)], settings(by_layer=dict(factors)))
    pruned, (stack_map,) = represent(net, find_stacks(net), lambda m: m(torch.zeros(2, 4)))
    # the config's mapping tells the three apart as well
    assert stack_map.originals == ((0,), (1, 2, 5), (3,), (4,), (6,))
    assert [block.layer_factors for block in pruned.blocks if hasattr(block, "layer_factors")] == [
        {0: 1.0, 2: 2.0, 3: 4.0}
    ] * 3
    assert pruned.config.by_layer == {0: 1.0, 2: 2.0, 3: 4.0}
    assert factors == net.config.by_layer == {0: 1.0, 3: 2.0, 4: 4.0}


def test_two_stacks_under_one_config_must_agree() -> None:
    net = Net([Block(i) for i in range(4)], settings(num_layers=4))
    net.others = nn.ModuleList([Block(i, 16 if i < 2 else 32) for i in range(4)])
    pruned, maps = represent(net, find_stacks(net))
    assert pruned is net
    assert [m.whole for m in maps] == ["blocks and others are described by one config and differ"] * 2


def test_two_stacks_of_one_length_that_nothing_describes_keep_their_own() -> None:
    net = Net([Block(i) for i in range(6)], settings(hidden_size=6))
    net.others = nn.ModuleList([Block(i, 16 if i < 3 else 32) for i in range(6)])
    pruned, maps = represent(net, find_stacks(net))
    assert [m.whole for m in maps] == [None, None]
    assert [m.originals for m in maps] == [((0, 1, 2, 3, 4), (5,)), ((0, 1), (2,), (3, 4), (5,))]
    assert (len(pruned.blocks), len(pruned.others), len(net.others)) == (2, 4, 6)
    for field in ({"num_layers": 6}, {"layer_types": list("aabbaa")}):
        net.config = settings(**field)
        assert (
            represent(net, find_stacks(net))[1][0].whole == "blocks and others are described by one config and differ"
        )


def test_the_copy_computes_what_its_layers_compute() -> None:
    torch.manual_seed(0)
    net = Net([Block(i) for i in range(5)]).double()
    before = copy.deepcopy(net.state_dict())
    pruned, _ = represent(net, find_stacks(net))
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(pruned(x), net.blocks[4](net.blocks[0](net.stem(x))))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not any(block._forward_pre_hooks for block in pruned.blocks)


class Sharing(nn.Module):
    """A layer around a block that other layers have as well, with a matrix of its own behind it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.shared = block
        self.own = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.own(self.shared(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Hybrid(nn.Module):
    """Layer i has block ``blocks[i]``, or none: '..a.b.a' has a block in layers 2 and 6, another in layer 4."""

    def __init__(self, blocks: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        shared = {
            name: nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False))
            for name in sorted(set(blocks) - {"."})
        }
        self.layers = nn.ModuleList([Residual() if name == "." else Sharing(shared[name]) for name in blocks])
        self.head = nn.Linear(8, 32, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("blocks", "traced", "names"),
    [
        ("..a...a..", 4, ["layers.{layer}.shared.2 -> own"]),
        ("..a.b.a.b...", 6, ["layers.{layer}.shared.2 -> own @2,6", "layers.{layer}.shared.2 -> own @4,8"]),
    ],
)
def test_representatives_of_layers_that_share_parameters(blocks: str, traced: int, names: list[str]) -> None:
    source = ModelSource("hybrid", factory=lambda: (Hybrid(blocks), (torch.zeros(1, 4, dtype=torch.long),)))
    few, every = analyze(source), analyze(source, full=True)
    assert (len(few.stacks[0].originals), len(every.stacks[0].originals)) == (traced, len(blocks))
    assert canonical(unfold(few.findings)) == canonical(unfold(every.findings))
    assert [group.name for group in few.findings.groups if ".shared.2 " in group.name] == names
    assert [space.name for space in few.findings.spaces if ".shared.2 " in space.name] == names
    first = next(group for group in few.findings.groups if group.name == names[0])
    assert [slot.path for slot in first.sources] == ["layers.2.shared.2.weight", "layers.6.shared.2.weight"]
    assert [slot.path for slot in first.targets] == ["layers.2.own.weight", "layers.6.own.weight"]


class Numbered(nn.Module):
    """Layers in a dict, by their numbers written out, as mistral-inference keeps those of one stage of a pipeline."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__()
        self.emb = nn.Embedding(8, 4)
        self.layers = nn.ModuleDict({key: nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 4)) for key in keys})
        self.head = nn.Linear(4, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.emb(tokens)
        for layer in self.layers.values():
            x = x + layer(x).relu()
        return self.head(x)


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        (["0", "1", "2", "3"], ["layers.{layer}.0 -> 1"]),
        (["0", "2", "1"], ["layers.0.0 -> 1", "layers.2.0 -> 1", "layers.1.0 -> 1"]),
    ],
)
def test_layers_in_a_dict_are_a_stack_by_their_numbers(keys: list[str], found: list[str]) -> None:
    tokens = torch.tensor([[3, 1, 4], [1, 5, 2]])
    config = analyze(ModelSource("numbered", factory=lambda: (Numbered(keys), (tokens,)))).config
    assert [group.name for group in config.smoothing.groups] == found
    assert config.model.layers == (4 if found[0].startswith("layers.{") else 0)

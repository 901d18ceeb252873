"""Both captures of real architectures and of small modules made to be difficult."""

import logging
import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
from model_types import ONE_OF_EACH
from torch import nn

from autoquant.capture.routes import Captured, GraphInput, capture, check_against_eager, module_path, shape
from autoquant.errors import AutoQuantError
from autoquant.models.build import build_meta
from autoquant.models.reduce import grouped_experts, small
from autoquant.models.repair import find_source

TYPES = [*ONE_OF_EACH, "deepseek_v3"]
ONE_TYPE = "gpt2"  # has tied parameters, splits, and multiplies by a transposed weight


class Block(nn.Module):
    """Normalises, multiplies, breaks the graph, multiplies again by the transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.proj = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(self.norm(x))
        torch._dynamo.graph_break()
        return torch.relu(x) @ self.proj.weight.T


class Broken(nn.Module):
    """Two blocks in a loop, which Dynamo leaves to Python altogether, with one of their parameters used outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.out(x) + self.layers[1].norm.weight.sum()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x)
        return x + 1 if x.sum() > 0 else x - 1


class Stateful(nn.Module):
    """Changes a buffer, an attribute and the hooks, in regions without gradient and without autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        with torch.no_grad():
            y = self.proj(x)
        with torch.autocast("cpu", enabled=False):
            y = y * 2
        with torch.enable_grad():
            y = y + 1
        y = y.clone()
        y[..., 0] = 0
        y.mul_(3)
        self.seen.add_(1)
        return y


class Rescaling(nn.Module):
    """Divides a weight by a number when it first runs."""

    def __init__(self, by: float = 2, read_before: bool = False) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.by, self.read_before, self.done = by, read_before, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x)
        if self.read_before:
            x = x * (1 + self.out.weight[0])
        if not self.done:
            with torch.no_grad():
                self.out.weight.div_(self.by)
            self.done = True
        return self.out(x)


def operators(captured: Captured) -> Counter[tuple[str, str]]:
    return Counter(
        (str(node.target), module_path(node))
        for subgraph in captured.subgraphs
        for node in subgraph.graph.graph.nodes
        if node.op == "call_function"
    )


def parameters(captured: Captured) -> set[str]:
    return {
        source.name
        for subgraph in captured.subgraphs
        for source in subgraph.inputs.values()
        if source.kind == "parameter"
    }


@pytest.mark.parametrize("model_type", TYPES)
def test_both_captures_see_the_same_operators_in_the_same_modules(model_type: str) -> None:
    model = build_meta(find_source(model_type, layers=2))
    dynamo = capture(model.module, model.args, model.kwargs, "dynamo")
    export = capture(model.module, model.args, model.kwargs, "export")
    assert (dynamo.how, export.how) == ("dynamo", "export")
    assert operators(dynamo) == operators(export)
    assert parameters(dynamo) == parameters(export) == {name for name, _ in model.module.named_parameters()}
    assert dynamo.aliases == export.aliases
    paths = {name for name, _ in model.module.named_modules()}
    assert {path for _, path in operators(dynamo)} <= paths
    for subgraph in dynamo.subgraphs + export.subgraphs:
        for node in subgraph.graph.graph.nodes:
            assert node.op != "get_attr"
            assert node.op == "output" or "val" in node.meta
            assert not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)


@pytest.mark.parametrize("how", ["dynamo", "export"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "mamba", "falcon", "deepseek_v3"])
def test_captured_graph_computes_what_the_module_computes(model_type: str, how: str) -> None:
    model = small(find_source(model_type))
    with grouped_experts(model):
        captured = capture(model.module, model.args, model.kwargs, how)  # type: ignore[arg-type]
    assert check_against_eager(model.module, model.args, model.kwargs, captured) < 1e-7


def test_check_against_eager_notices_a_changed_graph() -> None:
    model = small(find_source("llama"))
    captured = capture(model.module, model.args, model.kwargs)
    graph = captured.subgraphs[0].graph
    silu = next(node for node in graph.graph.nodes if node.target is torch.ops.aten.silu.default)
    silu.target = torch.ops.aten.relu.default
    graph.recompile()
    assert check_against_eager(model.module, model.args, model.kwargs, captured) > 1e-3


def test_composite_operators_stay_whole() -> None:
    model = build_meta(find_source("opt", layers=1))
    seen = operators(capture(model.module, model.args, model.kwargs))
    layer = "model.decoder.layers.0"
    assert seen["aten.linear.default", f"{layer}.self_attn.v_proj"] == 1
    assert seen["aten.scaled_dot_product_attention.default", f"{layer}.self_attn"] == 1
    assert seen["aten.layer_norm.default", f"{layer}.final_layer_norm"] == 1
    assert seen["aten.embedding.default", "model.decoder.embed_tokens"] == 1
    rms = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8))
    assert operators(capture(rms, (torch.zeros(1, 8),), {})) == Counter(
        {("aten.rms_norm.default", "0"): 1, ("aten.linear.default", "1"): 1}
    )


def test_shared_parameters_go_by_their_first_name_and_equal_ones_are_not_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.second = nn.Linear(4, 4, bias=False)
            self.third = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight
            self.third.weight = nn.Parameter(self.first.weight.detach().clone())
            self.fourth = nn.Linear(4, 4, bias=False)
            self.fourth.weight = nn.Parameter(self.first.weight)  # another object, the same storage

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fourth(self.third(self.second(self.first(x))))

    for how in ("dynamo", "export"):
        captured = capture(Tied(), (torch.zeros(1, 4),), {}, how)  # type: ignore[arg-type]
        assert captured.aliases == (("first.weight", "second.weight", "fourth.weight"),)
        assert parameters(captured) == {"first.weight", "third.weight"}
        sources = captured.subgraphs[0].inputs
        weights = [
            sources[node.args[1].name].name
            for node in captured.subgraphs[0].graph.graph.nodes
            if node.target is torch.ops.aten.linear.default
        ]
        assert weights == ["first.weight", "first.weight", "third.weight", "first.weight"]


def test_a_module_called_twice_keeps_its_path() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.inner(x))

    for how in ("dynamo", "export"):
        seen = operators(capture(Twice(), (torch.zeros(1, 4),), {}, how))  # type: ignore[arg-type]
        assert seen == Counter({("aten.linear.default", "inner.0"): 2})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_graph_breaks_give_pieces_of_every_layer_with_true_names(device: str) -> None:
    torch.manual_seed(0)
    module, x = Broken().to(device), torch.randn(1, 3, 8).to(device)
    captured = capture(module, (x,), {}, "dynamo")
    assert captured.how == "dynamo-pieces"
    assert len(captured.subgraphs) >= 4
    seen = operators(captured)
    for layer in ("layers.0", "layers.1"):
        assert seen["aten.layer_norm.default", f"{layer}.norm"] == 1
        assert seen["aten.linear.default", f"{layer}.proj"] == 1
        assert seen["aten.relu.default", layer] == 1
    first, second = captured.subgraphs[:2]
    assert [source for source in first.inputs.values() if source.kind not in ("parameter",)] == [
        GraphInput("input", "input 0")
    ]
    assert [source.kind for source in second.inputs.values()].count("graph break") == 1
    assert parameters(captured) >= {"layers.0.norm.weight", "layers.0.proj.weight", "layers.1.proj.weight"}
    if device == "cpu":
        assert check_against_eager(module, (x,), {}, captured) == 0.0


def test_a_parameter_that_code_between_the_pieces_uses_is_not_trusted() -> None:
    captured = capture(Broken(), (torch.zeros(1, 3, 8),), {}, "dynamo")
    sources = {source.name: source.kind for subgraph in captured.subgraphs for source in subgraph.inputs.values()}
    assert sources["layers.0.norm.weight"] == "parameter"
    assert sources["layers.1.norm.weight"] == "graph break"


def test_a_data_dependent_branch_gives_the_pieces_of_the_way_taken() -> None:
    module, x = Branching(), torch.ones(1, 4)
    with torch.no_grad():
        module.proj.bias.fill_(5.0)
    captured = capture(module, (x,), {})
    assert captured.how == "dynamo-pieces"
    assert check_against_eager(module, (x,), {}, captured) == 0.0
    with pytest.raises(AutoQuantError, match=r"^cannot capture Branching: .*dynamo-pieces: [^\n]*meta[^\n]*$"):
        capture(Branching().to("meta"), (x.to("meta"),), {})


def test_code_that_goes_on_where_it_was_not_captured_is_an_error() -> None:
    module, x = Broken(), torch.randn(1, 3, 8)
    captured = capture(module, (x,), {}, "dynamo")
    fewer = replace(captured, subgraphs=captured.subgraphs[:2])
    with pytest.raises(AutoQuantError, match=r"Broken: run again, its code goes .* after the 2 subgraphs"):
        check_against_eager(module, (x,), {}, fewer)


def test_failure_names_the_line_of_the_model() -> None:
    with pytest.raises(
        AutoQuantError,
        match=r"^cannot capture Branching: its code takes [^\n]*: export: [^\n]*test_routes\.py:\d+ in forward",
    ):
        capture(Branching(), (torch.ones(1, 4),), {}, "export")
    with pytest.raises(AutoQuantError, match="expected one of auto, dynamo, export, got 'jit'"):
        capture(Branching(), (torch.ones(1, 4),), {}, "jit")  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["dynamo", "export"])
def test_in_place_operators_and_regions_are_made_plain(how: str) -> None:
    module, x = Stateful(), torch.randn(2, 4)
    captured = capture(module, (x,), {}, how)  # type: ignore[arg-type]
    assert captured.how == how
    assert captured.subgraphs[0].mutated == 1  # the buffer
    assert not [target for target, _ in operators(captured) if "wrap_with" in target or "mul_" in target]
    assert check_against_eager(module, (x,), {}, captured) < 1e-7


@pytest.mark.parametrize("how", ["dynamo", "export"])
@pytest.mark.parametrize(
    ("module", "mutated"),
    [(Rescaling(), 0), (Rescaling(read_before=True), 1), (Rescaling(by=0), 1)],
    ids=["for products alone", "read before", "to nothing"],
)
def test_a_weight_that_becomes_a_multiple_of_itself_is_no_result(how: str, module: nn.Module, mutated: int) -> None:
    x = torch.randn(2, 4)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    captured = capture(module, (x,), {}, how)  # type: ignore[arg-type]
    assert captured.subgraphs[0].mutated == mutated
    expected = nn.functional.linear(x, before["proj.weight"], before["proj.bias"])
    if mutated == 0:
        weight = before["out.weight"] / 2
        values = {"x": x, **{f"p_{name.replace('.', '_')}": value for name, value in before.items()}}
        (result,) = captured.subgraphs[0].graph(*(values[name] for name in captured.subgraphs[0].inputs))
        assert torch.equal(result, nn.functional.linear(expected, weight, before["out.bias"]))


@pytest.mark.parametrize("how", ["dynamo", "export", "auto"])
@pytest.mark.parametrize("make", [Stateful, Broken], ids=["stateful", "broken"])
def test_nothing_is_left_behind(how: str, make: type[nn.Module]) -> None:
    module, x = make().train(), torch.randn(1, 3, 4 if make is Stateful else 8)
    next(module.children()).eval()
    before = {name: dict(part.__dict__) for name, part in module.named_modules()}
    tables = {
        (name, key): dict(value)
        for name, part in module.named_modules()
        for key, value in part.__dict__.items()
        if isinstance(value, dict)
    }
    values = {name: value.clone() for name, value in module.state_dict().items()}
    filters, threshold, seed = list(warnings.filters), logging.root.manager.disable, torch.get_rng_state()
    with torch.enable_grad():
        captured = capture(module, (x,), {}, how)  # type: ignore[arg-type]
        check_against_eager(module, (x,), {}, captured)
        assert torch.is_grad_enabled()
    for name, part in module.named_modules():
        assert list(part.__dict__) == list(before[name])
        assert all(part.__dict__[key] is value for key, value in before[name].items())
    for (name, key), table in tables.items():
        now = module.get_submodule(name).__dict__[key]
        assert list(now) == list(table)
        assert all(now[entry] is value for entry, value in table.items())
    assert all(torch.equal(value, values[name]) for name, value in module.state_dict().items())
    assert warnings.filters == filters
    assert logging.root.manager.disable == threshold
    assert torch.equal(torch.get_rng_state(), seed)
    assert torch.get_default_dtype() is torch.float32


def test_shape_of_a_node_and_its_refusal() -> None:
    model = build_meta(find_source(ONE_TYPE, layers=1))
    nodes = list(capture(model.module, model.args, model.kwargs).subgraphs[0].graph.graph.nodes)
    embedding = next(node for node in nodes if node.target is torch.ops.aten.embedding.default)
    assert shape(embedding) == (1, 3, 768)
    split = next(node for node in nodes if node.target is torch.ops.aten.split.Tensor)
    with pytest.raises(
        AutoQuantError, match=r"aten.split.Tensor at transformer.h.0.attn: expected one tensor, got list"
    ):
        shape(split)


class Padded(nn.Module):
    """Looks for padding among its token ids, unless it is told that there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.inner = Inner()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is None and bool((ids == 0).any()):
            mask = (ids != 0).long()
        x = self.table(ids)
        return self.inner(x if mask is None else x * mask[..., None])


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_mask_is_added_where_the_model_would_make_one_by_values(device: str) -> None:
    module, ids = Padded().to(device).eval(), torch.tensor([[1, 2, 3]], device=device)
    with pytest.raises(AutoQuantError, match="data-dependent"):
        capture(module, (), {"ids": ids}, "export")
    captured = capture(module, (), {"ids": ids}, "export", spare={"mask": torch.ones_like(ids)})
    assert (captured.how, captured.untraceable, list(captured.spare)) == ("export", (), ["mask"])
    assert {s.name for s in captured.subgraphs[0].inputs.values() if s.kind == "input"} == {"ids", "mask"}
    if device == "cpu":
        assert check_against_eager(module, (), {"ids": ids}, captured) == 0.0


def test_a_mask_that_is_not_needed_is_not_added() -> None:
    module, ids = Padded().eval(), torch.tensor([[1, 2, 3]])
    given = {"ids": ids, "mask": torch.ones_like(ids)}
    assert capture(module, (), given, "export", spare={"other": ids}).spare == {}
    with pytest.raises(AutoQuantError, match=r"unexpected keyword|data-dependent"):  # one that it does not take
        capture(module, (), {"ids": ids}, "export", spare={"other": ids})


class Router(nn.Module):
    """Picks tokens by their values, so that it stays whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = x.sum(-1) > 0
        return x.masked_fill(~chosen[..., None], 0.0) if bool(chosen.any()) else x


class LacksMask(nn.Module):
    """Makes the mask that it needs only where it is not traced, and routes."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = Router(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is None and not torch.compiler.is_compiling():
            mask = torch.ones(x.shape[:2])
        return self.head(self.router(x)) * mask[:, :, None]  # type: ignore[index]  # the mistake


def test_a_module_is_left_untraced_with_the_mask_too() -> None:
    module, x = LacksMask().eval(), torch.randn(1, 3, 4)
    with pytest.raises(AutoQuantError, match="NoneType"):
        capture(module, (), {"x": x}, "export")
    captured = capture(module, (), {"x": x}, "export", spare={"mask": torch.ones(1, 3)})
    assert ([call.path for call in captured.untraceable], list(captured.spare)) == (["router"], ["mask"])


def test_a_graph_that_cannot_be_run_is_an_error_of_one_line() -> None:
    """A graph for two sequences is no graph for three."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(12, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.reshape(x.shape[0], -1))

    module, x = Flat(), torch.randn(2, 3, 4)
    captured = capture(module, (x,), {}, "export")
    with pytest.raises(AutoQuantError, match=r"captured graph of Flat: it cannot be run, .*cannot be multiplied"):
        check_against_eager(module, (torch.randn(3, 3, 4),), {}, captured)


class Mapped(nn.Module):
    """Two linears under a vmap over the sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.vmap(lambda row: self.down(self.up(row).relu()))(x)


def test_what_is_mapped_over_becomes_operators_of_a_batch() -> None:
    module, x = Mapped().eval(), torch.randn(2, 3, 4)
    captured = capture(module, (x,), {})
    (subgraph,) = captured.subgraphs
    names = {str(node.target) for node in subgraph.graph.graph.nodes if node.op == "call_function"}
    assert {name.partition(".")[0] for name in names} == {"aten"}
    assert check_against_eager(module, (x,), {}, captured) < 1e-6


class Long(nn.Module):
    """Takes other frequencies for long sequences, as the largest position says."""

    def __init__(self, position: bool) -> None:
        super().__init__()
        self.table, self.position = nn.Embedding(8, 4), position

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        positions = torch.arange(ids.shape[1], device=ids.device) if self.position else ids[0]
        speed = 0.1 if torch.max(positions) + 1 > 64 else 1.0
        return x * (positions[:, None] * speed).cos()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_code_that_decides_by_the_largest_position_is_followed(device: str) -> None:
    module, ids = Long(position=True).to(device).eval(), torch.tensor([[1, 2, 3]], device=device)
    captured = capture(module, (ids,), {})
    assert (captured.how, captured.by_position, captured.untraceable) == ("export", True, ())
    if device == "cpu":
        assert check_against_eager(module, (ids,), {}, captured) == 0.0


def test_code_that_decides_by_token_ids_is_not() -> None:
    module = Long(position=False).to("meta").eval()
    with pytest.raises(AutoQuantError, match="by the values of activations"):
        capture(module, (torch.tensor([[1, 2, 3]], device="meta"),), {}, "export")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_module_of_torchscript_is_named() -> None:
    inner: nn.Module = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))  # type: ignore[no-untyped-call]  # torch has no types for it
    with pytest.raises(AutoQuantError, match=r"cannot capture Sequential: 1 is compiled by TorchScript"):
        capture(nn.Sequential(nn.Linear(4, 4), inner), (torch.ones(1, 4),), {})

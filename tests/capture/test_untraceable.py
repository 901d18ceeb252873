"""Modules that cannot be traced: one operator each, which blocks what it touches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autoquant.analyzer.analysis import NOT_TRACED, analyse
from autoquant.analyzer.analyze import analyze
from autoquant.capture.routes import Captured, capture, check_against_eager
from autoquant.capture.untraceable import UNTRACED
from autoquant.certificate.certify import certify
from autoquant.errors import AutoQuantError
from autoquant.models.source import ModelSource

HIDDEN, HEADS = 8, 2


class Experts(nn.Module):
    """Runs the experts that were hit, one after the other: which ones, only values say."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, HIDDEN, HIDDEN))
        self.down = nn.Parameter(torch.randn(4, HIDDEN, HIDDEN))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for expert in range(4):
            if (chosen == expert).double().mean() == 0:
                continue
            tokens = torch.where(chosen == expert)[0]
            result.index_add_(0, tokens, torch.relu(x[tokens] @ self.up[expert].T) @ self.down[expert].T)
        return result


class Layer(nn.Module):
    """Attention without positions, then the experts."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.router = nn.Linear(HIDDEN, 4)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (part(y).view(len(x), HEADS, -1).transpose(0, 1)[None] for part in (self.q, self.k, self.v))
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(heads[0].transpose(0, 1).reshape(len(x), HIDDEN))
        y = self.norm2(x)
        return x + self.experts(y, self.router(y).argmax(-1))


class Mixture(nn.Module):
    """Two such layers between a table and a head."""

    def __init__(self, make: Callable[[], nn.Module] = Experts) -> None:
        super().__init__()
        self.table = nn.Embedding(16, HIDDEN)
        self.layers = nn.ModuleList([Layer(make()) for _ in range(2)])
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


IDS = torch.tensor([3, 1, 4, 1, 5])


def captured(module: nn.Module, device: str = "meta") -> Captured:
    return capture(module.to(device), (IDS.to(device),), {})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_loop_over_values_is_one_operator_and_the_rest_is_captured(device: str) -> None:
    torch.manual_seed(0)
    module = Mixture()
    found = captured(module, device)
    assert found.how == "export"
    assert [call.path for call in found.untraceable] == ["layers.0.experts", "layers.1.experts"]
    assert [call.outputs for call in found.untraceable] == [(((5, HIDDEN), torch.float32),)] * 2
    assert "forward" not in vars(module.layers[0].experts)
    if device == "cpu":
        assert check_against_eager(module, (IDS,), {}, found) == 0.0


def test_it_blocks_what_reaches_it_and_nothing_else() -> None:
    analysed = analyse(captured(Mixture()))
    findings = analysed.findings
    groups = {(group.kind.value, group.sources[0].path): group for group in findings.groups}
    targets = {key: [slot.path for slot in group.targets] for key, group in groups.items()}
    for layer in ("layers.0", "layers.1"):
        assert targets["norm_linear", f"{layer}.norm1.weight"] == [f"{layer}.{name}.weight" for name in "qkv"]
        assert targets["linear_linear", f"{layer}.v.weight"] == [f"{layer}.o.weight"]
        assert ("norm_linear", f"{layer}.norm2.weight") not in groups
    assert targets["norm_linear", "norm.weight"] == ["head.weight"]
    assert {space.kind for space in findings.spaces} == {"R2"}
    named = {slot.path for group in findings.groups for slot in (*group.sources, *group.targets)}
    assert not [path for path in named if "experts" in path]
    reasons = {(b.path, b.what): b for b in findings.blocked}
    for what in ("smoothing", "rotation"):
        blocked = reasons["layers.0.experts", what]
        assert blocked.reason.startswith(NOT_TRACED)
        assert "test_untraceable.py" in blocked.reason  # the line that cannot be traced
    assert reasons["table", "rotation"].operator == "autoquant.opaque"
    assert ("layers.0.router", "smoothing") in reasons
    assert UNTRACED in {reason.text for reason in analysed.scales.analysis.variables.reasons.values()}


def test_what_is_left_is_proved() -> None:
    source = ModelSource("mixture", factory=lambda: (Mixture(), (IDS,)))
    proved = certify(analyze(source), source)
    assert proved.certificate is not None
    assert {row.kind for row in proved.certificate.rows} >= {"norm_linear", "linear_linear", "R2", "all"}
    assert all(row.worst < 1e-12 for row in proved.certificate.rows)


def test_its_parameters_have_no_labels_however_many_they_are() -> None:
    """Only a use elsewhere counts: a thousand experts' matrices would be thousands of millions of variables."""
    analysis = analyse(captured(Mixture())).scales.analysis
    assert analysis.axes.contested() == {}
    assert [family.param for family in analysis.axes.all() if ".experts." in family.param] == []
    assert analysis.variables.count < 2000

    class Wide(Experts):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Parameter(torch.empty(1 << 20, HIDDEN, device="meta"))

    assert analyse(captured(Mixture(Wide))).scales.analysis.variables.count == analysis.variables.count


def test_a_parameter_that_it_has_in_common_with_a_linear_keeps_its_scale() -> None:
    module = Mixture()
    module.layers[0].experts.also = module.layers[0].v
    analysis = analyse(captured(module)).scales.analysis
    both = "the parameter is used in different ways: as a tensor"
    assert {name: reason.text for name, reason in analysis.axes.contested().items()} == {
        "layers.0.v.weight": f"{both} that keeps its scale and as a weight",
        "layers.0.v.bias": f"{both} and as a tensor that keeps its scale",
    }


def test_a_parameter_that_it_shares_is_claimed_by_nothing() -> None:
    class Borrowing(Experts):
        def __init__(self) -> None:
            super().__init__()
            self.also = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
            return self.also(super().forward(x, chosen))

    module = Mixture(Borrowing)
    own = {slot.path for group in analyse(captured(module)).findings.groups for slot in group.sources}
    assert "layers.0.v.weight" in own
    shared = Mixture(Borrowing)
    shared.layers[0].v = shared.layers[0].experts.also
    found = analyse(captured(shared)).findings
    assert "layers.0.v.weight" not in {slot.path for group in found.groups for slot in group.sources}
    assert "layers.1.v.weight" in {slot.path for group in found.groups for slot in group.sources}


class Writing(Experts):
    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        result = super().forward(x, chosen)
        x.mul_(2)
        return result


class Keeping(Experts):
    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        self.last = super().forward(x, chosen)
        return self.last


class Reaching(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.elsewhere = [nn.Parameter(torch.randn(HIDDEN))]  # not registered

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return super().forward(x, chosen) * self.elsewhere[0].to(x.device)


def test_a_module_that_writes_to_what_it_is_given_is_left_out_with_what_calls_it() -> None:
    torch.manual_seed(0)
    module = Mixture(Writing)
    found = captured(module, "cpu")
    assert [call.path for call in found.untraceable] == ["layers.0", "layers.1"]
    assert "writes to a tensor that it is given" in found.untraceable[0].reason
    assert check_against_eager(module, (IDS,), {}, found) == 0.0
    assert [group.name for group in analyse(found).findings.groups] == ["norm -> head"]


@pytest.mark.parametrize(
    ("make", "reason"),
    [(Keeping, "keeps a tensor"), (Reaching, "uses a tensor that is not its own")],
)
def test_a_module_that_does_more_than_return_is_not_replaced(make: type[nn.Module], reason: str) -> None:
    with pytest.raises(AutoQuantError, match=reason):
        capture(Mixture(make).to("meta"), (IDS.to("meta"),), {}, "export")


class Cut(nn.Module):
    """As many rows as its input has numbers above 0."""

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return x[: int((chosen >= 0).sum().item())]


class Counted(nn.Module):
    def forward(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, int]:
        return x, int((chosen >= 0).sum().item())


class Whole(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.linear, self.part = nn.Linear(4, 4), part

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        result = self.part(y, y.argmax(-1))
        return result[0] * result[1] if isinstance(result, tuple) else result


def test_shapes_are_those_of_a_run_where_there_are_values() -> None:
    x = torch.randn(5, 4)
    module = Whole(Cut())
    found = capture(module, (x,), {}, "export")
    assert found.untraceable[0].outputs == (((5, 4), torch.float32),)
    assert check_against_eager(module, (x,), {}, found) == 0.0
    found = capture(module.to("meta"), (x.to("meta"),), {}, "export")
    assert found.untraceable[0].outputs == (((0, 4), torch.float32),)


def test_shapes_and_numbers_that_were_not_foreseen_are_noticed() -> None:
    x = torch.randn(5, 4)
    module = Whole(Cut())
    found = capture(module, (x,), {}, "export")
    found.untraceable[0].outputs = (((3, 4), torch.float32),)
    with pytest.raises(AutoQuantError, match=r"part cannot be traced, .*shapes \[\(5, 4\)\], where \[\(3, 4\)\]"):
        check_against_eager(module, (x,), {}, found)
    module = Whole(Counted())
    found = capture(module, (x,), {}, "export")
    with pytest.raises(AutoQuantError, match=r"\(None, 5\), where \(None, 0\) was"):
        check_against_eager(module, (x,), {}, found)


def test_zeros_stand_in_where_no_values_contradict_each_other() -> None:
    class Packed(nn.Module):
        def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
            both = torch.cat([x > 0, x <= 0])
            packed = torch.cat([x, x])[both].reshape(x.shape)  # exactly half of them
            return packed + 1 if packed.sum() > 0 else packed

    module = Whole(Packed()).to("meta")
    found = capture(module, (torch.randn(5, 4, device="meta"),), {}, "export")
    assert [call.outputs for call in found.untraceable] == [(((5, 4), torch.float32),)]


class Halves(nn.Module):
    """Goes on for as long as the data say."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.router(x).sigmoid()
        while y.mean() > 1e-3:
            y = y / 2
        return x + y[:, :1]


class Looking(nn.Module):
    """Has such a loop, and looks at its token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(8, 4), Halves()

    def forward(self, x: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        assert ids is not None
        return self.inner(x + self.table(ids)[0] if bool((ids == 7).any()) else x)


def test_known_inputs_are_constants_whichever_way_is_taken() -> None:
    module, inputs = Looking().eval(), {"x": torch.randn(3, 4), "ids": torch.tensor([[1, 7, 2]])}
    captured = capture(module, (), inputs, known=["ids"])
    assert (captured.how, captured.known, captured.by_position) == ("export", ("ids",), False)
    assert [call.path for call in captured.untraceable] == ["inner"]
    assert [source.name for source in captured.subgraphs[0].inputs.values() if source.kind == "input"] == ["x"]
    assert check_against_eager(module, (), inputs, captured) < 1e-6

"""Config x model: everything that does not fit is found at once, before anything is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from handmade import LLAMA, build, cols, llama_like, make_config, rows
from handmade_more import MIXTRAL, mixtral_config
from torch import nn

from autoquant.config.format import (
    Config,
    IndexMap,
    Linear,
    Norm,
    Online,
    Read,
    Reader,
    Slot,
    SmoothingGroup,
    SmoothingKind,
    SmoothingOverride,
    Space,
    Writer,
    edited,
)
from autoquant.config.slots import channels_of
from autoquant.errors import AutoQuantError
from autoquant.executor.resolve import resolve
from autoquant.executor.resolved import Resolved
from autoquant.models.structure import structure_of


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3, bias=False)


def fc(model: nn.Module, sources: list[Slot], targets: list[Slot], channels: int = 6) -> Config:
    group = SmoothingGroup(
        name="pair",
        kind=SmoothingKind.LINEAR_LINEAR,
        channels=channels,
        sources=tuple(sources),
        targets=tuple(targets),
    )
    return make_config(model, [group])


FIRST = [rows("first.weight", 6), rows("first.bias", 6)]
SECOND = [cols("second.weight", 6)]


def problems(model: nn.Module, config: Config, **options: Any) -> tuple[str, ...]:
    with pytest.raises(AutoQuantError) as caught:
        resolve(config, structure_of(model), **options)
    message = caught.value.message
    assert message.startswith("the config does not fit the model: ") and message.endswith("; nothing was changed")
    first = message.removeprefix("the config does not fit the model: ").removesuffix("; nothing was changed")
    assert not caught.value.details or first.startswith(caught.value.details[0] + " (and ")
    return caught.value.details or (first,)


def test_a_fitting_config_resolves_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = TwoLinears()
    resolved = resolve(fc(model, FIRST, SECOND), structure_of(model))
    (group,) = resolved.groups
    assert [s.name for s in group.sources] == ["first.weight", "first.bias"]
    assert group.alpha == 0.5 and group.layer is None


def slot(path: str, size: int, dim: int = 0, **more: Any) -> Slot:
    return Slot(path=path, dim=dim, size=size, **more)


def strided(start: int, count: int, channel: int = 0, stride: int = 1) -> IndexMap:
    return IndexMap(start=start, shape=(count,), stride=(stride,), channel_start=channel, channel_stride=(1,))


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (slot("frist.weight", 6), ".path: the model has no parameter 'frist.weight'; did you mean 'first.weight'?"),
        (
            slot("first.weight", 7),
            ": 'first.weight' is [6, 4] in the model; the config says 7 positions (size) along dimension 0",
        ),
        (
            slot("first.weight", 6, dim=2),
            ": 'first.weight' is [6, 4] in the model; it has no dimension 2 (dim)",
        ),
        (
            slot("first.weight", 16, dim=1, stack=4),
            ": 'first.weight' is [6, 4] in the model; the config says 4 matrices stacked along dimension 0 (stack)",
        ),
        (
            slot("first.weight", 6, index=(strided(2, 6),)),
            ".index[0]: position 7 is out of range; expected 0 to 5",
        ),
        (
            slot("first.weight", 6, index=(strided(0, 3), strided(2, 3))),
            ".index: position 2 occurs more than once",
        ),
        (
            slot("first.weight", 6, index=(strided(0, 3, channel=5),)),
            ".index[0]: channel 7 is out of range; expected 0 to 5",
        ),
        (slot("first.weight", 6, index=()), ".index: expected at least one block, or null for the whole axis"),
        (
            slot("first.weight", 6, index=(IndexMap(shape=(3,), stride=(1, 1), channel_stride=(1,)),)),
            ".index[0]: shape, stride and channel_stride differ in length: 1, 2 and 1",
        ),
    ],
)
def test_a_wrong_slot_is_said(wrong: Slot, expected: str) -> None:
    model = TwoLinears()
    assert problems(model, fc(model, [wrong], SECOND)) == ("$.claims.groups[0].sources[0]" + expected,)


def test_all_problems_come_at_once() -> None:
    model = TwoLinears()
    config = fc(model, [slot("first.wieght", 6), slot("first.bias", 5)], [slot("secnd.weight", 6, dim=1)])
    assert len(problems(model, config)) == 3


def test_many_problems_are_cut() -> None:
    model = TwoLinears()
    found = problems(model, fc(model, [slot(f"x{i}", 6) for i in range(30)], SECOND))
    assert len(found) == 21 and found[-1] == "... and 10 more"


def test_another_model_is_refused() -> None:
    model = TwoLinears()
    config = fc(model, FIRST, SECOND)
    model.third = nn.Linear(2, 2)
    fingerprint, parameters = problems(model, config)
    assert fingerprint.startswith("$.provenance.fingerprint: the model's is sha256:")
    assert parameters == "$.model.parameters: the model has 54 parameters, not 48"


def test_narrow_floats_are_refused() -> None:
    model = TwoLinears()
    config = fc(model, FIRST, SECOND)
    model.second.weight = nn.Parameter(model.second.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    (found,) = problems(model, config)
    at = "$.claims.groups[0].targets[0].path"
    assert found.startswith(f"{at}: second.weight is torch.float8_e4m3fn; only float16")


def test_unknown_names_in_only() -> None:
    model = TwoLinears()
    with pytest.raises(AutoQuantError, match=r"the config has no group or space 'pear'; did you mean 'pair'\?"):
        resolve(fc(model, FIRST, SECOND), structure_of(model), only=["pear"])


@pytest.mark.parametrize("options", [{"smooth": "none"}, {"only": []}])
def test_doing_nothing_is_an_error(options: dict[str, Any]) -> None:
    model = TwoLinears()
    with pytest.raises(AutoQuantError, match="nothing to do"):
        resolve(fc(model, FIRST, SECOND), structure_of(model), **options)


def space(**changes: Any) -> Space:
    made = Space(
        name="middle",
        kind="other",
        size=6,
        writers=(Writer(path="first.weight", size=6), Writer(path="first.bias", size=6)),
        reads=(Read(readers=(Reader(path="second.weight", dim=1, size=6),)),),
    )
    return edited(made, **changes)


def test_a_position_in_two_spaces_is_refused() -> None:
    model = TwoLinears()
    config = make_config(model, (), (space(), space(name="again")))
    assert problems(model, config)[0] == (
        "$.claims.spaces[1].writers[0]: the same positions of dimension 0 of first.weight are already in "
        "$.claims.spaces[0].writers[0]"
    )


def test_a_position_twice_in_a_group_is_refused() -> None:
    model = TwoLinears()
    columns = slot("second.weight", 6, dim=1)
    expected = "$.claims.groups[0].{}: the group names positions of dimension {} of {} twice"
    found = problems(model, fc(model, FIRST, [columns, columns]))
    assert found == (expected.format("targets[1]", 1, "second.weight"),)
    turned = slot("first.bias", 6, index=(strided(5, 6, stride=-1),))
    found = problems(model, fc(model, [*FIRST, turned], SECOND))
    assert found == (expected.format("sources[2]", 0, "first.bias"),)
    found = problems(model, fc(model, FIRST, [*SECOND, FIRST[0]]))
    assert found == (expected.format("targets[1]", 0, "first.weight"),)


def test_a_group_may_name_a_parameter_in_parts() -> None:
    """Each part carries every channel, as a file's slots have to: two heads that read the same six."""
    model = TwoLinears()
    model.second = nn.Linear(12, 3, bias=False)
    parts = [slot("second.weight", 12, dim=1, index=(strided(start, 6),)) for start in (0, 6)]
    (group,) = resolve(fc(model, FIRST, parts), structure_of(model)).groups
    assert [s.name for s in group.targets] == ["second.weight", "second.weight"]


def test_one_expert_and_all_of_them_is_twice() -> None:
    model = nn.ParameterDict({"up": nn.Parameter(torch.ones(2, 3, 4)), "down": nn.Parameter(torch.ones(2, 4, 3))})
    every = slot("down", 4, dim=1)
    last = slot("down", 8, dim=1, stack=2, index=(strided(4, 4),))
    first = slot("down", 8, dim=1, stack=2, index=(strided(0, 4),))
    source = [slot("up", 4, dim=2)]
    found = problems(model, fc(model, source, [every, last], channels=4))
    assert found == ("$.claims.groups[0].targets[1]: the group names positions of dimension 1 of down twice",)
    assert len(resolve(fc(model, source, [first, last], channels=4), structure_of(model)).groups[0].targets) == 2


def test_a_part_of_a_block_is_refused() -> None:
    model = TwoLinears()
    reads = (Read(readers=(Reader(path="second.weight", dim=1, size=6, index=(strided(0, 5),)),)),)
    found = problems(model, make_config(model, (), (space(reads=reads),)))
    assert found == ("$.claims.spaces[0].reads[0].readers[0].index: channel 5 of 6 is on no position",)


def test_centring_without_a_layer_norm_is_refused() -> None:
    model = TwoLinears()
    (found,) = problems(model, make_config(model, (), (space(centre=True),)))
    assert found == (
        "$.claims.spaces[0].reads[0]: reads a centred space without a LayerNorm, and centring would change it (centre)"
    )


def test_a_bias_of_another_shape_is_refused() -> None:
    model = TwoLinears()
    reads = (Read(readers=(Reader(path="second.weight", dim=1, size=6, bias="first.bias"),)),)
    (found,) = problems(model, make_config(model, (), (space(reads=reads),)))
    at = "$.claims.spaces[0].reads[0].readers[0].bias"
    assert found == f"{at}: 'first.bias' is [6] in the model; the linear's is [3]"


def test_a_norm_in_two_reads_is_refused() -> None:
    model = build("llama", **LLAMA)
    config = llama_like(model)
    residual = config.rotation.spaces[0]
    first = residual.reads[0]
    split = tuple(Read(norm=first.norm, readers=(r,)) for r in first.readers)
    changed = edited(residual, reads=split + residual.reads[1:])
    config = edited(config, rotation=edited(config.rotation, spaces=(changed,)))
    found = problems(model, config, smooth="none")
    assert (
        "input_layernorm.weight is in $.claims.spaces[0].reads[0].norm too; all its readers belong in one" in found[0]
    )


def test_a_norm_of_another_size_is_refused() -> None:
    model = TwoLinears()
    model.norm = nn.LayerNorm(5)
    reads = (Read(norm=Norm(kind="layer", weight="norm.weight"), readers=space().reads[0].readers),)
    (found,) = problems(model, make_config(model, (), (space(reads=reads),)))
    at = "$.claims.spaces[0].reads[0].norm.weight"
    assert found == f"{at}: 'norm.weight' is [5] in the model; the config says 6 elements"


def test_layers_missing_for_a_template_are_said() -> None:
    model = TwoLinears()
    writers = (Writer(path="layers.{layer}.weight", size=6),)
    found = problems(model, make_config(model, (), (space(writers=writers),)))
    assert found == (
        "$.claims.spaces[0].writers[0].path: 'layers.{layer}.weight' holds {layer}, and no layers are given",
    )


# What is selected.


def resolved_llama(update: dict[str, Any] | None = None, **options: Any) -> Resolved:
    model = build("llama", **LLAMA)
    config = llama_like(model)
    if update:
        groups = tuple(edited(g, **update) if g.name == "v_o" else g for g in config.smoothing.groups)
        config = edited(config, smoothing=edited(config.smoothing, groups=groups))
    return resolve(config, structure_of(model), **options)


def names(resolved: Resolved) -> list[tuple[str, int | None]]:
    return [(g.name, g.layer) for g in resolved.groups]


def test_norms_that_a_rotation_folded_are_not_smoothed() -> None:
    assert names(resolved_llama()) == [("v_o", 0), ("v_o", 1), ("up_down", 0), ("up_down", 1)]
    assert len(names(resolved_llama(rotate=False))) == 8
    assert len(names(resolved_llama(rotate=False, smooth="fc_fc"))) == 4
    assert names(resolved_llama(smooth="none")) == []


def test_query_key_groups_are_off_unless_enabled() -> None:
    assert ("v_o", 0) not in names(resolved_llama({"kind": SmoothingKind.QUERY_KEY}))
    assert ("v_o", 0) in names(resolved_llama({"kind": SmoothingKind.QUERY_KEY, "enable": True}))


def test_overrides_choose_layers_and_alpha() -> None:
    overrides = (SmoothingOverride(layers="1", enable=False), SmoothingOverride(layers="0", alpha=0.85))
    resolved = resolved_llama({"overrides": overrides, "alpha": 0.3})
    assert [(g.layer, g.alpha) for g in resolved.groups if g.name == "v_o"] == [(0, 0.85)]


def test_one_residual_space_and_heads_per_layer() -> None:
    spaces = resolved_llama().spaces
    assert [(s.name, s.layer) for s in spaces] == [("residual", None), ("heads", 0), ("heads", 1)]
    assert len({seed for s in spaces for seed in s.seeds}) == 1 + 2 * 2
    residual = spaces[0]
    assert len(residual.writers) == 1 + 2 * 2 and len(residual.reads) == 2 * 2 + 1


def test_experts_that_are_alike_need_no_stack() -> None:
    model = build("mixtral", **MIXTRAL)
    resolved = resolve(mixtral_config(model), structure_of(model))
    axis = next(r.axis for read in resolved.spaces[0].reads for r in read.readers if "gate_up" in r.name)
    assert axis.stack is None and axis.dim == 2 and len(axis.channels) == 24


def test_channels_of_a_grouped_query_projection() -> None:
    index = (IndexMap(shape=(2, 2, 3), stride=(6, 3, 1), channel_stride=(3, 0, 1)),)
    found = channels_of(Slot(path="o", dim=1, size=12, index=index))
    assert found.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]


@pytest.mark.parametrize(("sizes", "wrong"), [((4, 6), None), ((6, 6), 0), ((4, 4), 1)])
def test_an_online_rotation_has_the_size_of_its_own_layers_linear(sizes: tuple[int, int], wrong: int | None) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(width, 8)}) for width in (4, 6)])
    path = "layers.{layer}.up"
    up = Linear(path=path, weight=f"{path}.weight", bias=None, in_features=4, out_features=8, in_dim=1, role="linear")
    linears = [edited(up, layers="0"), edited(up, layers="1", in_features=6)]
    online = [Online(kind="input", path=path, layers=str(i), size=size, enable=True) for i, size in enumerate(sizes)]
    config = make_config(model, online=online, linears=linears)
    if wrong is None:
        found = resolve(config, structure_of(model))
        assert [(one.path, one.size) for one in found.online] == [("layers.0.up", 4), ("layers.1.up", 6)]
        return
    said = f"$.rotation.online[{wrong}].size: the linear '{path}' has {(4, 6)[wrong]} columns (in_features)"
    assert problems(model, config) == (said,)

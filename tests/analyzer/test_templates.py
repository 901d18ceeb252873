from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.analyzer.findings import Findings
from autoquant.analyzer.templates import StackMap, canonical, disagreement, fold, unfold
from autoquant.config.format import (
    Blocked,
    Linear,
    Norm,
    Online,
    Read,
    Reader,
    Slot,
    SmoothingGroup,
    SmoothingKind,
    Space,
    Writer,
    edited,
)

STACK = "model.layers"
KINDS = ("dense", "sparse", "recurrent")


def identity(layers: int, path: str = STACK) -> StackMap:
    return StackMap(path, tuple((i,) for i in range(layers)), tuple(range(layers)))


def representatives(kinds: Sequence[str]) -> tuple[StackMap, list[str]]:
    """First and last layer of each kind, as layers.represent keeps them, and their kinds."""
    last = {kind: i for i, kind in enumerate(kinds)}
    kept = sorted({*(kinds.index(kind) for kind in kinds), *last.values()})
    originals = tuple(
        (i,) if last[kinds[i]] == i else tuple(j for j, k in enumerate(kinds) if k == kinds[i] and j != last[k])
        for i in kept
    )
    return StackMap(STACK, originals, tuple(KINDS.index(kinds[i]) for i in kept)), [kinds[i] for i in kept]


def linear(path: str, size: int = 8) -> Linear:
    return Linear(path=path, weight=f"{path}.weight", in_features=size, out_features=size, in_dim=1)


def blocked(path: str, at: str, reason: str = "no rule") -> Blocked:
    return Blocked(path=path, what="smoothing", reason=reason, operator="aten.silu", at=at)


def findings(**parts: tuple[object, ...]) -> Findings:
    empty = {"linears": (), "groups": (), "spaces": (), "online": (), "blocked": (), "unknown_operators": ()}
    return Findings(**{**empty, **parts})  # type: ignore[arg-type]  # the tests pass what the fields hold


def model(kinds: Sequence[str]) -> Findings:
    """What a residual model with one block per kind gives: everything that folding has to deal with."""
    linears, groups, spaces, online, blocks = [], [], [], [], []
    writers = [Writer(path="model.embed.weight", dim=1, size=8)]
    reads = []
    plain_readers = []
    for i, kind in enumerate(kinds):
        at = f"{STACK}.{i}"
        width = 8 + KINDS.index(kind)  # the name is the same for all kinds, the size is not
        up, down = f"{at}.mlp.up", f"{at}.mlp.down"
        linears += [linear(up, width), linear(down, width)]
        groups.append(
            SmoothingGroup(
                name=f"{up} -> down",
                kind=SmoothingKind.LINEAR_LINEAR,
                channels=width,
                sources=(Slot(path=f"{up}.weight", size=width),),
                targets=(Slot(path=f"{down}.weight", dim=1, size=width),),
            )
            if kind != "recurrent"
            else SmoothingGroup(
                name=f"{at}.norm -> up",
                kind=SmoothingKind.NORM_LINEAR,
                channels=8,
                sources=(Slot(path=f"{at}.norm.weight", size=8),),
                targets=(Slot(path=f"{up}.weight", dim=1, size=8),),
            )
        )
        if kind == "sparse":
            spaces.append(
                Space(
                    name=f"{at} values",
                    kind="R2",
                    size=4,
                    blocks=2,
                    writers=(Writer(path=f"{up}.weight", size=width),),
                    reads=(Read(readers=(Reader(path=f"{down}.weight", dim=1, size=width),)),),
                )
            )
            online.append(Online(kind="R4", path=down, size=width))
        else:
            blocks.append(blocked(down, f"{at}.act", f"silu at {at}.act"))
        blocks.append(blocked(up, f"{STACK}.0.norm"))
        blocks.append(blocked(f"{at}.state", "model.final"))
        writers.append(Writer(path=f"{down}.weight", size=8))
        reads.append(
            Read(
                norm=Norm(kind="rms", weight=f"{at}.norm.weight"),
                readers=(Reader(path=f"{up}.weight", dim=1, size=8, bias=f"{up}.bias"),),
            )
        )
        plain_readers += [Reader(path=f"{at}.gate.weight", dim=1, size=8), Reader(path=f"{at}.gate2.weight", size=8)]
    # One norm that all layers read, and a group that spans them: cross-attention in a decoder.
    cross = tuple(Reader(path=f"{STACK}.{i}.cross.{n}.weight", dim=1, size=8) for i in range(len(kinds)) for n in "kv")
    groups.append(
        SmoothingGroup(
            name="encoder.norm -> cross",
            kind=SmoothingKind.NORM_LINEAR,
            channels=8,
            sources=(Slot(path="encoder.norm.weight", size=8),),
            targets=tuple(Slot(path=reader.path, dim=1, size=8) for reader in cross),
        )
    )
    encoder = Read(norm=Norm(kind="layer", weight="encoder.norm.weight"), readers=cross)
    spaces.append(
        Space(
            name="residual",
            kind="R1",
            size=8,
            writers=tuple(writers),
            reads=(*reads, Read(readers=tuple(plain_readers)), encoder),
        )
    )
    linears.append(linear("lm_head"))
    blocks.append(blocked("lm_head", "model.final"))
    return findings(
        linears=tuple(linears),
        groups=tuple(groups),
        spaces=tuple(spaces),
        online=tuple(online),
        blocked=tuple(blocks),
        unknown_operators=("aten.fft",),
    )


def test_layers_are_written_once_with_their_set() -> None:
    folded = fold(findings(linears=tuple(linear(f"{STACK}.{i}.up") for i in range(32))), [identity(32)])
    assert [(x.path, x.weight, x.layers) for x in folded.linears] == [
        ("model.layers.{layer}.up", "model.layers.{layer}.up.weight", "0-31")
    ]


def test_dense_first_experts_are_two_templates() -> None:
    kinds = ["dense"] * 3 + ["sparse"] * 58
    stack, kept = representatives(kinds)
    assert stack.originals == ((0, 1), (2,), tuple(range(3, 60)), (60,))
    folded = fold(model(kept), [stack])
    assert [(x.path, x.in_features, x.layers) for x in folded.linears] == [
        ("model.layers.{layer}.mlp.up", 8, "0-2"),
        ("model.layers.{layer}.mlp.down", 8, "0-2"),
        ("model.layers.{layer}.mlp.up", 9, "3-60"),
        ("model.layers.{layer}.mlp.down", 9, "3-60"),
        ("lm_head", 8, None),
    ]
    assert [(g.name, g.channels, g.layers) for g in folded.groups] == [
        ("model.layers.{layer}.mlp.up -> down @0-2", 8, "0-2"),
        ("model.layers.{layer}.mlp.up -> down @3-60", 9, "3-60"),
        ("encoder.norm -> cross", 8, None),
    ]
    assert folded.groups[2].targets[-1].path == "model.layers.60.cross.v.weight"
    assert len(folded.groups[2].targets) == 122


def test_members_of_the_residual_space_have_their_own_layers() -> None:
    residual = fold(model(["dense", "sparse", "dense"]), [identity(3)]).spaces[-1]
    assert residual.layers is None
    assert [(w.path, w.layers) for w in residual.writers] == [
        ("model.embed.weight", None),
        ("model.layers.{layer}.mlp.down.weight", "0-2"),
    ]
    assert [(r.norm and r.norm.weight, r.readers[0].path, r.layers) for r in residual.reads][:2] == [
        ("model.layers.{layer}.norm.weight", "model.layers.{layer}.mlp.up.weight", "0-2"),
        (None, "model.layers.{layer}.gate.weight", "0-2"),
    ]
    # A norm outside the layers is folded into all its readers at once: they stay in one concrete read.
    assert residual.reads[2].layers is None
    assert len(residual.reads[2].readers) == 6


def test_one_layer_model_looks_like_a_deep_one() -> None:
    one, many = fold(model(["dense"]), [identity(1)]), fold(model(["dense"] * 5), [identity(5)])
    assert [w.path for w in one.spaces[-1].writers] == [w.path for w in many.spaces[-1].writers]
    assert [w.layers for w in one.spaces[-1].writers] == [None, "0"]
    assert [b.path for b in one.blocked] == [b.path for b in many.blocked]


def test_only_the_index_of_the_stack_becomes_a_template() -> None:
    path = f"{STACK}.3.experts.3.up"
    folded = fold(findings(linears=(linear(path), linear("other.model.layers.3.up"))), [identity(4)])
    assert [x.path for x in folded.linears] == ["model.layers.{layer}.experts.3.up", "other.model.layers.3.up"]


def test_stacks_side_by_side_share_the_index() -> None:
    group = {"kind": SmoothingKind.LINEAR_LINEAR, "channels": 8}
    groups = tuple(
        SmoothingGroup(
            name=f"attentions.{i}.v -> up",
            sources=(Slot(path=f"attentions.{i}.v.weight", size=8),),
            targets=(Slot(path=f"ffns.{i}.up.weight", dim=1, size=8),),
            **group,
        )
        for i in range(3)
    )
    folded = fold(findings(groups=groups), [identity(3, "attentions"), identity(3, "ffns")])
    assert [(g.name, g.targets[0].path, g.layers) for g in folded.groups] == [
        ("attentions.{layer}.v -> up", "ffns.{layer}.up.weight", "0-2")
    ]


def test_words_about_one_place_stay_concrete() -> None:
    elsewhere = tuple(blocked(f"{STACK}.{i}.q", f"{STACK}.0.norm") for i in range(4))
    own = tuple(blocked(f"{STACK}.{i}.o", f"{STACK}.{i}.act", f"silu in {STACK}.{i}.act.") for i in range(4))
    folded = fold(findings(blocked=elsewhere + own), [identity(4)])
    assert [(b.path, b.at, b.layers) for b in folded.blocked] == [
        ("model.layers.{layer}.q", "model.layers.0.norm", "0-3"),
        ("model.layers.{layer}.o", "model.layers.{layer}.act", "0-3"),
    ]
    assert folded.blocked[1].reason == "silu in model.layers.{layer}.act."


def test_traced_numbers_become_original_ones() -> None:
    stack = StackMap(STACK, ((0, 1, 2), (3,)), (0, 0))
    items = tuple(blocked(f"{STACK}.{i}.q", f"{STACK}.1.norm") for i in range(2))
    assert [(b.at, b.layers) for b in fold(findings(blocked=items), [stack]).blocked] == [
        ("model.layers.3.norm", "0-3")
    ]


PAIR = StackMap(STACK, ((0, 1, 2), (3,)), (0, 0))


def test_a_finding_of_one_representative_only_is_a_disagreement() -> None:
    found = findings(linears=(linear(f"{STACK}.0.up"), linear(f"{STACK}.1.up"), linear(f"{STACK}.0.first")))
    reason = disagreement(found, [PAIR])
    assert reason == (
        "model.layers.{layer}.first: found in layer 0 of model.layers and not in layer 3, which is of the same kind"
    )
    with pytest.raises(ValueError, match="cannot be written for the layers that were not traced"):
        fold(found, [PAIR])
    assert disagreement(found, [identity(2)]) is None


def test_a_space_between_neighbouring_layers_is_a_disagreement() -> None:
    # Post-norm: what layer 0 writes is read by layer 1 and ends there.
    def segment(name: str, writer: str, reader: str) -> Space:
        writers = (Writer(path=f"{writer}.down.weight", size=8),)
        reads = (Read(readers=(Reader(path=f"{reader}.up.weight", dim=1, size=8),)),)
        return Space(name=name, kind="other", size=8, writers=writers, reads=reads)

    spaces = (
        segment("a", "embed", f"{STACK}.0"),
        segment("b", f"{STACK}.0", f"{STACK}.1"),
        segment("c", f"{STACK}.1", "head"),
    )
    assert "same kind" in (disagreement(findings(spaces=spaces), [PAIR]) or "")
    assert "same kind" in (disagreement(findings(spaces=spaces[1:2]), [PAIR]) or "")


def test_a_path_pair_across_layers_is_a_disagreement() -> None:
    shared = edited(linear(f"{STACK}.1.up"), weight=f"{STACK}.0.up.weight")
    assert disagreement(findings(linears=(shared,)), [PAIR]) == "model.layers.1.up: spans several layers"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=7))
def test_unfolding_gives_the_findings_back(kinds: list[str]) -> None:
    found = model(kinds)
    assert canonical(unfold(fold(found, [identity(len(kinds))]))) == canonical(found)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=12))
def test_representatives_give_the_findings_of_the_whole_model(kinds: list[str]) -> None:
    stack, kept = representatives(kinds)
    whole, pruned = fold(model(kinds), [identity(len(kinds))]), fold(model(kept), [stack])
    assert canonical(unfold(pruned)) == canonical(model(kinds))
    assert canonical(pruned) == canonical(whole)


PATHS = st.one_of(
    st.builds("{}.{}.{}".format, st.just(STACK), st.integers(0, 3), st.sampled_from("ab")),
    st.builds("{}.{}.{}".format, st.just("encoder.block"), st.integers(0, 3), st.sampled_from(["a", "experts.1.a"])),
    st.sampled_from(["head", "model.layers", "model.layers.12.a", "xmodel.layers.1.a"]),
)
SLOTS = st.lists(st.builds(Slot, path=PATHS, size=st.integers(1, 2)), min_size=1, max_size=4, unique=True).map(tuple)
READS = st.builds(
    Read,
    norm=st.none() | st.builds(Norm, kind=st.just("rms"), weight=PATHS),
    readers=st.lists(st.builds(Reader, path=PATHS, size=st.just(1)), min_size=1, max_size=3, unique=True).map(tuple),
)


@settings(max_examples=120, deadline=None)
@given(
    groups=st.lists(
        st.builds(
            SmoothingGroup,
            name=PATHS,
            kind=st.just(SmoothingKind.QUERY_KEY),
            channels=st.just(1),
            sources=SLOTS,
            targets=SLOTS,
        ),
        max_size=6,
    ),
    spaces=st.lists(
        st.builds(
            Space,
            name=PATHS,
            kind=st.just("other"),
            size=st.just(1),
            writers=st.lists(st.builds(Writer, path=PATHS, size=st.just(1)), min_size=1, max_size=4, unique=True).map(
                tuple
            ),
            reads=st.lists(READS, min_size=1, max_size=3, unique=True).map(tuple),
        ),
        max_size=3,
    ),
    blocks=st.lists(st.builds(blocked, PATHS, PATHS, PATHS), max_size=8),
    linears=st.lists(st.builds(linear, PATHS), max_size=6),
)
def test_anything_at_all_comes_back(
    groups: list[SmoothingGroup], spaces: list[Space], blocks: list[Blocked], linears: list[Linear]
) -> None:
    found = findings(groups=tuple(groups), spaces=tuple(spaces), blocked=tuple(blocks), linears=tuple(linears))
    stacks = [identity(13), identity(4, "encoder.block")]
    assert _sets(unfold(fold(found, stacks))) == _sets(found)


def _sets(found: Findings) -> list[set[object]]:
    """Canonical, and each thing once, members of spaces included."""
    found = canonical(found)
    spaces = {(s.name, s.size, frozenset(s.writers), frozenset(s.reads)) for s in found.spaces}
    return [set(found.linears), set(found.groups), set(spaces), set(found.blocked)]


def test_names_of_kinds_come_back_without_their_layers() -> None:
    found = model(["dense", "sparse", "dense"])
    folded = fold(found, [identity(3)])
    assert {g.name for g in folded.groups} >= {f"{STACK}.{{layer}}.mlp.up -> down @0,2"}
    assert {g.name for g in unfold(folded).groups} == {g.name for g in found.groups}

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from autoquant.errors import AutoQuantError

if TYPE_CHECKING:
    from autoquant.analyzer.analyze import Analyzed

TINY = Path(__file__).parents[1] / "report"


def analyzed(name: str) -> Iterator[Analyzed]:
    from autoquant.analyzer.analyze import analyze
    from autoquant.models.repair import find_source

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TINY))
        yield analyze(find_source(name), how="export")


@pytest.fixture(scope="module")
def plain() -> Iterator[Analyzed]:
    yield from analyzed("tiny:plain")


@pytest.fixture(scope="module")
def post() -> Iterator[Analyzed]:
    yield from analyzed("tiny:post")


def text(found: Analyzed, path: str) -> str:
    from autoquant.analyzer.explain import explain
    from autoquant.report.explanation import explanation_text

    return explanation_text(explain(found.analysis, found.stacks, path), path)


GATED = """\
steps.0.fall: a linear from 24 to 16 channels
The same holds in layers 0-2.

Smoothable: yes
  from the source to this linear:
    1. aten.linear  steps.0.rise.weight  product with a weight: each row can take a scale
    2. aten.mul     steps.0              product: the scale of one side passes, the other (silu at steps.0) has scale 1
    3. aten.linear  steps.0.fall.weight  this linear: its columns undo the scale
  - the scale is put on steps.0.rise

Rotatable: no
  from the nearest writer to this linear:
    1. aten.linear  steps.0.rise.weight  writes the vector: the rows of the weight are rotated
    2. aten.mul     steps.0              BLOCKS: its channels are multiplied by different factors
    3. aten.linear  steps.0.fall.weight  this linear
  - blocked by aten.mul at steps.0: its channels are multiplied by different factors
  - its output is rotated with the space 'residual' (R1)
  - an online rotation fits (R4): a Hadamard matrix of size 24, computed while the model runs"""


def test_a_gated_product(plain: Analyzed) -> None:
    assert text(plain, "steps.0.fall") == GATED


def test_the_weight_and_the_template_name_the_same_linear(plain: Analyzed) -> None:
    assert text(plain, "steps.0.fall.weight") == text(plain, "steps.{layer}.fall") == GATED


def test_a_layer_that_another_stands_for(plain: Analyzed) -> None:
    assert text(plain, "steps.1.fall").splitlines()[2] == "steps.1.fall is one of them and was not traced by itself."
    assert text(plain, "steps.2.fall").startswith("steps.2.fall: ")


def test_a_norm_feeds_all_of_its_readers(plain: Analyzed) -> None:
    found = text(plain, "steps.0.gate")
    assert "  - the scale is put on steps.0.before" in found
    assert "  - the same scale is undone in every other reader too: steps.0.rise" in found
    assert "Rotatable: yes, its input is the space 'residual' (R1, 16 channels)" in found


def test_an_activation_between_two_linears(plain: Analyzed) -> None:
    found = text(plain, "head")
    assert "Smoothable: no\n" in found
    lines = [line.split() for line in found.splitlines()]
    assert [line[1] for line in lines if line[:1] in (["1."], ["2."], ["3."])][:3] == [
        "aten.linear",
        "aten.tanh",
        "aten.linear",
    ]
    assert "aten.tanh    the model    BLOCKS:" in found


def test_a_blocked_residual_shows_the_way_to_what_blocks(post: Analyzed) -> None:
    found = text(post, "steps.0.gate")
    assert "Smoothable: yes" in found
    assert "  the same channels on their way to what blocks:" in found
    assert "aten.add        steps.0       BLOCKS: steps.0.after.weight is applied to it before it is added" in found
    assert "an online rotation fits (input): a Hadamard matrix of size 16" in found


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("steps.0.fal", "steps.0.fal: no linear of the model; did you mean 'steps.0.fall'?"),
        ("steps.3.fall", "steps.3.fall: there is no layer 3; the layers of steps are 0 to 2"),
        ("table", "table: no linear of the model"),
    ],
)
def test_an_unknown_path_gets_the_nearest(plain: Analyzed, path: str, message: str) -> None:
    with pytest.raises(AutoQuantError) as error:
        text(plain, path)
    assert error.value.message == message


@pytest.mark.slow
def test_experts_by_data() -> None:
    """The show subgraph: grouped products, expert by expert."""
    (found,) = analyzed("qwen3_moe")
    shown = text(found, "model.layers.0.mlp.experts.down_proj")
    assert "for each of 128 experts" in shown
    assert "grouped product with the experts' weights: each row can take a scale, in every expert its own" in shown
    assert "the other (silu at model.layers.0.mlp.experts.act_fn) has scale 1" in shown
    assert "  - the scale is put on model.layers.0.mlp.experts.gate_up_proj" in shown


FIRST_CAUSE = """\
Rotatable: no, its input is not a vector that weights alone could rotate
  from the source to what blocks, and on to this linear:
    1. aten.linear    steps.1.fall.weight  writes the vector: the rows of the weight are rotated
    2. aten.rms_norm  steps.1.after        divides by the vector's length, which a rotation keeps; its weight is folded into the readers
    3. aten.add       steps.1              BLOCKS: a tensor that is not rotated is added
    4. aten.rms_norm  steps.2.before
    5. aten.linear    steps.2.gate.weight  this linear
  the first cause:
    1. aten.embedding  table.weight  looks up an embedding: the columns of the table are rotated
    2. aten.add        steps.0       BLOCKS: steps.0.after.weight is applied to it before it is added: it cannot be folded into a linear
  - blocked by aten.add at steps.1: a tensor that is not rotated is added
  - the first cause is aten.add at steps.0, which blocks: steps.0.after.weight is applied to it before it is added: it cannot be folded into a linear
  - an online rotation fits (input): a Hadamard matrix of size 16, computed while the model runs"""  # noqa: E501


@pytest.fixture
def layers_apart(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Explanations of the model with post-norms, with each of its layers traced by itself."""
    monkeypatch.syspath_prepend(str(TINY))
    import tiny

    from autoquant.analyzer.analysis import analyse
    from autoquant.analyzer.explain import explain
    from autoquant.capture.routes import capture
    from autoquant.report.explanation import explanation_text

    module, args = tiny.post()
    analysis = analyse(capture(module.eval(), args, {}, "export"))
    return lambda path: explanation_text(explain(analysis, (), path), path).partition("\n\nRotatable")[2]


def test_a_deeper_layer_names_where_the_block_came_about(layers_apart: Callable[[str], str]) -> None:
    assert "Rotatable" + layers_apart("steps.2.gate") == FIRST_CAUSE
    assert "the first cause is aten.add at steps.0, which blocks: steps.0.after.weight is" in layers_apart("act")


def test_what_blocks_by_itself_has_no_cause_before_it(layers_apart: Callable[[str], str]) -> None:
    for path in ("steps.0.gate", "steps.1.gate"):
        found = layers_apart(path)
        assert "at steps.0" in found and "steps.0.after.weight is applied to it before it is added" in found
        assert "first cause" not in found

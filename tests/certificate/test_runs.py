from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from odd_units import INNER, WORDS
from torch import Tensor, nn
from transformers import AutoConfig

from autoquant.analyzer.analyze import analyze
from autoquant.certificate.certify import certify
from autoquant.certificate.prove import prove
from autoquant.certificate.runs import WINDOW, departure, further_runs, given, refer, stopped, with_short_windows
from autoquant.config.format import Config, Slot, SmoothingGroup, SmoothingKind, edited
from autoquant.errors import AutoQuantError
from autoquant.models.build import build_meta
from autoquant.models.repair import find_source
from autoquant.models.source import LoadedModel, ModelSource
from tests.certificate.modules import Unit, loaded


def relu(unit: Unit, hidden: Tensor) -> Tensor:
    return hidden.relu()


def relu_of_the_first_eight(unit: Unit, hidden: Tensor) -> Tensor:
    """Beyond eight tokens the scale does not pass."""
    return torch.cat([hidden[:, :8].relu(), hidden[:, 8:].tanh()], 1)


def relu_with_a_distance(unit: Unit, hidden: Tensor) -> Tensor:
    far = (torch.arange(hidden.shape[1]) - 8).clamp(min=0)
    return hidden.relu() + 0.1 * far[:, None]


def relu_of_few_sequences(unit: Unit, hidden: Tensor) -> Tensor:
    """What is seen of one sequence, and of two, says nothing of three."""
    return hidden.relu() if len(hidden) < 3 else hidden.tanh()


def up_to_down() -> Config:
    """Of a unit: what an analysis claims that has seen three tokens."""
    config = analyze(ModelSource("unit", factory=lambda: (Unit(relu), (torch.arange(3)[None],)))).config
    sources = tuple(Slot(path=f"up.{name}", dim=0, size=INNER) for name in ("weight", "bias"))
    group = SmoothingGroup(
        name="up -> down",
        kind=SmoothingKind.LINEAR_LINEAR,
        channels=INNER,
        sources=sources,
        targets=(Slot(path="down.weight", dim=1, size=INNER),),
    )
    smoothing = edited(config.smoothing, groups=(group,))
    return edited(config, smoothing=smoothing, rotation=edited(config.rotation, spaces=(), online=()))


def test_a_claim_that_holds_does_so_in_every_run() -> None:
    proof = prove(loaded(Unit(relu)), up_to_down())
    assert [(trial.name, trial.kind) for trial in proof.trials] == [("up -> down", "linear_linear"), ("all", "all")]
    assert all(0 < trial.change < 1e-13 for trial in proof.trials)
    assert proof.coverage.lengths == (1, 3, 12, 64, 160)


@pytest.mark.parametrize("act", [relu_of_the_first_eight, relu_with_a_distance, relu_of_few_sequences])
def test_what_matters_beyond_eight_tokens_or_two_sequences_only_is_refused(act: object) -> None:
    """The given three tokens alone do not tell: this is the trap."""
    module = loaded(Unit(act))  # type: ignore[arg-type]  # one of those above
    proof = prove(module, up_to_down())
    (failed,) = proof.failed()
    assert (failed.name, failed.kind) == ("up -> down", "linear_linear")
    assert failed.change > 1e-3
    only = refer(module)
    assert [run.name for run in only.runs] == ["given"]


def test_the_departure_of_a_module_from_itself_is_nothing_and_of_a_broken_one_is_infinite() -> None:
    module = loaded(Unit(relu))
    reference = refer(module, further_runs(module, (), 0))
    assert departure(module.module, reference) == 0
    short = loaded(Unit(lambda unit, hidden: hidden.relu()[:, :1].expand_as(hidden)))
    assert departure(short.module, reference) > 1e-2
    broken = loaded(Unit(lambda unit, hidden: hidden.missing))
    assert departure(broken.module, reference) == float("inf")
    assert stopped(broken.module, reference) == "AttributeError: 'Tensor' object has no attribute 'missing'"
    cut = loaded(Unit(lambda unit, hidden: hidden.relu()[:1]))  # broadcasts, but not where two sequences are given
    assert departure(cut.module, reference) > 1e-2 and stopped(cut.module, reference) == ""
    assert stopped(module.module, reference) == ""


class Ends(nn.Module):
    """Returns fewer numbers than it did, once it is ``short``."""

    short = False

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] if self.short else x


def test_outputs_of_other_shapes_stop_a_run() -> None:
    ends = LoadedModel(Ends(), (torch.randn(2, 3),))
    reference = refer(ends)
    ends.module.short = True
    assert departure(ends.module, reference) == float("inf")
    assert stopped(ends.module, reference) == "the outputs are [[2, 2]], and were [[2, 3]]"


class Picky(nn.Module):
    """Whose own code takes nothing in place of its second linear."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.down) is not nn.Linear:
            raise TypeError("down is\nno linear")
        return self.head(self.down(self.up(x).tanh()).tanh())  # type: ignore[no-any-return]  # a call's


def test_a_claim_that_stops_the_model_says_what_the_model_says() -> None:
    source = ModelSource("picky", factory=lambda: (Picky(), (torch.randn(2, 3, 12),)))
    found = analyze(source)
    assert [online.path for online in found.config.rotation.online] == ["up", "down"]
    config = certify(found, source)
    assert [online.path for online in config.rotation.online] == ["up"]
    (blocked,) = (b for b in config.blocked if b.path == "down" and b.what == "rotation")
    assert "('down' stops the model: TypeError: down is no linear): please report" in blocked.reason


def test_a_library_model_is_padded_moved_and_decoded() -> None:
    from autoquant.models.reduce import small

    module = small(find_source("mistral", layers=2))
    names = [run.name for run in refer(module, further_runs(module, (), 0)).runs]
    assert names == ["given", "1 tokens", "64 tokens", "left padding", "offset", "decode"]
    assert [tensor.shape[1] for tensor in further_runs(module, (), 0)[-1](module.module)] == [10, 1, 1, 1, 1]
    assert given(module).length == 8


FEW = 300


class Branching(nn.Module):
    """A part of a library's model whose code names a length that no configuration does."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.tanh() if hidden.shape[1] > FEW else hidden


def test_a_length_that_the_code_names_is_exceeded() -> None:
    from autoquant.models.reduce import small

    made = small(find_source("llama", layers=2))
    assert [run.length for run in further_runs(made, (), 0)][:3] == [1, 64, 12]
    made.module.model.norm = nn.Sequential(made.module.model.norm, Branching())
    longest, *others = sorted(
        (run for run in further_runs(made, (), 0) if run.length > 64), key=lambda run: -run.length
    )
    assert {run.length for run in others} == {FEW + 1}, "where the branch goes the other way"
    assert (longest.name, longest.length) == ("309 tokens", FEW + 9)
    assert longest(made.module)[0].shape[1] == longest.length


def test_windows_are_shorter_than_the_longest_run() -> None:
    source = find_source("mistral")
    assert source.config.sliding_window == 4096
    shorter = with_short_windows(source)
    assert (shorter.config.sliding_window, source.config.sliding_window) == (WINDOW, 4096)
    assert with_short_windows(shorter) is shorter
    plain = find_source("gpt2")
    assert with_short_windows(plain) is plain


def test_windows_of_a_tower_in_pixels_stay() -> None:
    """With shorter ones it takes no image of a patch, and what is claimed of it could not be proved."""
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 60, "num_heads": 4, "out_hidden_size": 64}
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 4, "vocab_size": 128, "use_sliding_window": True, "sliding_window": 4096}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    config = AutoConfig.for_model("qwen2_5_vl", vision_config=vision, text_config=text, image_token_id=120)
    shorter = with_short_windows(ModelSource("pixels", config, kind="image-text-to-text"))
    assert shorter.config.vision_config.window_size == 112 > WINDOW
    assert shorter.config.text_config.sliding_window == WINDOW
    assert "pixel_values" in build_meta(shorter).kwargs


def relu_without_derivative(unit: Unit, hidden: Tensor) -> Tensor:
    if torch.is_grad_enabled() and hidden.requires_grad:
        raise NotImplementedError("this kernel has no derivative")
    return hidden.relu()


def test_a_kernel_without_derivative_runs_at_all_lengths() -> None:
    lengths = [len(further_runs(loaded(Unit(function)), (), 0)) for function in (relu_without_derivative, relu)]
    assert lengths[0] == lengths[1] > 1


def relu_up_to(limit: int, unit: Unit, hidden: Tensor) -> Tensor:
    return torch.cat([hidden[:, :limit].relu(), hidden[:, limit:].tanh()], 1)


def beyond(limit: int) -> Callable[[Unit, Tensor], Tensor]:
    return lambda unit, hidden: relu_up_to(limit, unit, hidden)


@pytest.mark.parametrize(
    "act",
    [beyond(300), partial(relu_up_to, 300), lambda unit, hidden: relu_up_to(300, unit, hidden)],
    ids=["closure", "partial", "code"],
)
def test_a_number_in_the_code_is_outrun(act: Callable[[Unit, Tensor], Tensor]) -> None:
    module = loaded(Unit(act))
    lengths = [run.length for run in further_runs(module, (), 0)]
    assert (lengths[:6], lengths[-1]) == ([3, 1, 12, 64, 160, 309], 3), "the last ones of nine sequences"
    assert {300, 301} < set(lengths), "to either side of the number"
    (failed,) = prove(module, up_to_down()).failed()
    assert (failed.name, failed.kind) == ("up -> down", "linear_linear")


class Seven(nn.Module):
    """No Hadamard matrix has seven rows: that rotation is diagonal, and what is odd passes it."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(4, 7), nn.Linear(7, 4), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))  # type: ignore[no-any-return]  # a call's


def test_a_rotation_of_a_size_without_hadamard_matrix_mixes_in_the_proof() -> None:
    source = ModelSource("seven", factory=lambda: (Seven(torch.neg), (torch.randn(1, 3, 4),)))
    config = analyze(source).config
    (space,) = config.rotation.spaces
    config = edited(config, smoothing=edited(config.smoothing, groups=()))
    assert (space.name, space.size) == ("up -> down", 7)
    torch.manual_seed(0)
    for act, failing in ((torch.neg, []), (torch.tanh, ["up -> down"])):
        module = LoadedModel(Seven(act).double().eval(), (torch.randn(1, 3, 4, dtype=torch.float64),))
        assert [trial.name for trial in prove(module, config).failed()] == failing


class Cached(nn.Module):
    """Gemma's: the caches are inputs, which the forward writes into, and all of them is read."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 4)
        self.value, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, tokens: Tensor, places: Tensor, cache: Tensor) -> Tensor:
        cache.index_copy_(1, places, self.value(self.words(tokens)))
        return self.out(cache)  # type: ignore[no-any-return]  # nn.Module


def test_a_cache_among_the_inputs_starts_as_it_was_given() -> None:
    cache = torch.zeros(1, 6, 4)
    source = ModelSource("cached", factory=lambda: (Cached(), (torch.arange(3)[None], torch.arange(3), cache)))
    assert proved(source) == ["words -> value", "value -> out"]
    assert not cache.any()
    filled = ModelSource("filled", factory=lambda: (Cached(), (torch.arange(3)[None], torch.arange(3), cache + 1)))
    assert proved(filled) == ["words -> value"]


def proved(source: ModelSource) -> list[str]:
    return [group.name for group in certify(analyze(source), source).smoothing.groups]


@dataclass
class Answer:
    logits: Tensor
    words: int = WORDS


class Answering(Unit):
    def forward(self, ids: Tensor) -> Answer:  # type: ignore[override]  # a person's own
        return Answer(super().forward(ids))


def test_a_dataclass_of_a_person_s_own_is_compared() -> None:
    proof = prove(loaded(Answering(relu)), up_to_down())
    assert proof.failed() == ()
    (failed,) = prove(loaded(Answering(relu_with_a_distance)), up_to_down()).failed()
    assert failed.name == "up -> down"


def relu_of_two_calls(unit: Unit, hidden: Tensor) -> Tensor:
    unit.calls: int = getattr(unit, "calls", 0) + 1  # type: ignore[misc]  # an attribute of one kind of unit
    return hidden.relu() if unit.calls < 9 else hidden.tanh()


def test_what_later_calls_alone_do_is_refused() -> None:
    module = loaded(Unit(relu_of_two_calls))
    module.module.calls = 0  # type: ignore[assignment]  # a number
    (calls,) = [run.name for run in further_runs(module, (), 0) if run.name.endswith(" calls")]
    assert int(calls.partition(" ")[0]) >= 9 + 3  # more than the nine that the code names
    (failed,) = prove(module, up_to_down()).failed()
    assert failed.name == "up -> down" and failed.change > 1e-3
    assert module.module.calls == 0


def times_the_calls(unit: Unit, hidden: Tensor) -> Tensor:
    unit.log.append(len(unit.log))  # type: ignore[operator, union-attr]  # a list
    return hidden.relu() * len(unit.log)  # type: ignore[arg-type]


def test_a_module_that_counts_its_calls_keeps_its_claims() -> None:
    module = loaded(Unit(times_the_calls))
    module.module.log = []  # type: ignore[assignment]  # a list
    proof = prove(module, up_to_down())
    assert not proof.failed() and max(trial.change for trial in proof.trials) < 1e-13


CALLS = [0]


def times_a_global(unit: Unit, hidden: Tensor) -> Tensor:
    CALLS[0] += 1
    return hidden.relu() * CALLS[0]


def test_what_hangs_on_more_than_inputs_and_state_is_said() -> None:
    with pytest.raises(AutoQuantError, match="Unit returns something else when it is called again with the same"):
        prove(loaded(Unit(times_a_global)), up_to_down())

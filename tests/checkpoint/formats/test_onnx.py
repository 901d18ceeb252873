"""What onnxruntime runs: refused before the work; written and run where the packages are there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from quantized import DATA, PACKAGED, STATIC, STATIC_KV, TINY, config_of, gpt2, windows

import autoquant
from autoquant.checkpoint.convert import convert_checkpoint
from autoquant.checkpoint.formats import COMPRESSED_TENSORS, NATIVE, ONNX, Changes, Wish, choose_format, format_of
from autoquant.checkpoint.formats.onnx_graph import GRAPH
from autoquant.checkpoint.quantize import Recipe, quantize_checkpoint
from autoquant.cli.main import main
from autoquant.config.format import Config, Strategy, edited
from autoquant.errors import AutoQuantError
from autoquant.io.folders import PROVENANCE
from autoquant.models.reduce import randomise_
from autoquant.pipeline.select import Transforms

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
runs = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (the extra [onnx])")
TOKEN = Strategy.PER_CHANNEL_PER_TOKEN


def with_(strategy: Strategy, **more: Any) -> Config:
    config = config_of(PACKAGED)
    return edited(config, quantization=edited(config.quantization, strategy=strategy, **more))


def recipe(config: Config, strategy: Strategy = STATIC, transforms: str = "fc_fc:0.5+rotation") -> Recipe:
    return Recipe(config, strategy, Transforms.parse(transforms), windows())


# Refused, with or without the packages


@pytest.mark.parametrize(
    ("strategy", "more", "reason"),
    [
        (TOKEN, {}, f"takes no int8 linears per channel / per token dynamic; the nearest is {STATIC.value}$"),
        (
            Strategy.PER_CHANNEL_DYNAMIC,
            {},
            f"takes no int8 linears per channel / per tensor dynamic; the nearest is {STATIC.value}$",
        ),
        (Strategy(STATIC_KV), {}, f"without an int8 cache; the nearest is {STATIC.value}$"),
        (STATIC, {"prefix": (0,)}, "a prefix has no place in the graph"),
    ],
)
def test_what_the_graph_cannot_express_is_refused(strategy: Strategy, more: Any, reason: str) -> None:
    for wish in (Wish(ONNX), Wish(None, "onnxruntime")):
        with pytest.raises(AutoQuantError, match="the format 'onnx' cannot hold the result") as caught:
            choose_format(wish, with_(strategy, **more), Changes())
        (found,) = caught.value.details
        assert re.search(reason, found), found


def test_experts_are_refused() -> None:
    config = with_(STATIC)
    first, *others = config.model.linears
    model = edited(config.model, linears=(edited(first, stack=4, in_dim=2), *others))
    with pytest.raises(AutoQuantError) as caught:
        choose_format(Wish(ONNX), edited(config, model=model), Changes())
    assert "loads no experts; the nearest is the target vllm" in caught.value.details[0]


def test_a_transposed_weight_is_refused(tmp_path: Path) -> None:
    folder = gpt2(tmp_path / "model")
    with pytest.raises(AutoQuantError) as caught:
        quantize_checkpoint(folder, tmp_path / "out", recipe(config_of(folder), transforms="none"), {}, wish=Wish(ONNX))
    assert "its weight is transposed (Conv1D); exclude it" in caught.value.details[0]
    assert not (tmp_path / "out").exists()


def test_targets_and_formats_belong_together() -> None:
    assert Wish(None, "onnxruntime").wanted == ONNX and Wish(None, "vllm").wanted is None
    assert Wish(ONNX, "onnxruntime").wanted == ONNX
    for wish, message in (
        ((ONNX, "vllm"), "the target 'vllm' reads the format 'compressed-tensors', not 'onnx'"),
        ((COMPRESSED_TENSORS, "onnxruntime"), "the target 'onnxruntime' reads the format 'onnx'"),
        ((NATIVE, "onnxruntime"), "the format 'native' runs in autoquant alone"),
    ):
        with pytest.raises(AutoQuantError, match=message):
            Wish(*wish)


def test_missing_packages_are_named_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoquant.checkpoint.formats.onnx_graph.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("autoquant.checkpoint.quantize.prepare_held_", None)  # nothing is calibrated
    with pytest.raises(AutoQuantError, match=r"needs onnx and onnxscript and onnxruntime, .*'autoquant\[onnx\]'"):
        quantize_checkpoint(PACKAGED, tmp_path / "out", recipe(with_(STATIC)), {}, wish=Wish(ONNX))
    assert not list(tmp_path.iterdir())


# Written and run


def random_model(kind: str, folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"opt": {"ffn_dim": 24, "word_embed_proj_dim": 16}, "mistral": {"sliding_window": 6}}
    settings = {**TINY, "vocab_size": 2048, "max_position_embeddings": 64, **sizes.get(kind, {})}
    made: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    randomise_(made, 0)
    made.save_pretrained(folder)
    return folder


def both(folder: Path, config: Config, made: Path, transforms: str = "fc_fc:0.5+rotation") -> tuple[Any, Any]:
    """The int8 model and its graph."""
    quantize_checkpoint(folder, made / NATIVE, recipe(config, transforms=transforms), {})
    assert convert_checkpoint(made / NATIVE, made / ONNX, Wish(ONNX)) == NATIVE
    return autoquant.load(made / NATIVE, "float32"), autoquant.load(made / ONNX)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("packaged")
    return folder, *both(PACKAGED, with_(STATIC), folder)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if all int8 values were the same, for most of the logits."""
    return bool((one - other).abs().median() <= 1e-5 * one.abs().max())


@runs
@pytest.mark.slow
@torch.no_grad()
def test_onnxruntime_computes_what_the_int8_model_does(packaged: tuple[Path, Any, Any]) -> None:
    _, ours, theirs = packaged
    ids = torch.cat(windows())
    whole = ours(ids).logits
    assert same(whole, theirs(ids).logits)
    first = theirs(ids[:, :10])
    then = theirs(ids[:, 10:11], past=first.present)
    last = theirs(ids[:, 11:], past=then.present)
    assert same(whole, torch.cat([first.logits, then.logits, last.logits], 1)), "on its own cache"


@runs
@pytest.mark.slow
@torch.no_grad()
def test_padding_on_the_left_is_not_seen(packaged: tuple[Path, Any, Any]) -> None:
    _, _, theirs = packaged
    ids = windows()[0]
    padded, mask = torch.cat([torch.full((1, 4), 7), ids], 1), torch.ones(1, ids.shape[1] + 4).long()
    mask[:, :4] = 0
    assert same(theirs(ids).logits, theirs(padded, mask).logits[:, 4:])


@runs
@pytest.mark.slow
def test_a_folder_holds_what_a_reader_of_onnx_asks_for(packaged: tuple[Path, Any, Any]) -> None:
    import onnx  # type: ignore[import-not-found, unused-ignore]  # of the extra

    folder = packaged[0] / ONNX
    wanted = {"README.md", "autoquant_config.json", PROVENANCE, "config.json", "generation_config.json"}
    wanted |= {GRAPH, f"{GRAPH}.data", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == wanted
    onnx.checker.check_model(str(folder / GRAPH), full_check=True)
    made = onnx.load(str(folder / GRAPH))
    assert [entry.version for entry in made.opset_import] == [19]
    inputs = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in made.graph.input
    }
    assert inputs["input_ids"] == ["batch_size", "sequence_length"]
    assert inputs["past_key_values.4.value"] == ["batch_size", 2, "past_sequence_length", 32]
    assert {value.name for value in made.graph.output} >= {"logits", "present.0.key", "present.4.value"}
    nodes = [node for node in made.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert sum(node.op_type == "QuantizeLinear" for node in nodes) == 4 * 5, "q, k and v have one, gate and up one"
    assert "model.layers.3.mlp.down_proj/QuantizeLinear" in {node.name for node in nodes}
    tensors = {one.name: onnx.numpy_helper.to_array(one) for one in made.graph.initializer}
    native = packaged[1].get_submodule("model.layers.3.mlp.down_proj").weight
    assert torch.equal(torch.tensor(tensors["model.layers.3.mlp.down_proj.values"]), native.values.t())
    assert torch.equal(torch.tensor(tensors["model.layers.3.mlp.down_proj.scale"]), native.scale.flatten())
    assert str(Path(autoquant.__file__).parent).encode() not in (folder / GRAPH).read_bytes(), (
        "no names of this machine"
    )


@runs
@pytest.mark.slow
def test_a_folder_is_measured_and_not_converted(packaged: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder = packaged[0] / ONNX
    found = format_of(folder)
    assert found is not None and found.name == ONNX
    text = str(DATA / "sample.evaluation.txt")
    result = CliRunner().invoke(main, ["eval", str(folder), "--data", text, "--length", "32", "--tokens", "64"])
    assert result.exit_code == 0, result.output
    for command, message in (
        (["convert", str(folder), "--to", NATIVE, "-o", str(tmp_path / "out")], "is an ONNX graph, from which no"),
        (["eval", str(folder), "--data", text, "--dtype", "bfloat16"], "computes in float32 beside int8"),
    ):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1 and message in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())


@runs
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2", "opt", "mistral"])
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    folder = random_model(kind, tmp_path / "model")
    ours, theirs = both(folder, config_of(folder), tmp_path, "fc_fc:0.5")
    ids = torch.cat(windows())
    assert same(ours(ids).logits, theirs(ids).logits)


@runs
@pytest.mark.slow
@torch.no_grad()
def test_online_rotations_run_in_the_graph(tmp_path: Path) -> None:
    folder = random_model("llama", tmp_path / "model")
    config = config_of(folder)
    online = tuple(edited(one, enable=True) for one in config.rotation.online)
    ours, theirs = both(folder, edited(config, rotation=edited(config.rotation, online=online)), tmp_path)
    ids = torch.cat(windows())
    assert same(ours(ids).logits, theirs(ids).logits)


@runs
@pytest.mark.parametrize("stop", [KeyboardInterrupt("now"), ValueError("no such operator")])
def test_a_failed_export_leaves_nothing(stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise stop

    monkeypatch.setattr("torch.onnx.export", failing)
    wanted = AutoQuantError if isinstance(stop, ValueError) else KeyboardInterrupt
    with pytest.raises(wanted, match=r"cannot be expressed in ONNX: .*no such operator.*--format native|now"):
        quantize_checkpoint(PACKAGED, tmp_path / "out", recipe(with_(STATIC)), {}, wish=Wish(ONNX))
    assert not list(tmp_path.iterdir())


def test_a_graph_that_computes_something_else_is_refused() -> None:
    from autoquant.checkpoint.formats.onnx_session import OnnxModel, Output, answers_of, check_answers

    class Session(torch.nn.Module):
        """A stand-in for a session: a model, its logits changed."""

        def __init__(self, model: Any, change: Any) -> None:
            super().__init__()
            self.model, self.change, self.config = model, change, model.config

        def forward(self, ids: torch.Tensor, past: Any = None) -> Output:
            out = self.model(ids, past_key_values=past, use_cache=True)
            return Output(self.change(out.logits), out.past_key_values)

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    expected = answers_of(model)
    assert [tuple(one.shape) for one in expected] == [(1, 7, 64), (1, 1, 64), (3, 4, 64), (3, 2, 64)]

    def session(change: Any) -> OnnxModel:
        made: Any = Session(model, change)
        return made  # type: ignore[no-any-return]

    check_answers(session(lambda logits: logits * 1.01), expected)
    with pytest.raises(AutoQuantError, match=r"computes other logits than its model, by 100%"):
        check_answers(session(lambda logits: logits * 0), expected)
    with pytest.raises(AutoQuantError, match=r"computes other logits"):
        check_answers(session(lambda logits: logits * float("nan")), expected)
    with pytest.raises(AutoQuantError, match=r"does not run at every shape: .*; the nearest is --format native"):
        check_answers(session(lambda logits: logits.reshape(1, 7, 64)), expected)

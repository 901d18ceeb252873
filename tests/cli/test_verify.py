from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from quantized import TINY

from autoquant.cli.main import main
from autoquant.config.file import save_config
from autoquant.config.format import Config, SmoothingKind, edited

SIZES = {**TINY, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with tied embeddings, on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from autoquant.models.reduce import randomise_

    folder = tmp_path_factory.mktemp("verify") / "tiny"
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    randomise_(model, 0)
    model.save_pretrained(folder)
    return folder


@cache
def analysis(model: str) -> Config:
    from autoquant.analyzer.analyze import analyze
    from autoquant.models.repair import find_source

    return analyze(find_source(model)).config


@pytest.fixture
def config(checkpoint: Path) -> Config:
    return analysis(str(checkpoint))


def verify(model: str | Path, config: Config, tmp_path: Path, *options: str) -> Result:
    save_config(config, tmp_path / "c.json", force=True)
    return CliRunner().invoke(main, ["verify", str(model), str(tmp_path / "c.json"), *options])


def with_group(config: Config, number: int, **changes: Any) -> Config:
    groups = list(config.smoothing.groups)
    groups[number] = edited(groups[number], **changes)
    return edited(config, smoothing=edited(config.smoothing, groups=tuple(groups)))


def forgetful(config: Config) -> Config:
    """One of the readers of the first norm is left out."""
    return with_group(config, 0, targets=config.smoothing.groups[0].targets[1:])


def test_its_own_weights(checkpoint: Path, config: Config, tmp_path: Path) -> None:
    result = verify(checkpoint, config, tmp_path)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["claim", "kind", "change", "of", "the", "logits"]
    assert lines[-1] == f"11 of 11 hold (at most 1e-05) on {checkpoint}: its own weights"
    assert [line.split()[-1] for line in lines if "residual" in line or line.startswith("all")] == ["ok", "ok"]


def test_json(checkpoint: Path, config: Config, tmp_path: Path) -> None:
    result = verify(checkpoint, config, tmp_path, "--format", "json", "--seed", "3")
    content = json.loads(result.stdout)
    assert (content["weights"], content["tolerance"], content["not_tried"]) == ("own", 1e-5, {})
    assert [row["kind"] for row in content["trials"]][-5:] == ["R1", "R2", "R3", "R4", "all"]
    assert all(row["ok"] and 0 < row["change"] < 1e-13 for row in content["trials"])


def test_float32(checkpoint: Path, config: Config, tmp_path: Path) -> None:
    result = verify(checkpoint, config, tmp_path, "--dtype", "float32", "--format", "json")
    content = json.loads(result.stdout)
    assert content["tolerance"] == 1e-4
    assert all(row["ok"] and 1e-9 < row["change"] < 1e-5 for row in content["trials"])


def test_a_small_model(checkpoint: Path, config: Config, tmp_path: Path) -> None:
    result = verify(checkpoint, config, tmp_path, "--small", "--format", "json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["weights"] == "random"
    assert len(content["trials"]) == 11
    assert all(row["ok"] for row in content["trials"])


class Hearing(torch.nn.Module):
    """Reads vectors and not tokens, as a model of sounds does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(16, eps=1e-6)
        self.up = torch.nn.Linear(16, 24)
        self.down = torch.nn.Linear(24, 8)

    def forward(self, sound: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.norm(sound * gain))))  # type: ignore[no-any-return]  # a module's call


def test_floating_point_inputs_are_of_the_models_dtype() -> None:
    from autoquant.analyzer.analyze import analyze
    from autoquant.certificate.verify import verify_small
    from autoquant.models.source import ModelSource

    for inputs in (
        lambda: {"sound": torch.randn(1, 3, 16), "gain": torch.ones(16)},
        lambda: (torch.randn(1, 3, 16), torch.ones(16)),
    ):
        source = ModelSource("hearing", factory=lambda inputs=inputs: (Hearing(), inputs()))
        config = analyze(source).config
        for dtype, most in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
            trials = verify_small(source, config, dtype=dtype).trials
            assert [trial.kind for trial in trials][-1] == "all"
            assert all(0 < trial.change < most for trial in trials), dtype


def test_claims_that_were_taken_out_are_not_tried(checkpoint: Path, config: Config, tmp_path: Path) -> None:
    from autoquant.certificate.claims import claims, keep

    left = [claim for claim in claims(config) if claim[1] in ("R2", "linear_linear")]
    for options in ((), ("--small",)):
        result = verify(checkpoint, keep(config, left), tmp_path, "--format", "json", *options)
        kinds = [row["kind"] for row in json.loads(result.stdout)["trials"]]
        assert kinds == ["linear_linear", "linear_linear", "R2", "all"]


def test_a_false_claim_fails_and_is_named(
    checkpoint: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the analysis makes it too: only the figure can tell."""
    monkeypatch.setattr("autoquant.certificate.verify.check_claims", lambda *_: None)
    result = verify(checkpoint, forgetful(config), tmp_path)
    assert result.exit_code == 1
    name = config.smoothing.groups[0].name
    assert f"error: 1 of 11 trials changed the logits, '{name}' by " in result.stderr
    assert result.stdout.count("FAILED") == 1
    assert "decoding with a cache" in result.stdout
    quiet = verify(checkpoint, forgetful(config), tmp_path, "--quiet")
    assert (quiet.exit_code, quiet.stdout) == (1, "")


@pytest.mark.parametrize("options", [(), ("--small",)])
def test_a_false_claim_differs_from_the_analysis(
    checkpoint: Path, config: Config, tmp_path: Path, options: tuple[str, ...]
) -> None:
    result = verify(checkpoint, forgetful(config), tmp_path, *options)
    assert result.exit_code == 1
    name = config.smoothing.groups[0].name
    expected = f"the config claims what the model does not: '{name}': its targets differ from the analysis"
    assert f"error: {expected}" in result.stderr
    both = with_group(forgetful(config), 5, name="model.norm -> lm_haed", kind=SmoothingKind.LINEAR_LINEAR)
    details = verify(checkpoint, both, tmp_path, *options).stderr
    assert "did you mean 'model.norm -> lm_head'?" in details
    assert f"'{name}': its targets differ" in details


@pytest.mark.parametrize("options", [(), ("--small",)])
def test_a_config_of_another_structure(checkpoint: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    other = analysis("gpt2")
    result = verify(checkpoint, other, tmp_path, *options)
    assert (result.exit_code, result.stdout) == (1, "")
    message = "error: the config is for another structure: gpt2 with 12 layers and 124,439,808 parameters; "
    assert message in result.stderr
    assert result.stderr.count("\n") < 8


def test_a_weight_that_is_not_finite(checkpoint: Path, config: Config, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "nan"
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = verify(folder, config, tmp_path)
    assert result.exit_code == 1
    assert "error: model.layers.1.mlp.up_proj.weight holds a NaN or an infinity\n" in result.stderr


def test_a_checkpoint_that_lacks_a_tensor(checkpoint: Path, config: Config, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "short"
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = verify(folder, config, tmp_path)
    assert f"error: {folder}: model.layers.1.mlp.up_proj.weight is missing or of another shape\n" in result.stderr


def test_a_shard_that_is_cut_short(checkpoint: Path, config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-100])
    result = verify(folder, config, tmp_path)
    assert result.exit_code == 1
    assert "model.safetensors" in result.stderr.splitlines()[-1]


def test_a_config_that_claims_nothing(checkpoint: Path, config: Config, tmp_path: Path) -> None:
    from autoquant.certificate.claims import keep

    result = verify(checkpoint, keep(config, []), tmp_path)
    assert "error: nothing to verify: the config has no smoothing group, space or online rotation" in result.stderr


@pytest.mark.parametrize(("text", "message"), [("{", "expected"), ("[]", "expected")])
def test_a_broken_config(checkpoint: Path, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    result = CliRunner().invoke(main, ["verify", str(checkpoint), str(path)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {path}:1:")
    assert message in result.stderr

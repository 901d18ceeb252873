"""`autoquant apply` on the trained model that comes with the data, and its messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from handmade import llama_like
from torch import nn

from autoquant.certificate.claims import digest_of
from autoquant.cli.apply import command
from autoquant.config.file import config_text
from autoquant.config.format import Certificate, edited
from autoquant.errors import AutoQuantError

DATA = Path(__file__).parents[3] / "shared" / "data"
MODEL = DATA / "wikinano1m"
TEXT = "A small text that is repeated to fill the windows of the calibration. " * 200

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="needs the trained model in ../shared/data")


def load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = json.loads((MODEL / "config.json").read_text())
    made = llama_like(load(MODEL), facts=settings, layer_count=settings["num_hidden_layers"])
    made = edited(made, certificate=Certificate(proved=True, digest=digest_of(made)))
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(config_text(made))
    return path


def run(*args: Any) -> Result:
    return CliRunner().invoke(command, [str(a) for a in args])


def refusal(*args: Any) -> AutoQuantError:
    error = run(*args).exception
    assert isinstance(error, AutoQuantError), error
    return error


@torch.no_grad()
def nll(model: nn.Module) -> float:
    ids = torch.randint(2, 2048, (2, 128), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    return float(model(ids, labels=ids).loss)


@pytest.mark.parametrize("smooth", ["fc_fc", "all"])
@pytest.mark.parametrize("rotate", ["--rotate", "--no-rotate"])
def test_the_trained_model_computes_the_same(tmp_path: Path, config: Path, smooth: str, rotate: str) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    options = ["--calibration", text, "--sequences", 4, "--length", 64, "--dtype", "float32"]
    result = run(MODEL, config, "-o", out, "--smooth", smooth, rotate, *options)
    assert result.exit_code == 0, result.output
    assert "warning: --rotate, --smooth and --alpha are now --transforms " in result.output
    after = load(out)
    assert nll(after) == pytest.approx(nll(load(MODEL)), rel=2e-6)
    provenance = json.loads((out / "autoquant_provenance.json").read_text())
    norms = {"attention_in", "mlp_in"} if (smooth, rotate) == ("all", "--no-rotate") else set()
    assert set(provenance["result"]["smoothed"]) == {"v_o", "up_down"} | norms
    assert ("residual: random signs x Sylvester 128" in result.output) is (rotate == "--rotate")
    assert after.config.tie_word_embeddings is (rotate == "--no-rotate")
    assert (out / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()


def test_a_space_may_have_the_name_of_a_group(tmp_path: Path, config: Path) -> None:
    """The analyzer names both by their members: v_proj -> o_proj."""
    (tmp_path / "text.txt").write_text(TEXT)
    shared = tmp_path / "shared.json"
    assert '"name": "heads"' in config.read_text()
    shared.write_text(config.read_text().replace('"name": "heads"', '"name": "v_o"'))
    options = ["--calibration", tmp_path / "text.txt", "--sequences", 2, "--length", 64, "--dtype", "float32"]
    result = run(MODEL, shared, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert nll(load(tmp_path / "out")) == pytest.approx(nll(load(MODEL)), rel=2e-6)


def test_maxima_can_be_kept_and_used_again(tmp_path: Path, config: Path) -> None:
    text, maxima = tmp_path / "text.txt", tmp_path / "maxima.safetensors"
    text.write_text(TEXT)
    options = ["--sequences", 2, "--length", 64, "--quiet"]
    assert (
        run(MODEL, config, "-o", tmp_path / "a", "--calibration", text, "--save-maxima", maxima, *options).output == ""
    )
    assert run(MODEL, config, "-o", tmp_path / "b", "--maxima", maxima, *options).exit_code == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    maxima.write_bytes(b"?")
    assert "no activation maxima" in refusal(MODEL, config, "-o", tmp_path / "c", "--maxima", maxima).message


def test_rotation_alone_needs_no_calibration(tmp_path: Path, config: Path) -> None:
    assert run(MODEL, config, "-o", tmp_path / "out", "--transforms", "rotation").exit_code == 0


def test_without_a_text_the_packaged_one_is_read_and_said(tmp_path: Path, config: Path) -> None:
    options = ["-o", tmp_path / "out", "--sequences", 2, "--length", 64]
    said = run(MODEL, config, *options).output.splitlines()
    assert "calibrated on 128 tokens of the packaged text; better on text of its use: --calibration TEXT" in said
    assert "default.calibration.txt" in (tmp_path / "out" / "autoquant_provenance.json").read_text()
    error = refusal(MODEL, config, "-o", tmp_path / "out2", "--sequences", 2000)
    assert "2000 were asked for: lower --sequences or --length" in error.message


def test_messages(tmp_path: Path, config: Path) -> None:
    out = tmp_path / "out"
    assert "nothing to do" in refusal(MODEL, config, "-o", out, "--transforms", "none").message
    assert (
        "not to be had from the hub" in refusal("no-such/model", config, "-o", out, "--transforms", "rotation").message
    )
    assert "expected a checkpoint" in refusal("./none", config, "-o", out).message
    assert "exists already" in refusal(MODEL, config, "-o", tmp_path.parent).message
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    assert "16 were asked for" in refusal(MODEL, config, "-o", out, "--calibration", short).message
    assert not out.exists()


def test_a_config_of_another_model_is_refused(tmp_path: Path, config: Path) -> None:
    other = DATA / "stories260K"
    error = refusal(other, config, "-o", tmp_path / "out", "--transforms", "rotation")
    assert error.message == f"{config}: does not fit {other}: {len(error.details)} problems"
    line, column, place, message = error.details[0].removeprefix(f"{config}:").split(":", 3)
    assert place == " $.provenance.fingerprint" and message.startswith(" the model's is sha256")
    text = config.read_text().splitlines()[int(line) - 1]
    assert text[int(column) - 1 :].startswith('"sha256:') and '"fingerprint"' in text
    assert any("$.model.parameters: the model has" in line for line in error.details)

"""Checkpoints: the written folder loads with plain transformers and computes the same; interruptions leave nothing."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import handmade_more as more
import pytest
import torch
from handmade import LLAMA, build, change, llama_like, logits
from safetensors.torch import load_file, save_file
from torch import nn

from autoquant.checkpoint import folding
from autoquant.checkpoint.apply import apply_checkpoint
from autoquant.config.file import config_text, load_config
from autoquant.config.format import Config
from autoquant.errors import AutoQuantError
from autoquant.executor.resolve import resolve
from autoquant.executor.scales import random_scales
from autoquant.models.load import load_skeleton
from autoquant.models.structure import structure_of

CASES: dict[str, tuple[dict[str, Any], Callable[[nn.Module], Config]]] = {
    "llama": (LLAMA, llama_like),
    "qwen2": (LLAMA, lambda model: llama_like(model, bias=True)),
    "gemma": (LLAMA, lambda model: llama_like(model, offset=1)),
    "opt": (more.OPT, more.opt_config),
    "gpt2": (more.GPT2, more.gpt2_config),
    "gpt_neox": (more.NEOX, more.neox_config),
    "mixtral": (more.MIXTRAL, more.mixtral_config),
}


def load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    if "mixtral" in type(model).__name__.lower():
        model.set_experts_implementation("eager")
    return model.eval()


def saved(folder: Path, name: str = "llama", shard: str = "20KB", dtype: torch.dtype = torch.float64) -> Config:
    sizes, config = CASES[name]
    model = build(name, dtype=dtype, **sizes)
    model.save_pretrained(folder, max_shard_size=shard)  # type: ignore[operator]
    (folder / "tokenizer.json").write_text("{}")
    return config(model)


def random_scales_for(folder: Path, config: Config) -> Any:
    return random_scales(resolve(config, structure_of(load_skeleton(folder))), 0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_the_result_loads_and_computes_the_same(tmp_path: Path, name: str, shard: str) -> None:
    config = saved(tmp_path / "in", name, shard)
    applied = apply_checkpoint(
        tmp_path / "in",
        config,
        tmp_path / "out",
        smooth="all",
        scales=random_scales_for(tmp_path / "in", config),
        options={"alpha": 0.5},
    )
    before, after = load(tmp_path / "in"), load(tmp_path / "out")
    assert change(logits(before), logits(after)) < 1e-13
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    provenance = json.loads((tmp_path / "out" / "autoquant_provenance.json").read_text())
    assert provenance["options"] == {"alpha": 0.5} and provenance["result"]["untied"] == list(applied.untied)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    if applied.untied:
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
        assert after.get_output_embeddings().weight is not after.get_input_embeddings().weight  # type: ignore[operator]


def test_nothing_but_what_changes_is_touched(tmp_path: Path) -> None:
    config = saved(tmp_path / "in", "llama", "1GB")
    apply_checkpoint(tmp_path / "in", config, tmp_path / "out", only=["heads"])
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("in", "out"))
    changed = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert changed == {f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(2) for p in "vo"}
    assert (tmp_path / "in" / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_memory_and_disk_give_the_same_bits(tmp_path: Path, name: str) -> None:
    from autoquant.executor.apply import apply_

    config = saved(tmp_path / "in", name, dtype=torch.bfloat16)
    apply_checkpoint(tmp_path / "in", config, tmp_path / "out")
    model, after = load(tmp_path / "in"), load(tmp_path / "out")
    apply_(model, config, smooth="none")
    assert all(torch.equal(p, after.get_parameter(n)) for n, p in model.named_parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="folds on a GPU")
def test_a_gpu_gives_the_same_bits(tmp_path: Path) -> None:
    config = saved(tmp_path / "in", dtype=torch.bfloat16)
    for name in ("cpu", "cuda"):
        apply_checkpoint(tmp_path / "in", config, tmp_path / name, device=torch.device(name))
    for file in (tmp_path / "cpu").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "cuda" / file.name).read_bytes()


@pytest.mark.parametrize("large", [0, 1 << 26])
def test_rows_are_folded_apart_and_by_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int) -> None:
    """By processes where the checkpoint is large."""
    config = saved(tmp_path / "in", dtype=torch.bfloat16)
    apply_checkpoint(tmp_path / "in", config, tmp_path / "out")
    monkeypatch.setattr(folding, "PART", 64)
    monkeypatch.setattr(folding, "_LARGE", large)
    apply_checkpoint(tmp_path / "in", config, tmp_path / "parts", workers=3)
    assert all(
        file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes() for file in (tmp_path / "out").iterdir()
    )


def test_processes_tell_what_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = saved(tmp_path / "in", shard="1GB", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    table = "model.embed_tokens.weight"
    tensors[table][3, 0] = torch.nan
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(folding, "_LARGE", 0)
    with pytest.warns(UserWarning, match=f"{table}: row 3 holds a NaN"):
        apply_checkpoint(tmp_path / "in", config, tmp_path / "out", workers=2)
    changed = load_file(tmp_path / "out" / "model.safetensors")[table].isnan()
    assert changed.sum() == 1 and changed[3, 0]
    first = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[first][0, 0] = torch.inf
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    with pytest.raises(AutoQuantError, match=f"{first} holds an infinity"):
        apply_checkpoint(tmp_path / "in", config, tmp_path / "other", workers=2)
    assert left(tmp_path) == ["in", "out"]


def test_a_base_checkpoint_without_the_first_component(tmp_path: Path) -> None:
    """As the original GPT-2 files are: 'h.0...' instead of 'transformer.h.0...', and buffers among the tensors."""
    config = saved(tmp_path / "in", "gpt2", "1GB")
    file = tmp_path / "in" / "model.safetensors"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(tensors, file, {"format": "pt"})
    apply_checkpoint(tmp_path / "in", config, tmp_path / "out")
    assert "h.0.attn.bias" in load_file(tmp_path / "out" / "model.safetensors")
    assert change(logits(load(tmp_path / "in")), logits(load(tmp_path / "out"))) < 1e-13


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_another_dtype(tmp_path: Path, name: str) -> None:
    config = saved(tmp_path / "in", name, dtype=torch.float16)
    apply_checkpoint(tmp_path / "in", config, tmp_path / "out", dtype=torch.float32)
    after = load(tmp_path / "out")
    assert {p.dtype for p in after.parameters()} == {torch.float32}
    before = load(tmp_path / "in").float()
    assert change(logits(before), logits(after)) < 1e-5


# What cannot be held, and targets that cannot be written: said before the work starts.


def test_online_rotations_are_refused(tmp_path: Path) -> None:
    config = saved(tmp_path / "in")
    with pytest.raises(AutoQuantError, match="plain transformers cannot hold the result; disable it") as caught:
        apply_checkpoint(tmp_path / "in", config, tmp_path / "out", only=["model.layers.{layer}.mlp.down_proj"])
    assert caught.value.details[0].startswith("R4 model.layers.0.mlp.down_proj: an online rotation")
    assert not (tmp_path / "out").exists()


def test_a_norm_folded_into_a_table_is_refused(tmp_path: Path) -> None:
    model = build("bloom", **more.BLOOM)
    model.save_pretrained(tmp_path / "in")  # type: ignore[operator]
    with pytest.raises(AutoQuantError, match="--no-rotate") as caught:
        apply_checkpoint(tmp_path / "in", more.bloom_config(model), tmp_path / "out")
    assert (
        "word_embeddings_layernorm.weight is folded into transformer.word_embeddings.weight" in caught.value.details[0]
    )


def test_a_new_bias_is_refused(tmp_path: Path) -> None:
    model = build("opt", **more.OPT)
    with torch.no_grad():
        model.get_parameter("model.decoder.final_layer_norm.weight")[2] = 0
    model.save_pretrained(tmp_path / "in")  # type: ignore[operator]
    with pytest.raises(AutoQuantError, match="cannot hold new biases") as caught:
        apply_checkpoint(tmp_path / "in", more.opt_config(model), tmp_path / "out")
    assert caught.value.details == ("lm_head.bias: a LayerNorm's bias has to move there (its gain has zeros)",)


def test_an_existing_folder_needs_force(tmp_path: Path) -> None:
    config = saved(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(AutoQuantError, match="exists already; give --force"):
        apply_checkpoint(tmp_path / "in", config, tmp_path / "out")
    with pytest.raises(AutoQuantError, match="holds old, and autoquant did not write it"):
        apply_checkpoint(tmp_path / "in", config, tmp_path / "out", force=True)
    (tmp_path / "out" / "autoquant_provenance.json").write_text("{}")
    apply_checkpoint(tmp_path / "in", config, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "old").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("target", "message"),
    [("in", "holds the input"), (".", "holds the input"), ("none/out", "does not exist"), ("file", "is a file")],
)
def test_bad_targets(tmp_path: Path, target: str, message: str) -> None:
    config = saved(tmp_path / "in")
    (tmp_path / "file").write_text("")
    with pytest.raises(AutoQuantError, match=message):
        apply_checkpoint(tmp_path / "in", config, tmp_path / target, force=True)


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    config = saved(tmp_path / "in")
    with pytest.raises(AutoQuantError, match="not a folder"):
        apply_checkpoint(tmp_path / "none", config, tmp_path / "out")
    (tmp_path / "in" / "config.json").unlink()
    with pytest.raises(AutoQuantError, match=r"no config.json"):
        apply_checkpoint(tmp_path / "in", config, tmp_path / "out")


@pytest.mark.parametrize(("text", "message"), [('{"model_type": ', "cannot be read as JSON"), ("[]", "a JSON object")])
def test_a_broken_config_json(tmp_path: Path, text: str, message: str) -> None:
    config = saved(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(text)
    with pytest.raises(AutoQuantError, match=rf"config\.json: .*{message}"):
        apply_checkpoint(tmp_path / "model", config, tmp_path / "out")


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    config = saved(tmp_path / "in")
    settings = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(settings | {"quantization_config": {}}))
    with pytest.raises(AutoQuantError, match="is quantized already"):
        apply_checkpoint(tmp_path / "in", config, tmp_path / "out")


# Interruptions: whatever happens, the target is absent or as it was.


def left(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in tmp_path.iterdir())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_nan_in_a_weight(tmp_path: Path, name: str, value: float) -> None:
    config = saved(tmp_path / "in", name, "1GB")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    last = sorted(tensors)[-5]
    tensors[last].view(-1)[0] = value
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    with pytest.raises(AutoQuantError, match=rf"{last} holds an? (NaN|infinity) \(1 of \d+ elements\)"):
        apply_checkpoint(tmp_path / "in", config, tmp_path / "out")
    assert left(tmp_path) == ["in"]


@pytest.mark.parametrize("damage", ["cut", "missing", "header"])
def test_a_broken_shard(tmp_path: Path, damage: str) -> None:
    config = saved(tmp_path / "in")
    shard = sorted((tmp_path / "in").glob("*.safetensors"))[-1]
    content = shard.read_bytes()
    shard.unlink()
    if damage != "missing":
        shard.write_bytes(content[:-100] if damage == "cut" else b"\xff" * 20 + content[20:])
    with pytest.raises(AutoQuantError, match=shard.name):
        apply_checkpoint(tmp_path / "in", config, tmp_path / "out")
    assert left(tmp_path) == ["in"]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_missing_tensor(tmp_path: Path, name: str) -> None:
    config = saved(tmp_path / "in", name, "1GB")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    with pytest.raises(AutoQuantError, match=r"model.norm.weight is missing or of another shape"):
        apply_checkpoint(tmp_path / "in", config, tmp_path / "out")
    assert left(tmp_path) == ["in"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_inside(tmp_path: Path, error: type[BaseException]) -> None:
    config = saved(tmp_path / "in")

    def progress(done: int, total: int) -> None:
        if done == 10:
            assert left(tmp_path) == [f".out.partial-{os.getpid()}", "in", "out"]
            raise error

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "autoquant_provenance.json").write_text("old")
    with pytest.raises(error):
        apply_checkpoint(tmp_path / "in", config, tmp_path / "out", force=True, progress=progress)
    assert left(tmp_path) == ["in", "out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["autoquant_provenance.json"]


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on file sizes makes write() fail as a full disk does."""
    config = saved(tmp_path / "in", "llama", "1GB")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(AutoQuantError, match="cannot be written: File too large; nothing was left there"):
            apply_checkpoint(tmp_path / "in", config, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left(tmp_path) == ["in"]


SCRIPT = """
import sys, time
from pathlib import Path
from autoquant.config.file import load_config
from autoquant.checkpoint import folding
from autoquant.checkpoint.apply import apply_checkpoint

def progress(done, total):
    if done == 10:
        print("working", flush=True)
        time.sleep(600)

apply_checkpoint(Path("in"), load_config(Path("config.json")), Path("out"), progress=progress)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_from_outside(tmp_path: Path, number: signal.Signals) -> None:
    config = saved(tmp_path / "in")
    (tmp_path / "config.json").write_text(config_text(config))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # A test run in the background of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(number)
    process.wait(timeout=300)
    process.stdout.close()
    remaining = [name for name in left(tmp_path) if name not in ("in", "config.json")]
    if number is signal.SIGINT:
        assert remaining == []
    else:  # a kill cannot clean up: what is left is hidden and no model, for it has no config.json
        assert remaining == [f".out.partial-{process.pid}"]
        assert not (tmp_path / remaining[0] / "config.json").exists()


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_killed_run_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None
) -> None:
    """In another dtype nothing of it can be kept."""
    (tmp_path / "config.json").write_text(config_text(saved(tmp_path / "in", dtype=torch.bfloat16)))
    config = load_config(tmp_path / "config.json")
    monkeypatch.chdir(tmp_path)
    apply_checkpoint(Path("in"), config, Path("wanted"), dtype=dtype)
    script = SCRIPT.replace("time.sleep(600)", "__import__('os').kill(__import__('os').getpid(), 9)")
    killed = subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL, check=False)
    assert killed.returncode == -signal.SIGKILL
    folded: list[str] = []
    actual = folding._folded

    def counted(part: Any, *rest: Any) -> torch.Tensor:
        folded.append(part.output.name)
        return actual(part, *rest)

    monkeypatch.setattr(folding, "_folded", counted)
    apply_checkpoint(Path("in"), config, Path("out"), dtype=dtype)
    assert left(tmp_path) == ["config.json", "in", "out", "wanted"]
    assert 0 < len(folded) <= 21 - 10 if dtype is None else len(folded) == 21
    for file in (tmp_path / "wanted").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name

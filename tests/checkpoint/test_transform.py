"""What `autoquant apply` does, as a function: every step once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import DATA, PACKAGED, config_of, with_a_tower
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from autoquant.analyzer.analyze import analyze
from autoquant.calibration.windows import CalibrationOptions
from autoquant.checkpoint.transform import TransformOptions, transform_checkpoint
from autoquant.errors import AutoQuantError
from autoquant.executor.resolve import resolve
from autoquant.models.repair import find_source
from autoquant.pipeline import select
from autoquant.pipeline.select import Transforms

TEXT = CalibrationOptions(DATA / "sample.calibration.txt", 2, 32)


def test_the_config_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(select, "resolve", lambda *a, **k: calls.append(a) or resolve(*a, **k))
    steps: list[str] = []
    options = TransformOptions(Transforms.parse("fc_fc:0.6+rotation"), TEXT, save_maxima=tmp_path / "maxima")
    done = transform_checkpoint(
        PACKAGED, config_of(PACKAGED), tmp_path / "out", options, progress=lambda step, *at: steps.append(step)
    )
    assert len(calls) == 1
    assert list(dict.fromkeys(steps)) == ["load", "calibrate", "apply"]
    assert done.smoothed == 10 and len(done.applied.groups) == 2, "two groups in each of five layers"
    again = TransformOptions(options.transforms, maxima=tmp_path / "maxima")
    transform_checkpoint(PACKAGED, config_of(PACKAGED), tmp_path / "again", again)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert files[0] == files[1]


def test_r1_alone_leaves_the_heads(tmp_path: Path) -> None:
    options = TransformOptions(Transforms.parse("rotation:R1"))
    done = transform_checkpoint(PACKAGED, config_of(PACKAGED), tmp_path / "out", options)
    assert done.applied.spaces == ("residual",) and done.smoothed == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["model.norm.weight"], torch.ones(128, dtype=torch.float16))


@pytest.mark.parametrize(
    ("transforms", "options", "message"),
    [
        ("none", {}, "nothing to do"),
        ("fc_fc", {}, "smoothing needs --calibration TEXT"),
        ("fc_fc", {"maxima": Path("no-such")}, "no-such: no activation maxima"),
        ("rotation", {"save_maxima": Path("no/such/folder")}, "the folder .* does not exist"),
    ],
)
def test_what_is_missing_is_said_before_the_work(
    transforms: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    chosen = TransformOptions(Transforms.parse(transforms), **options)
    with pytest.raises(AutoQuantError, match=message):
        transform_checkpoint(PACKAGED, config_of(PACKAGED), tmp_path / "out", chosen)
    assert not list(tmp_path.iterdir())


def test_what_text_does_not_reach_is_not_smoothed(tmp_path: Path) -> None:
    source = with_a_tower(tmp_path / "in")
    config = analyze(find_source(str(source))).config
    towers = [group.name for group in config.smoothing.groups if "vision" in group.name]
    assert towers
    ids = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    options = TransformOptions(Transforms.parse("smooth:0.5+rotation"), tuple(ids[:, None]))
    with pytest.warns(UserWarning, match=f"not smoothed, since text does not reach it: .*{re.escape(towers[0])}"):
        done = transform_checkpoint(source, config, tmp_path / "out", options)
    assert done.smoothed and not any("vision" in name for name in done.applied.groups)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, tmp_path / "out")]
    with torch.no_grad():
        before, after = (model(input_ids=ids).logits for model in models)
    assert (after - before).norm() < 1e-4 * before.norm()
    moved = [n for n, p in models[0].named_parameters() if not torch.equal(p, models[1].get_parameter(n))]
    assert any("language_model" in name for name in moved)

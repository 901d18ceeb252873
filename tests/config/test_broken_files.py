"""Files that a person broke, and what `autoquant check` says: read the snapshot, which is what a user reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

from autoquant.cli.main import main

LLAMA = Path(__file__).parents[2] / "generated_configs" / "llama.json"
Edit = Callable[[str], str | bytes]


def swap(old: str, new: str) -> Edit:
    def edit(text: str) -> str:
        assert old in text, old
        return text.replace(old, new, 1)

    return edit


Q = "model.layers.{layer}.self_attn.q_proj"
BROKEN: dict[str, Edit] = {
    "a comment": swap('"alpha": 0.5,', '"alpha": 0.5, // more for static'),
    "a comment of several lines": swap('"smoothing": {', '/* mine */ "smoothing": {'),
    "a comment as in YAML": swap('"smoothing": {', '# mine\n  "smoothing": {'),
    "True": swap('"enable": true', '"enable": True'),
    "None": swap('"enable": null', '"enable": None'),
    "FALSE": swap('"enable": true', '"enable": FALSE'),
    "yes": swap('"enable": true', '"enable": yes'),
    "true in quotes": swap('"enable": true', '"enable": "true"'),
    "UTF-16": lambda text: text.encode("utf-16"),
    "Latin-1": lambda text: text.replace('"model": "llama"', '"model": "lläma"').encode("latin-1"),
    "a missing comma": swap('"alpha": 0.5,', '"alpha": 0.5'),
    "a missing comma after an object": swap('"overrides": [],', '"overrides": []'),
    "a comma too many": swap('"method": "smoothquant",', '"method": "smoothquant",,'),
    "a comma after the last": swap('"overrides": []\n', '"overrides": [],\n'),
    "a comma after the last of a list": swap('"lm_head"\n', '"lm_head",\n'),
    "single quotes": swap('"smoothquant"', "'smoothquant'"),
    "a key without quotes": swap('"alpha"', "alpha"),
    "an equals sign": swap('"alpha": 0.5', '"alpha" = 0.5'),
    "a quote too few": swap('"smoothquant"', '"smoothquant'),
    "a bracket too few": lambda text: text.rstrip()[:-1],
    "a bracket too many": lambda text: text + "}",
    "an empty file": lambda text: "",
    "only white space": lambda text: " \n\n",
    "another file": lambda text: '{"hidden_size": 4096, "model_type": "llama"}',
    "a list": lambda text: f"[{text}]",
    "seed 7.0": swap('"seed": 0', '"seed": 7.0'),
    "seed -1": swap('"seed": 0', '"seed": -1'),
    "seed in quotes": swap('"seed": 0', '"seed": "7"'),
    "a pattern": swap('"lm_head"\n', '"*.down_proj"\n'),
    "a regular expression": swap('"lm_head"\n', '".*\\\\.down_proj$"\n'),
    "a misspelt linear": swap('"lm_head"\n', '"lm_haed"\n'),
    "a misspelt key": swap('"alpha": 0.5', '"alhpa": 0.5'),
    "a key of nowhere": swap('"alpha": 0.5', '"group_size": 128'),
    "a key twice": swap('"alpha": 0.5', '"enable": true'),
    "alpha 1.5": swap('"alpha": 0.5', '"alpha": 1.5'),
    "alpha as a fraction": swap('"alpha": 0.5', '"alpha": 1/2'),
    "alpha with a comma": swap('"alpha": 0.5', '"alpha": 0,5'),
    "NaN": swap('"alpha": 0.5', '"alpha": NaN'),
    "a strategy of another tool": swap('"w_int8_per_channel_a_int8_per_token_dynamic"', '"W8A8"'),
    "a strategy cut short": swap("_per_token_dynamic", "_per_token"),
    "layers out of range": swap('"overrides": []', '"overrides": [{"layers": "30-35", "enable": false}]'),
    "layers as a list": swap('"overrides": []', '"overrides": [{"layers": [0, 1], "enable": false}]'),
    "a renamed group": swap("mlp.up_proj -> down_proj", "mlp.up_proj to down_proj"),
    "a knob among the claims": swap('"kind": "norm_linear"', '"alpha": 0.7, "kind": "norm_linear"'),
    "the next version": swap('"format_version": 2', '"format_version": 3'),
    "a long name": swap('"lm_head"\n', f'"{"x" * 5000}"\n'),
    "a long key": swap('"alpha": 0.5', f'"{"x" * 5000}": 0.5'),
    "control characters": swap('"lm_head"\n', '"\\u001b[31mred\\u0007\\n"\n'),
    "rich markup": swap('"lm_head"\n', '"[bold red]lm_head[/]"\n'),
    "right to left": swap('"lm_head"\n', '"\\u202elm_head"\n'),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_said(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion) -> None:
    made = BROKEN[name](LLAMA.read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    Path("llama.json").write_bytes(made if isinstance(made, bytes) else made.encode())
    result = CliRunner().invoke(main, ["check", "llama.json"])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.isprintable() or all(line.isprintable() for line in result.stderr.splitlines())
    assert max(map(len, result.stderr.splitlines())) <= 420
    assert result.stderr == snapshot


def test_there_are_forty() -> None:
    assert len(BROKEN) >= 40

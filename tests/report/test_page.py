"""The page without a browser: what it says, that it is whole and closed, that no name is markup in it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autoquant.cli.main import main
from autoquant.config.file import config_text, load_config
from autoquant.config.format import Config, edited
from autoquant.report.page import page

CONFIGS = Path(__file__).parents[2] / "generated_configs"
VOID = {"meta", "br", "link", "input", "img"}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


class Tags(HTMLParser):
    """Elements with their attributes, and that each is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] == "script" else self.words).append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def data_of(tags: Tags) -> Any:
    return json.loads(tags.scripts[0])


def named(config: Config, name: str) -> Config:
    return edited(config, provenance=edited(config.provenance, model=name))


def measured() -> dict[str, Any]:
    table = [[1.0, 2.5], [3.0, None]]
    side = {
        "channel": table,
        "token": table,
        "peak": table,
        "median": table,
        "tokens": [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], []]],
    }
    strategies = ["w_int8_per_channel_a_int8_per_token_dynamic", "w_int8_per_channel_a_int8_per_tensor_static"]
    return {
        "measures": {"channel": "largest channel", "token": "largest token", "peak": "largest", "median": "median"},
        "linears": ["a.down", EVIL],
        "layers": [0, 1],
        "text": ["<s>", EVIL],
        "tokens": 12,
        "strategy": strategies[0],
        "before": side,
        "after": side,
        "snr": {name: {"before": table, "after": table} for name in strategies},
        "cost": [{"path": EVIL, "percent": 1.25, "decibels": 20.5}],
    }


def compared() -> dict[str, Any]:
    def cell(transforms: str | None, strategy: str, mean: float) -> dict[str, Any]:
        ratio = {"mean": mean, "standard_error": 0.01}
        return {
            "transforms": transforms,
            "strategy": strategy,
            "perplexity": {"mean": 20.0 * mean},
            "ratio_to_float": ratio,
        }

    return {
        "tokens": 1000,
        "cells": [cell(None, "float", 1.0), cell("none", "w_int8_a", 1.5), cell("rotation", "w_int8_a", math.inf)],
    }


def test_what_the_page_says_of_llama() -> None:
    text = page(load_config(CONFIGS / "llama.json"))
    tags = Tags(text)
    assert tags.of("html")[0]["lang"] == "en" and len(tags.of("h1")) == 1
    words = " ".join(" ".join(tags.words).split())
    for said in (
        "225 of 225",
        "rotatable",
        "32 layers of model.layers: 0-31",
        "R1 residual",
        "up_proj -> down_proj",
        "1.4e-15",
    ):
        assert said in words, said
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in tags.of("a")} <= {f"#{name}" for name in ids}
    for attributes in (attributes for _, attributes in tags.found if attributes.get("role") == "img"):
        assert attributes["aria-label"]
    assert [len(layer["boxes"]) for layer in data_of(tags)["layers"]] == [10, 3]
    (stream,) = data_of(tags)["residual"]
    assert (len(stream["writes"]), len(stream["reads"])) == (1 + 64, 64 + 1) and stream["depth"] == 32


def test_a_blocked_residual_is_said() -> None:
    words = " ".join(Tags(page(load_config(CONFIGS / "gemma2.json"))).words)
    assert "blocked" in words and "by aten.add" in words and "post_attention_layernorm.weight is applied to it" in words


def test_the_page_loads_nothing_and_runs_its_own_scripts_only() -> None:
    text = page(load_config(CONFIGS / "llama.json"), measured(), compared())
    tags = Tags(text)
    assert not [a for _, a in tags.found if a.keys() & {"src", "srcset", "action", "onclick", "onload", "style"}]
    assert "@import" not in text and "url(" not in tags.words[0] and not tags.of("link")
    policy = next(m["content"] for m in tags.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; ") and "unsafe-eval" not in policy
    wanted = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in tags.scripts[1:]]
    assert re.findall(r"'sha256-([^']+)'", policy) == wanted and len(wanted) == 2


def test_no_name_is_markup(example_config: Config) -> None:
    plain = [tag for tag, _ in Tags(page(named(example_config, "plain"), measured(), compared())).found]
    tags = Tags(page(named(example_config, EVIL), measured(), compared()))
    assert [tag for tag, _ in tags.found] == plain and len(tags.of("script")) == 3
    assert EVIL in "".join(tags.words)
    assert data_of(tags)["measured"]["text"][1] == EVIL


def test_what_was_measured_and_compared_is_in_tables() -> None:
    words = " ".join(" ".join(Tags(page(load_config(CONFIGS / "llama.json"), measured(), compared())).words).split())
    for said in ("1 to 2.5", "+1.250", "20.5", "+50.00 ± 1.00", "not finite", "per channel / per token dynamic"):
        assert said in words, said


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_the_command(tmp_path: Path) -> None:
    out, config = tmp_path / "o.html", CONFIGS / "llama.json"
    assert run(config, "-o", out).output == f"{out}: 0.8 MB; open it in a browser\n"
    assert out.read_text(encoding="utf-8") == page(load_config(config))
    assert "exists" in run(config, "-o", out).output
    assert run(config, "-o", out, "--force", "--quiet").output == ""
    (tmp_path / "report.json").write_text(json.dumps(compared()))
    assert json.loads(run(config, "-o", out, "--force", "--compare", tmp_path, "--format", "json").output)["compared"]
    assert "Perplexity of every strategy" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compare", "no-such.json"], "no-such.json: cannot be read: No such file or directory; expected what"),
        (["--compare", str(CONFIGS / "llama.json")], "no table in it; expected the report.json of `autoquant compare`"),
        (["--calibration", "a.txt"], "a calibration text needs a model to run it through: --model"),
        (["--model", "no-such-folder"], "no-such-folder"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    result = run(CONFIGS / "llama.json", "-o", tmp_path / "o.html", *options)
    assert result.exit_code == 1 and message in result.output.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_written_config_gives_the_same_page(tmp_path: Path, example_config: Config) -> None:
    path = tmp_path / "c.json"
    path.write_text(config_text(example_config))
    assert page(load_config(path)) == page(example_config)

"""What a config shows of itself: everything that can be done, and no more than a screen."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from autoquant.config.file import load_config
from autoquant.config.format import Config, SmoothingGroup, SmoothingOverride, edited
from autoquant.config.overview import ROWS, WIDTH

FOLDER = Path(__file__).parents[2] / "generated_configs"


@pytest.fixture(scope="module")
def llama() -> Config:
    return load_config(FOLDER / "llama.json")


def test_a_config_shows_groups_spaces_and_online_rotations(llama: Config) -> None:
    text = repr(llama)
    assert text == str(llama)
    assert text.splitlines() == [
        f"llama: 32 layers, 6,738,415,616 parameters, {len(llama.model.linears)} linears; "
        f"{llama.quantization.strategy.value}; proved",
        "           kind           layers  size      enabled  name",
        "smoothing  norm_linear    0-31    4096      yes      model.layers.{layer}.input_layernorm -> "
        "self_attn.q_proj, self_att…",
        "           query_key      0-31    2048      no       model.layers.{layer}.self_attn.q_proj -> k_proj",
        "           linear_linear  0-31    4096      yes      model.layers.{layer}.self_attn.v_proj -> o_proj",
        "           norm_linear    0-31    4096      yes      model.layers.{layer}.post_attention_layernorm -> "
        "mlp.gate_proj, ml…",
        "           linear_linear  0-31    11008     yes      model.layers.{layer}.mlp.up_proj -> down_proj",
        "           norm_linear            4096      yes      model.norm -> lm_head",
        "rotation   R1                     4096      yes      residual",
        "           R2             0-31    128 x 32  yes      model.layers.{layer}.self_attn.v_proj -> o_proj",
        "online     R3             0-31    128       no       model.layers.{layer}.self_attn",
        "           R4             0-31    11008     no       model.layers.{layer}.mlp.down_proj",
    ]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json"))[::20], ids=lambda path: path.stem)
def test_every_config_fits_a_screen(path: Path) -> None:
    config = load_config(path)
    lines = repr(config).splitlines()
    assert len(lines) <= 2 + 4 * (ROWS + 1) and max(map(len, lines)) <= WIDTH
    assert sum(line.startswith("blocked") for line in lines) == bool(config.blocked)


def test_what_is_left_out_is_counted(llama: Config) -> None:
    group = llama.smoothing.groups[0]
    many = tuple(edited(group, name=f"group {number}") for number in range(ROWS + 3))
    lines = repr(edited(llama, smoothing=edited(llama.smoothing, groups=many))).splitlines()
    assert sum("group " in line for line in lines) == ROWS
    assert sum("and 3 more" in line for line in lines) == 1


def one_group(config: Config, **changes: object) -> str:
    group: SmoothingGroup = edited(config.smoothing.groups[0], **changes)
    return repr(edited(config, smoothing=edited(config.smoothing, groups=(group,)))).splitlines()[2]


def test_what_layers_say_otherwise_shows(llama: Config) -> None:
    assert " no  " in one_group(llama, enable=False)
    off = (SmoothingOverride(layers="0-3", enable=False),)
    assert " in part  " in one_group(llama, overrides=off)
    assert " no  " in one_group(llama, enable=False, overrides=off)
    assert " yes  " in one_group(llama, overrides=(SmoothingOverride(layers="0-3", alpha=0.1),))


def test_a_config_without_proof_says_so(llama: Config) -> None:
    assert repr(edited(llama, certificate=None)).splitlines()[0].endswith("; no proof")


class Cells(HTMLParser):
    """The cells of a table; anything but the table's own tags fails."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        assert tag in ("p", "table", "tr", "td")

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def test_a_notebook_gets_a_table_in_which_names_are_inert(llama: Config) -> None:
    odd = "<script>\x1b[31m\n&amp;"
    group = edited(llama.smoothing.groups[0], name=odd)
    config = edited(llama, smoothing=edited(llama.smoothing, groups=(group,)))
    parser = Cells()
    parser.feed(config._repr_html_())
    assert r"<script>\x1b[31m\n&amp;" in parser.cells
    assert r"<script>\x1b[31m\n&amp;" in repr(config) and "\x1b" not in repr(config)

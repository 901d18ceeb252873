"""The patch of a registry: a unified diff that changes the entries meant and no other line."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from autoquant.errors import AutoQuantError
from autoquant.recipes.matching import WrittenMapping
from autoquant.recipes.patching import Mend, Source, patch

TEXT = """PLAIN = [1]

REGISTRY: dict[str, list] = {
    "First": PLAIN,
    "Second": [
        1,
    ],
    "Third": PLAIN,
}
"""
AWQ = Mend(
    "Second",
    "AWQModifier",
    (WrittenMapping(r"re:^a\.\d+$", ("b",), modifier="AWQModifier", observed="mlp"),),
    (WrittenMapping("gone", ("c",)),),
)
SMOOTH = Mend("Third", "AWQModifier", (WrittenMapping("n", ("q", "k"), modifier="SmoothQuantModifier"),))


def test_entries_are_written_as_the_tool_lays_them_out(tmp_path: Path) -> None:
    found = patch({"AWQModifier": Source("src/awq.py", TEXT, "REGISTRY")}, [AWQ, SMOOTH])
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "awq.py").write_text(TEXT)
    git = shutil.which("git")
    assert git is not None
    subprocess.run([git, "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run([git, "apply", "-"], cwd=tmp_path, input=found, text=True, check=True)
    text = (tmp_path / "src" / "awq.py").read_text()
    assert (
        text
        == r"""PLAIN = [1]

REGISTRY: dict[str, list] = {
    "First": PLAIN,
    "Second": [
        # gone has no mapping that holds in all of the layers
        AWQMapping(
            "re:^a\\.\\d+$",
            [
                "b",
            ],
            activation_hook_target="mlp",
        ),
    ],
    "Third": [
        LayerMap(
            balance_layers=[
                "q",
                "k",
            ],
            smooth_layers="n",
        ),
    ],
}
"""
    )


def test_nothing_to_mend_is_no_patch_and_an_unknown_entry_an_error() -> None:
    source = {"AWQModifier": Source("awq.py", TEXT, "REGISTRY")}
    assert patch(source, []) == ""
    with pytest.raises(AutoQuantError, match="no line for 'Fourth'"):
        patch(source, [Mend("Fourth", "AWQModifier", ())])
    with pytest.raises(AutoQuantError, match="no table OTHER"):
        patch({"AWQModifier": Source("awq.py", TEXT, "OTHER")}, [AWQ])

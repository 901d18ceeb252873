from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from quantized import PACKAGED, config_of, windows

from autoquant.checkpoint.apply import apply_checkpoint
from autoquant.checkpoint.quantize import Recipe, quantize_checkpoint
from autoquant.checkpoint.side_files import check_links, copy_side_files
from autoquant.config.format import Strategy
from autoquant.errors import AutoQuantError
from autoquant.pipeline.select import Transforms

TEMPLATE = "{{ messages[0]['content'] }}"
RECIPE = Recipe(
    config_of(PACKAGED),
    Strategy("w_int8_per_channel_a_int8_per_token_dynamic"),
    Transforms.parse("rotation"),
    windows(1, 8),
)


def snapshot(root: Path) -> Path:
    """The packaged model as a hub cache holds it: links into blobs, which lie two folders above."""
    blobs, folder = root / "models--a--b" / "blobs", root / "models--a--b" / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for number, name in enumerate(("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")):
        shutil.copyfile(PACKAGED / name, blobs / f"{number:040x}")
        (folder / name).symlink_to(Path("../../blobs") / f"{number:040x}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATE)
    return folder


def test_a_hub_cache_is_followed_and_sub_folders_come_along(tmp_path: Path) -> None:
    source = snapshot(tmp_path)
    apply_checkpoint(source, RECIPE.config, tmp_path / "applied")
    quantize_checkpoint(source, tmp_path / "quantized", RECIPE, {})
    for folder in ("applied", "quantized"):
        assert (tmp_path / folder / "additional_chat_templates" / "tool_use.jinja").read_text() == TEMPLATE
        assert not any(path.is_symlink() for path in (tmp_path / folder).rglob("*"))
    assert (tmp_path / "applied" / "tokenizer.json").read_bytes() == (PACKAGED / "tokenizer.json").read_bytes()


def test_packages_of_code_are_copied_and_weights_and_tools_are_not(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    for name in ("code/deep/a.py", "code/__pycache__/a.pyc", ".git/config", "original/consolidated.00.pth", "LICENSE"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "autoquant_provenance.json").write_text("{}")
    (source / "config.json").write_text("{}")
    (source / "own.jinja").symlink_to("LICENSE")
    target.mkdir()
    copy_side_files(source, target)
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert files == ["LICENSE", "code/deep/a.py", "own.jinja"]


@pytest.mark.parametrize("place", ["secret", "../secret", "folder", "models--c--d/blobs/" + "0" * 40])
def test_a_link_out_of_the_checkpoint_is_refused_by_both_commands(tmp_path: Path, place: str) -> None:
    source = snapshot(tmp_path)
    outside = tmp_path / place
    if place == "folder":
        outside.mkdir()
        (outside / "key").write_text("secret")
    else:
        outside.parent.mkdir(parents=True, exist_ok=True)
        outside.write_text("secret")
    (source / "notes.txt").symlink_to(os.path.relpath(outside, source))
    for run in (
        lambda: apply_checkpoint(source, RECIPE.config, tmp_path / "out"),
        lambda: quantize_checkpoint(source, tmp_path / "out", RECIPE, {}),
    ):
        with pytest.raises(AutoQuantError, match=r"notes\.txt: is a link out of the checkpoint, to .*; put the file"):
            run()
        assert not (tmp_path / "out").exists()
    outside.unlink() if outside.is_file() else shutil.rmtree(outside)


def test_links_to_nothing_and_in_circles(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "back").symlink_to("..", target_is_directory=True)
    with pytest.raises(AutoQuantError, match="more than 16 folders within each other; a link leads back"):
        check_links(tmp_path)
    (tmp_path / "a" / "back").unlink()
    (tmp_path / "lost").symlink_to("nowhere")
    with pytest.raises(AutoQuantError, match=r"lost: is a link to nothing; remove it"):
        check_links(tmp_path)

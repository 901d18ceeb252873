"""The picture in docs/architecture.md shows the imports as they are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parents[1] / "docs"

SPEC = importlib.util.spec_from_file_location("architecture_picture", DOCS / "architecture_picture.py")
assert SPEC is not None and SPEC.loader is not None
drawing = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(drawing)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """cli imports api and config; api imports config, inside of a function."""
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "a.py").write_text("from autoquant.api import x\nfrom autoquant.config import y\n")
    (tmp_path / "api.py").write_text("def f():\n    from autoquant import config\n")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "__init__.py").write_text("")
    return tmp_path


def test_the_committed_picture_is_that_of_the_imports() -> None:
    stale = (DOCS / "architecture.svg").read_text(encoding="utf-8") != drawing.picture()
    assert not stale, "docs/architecture.svg is stale: run `make picture`"


def test_what_follows_from_other_imports_is_left_out(package: Path) -> None:
    imports = drawing.layer_imports(package)
    assert imports == {"api": {"config"}, "cli": {"api", "config"}, "config": set()}
    assert drawing.without_the_implied(imports) == {"api": {"config"}, "cli": {"api"}, "config": set()}
    assert drawing.rows_of(imports) == {"cli": 2, "api": 1, "config": 0}


def test_it_changes_with_an_import(package: Path) -> None:
    before = drawing.picture(package)
    assert ElementTree.fromstring(before).tag.endswith("svg")
    (package / "config" / "b.py").write_text("from autoquant.io import z\n")
    (package / "io").mkdir()
    (package / "io" / "c.py").write_text("")
    assert drawing.picture(package) != before


def test_a_circle_is_an_error(package: Path) -> None:
    (package / "config" / "b.py").write_text("from autoquant.cli import a\n")
    with pytest.raises(SystemExit, match="circle: "):
        drawing.picture(package)

"""The page in headless Chromium, where there is one: as `python benchmarks/pages.py` tries it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="pip install playwright")
@pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium")
@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma2"])
def test_everything_on_the_page_works(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "pages.py"), "--out", str(tmp_path), "--only", name]
    done = subprocess.run([*command, "--chromium", str(CHROMIUM)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("*.png"))) == 3

"""Depth costs nothing and size little: measured in processes of their own, as ``benchmarks/analysis_cost.py`` does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow
GIB = 1024


@pytest.fixture(scope="module")
def cost() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "analysis_cost.py"
    spec = importlib.util.spec_from_file_location("analysis_cost", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_126_layers_are_read_off_the_graph_of_2(cost: ModuleType) -> None:
    """Seconds are for the benchmark to compare: this machine's depend on what else runs."""
    few, many = (cost.measured({"model_type": "llama"}, layers) for layers in (2, 126))
    print(few, many)
    assert many["parameters"] > 25 * 1e9 > few["parameters"]
    assert many["nodes"] == few["nodes"] > 100
    assert many["peak"] < 1.1 * few["peak"]


@pytest.mark.parametrize(("name", "billions"), [("DeepSeek-V3, 671 B", 671), ("Qwen3-MoE 235 B", 235)])
def test_large_models_need_little_memory(cost: ModuleType, name: str, billions: int) -> None:
    ((config, (layers,)),) = [(config, depths) for title, config, depths in cost.ROWS if title == name]
    figures = cost.measured(config, layers)
    print(figures)
    assert round(figures["parameters"] / 1e9) == billions
    assert figures["peak"] < 3 * GIB

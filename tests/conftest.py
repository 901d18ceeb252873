from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from autoquant.config.format import Config

# Small models on few cores: more threads than one only get in each other's way. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is ever downloaded by a test.
os.environ["HF_HUB_OFFLINE"] = "1"
# The workers of pytest-xdist inherit these from readline, which pytest imports: lines would be broken at 80 columns.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)


@pytest.fixture
def example_config() -> Config:
    """A small valid config of a made-up model: 4 layers, 2 heads of 4 over 1 KV head, a norm, a v bias."""
    from autoquant.config.format import Config

    layers, block = "0-3", "net.{layer}."
    heads = [{"shape": [2, 4], "stride": [4, 1], "channel_stride": [0, 1]}]
    v_rows = [{"start": 8, "shape": [4], "stride": [1], "channel_stride": [1]}]

    def linear(name: str, inputs: int, outputs: int, bias: str | None = None) -> dict[str, object]:
        return {
            "path": block + name,
            "layers": layers,
            "weight": f"{block}{name}.weight",
            "bias": bias,
            "in_features": inputs,
            "out_features": outputs,
            "in_dim": 1,
        }

    content = {
        "format_version": 2,
        "provenance": {
            "autoquant": "0.1.0",
            "torch": "2.13.0",
            "model": "made-up",
            "capture": "export",
            "fingerprint": "0123456789abcdef",
        },
        "model": {
            "layers": 4,
            "hidden_size": 8,
            "parameters": 1234,
            "tied": [["table.weight", "head.weight"]],
            "linears": [
                linear("qkv", 8, 12, f"{block}qkv.bias"),
                linear("out", 8, 8),
                {
                    "path": "head",
                    "weight": "table.weight",
                    "in_features": 8,
                    "out_features": 32,
                    "in_dim": 1,
                    "role": "lm_head",
                },
            ],
        },
        "smoothing": {
            "alpha": 0.5,
            "groups": [
                {
                    "name": "norm-qkv",
                    "kind": "norm_linear",
                    "layers": layers,
                    "overrides": [{"layers": "0,3", "alpha": 0.8}],
                    "channels": 8,
                    "sources": [{"path": block + "norm.weight", "size": 8, "offset": 1}],
                    "targets": [{"path": block + "qkv.weight", "dim": 1, "size": 8}],
                },
                {
                    "name": "v-out",
                    "kind": "linear_linear",
                    "layers": layers,
                    "channels": 4,
                    "sources": [
                        {"path": block + "qkv.weight", "size": 12, "index": v_rows},
                        {"path": block + "qkv.bias", "size": 12, "index": v_rows},
                    ],
                    "targets": [{"path": block + "out.weight", "dim": 1, "size": 8, "index": heads}],
                },
            ],
        },
        "rotation": {
            "spaces": [
                {
                    "name": "residual",
                    "kind": "R1",
                    "layers": layers,
                    "size": 8,
                    "writers": [
                        {"path": "table.weight", "dim": 1, "size": 8},
                        {"path": block + "out.weight", "size": 8},
                    ],
                    "reads": [
                        {
                            "norm": {"kind": "rms", "weight": block + "norm.weight", "offset": 1},
                            "readers": [
                                {"path": block + "qkv.weight", "dim": 1, "size": 8, "bias": block + "qkv.bias"}
                            ],
                        },
                        {"readers": [{"path": "head.weight", "dim": 1, "size": 8}]},
                    ],
                }
            ],
            "online": [{"kind": "input", "path": block + "out", "layers": layers, "size": 8}],
        },
        "quantization": {
            "exclude": ["head"],
            "overrides": [{"path": block + "out", "layers": "3"}],
        },
        "blocked": [
            {
                "path": block + "out",
                "layers": "0-2:2",
                "what": "smoothing",
                "reason": "the other half is gated",
                "operator": "aten.silu",
                "at": block + "act",
            }
        ],
    }
    return Config.model_validate(content, strict=False)

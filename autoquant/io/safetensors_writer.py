"""Write a safetensors file tensor by tensor, in any order.

All dtypes and shapes being known beforehand, the header is written first and each tensor goes to its place when it is
there, so that no more than one is in memory. The same tensors give the same bytes, whatever their order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from autoquant.io.safetensors_stream import NAMES

Described = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_tensors(path: Path, described: Described, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write the described tensors, each given once, and flush the file to disk. Raises OSError as the system does."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    # Wide elements first, so that each tensor begins at a multiple of its element's size.
    for name, (dtype, shape) in sorted(described.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        offsets[name] = end
        end += torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    missing = set(described)
    with open(path, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        stream.truncate(8 + len(encoded) + end)
        for name, tensor in tensors:
            assert (tensor.dtype, tuple(tensor.shape)) == described[name], name
            missing.remove(name)
            stream.seek(8 + len(encoded) + offsets[name])
            stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert not missing, missing
        stream.flush()
        os.fsync(stream.fileno())

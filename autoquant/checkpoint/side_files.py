"""What lies beside a checkpoint's weights: tokenizer, templates, licence, model code, in sub-folders too.

A link is followed into the checkpoint itself and into the store of a hub cache, and nowhere else: a checkpoint that was
unpacked from somewhere could name any file of this machine, which would then be published with the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from autoquant.checkpoint.provenance import CONFIG
from autoquant.errors import AutoQuantError
from autoquant.io.folders import PROVENANCE

_OURS = (CONFIG, PROVENANCE, "autoquant.json")
"""Files about an earlier run, which a new one does not copy."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json", ".ot")
_SKIPPED = ("__pycache__",)
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""What the hub client names files by: the digest of their content."""
_DEEPEST = 16
"""Sub-folders within each other; more are a loop of links."""


def check_links(source: Path) -> None:
    """Raise AutoQuantError for a side file that is a link out of the checkpoint, before anything is read or written."""
    for _ in _side_files(source):
        pass


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy everything but weights, ``config.json`` and hidden folders. Raises OSError as the system does, and
    AutoQuantError for what cannot be read and for links as of :func:`check_links`.
    """
    for path, relative in _side_files(source):
        if path.name in ("config.json", *_OURS) and path.parent == source:
            continue
        try:
            content = path.read_bytes()
        except OSError as error:
            raise AutoQuantError(f"{path}: cannot be read: {error.strerror}") from error
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        (folder / relative).write_bytes(content)


def _side_files(source: Path) -> Iterator[tuple[Path, Path]]:
    """Files and their places in the folder, sorted."""
    folders = [(source, Path())]
    while folders:
        folder, relative = folders.pop(0)
        if len(relative.parts) > _DEEPEST:
            raise AutoQuantError(f"{folder}: more than {_DEEPEST} folders within each other; a link leads back")
        try:
            children = sorted(folder.iterdir())
        except OSError as error:
            raise AutoQuantError(f"{folder}: cannot be read: {error.strerror}") from error
        for path in children:
            if path.name.endswith(_WEIGHTS) or path.name in _SKIPPED:
                continue
            if path.is_dir() and path.name.startswith("."):  # of tools: .git, .cache
                continue
            _check_link(source, path)
            if path.is_dir():
                folders.append((path, relative / path.name))
            elif path.is_file():
                yield path, relative / path.name


def _check_link(source: Path, path: Path) -> None:
    if not path.is_symlink():
        return
    try:
        place, root = path.resolve(strict=True), source.resolve()
    except (OSError, RuntimeError) as error:
        raise AutoQuantError(f"{path}: is a link to nothing; remove it") from error
    if not (place.is_relative_to(root) or _in_hub_cache(root, place)):
        raise AutoQuantError(f"{path}: is a link out of the checkpoint, to {place}; put the file itself there")


def _in_hub_cache(root: Path, place: Path) -> bool:
    """True if ``place`` is a blob of the hub cache that the snapshot ``root`` belongs to."""
    if "snapshots" not in root.parts or place.parent.name != "blobs" or _BLOB.fullmatch(place.name) is None:
        return False
    repository = next(parent for parent in root.parents if parent.name == "snapshots").parent
    return place.parent.parent in (repository, repository.parent)

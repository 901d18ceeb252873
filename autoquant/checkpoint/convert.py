"""From a quantized folder to one of another format, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

from autoquant.checkpoint.formats import NATIVE, Wish, check_format, choose_format, format_of, write_checkpoint
from autoquant.checkpoint.side_files import check_links
from autoquant.errors import AutoQuantError
from autoquant.io.folders import check_target


def convert_checkpoint(
    source: Path, output: Path, wish: Wish, *, force: bool = False, trust_remote_code: bool = False
) -> str:
    """Write ``source`` to ``output`` in the format wished for; returns the name of the one that it has.

    Raises AutoQuantError, with nothing left behind, where it is no quantized folder, has that format already, holds a
    link that leads out of it, or has what the format or the target does not take.
    """
    check_target(source, output, force)
    found = format_of(source)
    if found is None:
        raise AutoQuantError(f"{source}: no quantized checkpoint that can be converted; `autoquant quantize` makes one")
    if found.name == wish.form:
        raise AutoQuantError(f"{source}: is of the format '{wish.form}' already")
    check_links(source)
    contents = found.contents(source, trust_remote_code=trust_remote_code)
    if wish.form != NATIVE and wish.target is not None:
        choose_format(wish, contents.config, contents.changes, contents.model)
    else:
        check_format(wish.form or NATIVE, contents.config, contents.changes, contents.model)
    write_checkpoint(output, contents, wish.form or NATIVE, force=force)
    return found.name

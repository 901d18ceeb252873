from __future__ import annotations

from functools import partial
from io import StringIO
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from autoquant.report.table import print_summary

if TYPE_CHECKING:
    from autoquant.config.format import Config

PIPED = """\
made-up: 4 layers, hidden size 8, 1,234 parameters, tied table.weight = head.weight

linear                  in -> out   smoothed by          rotation
──────────────────────────────────────────────────────────────────────────
4 layers: 0-3
  qkv                   8 -> 12     norm norm            R1 in
  out                   8 -> 8      from 4 rows of qkv   online in, R1 out

outside of the layers
  head                  8 -> 32     no                   -

Rotations
  R1 residual: 8

In the table
  R1: the residual stream, rotated once and for all in the weights that write and read it
  online in: no rotation in the weights reaches it; one computed while the model runs can

8 of 9 linears smoothable, residual rotatable (8), 0 operators without a rule
"""


def test_a_pipe_gets_plain_text(example_config: Config) -> None:
    file = StringIO()
    print_summary(example_config, file=file)
    assert file.getvalue() == PIPED


NARROW = """\
4 layers: 0-3
  qkv: 8 -> 12
      smoothed by: norm norm; rotation: R1
      in
  out: 8 -> 8
      smoothed by: from 4 rows of qkv;
      rotation: online in, R1 out

outside of the layers
  head: 8 -> 32
      smoothed by: no; rotation: -
"""


def test_a_narrow_terminal_gets_lines_and_no_broken_names(
    example_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = partial(Console, width=44, force_terminal=True, color_system=None)
    monkeypatch.setattr("autoquant.report.table.Console", terminal)
    file = StringIO()
    print_summary(example_config, file=file)
    assert NARROW in file.getvalue()
    assert file.getvalue().splitlines()[-1].startswith("8 of 9 linears smoothable")

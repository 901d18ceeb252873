from __future__ import annotations

from typing import TYPE_CHECKING

from autoquant.report.table import summary_lines

if TYPE_CHECKING:
    from autoquant.config.format import Config

WIDE = """\
made-up: 4 layers, hidden size 8, 1,234 parameters, tied table.weight = head.weight

linear                 in -> out  smoothed by         rotation
───────────────────────────────────────────────────────────────────────
4 layers: 0-3
  qkv                  8 -> 12    norm norm           R1 in
  out                  8 -> 8     from 4 rows of qkv  online in, R1 out

outside of the layers
  head                 8 -> 32    no                  -

Rotations
  R1 residual: 8

In the table
  R1: the residual stream, rotated once and for all in the weights that write and read it
  online in: no rotation in the weights reaches it; one computed while the model runs can

8 of 9 linears smoothable, residual rotatable (8), 0 operators without a rule
"""


def test_a_wide_terminal_gets_a_table(example_config: Config) -> None:
    assert "\n".join(summary_lines(example_config, width=140)) + "\n" == WIDE


NARROW = """\
4 layers: 0-3
  qkv
    in -> out: 8 -> 12
    smoothed by: norm norm
    rotation: R1 in
  out
    in -> out: 8 -> 8
    smoothed by: from 4 rows of qkv
    rotation: online in, R1 out

outside of the layers
  head
    in -> out: 8 -> 32
    smoothed by: no
    rotation: -
"""


def test_a_narrow_terminal_gets_paragraphs_and_no_broken_names(example_config: Config) -> None:
    lines = summary_lines(example_config, width=44)
    assert NARROW in "\n".join(lines)
    assert lines[-1].startswith("8 of 9 linears smoothable")

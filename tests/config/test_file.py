from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from jsonschema import Draft202012Validator

from autoquant.config import file as configfile
from autoquant.config.file import config_text, load_config, parse_config, save_config
from autoquant.config.format import edited
from autoquant.errors import AutoQuantError

if TYPE_CHECKING:
    from autoquant.config.format import Config


def lines(text: str) -> list[str]:
    with pytest.raises(AutoQuantError) as error:
        parse_config(text, "c.json")
    return str(error.value).splitlines()


def test_round_trip(example_config: Config, tmp_path: Path) -> None:
    save_config(example_config, tmp_path / "c.json")
    loaded = load_config(tmp_path / "c.json")
    assert loaded.schema_ == "autoquant-config.v1.schema.json"
    assert edited(loaded, schema_=None) == example_config
    assert config_text(loaded) == (tmp_path / "c.json").read_text(encoding="utf-8")


def test_layout(example_config: Config) -> None:
    text = config_text(example_config)
    assert text.startswith('{\n  "$schema": "autoquant-config.v1.schema.json",\n  "format_version": 1,\n')
    assert text.endswith('\n  "certificate": null,\n  "search": null\n}\n')
    assert '\n              {"shape": [2, 4], "stride": [4, 1], "channel_stride": [0, 1]}\n' in text
    assert max(map(len, text.splitlines())) <= 120
    sections = ["$schema", "format_version", "provenance", "model", "smoothing", "rotation", "quantization"]
    assert list(json.loads(text)) == [*sections, "blocked", "certificate", "search"]


def test_knobs_are_written_and_facts_at_their_default_are_not(example_config: Config) -> None:
    content = json.loads(config_text(example_config))
    group = content["smoothing"]["groups"][1]
    assert (group["enable"], group["alpha"], group["overrides"]) == (None, None, [])
    assert content["rotation"]["spaces"][0]["method"] is None
    assert group["sources"][0].keys() == {"path", "size", "index"}


def test_same_bytes_with_any_hash_seed(tmp_path: Path, example_config: Config) -> None:
    save_config(example_config, tmp_path / "c.json")
    code = (
        "import sys; from pathlib import Path; from autoquant.config.file import *;"
        "sys.stdout.write(config_text(load_config(Path(sys.argv[1]))))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "c.json")],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert outputs == {(tmp_path / "c.json").read_bytes()}


def misspelt(config: Config, old: str, new: str) -> str:
    text = config_text(config)
    assert text.count(old) >= 1, old
    return text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"alpha": 0.5', '"alhpa": 0.5', r"$.smoothing.alhpa: unknown key; did you mean 'alpha'?"),
        ('"alpha": 0.5', '"zzz": 0.5', r"$.smoothing.zzz: unknown key; expected enable, alpha, method, groups"),
        ('"alpha": 0.5', '"alpha": 1.5', r"$.smoothing.alpha: 1.5 is out of range; expected at most 1"),
        ('"alpha": 0.5', '"alpha": "0.5"', r"$.smoothing.alpha: expected a number, found a string"),
        ('"alpha": 0.5', '"alpha": true', r"$.smoothing.alpha: expected a number, found true or false"),
        ('"alpha": 0.5', '"alpha": NaN', r"NaN is no JSON number; expected a finite number or null"),
        ('"alpha": 0.5', '"alpha": 1e999', r"the number is too large: 1e999"),
        (
            '"method": "hadamard"',
            '"method": "hadmard"',
            '$.rotation.method: "hadmard" is not among "hadamard", "orthogonal", "learned"; did you mean \'hadamard\'?',
        ),
        (
            '"method": null',
            '"method": 3',
            '$.smoothing.groups[0].method: expected one of "smoothquant", "descent" or null, found an integer',
        ),
        (
            '"alpha": null',
            '"alpha": -1',
            "$.smoothing.groups[0].alpha: -1 is out of range; expected at least 0",
        ),
        (
            '"layers": "0,3"',
            '"layers": "0;3"',
            "$.smoothing.groups[0].overrides[0].layers: '0;3' is not of the form: The layers that it is for",
        ),
        ('"size": 8, "offset": 1}', '"offset": 1}', "$.smoothing.groups[0].sources[0]: the key 'size' is missing"),
        (
            '"size": 8, "offset": 1}',
            '"size": 8.0, "offset": 1}',
            "$.smoothing.groups[0].sources[0].size: Input should be",
        ),
        ('"kind": "rms"', '"kid": "rms"', "$.rotation.spaces[0].reads[0].norm.kid: unknown key; did you mean 'kind'?"),
        (
            '"format_version": 1',
            '"format_version": 2',
            "$.format_version: version 2 of the format; this AutoQuant reads",
        ),
        (
            '"layers": "3"',
            '"layers": "3-1"',
            "$.quantization.overrides[0].layers: layer set '3-1': '3-1' runs backwards",
        ),
    ],
)
def test_one_mistake(example_config: Config, old: str, new: str, message: str) -> None:
    text = misspelt(example_config, old, new)
    found = lines(text)
    line = text[: text.index(new)].count("\n") + 1
    match = [item for item in found if re.match(rf"c\.json:{line}:\d+: {re.escape(message)}", item)]
    assert match, found


def test_column_is_that_of_the_key_or_the_value(example_config: Config) -> None:
    assert lines(misspelt(example_config, '    "alpha": 0.5', '    "alhpa": 0.5'))[0].startswith("c.json:48:5: ")
    assert lines(misspelt(example_config, '    "alpha": 0.5', '    "alpha": 7'))[0].startswith("c.json:48:14: ")


def test_a_key_that_is_there_twice(example_config: Config) -> None:
    text = misspelt(example_config, '"alpha": 0.5', '"enable": true')
    assert lines(text) == ["c.json:48:5: key 'enable' is there twice, first in line 47"]


def test_all_mistakes_at_once_in_the_order_of_the_file(example_config: Config) -> None:
    text = misspelt(example_config, '"method": "hadamard"', '"method": "hadmard"')
    text = text.replace('"alpha": 0.5', '"alhpa": Infinity').replace('"proved"', '"x"')
    found = lines(text)
    assert [re.sub(r":\d+:\d+:", ":", item)[:34] for item in found] == [
        "c.json: $.smoothing.alhpa: unknown",
        "c.json: Infinity is no JSON number",
        'c.json: $.rotation.method: "hadmar',
        "c.json: 3 problems",
    ]


def test_at_most_twenty_are_shown() -> None:
    found = lines('{"format_version": 1, ' + ", ".join(f'"k{i}": 0' for i in range(30)) + "}")
    assert len(found) == 21
    assert found[-1] == "c.json: 35 problems, the first 20 are shown"


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"'])
def test_not_an_object(text: str) -> None:
    (line,) = lines(text)
    assert line.startswith("c.json:1:1: $: expected an object, found ")


def test_syntax_error_is_one_line() -> None:
    assert lines('{"a": 1,\n\n  }') == [
        "c.json:3:3: expected a key in double quotes, found '}'; a comma after the last entry is not allowed"
    ]


def write(data: bytes) -> Callable[[Path], None]:
    def setup(path: Path) -> None:
        path.write_bytes(data)

    return setup


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (write(b"\xef\xbb\xbf{}"), r"c\.json:1:1: starts with a byte order mark; expected UTF-8 without one"),
        (write(b"\xff\xfe{\x00}\x00"), r"c\.json:1:1: starts with a byte order mark"),
        (write("{\n  'ü': ".encode() + b"\xe9}"), r"c\.json:2:8: byte 0xe9 is not UTF-8"),
        (lambda path: path.mkdir(), r"c\.json: cannot be read: Is a directory"),
        (lambda path: None, r"c\.json: no such file$"),
        (lambda path: path.with_name("cc.json").write_text("{}"), r"c\.json: no such file; did you mean 'cc\.json'\?"),
        (write(b""), r"c\.json:1:1: expected a value, found the end of the file"),
    ],
)
def test_unreadable_files(tmp_path: Path, setup: Callable[[Path], Any], message: str) -> None:
    setup(tmp_path / "c.json")
    with pytest.raises(AutoQuantError, match=message) as error:
        load_config(tmp_path / "c.json")
    assert "\n" not in str(error.value)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(AutoQuantError, match=r"no such file$"):
        load_config(tmp_path / "a" / "b.json")


def test_save_refuses_what_load_refuses(example_config: Config, tmp_path: Path) -> None:
    wrong = edited(example_config, quantization=edited(example_config.quantization, exclude=("haed",)))
    with pytest.raises(AutoQuantError, match="does not fit together: 1 problem") as error:
        save_config(wrong, tmp_path / "c.json")
    assert error.value.details == (
        "$.quantization.exclude[0]: 'haed' is no linear in model.linears; did you mean 'head'?",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"$schema": ', '"schema_": '),
        ('"format_version": 1', '"format_version": true'),
        ('"format_version": 1', '"format_version": 1.0'),
        ('"layers": 4', '"layers": 4.0'),
        ('"layers": 4', '"layers": 4, "layers": 4'),
        ('"alpha": 0.5', '"alpha": NaN'),
        ('"alpha": 0.5', '"alpha": 1e999'),
        ('"parameters": 1234', '"parameters": 1234567890123456789012'),
        ('"made-up"', '"made-up\\ud800"'),
        ('"made-up"', '"made-up\t"'),
    ],
)
def test_the_short_way_takes_what_the_long_way_takes(
    old: str, new: str, example_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text with nothing wrong is read without positions, in a way of its own."""
    text = config_text(example_config)
    read = configfile._read_quickly(text)
    assert read is not None and (config_text(read[0]), read[1]) == (text, [])
    other = text.replace(old, new, 1)
    assert other != text
    short = outcome(other)
    monkeypatch.setattr(configfile, "_read_quickly", lambda text: None)
    assert short == outcome(other)


def outcome(text: str) -> str:
    try:
        return config_text(parse_config(text, "c.json"))
    except AutoQuantError as error:
        return str(error)


def test_explains_by_name_even_without_a_rule() -> None:
    error = next(Draft202012Validator({"multipleOf": 2}).iter_errors(3))
    (problem,) = configfile._explain(error)
    assert problem.message == "3 is not a multiple of 2"

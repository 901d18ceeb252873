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
    assert loaded.schema_ == "autoquant-config.v2.schema.json"
    assert edited(loaded, schema_=None) == example_config
    assert config_text(loaded) == (tmp_path / "c.json").read_text(encoding="utf-8")


def test_layout(example_config: Config) -> None:
    text = config_text(example_config)
    assert text.startswith('{\n  "$schema": "autoquant-config.v2.schema.json",\n  "format_version": 2,\n')
    assert text.endswith('\n  "certificate": null,\n  "search": null\n}\n')
    assert '\n              {"shape": [2, 4], "stride": [4, 1], "channel_stride": [0, 1]}\n' in text
    assert max(map(len, text.splitlines())) <= 120
    sections = ["$schema", "format_version", "smoothing", "rotation", "quantization", "provenance", "model", "claims"]
    assert list(json.loads(text)) == [*sections, "blocked", "certificate", "search"]


def test_knobs_are_written_and_facts_at_their_default_are_not(example_config: Config) -> None:
    content = json.loads(config_text(example_config))
    line, group = content["smoothing"]["groups"][1], content["claims"]["groups"][1]
    assert line == {"enable": None, "alpha": None, "method": None, "overrides": [], "name": group["name"]}
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
        ('"size": 8, "offset": 1}', '"offset": 1}', "$.claims.groups[0].sources[0]: the key 'size' is missing"),
        (
            '"size": 8, "offset": 1}',
            '"size": 8.0, "offset": 1}',
            "$.claims.groups[0].sources[0].size: expected an integer, found 8.0; write 8",
        ),
        ('"kind": "rms"', '"kid": "rms"', "$.claims.spaces[0].reads[0].norm.kid: unknown key; did you mean 'kind'?"),
        (
            '"format_version": 2',
            '"format_version": 3',
            "$.format_version: version 3 of the format; this AutoQuant reads versions 1 and 2",
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
    assert lines(misspelt(example_config, '    "alpha": 0.5', '    "alhpa": 0.5'))[0].startswith("c.json:6:5: ")
    assert lines(misspelt(example_config, '    "alpha": 0.5', '    "alpha": 7'))[0].startswith("c.json:6:14: ")


def test_a_key_that_is_there_twice(example_config: Config) -> None:
    text = misspelt(example_config, '"alpha": 0.5', '"enable": true')
    assert lines(text) == ["c.json:6:5: key 'enable' is there twice, first in line 5"]


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
        (
            write(b"\xff\xfe{\x00}\x00"),
            r"c\.json:1:1: is UTF-16, by its byte order mark; expected UTF-8: save it as that",
        ),
        (write("{\n  'ü': ".encode() + b"\xe9}"), r"c\.json:2:8: byte 0xe9 is not UTF-8"),
        (lambda path: path.mkdir(), r"c\.json: is a folder; name a config's file"),
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
        ('"format_version": 2', '"format_version": true'),
        ('"format_version": 2', '"format_version": 2.0'),
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


CONFIGS = Path(__file__).parents[2] / "generated_configs"
FIRST = Path(__file__).parent / "v1"


def in_first_version(config: Config) -> str:
    """The file as version 1 had it: knobs and facts in one place, facts of the model first."""
    plain = {**configfile._plain(config), "format_version": 1, "$schema": configfile.FIRST_SCHEMA}
    return json.dumps(plain)


def test_every_committed_config_is_read_from_the_first_version() -> None:
    paths = sorted(path for path in CONFIGS.rglob("*.json") if "recipes" not in path.parts)
    assert len(paths) == 341
    for path in paths:
        config = load_config(path)
        assert config_text(config) == path.read_text(encoding="utf-8"), path
        assert parse_config(in_first_version(config)) == edited(config, schema_=configfile.SCHEMA_NAME), path


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_files_that_the_first_version_wrote_become_the_committed_ones(name: str) -> None:
    old = (FIRST / f"{name}.json").read_text(encoding="utf-8")
    assert json.loads(old)["format_version"] == 1 and "claims" not in json.loads(old)
    assert config_text(parse_config(old)) == (CONFIGS / f"{name}.json").read_text(encoding="utf-8")


def test_mistakes_in_a_file_of_the_first_version_are_where_they_stand() -> None:
    old = (FIRST / "llama.json").read_text(encoding="utf-8")
    for was, now, message in [
        ('"size": 4096}', '"size": 4095}', "$.smoothing.groups[0].sources[0]"),
        ('"channels": 4096', '"chanels": 4096', "$.smoothing.groups[0].chanels: unknown key; did you mean 'channels'?"),
        ('"layers": "0-31"', '"layers": "0-99"', "$.model.linears[0].layers"),
    ]:
        wrong = old.replace(was, now, 1)
        line = wrong[: wrong.index(now)].count("\n") + 1
        assert [x for x in lines(wrong) if x.startswith(f"c.json:{line}:") and message in x], lines(wrong)


@pytest.mark.parametrize("name", ["deepseek_v3", "llama", "kimi_k2"])
def test_the_knobs_of_a_large_model_fit_on_a_screen(name: str) -> None:
    path = CONFIGS / f"{name}.json"
    if path.exists():
        rows = path.read_text(encoding="utf-8").splitlines()
        assert rows.index('  "provenance": {') <= 56


def test_the_order_of_lines_of_knobs_does_not_matter_and_a_line_may_be_left_out(example_config: Config) -> None:
    content = json.loads(config_text(example_config))
    content["smoothing"]["groups"] = content["smoothing"]["groups"][::-1]
    read = parse_config(json.dumps(content))
    assert edited(read, schema_=None) == example_config
    content["smoothing"]["groups"] = [line for line in content["smoothing"]["groups"] if not line["overrides"]]
    del content["rotation"]["spaces"]
    first = parse_config(json.dumps(content)).smoothing.groups[0]
    assert (first.enable, first.overrides) == (None, ()) and first.targets == example_config.smoothing.groups[0].targets


def test_lines_of_knobs_for_nothing(example_config: Config) -> None:
    content = json.loads(config_text(example_config))
    rows = content["smoothing"]["groups"]
    name = rows[0]["name"]
    content["smoothing"]["groups"] = [*rows, {"name": name}, {"name": name[:-1] + "x"}]
    found = lines(json.dumps(content))
    assert f"$.smoothing.groups[{len(rows)}].name: '{name}' has a line already" in found[0]
    assert f"no '{name[:-1]}x' in claims.groups; did you mean '{name}'?" in found[1]


def test_mistakes_in_lines_that_were_moved_are_where_they_stand(example_config: Config) -> None:
    content = json.loads(config_text(example_config))
    rows = content["smoothing"]["groups"]
    rows[0]["overrides"] = [{"layers": "9-8", "enable": False}]
    content["smoothing"]["groups"] = rows[::-1]
    (found,) = lines(json.dumps(content))
    assert f"$.smoothing.groups[{len(rows) - 1}].overrides[0].layers: layer set '9-8': '9-8' runs backwards" in found


def test_a_byte_order_mark_is_skipped(tmp_path: Path, example_config: Config) -> None:
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + config_text(example_config).encode())
    assert edited(load_config(tmp_path / "c.json"), schema_=None) == example_config


def test_a_file_far_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.json").write_text("{" + " " * 1000)
    monkeypatch.setattr(configfile, "MAX_BYTES", 1000)
    with pytest.raises(AutoQuantError, match=r"c\.json: 1,001 bytes; a config has 1,000 at most"):
        load_config(tmp_path / "c.json")

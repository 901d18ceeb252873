"""Ten wrong uses of each everyday command: one line that says what is wrong, exit code 1 or 2, nothing written."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

from autoquant.cli.main import main

ROOT = Path(__file__).parents[2]
DATA = ROOT / "autoquant" / "data"

# M: a model's folder; C, D: configs; T: a text; EMPTY: a folder; OTHER, BROKEN: other configs. OUT is never written.
USES = {
    "analyze": """
        lama -o OUT
        ./nowhere -o OUT
        EMPTY -o OUT
        M -o C
        M -o nowhere/c.json
        M -o EMPTY
        M --layers 0
        M --explain mlp.down_porj
        M --capture eager
        M -o
    """,
    "check": """
        nowhere.json
        EMPTY
        BROKEN
        T
        C --model lama
        C --model OTHER
        C --model llama
        C --format yaml
        C D
        --model M
    """,
    "apply": """
        M nowhere.json -o OUT
        nowhere C -o OUT
        llama C -o OUT
        M OTHER -o OUT
        M C -o T
        M C -o OUT --transforms smoth
        M C -o OUT --transforms smooth:2
        M C -o OUT --calibration nowhere.txt
        M C -o OUT --calibration T --length 100000
        M C -o OUT --dtype int8
        M C
    """,
    "quantize": """
        M nowhere.json -o OUT
        nowhere -o OUT
        llama -o OUT
        M OTHER -o OUT
        M C -o M
        M C -o OUT --strategy int4
        M C -o OUT --format gguf
        M C -o OUT --target tgi
        M C -o OUT --device tpu
        M C -o OUT --sequences 0
        M C -o OUT --calibration SHORT
        M C -o OUT --calibration EMPTYTEXT
        M C -o OUT --media nowhere
    """,
    "eval": """
        nowhere --data T
        M --data nowhere.txt
        M --data EMPTYTEXT
        M --data SHORT --reference OTHER
        M --data T --reference nowhere
        M --data T --tokens 0
        M --data T --dtype int8
        M --data T --device cuda:x
        llama --data T
        M
        M --data T --media nowhere
        M --media nowhere
        M --media EMPTYTEXT
    """,
    "compare": """
        nowhere --data T --calibration T -o OUT
        M --data nowhere.txt --calibration T -o OUT
        M --data T --calibration nowhere.txt -o OUT
        M --data T --calibration T -o OUT --strategies int4 
        M --data T --calibration T -o OUT --transforms smoth
        M --data T --calibration T -o OUT --length 64 --sequences 2 --config nowhere.json
        M --data T --calibration T -o OUT --length 64 --sequences 2 --config OTHER
        M --data T --calibration T -o T
        M --data T --calibration T
        M --data T -o OUT
    """,
    "verify": """
        M nowhere.json
        nowhere C
        M OTHER
        M BROKEN
        M T
        llama C
        EMPTY C
        M C --dtype float16
        M C --seed -1
        M
    """,
    "search": """
        M nowhere.json --calibration T -o OUT
        nowhere C --calibration T -o OUT
        M OTHER --calibration T -o OUT
        M C --calibration nowhere.txt -o OUT
        M C --calibration SHORT -o OUT
        M C --calibration T -o C
        M C --calibration T -o OUT --strategy int4
        M C --calibration T -o OUT --knobs alhpa
        M C --calibration T -o OUT --target tgi
        M C -o OUT
    """,
    "report": """
        nowhere.json -o OUT
        BROKEN -o OUT
        C -o C
        C -o nowhere/x.html
        C -o OUT --model nowhere
        C -o OUT --model llama
        OTHER -o OUT --model M
        C -o OUT --compare EMPTY
        C -o OUT --model M --calibration nowhere.txt
        C
    """,
    "show": """
        nowhere.json
        EMPTY
        BROKEN
        T
        C --layer 99
        C --layer -1
        C --layer x
        C --linear down_porj
        C --linear proj
        C D
    """,
    "set": """
        nowhere.json smoothing.alpha=0.5
        BROKEN smoothing.alpha=0.5
        C smoothing.alhpa=0.5
        C smoothing.alpha=2
        C smoothing.alpha
        C 'layers 99: enable=false'
        C 'layers 0: down_porj: strategy=null'
        C smoothing.alpha=0.5 rotation.seed=x
        C smoothing.alpha=0.5 -o D
        C quantization.exclude=[lm_haed]
        C
    """,
    "diff": """
        nowhere.json C
        C nowhere.json
        BROKEN C
        C BROKEN
        C T
        C EMPTY
        EMPTY C
        C D --format yaml
        C D C
        C
    """,
    "merge": """
        nowhere.json C -o OUT
        C nowhere.json -o OUT
        BROKEN C -o OUT
        C BROKEN -o OUT
        C EDITED -o D
        OTHER EDITED -o OUT
        C EDITED -o EMPTY
        C EDITED -o nowhere/x.json
        C EDITED --take both -o OUT
        C -o OUT
    """,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the uses name."""
    folder = tmp_path_factory.mktemp("uses")
    shutil.copytree(DATA / "wikinano1m", folder / "M")
    shutil.copy(DATA / "sample.evaluation.txt", folder / "T")
    shutil.copy(ROOT / "generated_configs" / "gpt2.json", folder / "OTHER")
    (folder / "EMPTY").mkdir()
    (folder / "EMPTYTEXT").write_text("")
    (folder / "SHORT").write_text("Too short.")
    done = CliRunner().invoke(main, ["analyze", str(folder / "M"), "-o", str(folder / "C"), "--quiet"])
    assert done.exit_code == 0, done.output
    shutil.copy(folder / "C", folder / "D")
    edits = ["layers 0: enable=false", "mlp.up_proj -> down_proj: alpha=0.7", "layers 4: strategy=null"]
    done = CliRunner().invoke(main, ["set", str(folder / "C"), *edits, "-o", str(folder / "EDITED")])
    assert done.exit_code == 0, done.output
    text = (folder / "C").read_text()
    (folder / "BROKEN").write_text(text.replace('"alpha": 0.5', '"alhpa": 0.5', 1))
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("command", USES)
def test_wrong_uses(command: str, prepared: Path, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion) -> None:
    monkeypatch.chdir(prepared)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before, said = contents(prepared), []
    for use in filter(None, map(str.strip, USES[command].splitlines())):
        done = CliRunner().invoke(main, [command, *shlex.split(use)], prog_name="autoquant")
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.lower().startswith("error: ")]
        assert done.exit_code == (2 if errors[-1:] and errors[-1].startswith("Error: ") else 1), (use, done.output)
        assert len(errors) == 1 and lines[-1] == errors[0], (use, done.output)
        assert "Traceback" not in done.output and contents(prepared) == before, use
        said.append(f"{use}\n    {done.exit_code} {errors[0].replace(f'{prepared}/', '')}")
    assert len(said) >= 10
    assert "\n".join(said) == snapshot

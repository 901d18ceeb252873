"""How the package is laid out: what may import what, how long a file may be, where libraries' private names stand.

Each check takes the sources of a package and returns its problems by place, so that it is tested on made-up packages as
well. Nothing is imported: the sources are parsed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = tuple(
    "errors version threads steps library_patches aten io config capture models analyzer executor certificate "
    "quantizer calibration algorithms pipeline checkpoint recipes evaluation searcher survey report api cli".split()
)
"""A layer imports those before it only; ``survey`` may import ``report`` too."""

ALSO = {("survey", "report")}
"""Imports against the order: the survey writes its pages as it goes."""

AT_THE_TOP = {"__init__", "__main__", "errors", "version", "threads", "steps", "aten", "library_patches"}
"""The only modules that lie loose in autoquant/."""

MODULE_LINES, FUNCTION_LINES, INNER_FUNCTIONS = 500, 80, 8

Sources = Mapping[str, str]
"""Text by path below the package: 'cli/apply.py'."""
Problems = dict[str, str]
"""What is wrong, by place."""


def imports_against_the_order(sources: Sources) -> Problems:
    """Imports of a layer that does not come before the importing one, by 'importer -> imported'."""
    problems: Problems = {}
    for path, tree in parsed(sources):
        layer = path.removesuffix(".py").split("/")[0]
        if layer not in LAYERS:  # __init__ and __main__ hand on what they like
            continue
        for module in imported(tree):
            _, _, below = module.partition("autoquant.")
            other = below.split(".")[0]
            if not module.startswith("autoquant.") or other == layer or (layer, other) in ALSO:
                continue
            if other not in LAYERS or LAYERS.index(other) > LAYERS.index(layer):
                problems[f"{path} -> {module}"] = f"{layer} comes before {other or 'autoquant'} in LAYERS"
    return problems


def importers_of_transformers(sources: Sources) -> Problems:
    """Modules outside of models/ that import transformers, also inside of functions."""
    return {
        path: f"imports {module}: move the function to autoquant/models/"
        for path, tree in parsed(sources)
        if not path.startswith("models/")
        for module in imported(tree)
        if module.split(".")[0] == "transformers"
    }


def private_names_of_torch(sources: Sources) -> Problems:
    """Modules other than library_patches.py that name something private below the package torch.

    That is a dotted name with a part that begins with one underscore, in an import or in an expression that begins with
    a name imported from torch, as well as ``getattr`` and ``setattr`` on one. Attributes of instances
    (``module._parameters``) and operators (``torch.ops.aten._to_copy``) are not.
    """
    problems: Problems = {}
    for path, tree in parsed(sources):
        if path == "library_patches.py":
            continue
        names = torch_names(tree)
        dotted = [module for module in imported(tree) if module.split(".")[0] == "torch"]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                dotted.append(full_name(node, names))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
                owner, *rest = node.args
                if rest and isinstance(rest[0], ast.Constant) and full_name(owner, names):
                    dotted.append(f"{full_name(owner, names)}.{rest[0].value}")
        found = sorted({name for name in dotted if is_private(name)})
        if found:
            problems[path] = f"names {', '.join(found)}: gather it in autoquant/library_patches.py"
    return problems


def long_modules(sources: Sources) -> Problems:
    """Modules of too many lines."""
    lines = {path: len(text.splitlines()) for path, text in sources.items()}
    return {path: f"{n} lines, {MODULE_LINES} at most" for path, n in lines.items() if n > MODULE_LINES}


def long_functions(sources: Sources) -> Problems:
    """Functions of too many lines, decorators and docstring included."""
    return {
        f"{path}::{function.name}": f"{lines} lines, {FUNCTION_LINES} at most"
        for path, function in functions(sources)
        if (lines := span(function)) > FUNCTION_LINES
    }


def tables_inside_functions(sources: Sources) -> Problems:
    """Functions that define many functions (``def`` or ``lambda``) inside themselves: a table built at each call.

    A rule is a function of its module, where a test and a reader can reach it.
    """
    return {
        f"{path}::{function.name}": f"defines {inner} functions inside itself, {INNER_FUNCTIONS} at most"
        for path, function in functions(sources)
        if (inner := sum(isinstance(n, ast.FunctionDef | ast.Lambda) for n in ast.walk(function)) - 1) > INNER_FUNCTIONS
    }


def unchecked_copies(sources: Sources) -> Problems:
    """Calls of ``model_copy`` with ``update``, which pydantic does not validate."""
    return {
        path: f"model_copy(update=...) in line {node.lineno} validates nothing: use edited()"
        for path, tree in parsed(sources)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "model_copy"
        if any(keyword.arg == "update" for keyword in node.keywords)
    }


def loose_files(sources: Sources) -> Problems:
    """Modules at the top of the package that are not among the named ones."""
    loose = [path for path in sources if "/" not in path and path.removesuffix(".py") not in AT_THE_TOP]
    return {path: "lies loose at the top: move it to the layer that it belongs to" for path in loose}


CHECKS = (
    imports_against_the_order,
    importers_of_transformers,
    private_names_of_torch,
    long_modules,
    long_functions,
    tables_inside_functions,
    unchecked_copies,
    loose_files,
)

EXCEPTIONS: dict[str, dict[str, str]] = {}
"""Problems that are known and still there, with the reason, by check and place. One that is mended fails the test."""


def parsed(sources: Sources) -> Iterator[tuple[str, ast.Module]]:
    for path, text in sources.items():
        yield path, ast.parse(text, path)


def functions(sources: Sources) -> Iterator[tuple[str, ast.FunctionDef]]:
    for path, tree in parsed(sources):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def span(function: ast.FunctionDef) -> int:
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    return (function.end_lineno or first) - first + 1


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports, wherever in it: 'torch.nn' for ``from torch import nn``.

    Of ``from autoquant.a import b`` it is 'autoquant.a.b', so that a package's private members are seen too.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def torch_names(tree: ast.Module) -> dict[str, str]:
    """What the names that a module imports from torch stand for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "torch":
                    names[name.asname or "torch"] = name.name if name.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names.update({name.asname or name.name: f"{node.module}.{name.name}" for name in node.names})
    return names


def full_name(node: ast.expr, names: Mapping[str, str]) -> str:
    """'torch.fx._symbolic_trace' for ``fx._symbolic_trace``; empty where it does not begin with a name of torch."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute):
        owner = full_name(node.value, names)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def is_private(dotted: str) -> bool:
    parts = dotted.split(".")
    operator = parts[:2] == ["torch", "ops"]
    return not operator and any(part.startswith("_") and not part.startswith("__") for part in parts)


@pytest.fixture(scope="module")
def package() -> Sources:
    folder = ROOT / "autoquant"
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_package_keeps_the_layout(check, package: Sources) -> None:
    known = EXCEPTIONS.get(check.__name__, {})
    found = check(package)
    assert {place: why for place, why in found.items() if place not in known} == {}
    assert [place for place in known if place not in found] == [], "mended: remove it from EXCEPTIONS"


def test_every_exception_belongs_to_a_check() -> None:
    assert EXCEPTIONS.keys() <= {check.__name__ for check in CHECKS}


def test_every_layer_is_there(package: Sources) -> None:
    there = {path.removesuffix(".py").split("/")[0] for path in package} - {"__init__", "__main__"}
    assert there == set(LAYERS)


INNER = "def rules():\n" + "".join(f"    def rule_{i}(): ...\n" for i in range(INNER_FUNCTIONS + 1))

WRONG = [
    (
        imports_against_the_order,
        "io/files.py",
        "from autoquant.config.text import parse",
        "io/files.py -> autoquant.config.text.parse",
    ),
    (
        imports_against_the_order,
        "analyzer/a.py",
        "def f():\n    from autoquant.executor import b",
        "analyzer/a.py -> autoquant.executor.b",
    ),
    (imports_against_the_order, "cli/a.py", "import autoquant.somewhere.b", "cli/a.py -> autoquant.somewhere.b"),
    (imports_against_the_order, "io/a.py", "from autoquant import api", "io/a.py -> autoquant.api"),
    (importers_of_transformers, "cli/a.py", "def f():\n    from transformers.cache_utils import Cache", "cli/a.py"),
    (importers_of_transformers, "cli/a.py", "import transformers as t", "cli/a.py"),
    (importers_of_transformers, "cli/a.py", "importlib.import_module('transformers.cache_utils')", "cli/a.py"),
    (private_names_of_torch, "io/a.py", "from torch._dynamo import reset", "io/a.py"),
    (private_names_of_torch, "io/a.py", "from torch.utils import _pytree as pytree", "io/a.py"),
    (private_names_of_torch, "io/a.py", "from torch import fx as f\nf._symbolic_trace.x()", "io/a.py"),
    (private_names_of_torch, "io/a.py", "import torch\ntorch.compiler._flag = True", "io/a.py"),
    (private_names_of_torch, "io/a.py", "import torch\ngetattr(torch.fx, '_config')", "io/a.py"),
    (long_modules, "io/a.py", "\n" * (MODULE_LINES + 1), "io/a.py"),
    (long_functions, "io/a.py", "@cached\ndef f():\n" + "    pass\n" * (FUNCTION_LINES - 1), "io/a.py::f"),
    (tables_inside_functions, "io/a.py", INNER, "io/a.py::rules"),
    (tables_inside_functions, "io/a.py", f"def f(): return [{'lambda: 0, ' * (INNER_FUNCTIONS + 1)}]", "io/a.py::f"),
    (unchecked_copies, "io/a.py", "config.model_copy(update={'alpha': 1}, deep=True)", "io/a.py"),
    (loose_files, "helpers.py", "", "helpers.py"),
]

RIGHT = [
    (imports_against_the_order, "config/text.py", "from autoquant.io.files import a\nfrom autoquant.config import b"),
    (imports_against_the_order, "survey/a.py", "from autoquant.report import b"),
    (imports_against_the_order, "__init__.py", "from autoquant.cli import b"),
    (importers_of_transformers, "models/load.py", "from transformers import AutoConfig"),
    (importers_of_transformers, "cli/a.py", "from autoquant.models.transformers import x"),
    (private_names_of_torch, "library_patches.py", "import torch\ntorch._dynamo.reset()"),
    (private_names_of_torch, "io/a.py", "import torch\ntorch.ops.aten._to_copy\nmodule._parameters\ntorch.__version__"),
    (private_names_of_torch, "io/a.py", "from transformers import _x\nimport numpy as torch_like\ntorch_like._x"),
    (long_modules, "io/a.py", "\n" * MODULE_LINES),
    (long_functions, "io/a.py", "@cached\ndef f():\n" + "    pass\n" * (FUNCTION_LINES - 2)),
    (tables_inside_functions, "io/a.py", INNER.rpartition("    def")[0]),
    (unchecked_copies, "io/a.py", "config.model_copy(deep=True)"),
    (loose_files, "io/helpers.py", ""),
]


@pytest.mark.parametrize(("check", "path", "text", "place"), WRONG)
def test_that_a_check_can_fail(check, path: str, text: str, place: str) -> None:
    assert list(check({path: text})) == [place]


@pytest.mark.parametrize(("check", "path", "text"), RIGHT)
def test_that_a_check_lets_pass_what_is_right(check, path: str, text: str) -> None:
    assert check({path: text}) == {}

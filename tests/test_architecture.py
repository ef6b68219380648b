"""The rules of the code that can be measured: sizes, the direction of imports, and words that do not belong."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "foveate"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = (
    "__init__", "errors", "files", "registry", "records", "log", "config", "run_folder",
    "data", "datasets", "algorithms", "rewards", "encoding", "models", "parallel", "rollout", "cluster", "serve",
    "evaluate", "report", "train", "plan", "tools", "cli",
)  # fmt: skip
"""Modules and rooms of the package, each importing only from those before it and from itself."""
LONGEST_FILE, LONGEST_FUNCTION, WHOLE_PACKAGE = 400, 60, 27_500
ELSEWHERE = ("ray", "vllm", "sglang")
"""Heavy optional libraries, each imported in at most one file."""
BY_NAME = {("cluster/local.py", "attrgetter"), ("plan/trace.py", "attrgetter")}
"""Where an attribute may be looked up by name: the call of a method by its name, and a list of fields by theirs."""


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module


def layer_of(path: Path) -> str:
    """The folder or module below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_stays_short_and_so_do_its_functions(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{name_of(path)} has {lines} lines; split it by what it is about"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{name_of(path)}: {node.name} has {length} lines"


def test_the_package_stays_small():
    total = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES)
    assert total < WHOLE_PACKAGE, f"the package has {total} lines in {len(FILES)} files; the limit is {WHOLE_PACKAGE}"


def test_every_module_has_its_layer():
    assert {layer_of(path) for path in FILES} == set(LAYERS)


def test_no_module_imports_itself_in_a_circle():
    modules = {".".join(("foveate", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
    graph = {name: {other for other in imports_of(path) if other in modules} for name, path in modules.items()}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path):
    own = LAYERS.index(layer_of(path))
    for module in imports_of(path):
        if module.split(".")[0] == "foveate":
            above = [*module.split("."), "__init__"][1]
            assert LAYERS.index(above) <= own, f"{name_of(path)} imports {module}, which stands above it"


def test_only_the_pages_and_the_command_line_see_the_settings_of_a_whole_run():
    seen = {
        layer_of(path)
        for path in FILES
        if layer_of(path) != "config" and re.search(r"\b(RL|SFT|MPO|Cascade)Settings\b", path.read_text())
    }
    assert seen <= {"train", "plan", "tools", "cli"}


@pytest.mark.parametrize("library", ELSEWHERE)
def test_a_heavy_optional_library_is_imported_in_one_file(library):
    users = [name_of(path) for path in FILES if library in {module.split(".")[0] for module in imports_of(path)}]
    assert len(users) <= 1, users


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_printed_or_looked_up_by_name(path):
    called = {
        node.func.id
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    found = {(name_of(path), name) for name in called & {"print", "getattr", "hasattr", "setattr", "attrgetter"}}
    assert found <= BY_NAME


@pytest.mark.parametrize("path", [*FILES, *sorted((PACKAGE / "recipes").glob("*.yaml"))], ids=name_of)
def test_no_path_of_somebodys_machine(path):
    found = re.findall(r"/(?:home|Users|root|mnt|data|work|tmp)/\w+", path.read_text(encoding="utf-8"))
    assert not found, f"{name_of(path)}: {found[0]}"


@pytest.mark.parametrize("what", ["import foveate", "import foveate.cli.app", "sys.argv[1:] = ['--help']; help_of()"])
def test_starting_is_light(what):
    code = f"""
import sys
def help_of():
    from foveate.cli.app import main
    try:
        main()
    except SystemExit:
        pass
{what}
heavy = {{'torch', 'transformers', 'numpy', 'pyarrow', 'PIL'}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_report_is_opened_without_models_and_training():
    code = """
import sys
import foveate.report.page
heavy = {'torch', 'transformers', 'pyarrow', 'pandas', 'foveate.train', 'foveate.models'} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

"""The rules of the code that can be measured: sizes, the direction of imports, and words that do not belong."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from foveate.models.families import FAMILIES

PACKAGE = Path(__file__).parent.parent / "src" / "foveate"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = (
    "__init__", "errors", "files", "registry", "processes", "records", "log", "config", "run_folder",
    "data", "algorithms", "rewards", "environments", "datasets", "encoding", "models", "parallel", "rollout", "cluster",
    "serve", "evaluate", "report", "train", "plan", "tools", "api", "cli", "__main__",
)  # fmt: skip
"""Modules and rooms of the package, each importing only from those before it and from itself."""
ROOT_FILES, ROOMS = 9, 20
LONGEST_FILE, LONGEST_FUNCTION, WHOLE_PACKAGE = 400, 60, 65_000
LONG_FUNCTIONS = {"train/rl.py: rl_steps"}  # the page of the algorithm
"""Functions that may be longer, because a cut would go through one thought. It only shrinks."""
TWICE, WHATS = 5, 0
"""How many public names may stand in two modules, and how many docstrings may begin with "What"."""
WITHOUT_TORCH = {
    "errors",
    "files",
    "registry",
    "processes",
    "records",
    "config",
    "run_folder",
    "log",
    "report",
    "api",
    "cli",
}
"""Modules and rooms that do not import torch, nor anything of the package that does."""
DOOR = {"api", "config", "errors", "log", "cli"}
"""The parts of the package that the command line imports."""
NOT_YET_THROUGH_THE_DOOR = {
    "cluster",
    "data",
    "evaluate",
    "options",
    "prepare",
    "prepare_drawn",
    "prepare_reasoner",
    "serve",
    "vlmevalkit",
}
ELSEWHERE = ("ray", "vllm", "sglang")
"""Heavy optional libraries, each imported in at most one file."""
FAMILY_ROOMS = ("models/families/", "encoding/family.py")
BY_NAME = {("plan/trace.py", "attrgetter")}
"""Where an attribute may be looked up by name: a list of fields by theirs."""


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def all_nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree_of(path)))


def imports_of(path: Path, statements: Iterable[ast.AST] | None = None) -> Iterator[str]:
    """Dotted names of the modules that a file imports: in some of its statements, by default anywhere in it."""
    for node in all_nodes(path) if statements is None else statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module


def nodes_of(node: ast.AST) -> Iterator[ast.AST]:
    """A piece of code and all that is in it, but for imports that only a type checker sees."""
    if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        yield node
        for part in ast.iter_child_nodes(node):
            yield from nodes_of(part)


def own_imports(path: Path, statements: Iterable[ast.AST] | None = None) -> set[str]:
    """The modules of the package, as paths below it, that a file imports when it runs; by default anywhere in it."""
    found: set[str] = set()
    for node in nodes_of(tree_of(path)) if statements is None else statements:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name_of(MODULES[module]) for module in found & MODULES.keys()}


def module_of(path: Path) -> str:
    """The dotted name of a file's module."""
    return ".".join(("foveate", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def layer_of(path: Path) -> str:
    """The folder or module below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_a_file_stays_short():
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    long = {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE}
    assert not long, f"{long}: split a file by what it is about"
    total = sum(lengths.values())
    assert total < WHOLE_PACKAGE, f"the package has {total} lines in {len(FILES)} files; the limit is {WHOLE_PACKAGE}"


def test_a_function_stays_short():
    lengths = {
        f"{name_of(path)}: {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in FILES
        for node in all_nodes(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    long = {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION}
    assert long.keys() == LONG_FUNCTIONS, long


def test_every_module_has_its_layer():
    assert {layer_of(path) for path in FILES} == set(LAYERS)
    assert len(list(PACKAGE.glob("*.py"))) <= ROOT_FILES
    assert len({path.parent for path in PACKAGE.glob("*/*.py")}) <= ROOMS


def test_no_modules_import_each_other_in_a_circle():
    graph = {name_of(path): own_imports(path) - {name_of(path)} for path in FILES}
    assert [*TopologicalSorter(graph).static_order()]  # raises CycleError, which names the circle


def test_the_command_line_goes_through_the_door():
    users = {name_of(path): {layer_of(PACKAGE / name) for name in own_imports(path)} for path in FILES}
    assert not [
        name for name, used in users.items() if "cli" in used and name.split("/")[0] not in ("cli", "__main__.py")
    ]
    assert not [name for name, used in users.items() if "api" in used and not name.startswith(("cli/", "api/"))]
    around = {Path(name).stem for name, used in users.items() if name.startswith("cli/") and used - DOOR - {"__init__"}}
    assert around <= NOT_YET_THROUGH_THE_DOOR


def test_what_is_light_imports_no_torch():
    """Imports at the top of modules count, those for type checkers and inside functions do not."""
    tops = {name_of(path): own_imports(path, tree_of(path).body) for path in FILES}
    heavy = {
        name_of(path)
        for path in FILES
        if "torch" in {module.split(".")[0] for module in imports_of(path, tree_of(path).body)}
    }
    for name in TopologicalSorter(tops).static_order():
        if tops[name] & heavy:
            heavy.add(name)
    assert not {layer_of(PACKAGE / name) for name in heavy} & WITHOUT_TORCH


def test_a_public_name_stands_in_one_module():
    places: dict[str, set[str]] = {}
    for path in FILES:
        for name in public_names(path) if layer_of(path) != "api" else ():  # the door repeats what is behind it
            places.setdefault(name, set()).add(name_of(path))
    twice = {name: sorted(found) for name, found in places.items() if len(found) > 1}
    assert len(twice) <= TWICE, twice


def public_names(path: Path) -> Iterator[str]:
    """Names that a module defines at its top."""
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        else:
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        yield from (name for name in names if not name.startswith("_") and name != "logger")


def test_docstrings_say_it_at_once():
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    whats = [
        f"{name_of(path)}: {(ast.get_docstring(node) or '').splitlines()[0]}"
        for path in FILES
        for node in all_nodes(path)
        if isinstance(node, kinds) and (ast.get_docstring(node) or "").startswith("What")
    ]
    assert len(whats) <= WHATS, whats


def test_no_module_imports_itself_in_a_circle():
    modules = {".".join(("foveate", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
    graph = {name: {other for other in imports_of(path) if other in modules} for name, path in modules.items()}
    TopologicalSorter(graph).prepare()


def test_imports_go_one_way():
    upwards = [
        f"{name_of(path)} imports {module}, which stands above it"
        for path in FILES
        for module in imports_of(path)
        if module.split(".")[0] == "foveate"
        if LAYERS.index([*module.split("."), "__init__"][1]) > LAYERS.index(layer_of(path))
    ]
    assert not upwards, upwards


def test_only_the_pages_and_the_command_line_see_the_settings_of_a_whole_run():
    seen = {
        layer_of(path)
        for path in FILES
        if layer_of(path) != "config" and re.search(r"\b(RL|SFT|MPO|Cascade)Settings\b", path.read_text())
    }
    assert seen <= {"train", "plan", "tools", "api", "cli", "__init__"}


@pytest.mark.parametrize("library", ELSEWHERE)
def test_a_heavy_optional_library_is_imported_in_one_file(library):
    users = [name_of(path) for path in FILES if library in {module.split(".")[0] for module in imports_of(path)}]
    assert len(users) <= 1, users


def test_nothing_is_printed_or_looked_up_by_name():
    called = {
        (name_of(path), node.func.id)
        for path in FILES
        for node in all_nodes(path)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    names = {"print", "getattr", "hasattr", "setattr", "attrgetter"}
    found = {(file, name) for file, name in called if name in names}
    assert found <= BY_NAME, found - BY_NAME


@cache
def family_classes() -> frozenset[str]:
    """Names of the classes that the families are made of."""
    files = (PACKAGE / "models" / "families").glob("*.py")
    nodes = [node for file in files for node in all_nodes(file)]
    return frozenset(node.name for node in nodes if isinstance(node, ast.ClassDef))


def asks_which_family(path: Path) -> Iterator[str]:
    """Places where a file asks which family a model is of, instead of a declaration of it: `isinstance` with a class of
    the families, a comparison with a name of the table, and the unit or name of a family as a condition."""
    for node in all_nodes(path):
        match node:
            case ast.Call(func=ast.Name("isinstance" | "issubclass"), args=[_, asked]):
                found = family_classes() & {one.id for one in ast.walk(asked) if isinstance(one, ast.Name)}
            case ast.Compare():
                sides = [one for side in (node.left, *node.comparators) for one in ast.walk(side)]
                found = FAMILIES.keys() & {one.value for one in sides if isinstance(one, ast.Constant)}
                found = found if re.search(r"model_type|famil|kind|config", ast.unparse(node)) else set()
                found |= {ast.unparse(one) for one in sides if is_family_attribute(one, "name", "unit")}
            case ast.If() | ast.IfExp() | ast.While():
                found = {ast.unparse(one) for one in ast.walk(node.test) if is_family_attribute(one, "unit")}
            case ast.BoolOp():
                found = {ast.unparse(one) for one in node.values if is_family_attribute(one, "unit")}
            case _:
                continue
        yield from (f"line {node.lineno}: {one}" for one in found)


def is_family_attribute(node: ast.AST, *names: str) -> bool:
    """`family.unit`, `policy.family.unit`, ..."""
    return isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value).endswith("family")


def test_a_family_declares_what_differs_and_nothing_asks_which_one_it_is():
    others = [path for path in FILES if not name_of(path).startswith(FAMILY_ROOMS)]
    found = [f"{name_of(path)}: {place}" for path in others for place in asks_which_family(path)]
    assert not found, f"{found}; let the families declare what differs (encoding/family.py)"


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(policy.family, InternVL)",
        "isinstance(family, (str, Qwen3VL))",
        "policy.family.name == other",
        "kind in ('internvl', 'llava')",
        "config.model_type != 'qwen3_moe'",
        "1 if found.family.unit else 2",
        "family.unit and 3",
    ],
)
def test_a_question_which_family_it_is_is_found(code, tmp_path):
    file = tmp_path / "asking.py"
    file.write_text(code)
    assert [*asks_which_family(file)]


def test_tests_run_in_an_empty_folder(working_folder):
    assert Path.cwd() == working_folder
    assert not [*working_folder.iterdir()]


def test_no_path_of_somebodys_machine():
    found = {
        name_of(path): re.findall(r"/(?:home|Users|root|mnt|data|work|tmp)/\w+", path.read_text(encoding="utf-8"))
        for path in [*FILES, *(PACKAGE / "recipes").glob("*.yaml")]
    }
    assert not any(found.values()), {name: paths for name, paths in found.items() if paths}


@pytest.mark.parametrize(
    "what",
    [
        "import foveate",
        "import foveate.cli.app",
        "import foveate.models.families",
        "sys.argv[1:] = ['--help']; help_of()",
    ],
)
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


def test_an_installation_is_examined_without_importing_models():
    code = """
import sys
from foveate import api
api.doctor(None)
heavy = {'transformers', 'foveate.models', 'foveate.encoding', 'foveate.train'} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

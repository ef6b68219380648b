"""From a name in a recipe to the function it stands for, and from its settings to a call that is known to be valid.

A name is looked up in a table `name -> "module:object"`. Your own code is named by an import path instead:
`my_package.rewards:strict_iou`, or a file, `experiments/rewards.py:strict_iou`. A function's keyword-only arguments are
the schema of its settings, so a setting that nothing reads is refused before a run starts.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from foveate.errors import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]
"""The type of a setting in 0..1."""
FiniteNumber = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PASSED = "passed:"
"""Prefix of the names of functions that Python code has passed in a call; only this process knows them."""
_passed: dict[str, Callable[..., Any]] = {}
EXTRAS = {
    "bitsandbytes": "bnb", "if_verifiable": "ifeval", "langdetect": "ifeval", "nltk": "ifeval", "math_verify": "math",
    "mathruler": "math", "msgspec": "engines", "openai": "client", "peft": "lora", "pylatexenc": "math", "ray": "ray",
    "starlette": "serve", "uvicorn": "serve",
}  # fmt: skip
"""Packages that are not always installed, and the extra of foveate that each comes with."""
FILE_MODULES = "foveate_file_"
"""Prefix of the names of modules that were loaded from a file; only this process knows them."""


def resolve(table: Mapping[str, Any], name: str, kind: str) -> Any:
    """The object that `name` stands for.

    Args:
        table: the known names, each with its import path `"module:object"`, or with the object itself.
        name: a name of the table, or an import path: `module:object` or `path/to/file.py:object`.
        kind: what is looked up ("reward", "algorithm"), for messages.

    Raises:
        ConfigError: the name is not known, or nothing can be imported from its path.
    """
    path = table.get(name, table.get(name.lower(), name) if ":" not in name else name)
    if not isinstance(path, str):
        return path
    if path.startswith(PASSED):
        return _passed_function(path, kind)
    module_name, colon, attribute = path.rpartition(":")
    if not colon:
        raise ConfigError(
            f"unknown {kind} {name!r}{suggestion(name, table, then='known')}: {', '.join(sorted(table))}; "
            "your own code is named path/to/file.py:object or module:object"
        )
    is_file = module_name.endswith(".py")
    module = _load_file(module_name, path, kind) if is_file else _import_module(module_name, path, kind)
    members = vars(module)
    if attribute not in members:
        public = [member for member in members if not member.startswith("_")]
        raise ConfigError(f"{kind} {path!r}: {module_name} has no {attribute!r}{suggestion(attribute, public)}")
    return members[attribute]


def name_of(function: Callable[..., Any]) -> str:
    """The name, for settings, of a function that Python code has passed: with a hash of its source and of the numbers
    and texts that it holds, so that a run that was begun with other code is not continued. From now on this process can
    resolve it. Raises ConfigError for what is no plain function."""
    if not inspect.isfunction(function):
        raise ConfigError(f"{function!r:.60} must be a plain function, or a name; wrap it in a function (def)")
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except OSError:  # typed into python -i, or made by exec
        source = function.__code__.co_code.hex()
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    held += [cell.cell_contents for cell in function.__closure__ or ()]
    values = [value for value in held if isinstance(value, str | int | float | None)]
    code = hashlib.sha256(f"{source}{values}".encode()).hexdigest()[:12]
    name = f"{PASSED}{function.__name__.strip('<>')}-{code}"
    _passed[name] = function
    return name


def shown_name(name: str) -> str:
    """The name of a reward or another function for metrics: of one that Python code has passed, its own."""
    return name.removeprefix(PASSED).rpartition("-")[0] if name.startswith(PASSED) else name


def shown_names(text: str) -> str:
    """A text with the passed functions in it under their own names."""
    return re.sub(rf"{PASSED}(\w+)-[0-9a-f]{{12}}", r"\1", text)


def _passed_function(name: str, kind: str) -> Callable[..., Any]:
    if name not in _passed:
        raise ConfigError(
            f"{kind} {name!r}: the function {shown_name(name)} was passed by Python code; pass it again, unchanged, or "
            f"name code in a file, path/to/file.py:object (foveate eval: --{kind} path/to/file.py:object)"
        )
    return _passed[name]


def pickled(name: str, settings: Mapping[str, Any], group: str) -> bytes:
    """The passed functions that are named here, by value, for `unpickle` in another process. Raises ConfigError for one
    that cannot be sent; `group` of the settings says how many processes there are ("reward", "environment")."""
    text = f"{name} {settings}"
    named = {key: function for key, function in _passed.items() if key in text}
    if not named:
        return b""
    import cloudpickle

    try:
        return cloudpickle.dumps(named)
    except Exception as error:
        raise ConfigError(
            f"{', '.join(map(shown_name, named))}: cannot be sent to worker processes ({type(error).__name__}: "
            f"{error}); set {group}.workers=0 to run it here"
        ) from None


def unpickle(functions: bytes) -> None:
    """Make known here the functions that `pickled` has sent."""
    if functions:
        import cloudpickle

        _passed.update(cloudpickle.loads(functions))


def bind(function: Callable[..., Any], settings: Mapping[str, Any], kind: str) -> partial[Any]:
    """`function` with its settings filled in, after a check of every one against the keyword-only arguments.

    Types are taken literally, as a recipe writes them: a string is never read as a number; a whole number is a float.

    Args:
        function: positional arguments are data, keyword-only arguments are settings.
        settings: name -> value; arguments with a default may be left out.
        kind: whose settings these are ("reward grounding"), for messages.

    Raises:
        ConfigError: not a function, an unknown setting, a missing one, or a value of the wrong type.
    """
    if not inspect.isfunction(function):
        raise ConfigError(f"{kind} must be a function, found {_shown(function)}")
    parameters = inspect.signature(function).parameters.values()
    keywords = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    allowed = f"its settings: {', '.join(keywords)}" if keywords else "it has no settings"
    for key in settings:
        if key not in keywords:
            raise ConfigError(f"{kind}: unknown setting {key!r}{suggestion(key, keywords, then=allowed)}")
    for key, parameter in keywords.items():
        if parameter.default is inspect.Parameter.empty and key not in settings:
            raise ConfigError(f"{kind}: setting {key!r} is missing and has no default; {allowed}")
    hints = _type_hints(function, keywords)
    return partial(function, **{key: _checked(value, hints[key], f"{kind}: {key}") for key, value in settings.items()})


def suggestion(name: str, known: Iterable[str], then: str = "") -> str:
    """`; did you mean NAME?` for the nearest known name, or nothing when none is near. then: the words that follow,
    as a new sentence behind the question, else behind a semicolon."""
    near = get_close_matches(name, list(known), n=1)
    if near:
        return f"; did you mean {near[0]!r}?{then and f' {then[0].upper()}{then[1:]}'}"
    return then and f"; {then}"


def explain(problem: Mapping[str, Any]) -> str:
    """One entry of pydantic's `ValidationError.errors()` as the rest of a sentence: "must be a number, found 'fast'".
    The caller puts the name of the setting before it."""
    context = problem.get("ctx", {})
    phrases = {
        "missing": "is missing",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "int_parsing": "must be a whole number",
        "float_parsing": "must be a number",
        "bool_parsing": "must be true or false",
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "bool_type": "must be true or false",
        "string_type": "must be a string",
        "string_too_short": "must not be empty",
        "tuple_type": "must be a list, such as [a, b]",
        "list_type": "must be a list, such as [a, b]",
        "dict_type": "must be a mapping",
        "mapping_type": "must be a mapping",
        "model_type": "must be a mapping of settings",
        "literal_error": f"must be {context.get('expected')}",
        "greater_than": f"must be greater than {context.get('gt')}",
        "greater_than_equal": f"must be at least {context.get('ge')}",
        "less_than": f"must be less than {context.get('lt')}",
        "less_than_equal": f"must be at most {context.get('le')}",
        "too_short": f"must have at least {context.get('min_length')} entries",
        "too_long": f"must have at most {context.get('max_length')} entries",
    }
    text = phrases.get(problem["type"]) or str(problem["msg"])
    return text if problem["type"] == "missing" else f"{text}, found {_shown(problem['input'])}"


def _shown(value: Any) -> str:
    try:
        text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of very many digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _checked(value: Any, hint: Any, where: str) -> Any:
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        said = {explain(problem): None for problem in error.errors()}
        raise ConfigError(f"{where} {', or '.join(said)}") from None


def _type_hints(function: Callable[..., Any], names: Iterable[str]) -> dict[str, Any]:
    """The types of the named arguments; the others may be annotated with names that only a type checker imports."""
    annotations = inspect.get_annotations(function)
    chosen = SimpleNamespace(__annotations__={name: annotations.get(name, Any) for name in names})
    return typing.get_type_hints(chosen, globalns=vars(sys.modules[function.__module__]), include_extras=True)


def _import_module(name: str, path: str, kind: str) -> ModuleType:
    try:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ImportError("it is no name of a module")
        return importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if name.startswith("foveate.") and missing in EXTRAS:
            raise ConfigError(
                f"{kind} {path!r} needs {missing}, which is not installed: pip install 'foveate[{EXTRAS[missing]}]'"
            ) from error
        raise ConfigError(
            f"{kind} {path!r}: cannot import {name} ({error}); code outside an installed package is named by its file, "
            "path/to/file.py:object"
        ) from error


def _load_file(file: str, path: str, kind: str) -> ModuleType:
    """The module of a Python file, run once per process however often it is named."""
    try:
        location = Path(file).resolve()
        is_file = location.is_file()
    except (OSError, ValueError):  # a name too long for one, or with a zero in it
        location, is_file = Path(), False
    name = f"{FILE_MODULES}{location.stem}_{hashlib.sha256(bytes(location)).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, location)
    if not is_file or spec is None or spec.loader is None:
        raise ConfigError(f"{kind} {path!r}: no such file {file} (relative to {Path.cwd()})")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SystemExit as end:  # it would end the command without a word
        del sys.modules[name]
        raise ConfigError(f"{kind} {path!r}: {file} ends the program when it is imported (exit code {end})") from end
    except BaseException:
        del sys.modules[name]
        raise
    return module

"""Messages and docs name settings that there are."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from foveate.config.runs import STAGES

ROOT = Path(__file__).parents[2]
NOT_SETTINGS = re.compile(
    r"model\.(safetensors|norm|image_newline|vision|language|layers|embed|visual|multi_modal|connector|text_model)"
    r"|model\.(mlp2|pooling|gating)"
    r"|data\.py$"  # files and weights
    r"|rollout\.(n|name|tensor|gpu|log|val|response|engine_kwargs|multi)|\.(json|jsonl|md|py|parquet|yaml|sh)$"
    r"|^(algorithm\.(loss|advantage)|reward\.settings|rollout\.engine_settings|loss)\."  # free-form
)


def paths_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in models_in(field.annotation):
            yield from paths_of(kind, f"{prefix}{name}.")


def models_in(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in get_args(kind):
        yield from models_in(part)


SETTINGS = {path for stage in STAGES.values() for path in paths_of(stage)}
GROUPS = {path.split(".")[0] for path in SETTINGS if "." in path}
NAMED = re.compile(rf"(?<![\w./])((?:{'|'.join(sorted(GROUPS))})(?:\.[a-z][a-z_0-9]*)+)")


def texts() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "src").rglob("*.py")):
        if path.name == "import_verl.py" or path.parent.name == "import_verl":
            continue  # names verl's settings, too
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value
    others = {ROOT / "docs/recipes.md", ROOT / "docs/coming_from.md"}  # list the settings of other trainers, too
    pages = {ROOT / "README.md", *(ROOT / "docs").glob("*.md")} - others
    for path in sorted(pages):
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def test_every_setting_that_a_message_or_a_page_names_exists():
    wrong = [
        f"{where}: {name}"
        for where, text in texts()
        for name in NAMED.findall(text)
        if name not in SETTINGS and not NOT_SETTINGS.search(name)
    ]
    assert wrong == [], "\n".join(wrong)
    assert len(SETTINGS) > 100
